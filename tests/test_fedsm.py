"""FedSM: against float64 twins, in its special cases, and the traps others fell into."""

import logging

import numpy as np
import pytest
import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms.adam import adam_step
from hf_mlopt.federated.algorithms.averaging import weighted_mean
from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.fedsm import FedSM, with_new_site
from hf_mlopt.federated.algorithms.image_features import (
    Discriminant,
    empty_statistics,
    feature_statistics,
    image_features,
    num_image_features,
)
from hf_mlopt.federated.algorithms.message import Message
from hf_mlopt.federated.algorithms.replies import check_reply
from hf_mlopt.federated.algorithms.routing import GLOBAL, route
from hf_mlopt.federated.algorithms.soft_pull import mixture, soft_pull, soft_pull_from_total, soft_pull_total
from hf_mlopt.federated.selector_model import MomentsSelectorModel, selector_model, train_selector
from tests.federations import same_bits
from tests.least_squares import NAMES, LeastSquares, numbers, tensors
from tests.reference import fedsm as twin


PROBLEM = LeastSquares()
SITES = ["c", "a", "d", "b"]
SITES_SORTED = sorted(SITES)
SAMPLES = {0: 10, 1: 20, 2: 30, 3: 40}
MOMENTS = ("selector_m", "selector_v")
STEPS, ETA, ROUNDS = 4, 0.02, 6
EXACT = {"rtol": 0, "atol": 1e-13}
RNG = np.random.default_rng(5)
INPUTS = {k: RNG.normal(size=(5 + k, 6)) + k for k in range(4)}  # of the selector
START = RNG.normal(size=(4, 6))


def random_models(num_models, dtype=torch.float64, seed=0):
    generator = np.random.default_rng(seed)
    return {"abcdef"[k]: tensors(generator.normal(size=8), dtype) for k in range(num_models)}


class Linear(torch.nn.Linear):
    """A selector of rows in place of images."""

    def __init__(self, num_sites=4):
        super().__init__(6, num_sites, bias=False, dtype=torch.float64)


class Run:
    """FedSM and its sites; what a site keeps of itself is nothing."""

    def __init__(self, sites=SITES, dtype=torch.float64, buffers=None, seed=3, **options):
        self.algorithm, self.sites = FedSM(**options), sites
        self.algorithm.setup(sites, self.init(dtype, buffers), seed)

    def init(self, dtype=torch.float64, buffers=None):
        groups = {"weights": tensors(PROBLEM.start, dtype)}
        if buffers is not None:
            groups["buffers"] = buffers
        if self.algorithm.selector.takes_weights:
            groups["selector"] = {"weight": torch.from_numpy(START[: len(self.sites)].copy())}
        return Message(groups)

    def local_steps(self, k, round, start):
        w = numbers(start)
        for i in range(STEPS):
            w = w - ETA * PROBLEM.client_gradient(k, w, round, i)
        return tensors(w, start[NAMES[0]].dtype)

    def reply(self, site, message):
        k, r = "abcd".index(site), message.scalars["round"]
        groups = {
            "weights": self.local_steps(k, r, message.groups["weights"]),
            "personal": self.local_steps(k, r, message.groups["personal"]),
        }
        for name in ("buffers", "personal_buffers"):
            if name in message.groups:
                groups[name] = {key: tensor + k for key, tensor in message.groups[name].items()}
        scalars = {"round": r, "num_samples": SAMPLES[k]}
        if "selector" in message.groups:
            batches = [torch.from_numpy(INPUTS[k][:2]), torch.from_numpy(INPUTS[k][2:])]
            more, more_scalars = train_selector(Linear(len(self.sites)), batches, message)
            groups, scalars = {**groups, **more}, {**scalars, **more_scalars}
        if message.scalars.get("needs_statistics"):
            groups["selector_statistics"] = feature_statistics(torch.from_numpy(INPUTS[k]))
        return Message(groups, scalars)

    def replies(self):
        sent = self.algorithm.configure(self.algorithm.round)
        return {site: self.reply(site, message) for site, message in sent.items()}

    def round(self, drop=(), change=()):
        arrived = {site: reply for site, reply in self.replies().items() if site not in drop}
        return self.algorithm.aggregate(self.algorithm.round, {**dict(reversed(arrived.items())), **dict(change)})

    def personal(self, site):
        return self.algorithm.groups[f"personal/{site}"]


# SoftPull


@pytest.mark.parametrize("num_sites", [1, 2, 3, 6])
@pytest.mark.parametrize("pull", [0.0, 0.1, 0.7, 1.0])
def test_soft_pull_equals_its_twin(num_sites, pull):
    ends = random_models(num_sites)
    expected = twin.soft_pull({site: numbers(end) for site, end in ends.items()}, pull)
    for site, pulled in soft_pull(ends, pull).items():
        np.testing.assert_allclose(numbers(pulled), expected[site], rtol=0, atol=1e-15)


@pytest.mark.parametrize("num_sites, rho", [(3, 0.55), (6, 0.64)])
def test_soft_pull_keeps_the_mean_and_shrinks_deviations_by_rho(num_sites, rho):
    ends = random_models(num_sites)
    pulled = soft_pull(ends, 0.7)
    before, after = (np.stack([numbers(models[site]) for site in ends]) for models in (ends, pulled))
    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=0, atol=1e-15)
    np.testing.assert_allclose(after - after.mean(0), rho * (before - before.mean(0)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_pull_of_1_and_a_single_site_keep_every_bit(dtype):
    ends = {"a": {"w": torch.tensor([-0.0, 1e-30, 3e37], dtype=dtype)}, "b": {"w": torch.zeros(3, dtype=dtype)}}
    assert same_bits(soft_pull(ends, 1.0)["a"], ends["a"])
    assert same_bits(soft_pull({"a": ends["a"]}, 0.3)["a"], ends["a"])


def test_soft_pull_of_one_over_k_is_the_plain_mean():
    ends = random_models(4)
    mean = weighted_mean(ends.values(), [0.25] * 4)
    for pulled in soft_pull(ends, 0.25).values():
        np.testing.assert_allclose(numbers(pulled), numbers(mean), rtol=0, atol=1e-15)


def test_the_masked_form_is_the_plain_one():
    """A site needs its own model and a sum, which masks may hide; here masks that cancel modulo 2^64."""
    ends, scale = random_models(3), 2.0**40
    masks = np.random.default_rng(0).integers(0, 2**63, size=(2, 8), dtype=np.uint64)
    masks = [masks[0], masks[1], np.uint64(0) - masks[0] - masks[1]]
    encoded = [np.round(numbers(end) * scale).astype(np.int64).astype(np.uint64) for end in ends.values()]
    summed = sum(code + mask for code, mask in zip(encoded, masks, strict=True)).astype(np.int64) / scale
    np.testing.assert_allclose(summed, numbers(soft_pull_total(ends.values())), rtol=0, atol=1e-11)
    plain = twin.soft_pull({site: numbers(end) for site, end in ends.items()}, 0.7)
    for site, end in ends.items():
        masked = soft_pull_from_total(end, tensors(summed), 0.7, 3)
        np.testing.assert_allclose(numbers(masked), plain[site], rtol=0, atol=1e-11)


def test_counts_of_batches_are_pulled_in_float64_and_rounded():
    ends = {site: {"count": torch.tensor(count)} for site, count in (("a", 2**40 + 1), ("b", 2**40 + 4))}
    pulled = soft_pull(ends, 0.7)
    assert {site: int(group["count"]) - 2**40 for site, group in pulled.items()} == {"a": 2, "b": 3}
    assert pulled["a"]["count"].dtype == torch.int64


# The server


def chosen_sites(fraction):
    """What the algorithm itself chooses; a twin has no opinion on that."""
    run, chosen = Run(fraction=fraction), []
    for r in range(ROUNDS):
        chosen.append([SITES_SORTED.index(site) for site in run.algorithm.configure(r)])
        run.round()
    return chosen


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
def test_fedsm_equals_its_twin(fraction):
    present = chosen_sites(fraction)
    assert {len(sites) for sites in present} == {4 * fraction}
    run = Run(fraction=fraction, selector_steps=2)
    expected = twin.fedsm(
        PROBLEM.start, START, PROBLEM.client_gradient, INPUTS, present, SAMPLES, STEPS, ETA, 0.7, 2, 0.01
    )
    for w_g, personal, (W, m, v, s) in expected:
        run.round()
        groups = run.algorithm.groups
        np.testing.assert_allclose(numbers(groups["weights"]), w_g, **EXACT)
        for k, site in enumerate(SITES_SORTED):
            np.testing.assert_allclose(numbers(run.personal(site)), personal[k], **EXACT)
        for name, value in (("selector", W), ("selector_m", m), ("selector_v", v)):
            np.testing.assert_allclose(groups[name]["weight"].numpy(), value, **EXACT)
        assert int(groups["selector_step"]["s"]) == s


def test_the_global_model_is_that_of_fedavg_bit_for_bit():
    run, fedavg = Run(dtype=torch.float32), FedAvg()
    fedavg.setup(SITES, Message({"weights": tensors(PROBLEM.start, torch.float32)}), seed=3)
    for r in range(3):
        sent = fedavg.configure(r)
        replies = {}
        for site, message in sent.items():
            k = "abcd".index(site)
            weights = run.local_steps(k, r, message.groups["weights"])
            replies[site] = Message({"weights": weights}, {"round": r, "num_samples": SAMPLES[k]})
        fedavg.aggregate(r, replies)
        run.round()
        assert same_bits(run.algorithm.groups["weights"], fedavg.groups["weights"])


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_pull_1_is_training_alone_and_threshold_0_asks_no_global_model(threshold):
    run = Run(pull=1.0, threshold=threshold)
    alone = {site: tensors(PROBLEM.start) for site in SITES}
    for r in range(3):
        run.round()
        alone = {site: run.local_steps("abcd".index(site), r, model) for site, model in alone.items()}
    assert all(same_bits(run.personal(site), alone[site]) for site in SITES)
    routed = route(torch.softmax(torch.randn(50, 4, generator=torch.manual_seed(0)), dim=1), threshold)
    assert (routed != GLOBAL).all() == (threshold == 0)


def test_an_absent_site_keeps_its_model_and_the_mean_of_the_present_is_kept():
    run = Run()
    run.round()
    before = {site: run.personal(site) for site in SITES}
    replies = run.replies()
    metrics = run.round(drop=["b"])
    assert metrics["absent"] == ["b"]
    assert same_bits(run.personal("b"), before["b"])
    ends = [numbers(replies[site].groups["personal"]) for site in "acd"]
    np.testing.assert_allclose(np.mean([numbers(run.personal(site)) for site in "acd"], 0), np.mean(ends, 0), **EXACT)
    b = 0.3 / 2
    np.testing.assert_allclose(numbers(run.personal("a")), 0.7 * ends[0] + b * (ends[1] + ends[2]), **EXACT)


def test_a_site_that_answers_alone_is_not_pulled():
    run = Run()
    run.round()
    end = run.replies()["c"].groups["personal"]
    run.round(drop=["a", "b", "d"])
    assert same_bits(run.personal("c"), end)


def test_one_site_is_centralised_training():
    run = Run(sites=["a"], selector="none", pull=0.3)
    alone = tensors(PROBLEM.start)
    for r in range(3):
        run.round()
        alone = run.local_steps(0, r, alone)
        assert same_bits(run.personal("a"), alone) and same_bits(run.algorithm.groups["weights"], alone)


@pytest.mark.parametrize("buffers, mean_of_a, count_of_a", [("average", 0.7 * 0 + 0.1 * 6, 1), ("local", 0.0, 0)])
def test_buffers_of_personal_models_are_pulled_or_stay(buffers, mean_of_a, count_of_a):
    start = {"norm.mean": torch.zeros(2), "norm.count": torch.tensor(0)}
    run = Run(buffers=start)
    run.algorithm.buffers = buffers
    run.round()
    own = run.algorithm.groups["personal_buffers/a"]
    torch.testing.assert_close(own["norm.mean"], torch.full((2,), mean_of_a))
    assert int(own["norm.count"]) == count_of_a
    common = run.algorithm.groups["buffers"]["norm.mean"]
    torch.testing.assert_close(common, torch.full((2,), (20 * 1 + 30 * 2 + 40 * 3) / 100))


def test_a_mean_alone_is_refused():
    run = Run(selector="none")
    mean = next(iter(run.replies().values()))
    with pytest.raises(ConfigurationError, match="^algorithm='fedsm': needs each reply"):
        run.algorithm.aggregate_mean(0, mean, SITES_SORTED, 100)


def test_uniform_weights_of_the_selector_favour_no_label():
    run = Run(selector_weighting="uniform")
    replies = run.replies()
    run.round()
    mean = sum(reply.groups["selector"]["weight"] for reply in replies.values()) / 4
    torch.testing.assert_close(run.algorithm.groups["selector"]["weight"], mean, rtol=0, atol=1e-15)
    weighted = Run()
    weighted.round()
    assert not torch.equal(weighted.algorithm.groups["selector"]["weight"], run.algorithm.groups["selector"]["weight"])


@pytest.mark.parametrize("selector", ["learned", "moments", "none"])
def test_a_resumed_training_goes_on_bit_for_bit(selector):
    options = {"selector": selector, "num_features": 6, "fraction": 0.75}
    buffers = {"n": torch.tensor([1.0])}
    whole, first = Run(buffers=buffers, **options), Run(buffers=buffers, **options)
    for _ in range(2):
        whole.round(), first.round()
    for is_set_up in (False, True):
        second = Run(buffers=buffers, **options)
        if not is_set_up:
            second.algorithm = FedSM(**options)
        second.algorithm.load_state_dict(first.algorithm.state_dict())
        reference = Run(buffers=buffers, **options)
        reference.algorithm.load_state_dict(whole.algorithm.state_dict())
        for _ in range(3):
            second.round(), reference.round()
        mine, theirs = second.algorithm.state_dict(), reference.algorithm.state_dict()
        assert Message(mine.pop("groups")) == Message(theirs.pop("groups")) and mine == theirs


def test_a_state_of_another_selector_or_roster_is_refused():
    state = Run().algorithm.state_dict()
    with pytest.raises(InputError, match="does not fit fedsm for this model: selector/weight, selector_m/weight"):
        FedSM(selector="none").load_state_dict(state)
    other = Run(sites=["a", "b", "c"])
    before = other.algorithm.state_dict()
    with pytest.raises(InputError, match="give the same roster"):
        other.algorithm.load_state_dict(state)
    assert Message(other.algorithm.state_dict()["groups"]) == Message(before["groups"])


def test_bytes_of_a_round():
    """2 θ and 3 θ_s each way, θ_s only down in the first; with moments 2 θ, once with the statistics."""
    theta, theta_s = 8 * 8, 4 * 6 * 8
    run = Run()
    for first in (True, False):
        down = run.algorithm.configure(run.algorithm.round)["a"]
        assert down.nbytes == 2 * theta + (theta_s if first else 3 * theta_s)
        assert run.reply("a", down).nbytes == run.algorithm.template("a").nbytes == 2 * theta + 3 * theta_s
        run.round()
    run = Run(selector="moments", num_features=6)
    for first in (True, False):
        down = run.algorithm.configure(run.algorithm.round)["a"]
        assert down.nbytes == 2 * theta
        assert run.reply("a", down).nbytes == 2 * theta + (8 * (1 + 6 + 21) if first else 0)
        run.round()


# The traps


def site_images(site, num_images, seed):
    """Discs on noise; sites differ in contrast and polarity."""
    generator = torch.Generator().manual_seed(1000 * site + seed)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = []
    for _ in range(num_images):
        x, y = (torch.rand(2, generator=generator) * 16 + 8).tolist()
        disc = ((rows - x) ** 2 + (columns - y) ** 2 < 40).float()
        ground, contrast = ((0.3, 0.3), (0.45, 0.15), (0.6, -0.3))[site]
        images.append(ground + contrast * disc + 0.05 * torch.randn(32, 32, generator=generator))
    return torch.stack(images)[:, None].clamp(0, 1)


def selector_accuracy(forget_moments, num_rounds=40):
    torch.manual_seed(0)
    model = selector_model(1, 3)
    run = Run(sites=["a", "b", "c"])
    run.algorithm.setup(
        ["a", "b", "c"],
        Message({"weights": tensors(PROBLEM.start), "selector": {n: w.detach() for n, w in model.named_parameters()}}),
        seed=0,
    )
    train = {site: site_images(k, 24, 0) for k, site in enumerate("abc")}
    for r in range(num_rounds):
        replies = {}
        for site, message in run.algorithm.configure(r).items():
            if forget_moments and r > 0:
                zeros = {name: {n: t * 0 for n, t in message.groups[name].items()} for name in MOMENTS}
                message = Message({**message.groups, **zeros}, {**message.scalars, "selector_step": 0})
            groups, _ = train_selector(model, [train[site]], message)
            template = run.algorithm.template(site)
            scalars = {**template.scalars, "num_samples": 24}
            replies[site] = Message({**template.groups, **groups}, scalars)
        run.algorithm.aggregate(r, replies)
    right = []
    for k in range(3):
        logits = torch.func.functional_call(model, run.algorithm.groups["selector"], (site_images(k, 24, 1),))
        right.append((logits.argmax(1) == k).float().mean())
    return float(torch.stack(right).mean())


def test_trap_1_a_selector_collapses_unless_the_moments_travel():
    assert selector_accuracy(forget_moments=False) > 0.7
    assert selector_accuracy(forget_moments=True) < 0.45  # chance is a third


def test_trap_2_the_optimizer_is_built_from_the_message_alone():
    run = Run()
    run.round()
    message = run.algorithm.configure(1)["a"]
    again = Run().reply("a", message)  # another process, which has never trained
    assert run.reply("a", message) == again
    assert message.scalars["selector_step"] == 1 and again.scalars["selector_step"] == 2
    lacking = {name: group for name, group in message.groups.items() if name != "selector_v"}
    with pytest.raises(InputError, match=r"no \['selector_v'\] at selector_step=1"):
        run.reply("a", Message(lacking, message.scalars))


def without(groups, name):
    return {key: group for key, group in groups.items() if key != name}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda g, s: (g, {**s, "selector_step": 1}), "selector_step=1 instead of 2"),
        (lambda g, s: (g, without(s, "selector_step")), "selector_step=None instead of 2"),
        (lambda g, s: (without(g, "selector_m"), s), "missing ['selector_m']"),
        (lambda g, s: (without(g, "personal"), s), "missing ['personal']"),
        (lambda g, s: ({**g, "personal": without(g["personal"], "norm.bias")}, s), "missing ['norm.bias']"),
        (lambda g, s: ({**g, "selector_v": {"weight": -g["selector_v"]["weight"]}}, s), "negative"),
        (lambda g, s: ({**g, "personal": {n: t * np.nan for n, t in g["personal"].items()}}, s), "not finite"),
    ],
)
def test_a_reply_with_a_wrong_part_is_no_reply(change, reason):
    run, without_a = Run(), Run()
    run.round(), without_a.round()
    reply = run.replies()["a"]
    metrics = run.round(change={"a": Message(*change(dict(reply.groups), dict(reply.scalars)))})
    assert reason in metrics["refused"]["a"]
    without_a.round(drop=["a"])
    assert Message(run.algorithm.groups) == Message(without_a.algorithm.groups)


def test_trap_3_personal_models_have_the_models_names_whatever_the_selector_calls_its_own():
    algorithm = FedSM()
    weights = {"head.weight": torch.ones(3, 3), "only.here": torch.ones(1)}
    selector = {"head.weight": torch.zeros(2, 5), "only.there": torch.zeros(1)}
    algorithm.setup(["a", "b"], Message({"weights": weights, "selector": selector}), seed=0)
    replies = {}
    for number, site in enumerate("ab"):
        groups = {name: {n: t + number for n, t in g.items()} for name, g in algorithm.template(site).groups.items()}
        scalars = {**algorithm.template(site).scalars, "num_samples": 1}
        replies[site] = Message(groups, scalars)
    algorithm.aggregate(0, replies)
    for site, value in (("a", 1.3), ("b", 1.7)):
        personal = algorithm.groups[f"personal/{site}"]
        assert list(personal) == list(weights)
        torch.testing.assert_close(personal["head.weight"], torch.full((3, 3), value))
    torch.testing.assert_close(algorithm.groups["selector"]["head.weight"], torch.full((2, 5), 0.5))


def test_trap_4_a_site_is_sent_its_own_personal_model_only():
    run = Run(buffers={"n": torch.zeros(1)})
    run.round()
    for k, (site, message) in enumerate(run.algorithm.configure(1).items()):
        names = ["weights", "buffers", "personal", "personal_buffers", "selector", *MOMENTS]
        assert list(message.groups) == names
        assert same_bits(message.groups["personal"], run.personal(site))
        assert message.scalars["label"] == k == SITES_SORTED.index(site)
        others = [run.personal(other) for other in SITES if other != site]
        assert not any(same_bits(message.groups["personal"], other) for other in others)


def test_a_site_evaluates_the_global_and_its_own_model():
    run = Run(fraction=0.5)
    run.round()
    sent = run.algorithm.evaluation()
    assert list(sent) == SITES_SORTED
    for site, message in sent.items():
        assert list(message.groups) == ["weights", "personal"]
        assert same_bits(message.groups["weights"], run.algorithm.groups["weights"])
        assert same_bits(message.groups["personal"], run.personal(site))


def test_trap_4_the_threshold_is_compared_with_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0]])  # softmax .67
    assert route(torch.softmax(logits, dim=1), 0.9).tolist() == [GLOBAL]
    with pytest.raises(InputError, match="give the softmax, not the logits"):
        route(logits, 0.9)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_trap_5_routing_equals_its_twin(threshold):
    P = torch.softmax(4 * torch.randn(200, 5, dtype=torch.float64, generator=torch.manual_seed(1)), dim=1)
    expected = [GLOBAL if k is None else k for k in twin.route(P.tolist(), threshold)]
    routed = route(P, threshold)
    assert routed.tolist() == expected
    assert len(set(expected)) == {0.0: 5, 1.0: 1}.get(threshold, 6)
    assert [route(row[None], threshold).item() for row in P] == expected  # a batch = its samples


def test_a_probability_at_the_threshold_is_not_above_it():
    assert route(torch.tensor([[0.75, 0.25], [0.0, 1.0]]), 0.75).tolist() == [GLOBAL, 1]
    assert route(torch.tensor([[0.0, 1.0]]), 1.0).tolist() == [GLOBAL]


@pytest.mark.parametrize("P", [[[0.5, float("nan")]], [[1.0]], [[1.5, -0.5]], [[0.2, 0.2]], [0.5, 0.5]])
def test_routing_refuses_what_is_no_distribution(P):
    with pytest.raises(InputError, match="^probabilities: "):
        route(torch.tensor(P), 0.5)


# Adam, features and the discriminant


def test_adam_equals_torch():
    weight = torch.randn(7, dtype=torch.float64, generator=torch.manual_seed(2))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.03, betas=(0.8, 0.95))
    w, m, v = {"w": weight}, {"w": torch.zeros_like(weight)}, {"w": torch.zeros_like(weight)}
    for t in range(1, 6):
        grad = torch.sin(t * parameter.detach())
        w, m, v = adam_step(w, {"w": torch.sin(t * w["w"])}, m, v, t, 0.03, (0.8, 0.95))
        parameter.grad = grad
        optimizer.step()
        torch.testing.assert_close(w["w"], parameter.detach(), rtol=0, atol=1e-14)


def test_selector_training_is_full_batch():
    """However the images are cut into batches: one step of Adam, of the mean gradient."""
    message = Run().algorithm.configure(0)["b"]
    images = torch.from_numpy(INPUTS[1])
    whole, scalars = train_selector(Linear(), [images], message)
    cut, _ = train_selector(Linear(), list(images.split(1)), message)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-14)
    assert scalars == {"selector_step": 1}
    with pytest.raises(InputError, match="no images"):
        train_selector(Linear(), [], message)


@pytest.mark.parametrize("num_channels, shape", [(3, (9, 7)), (1, (2, 5))])
def test_features_equal_their_twin(num_channels, shape):
    images = torch.rand(4, num_channels, *shape, dtype=torch.float64, generator=torch.manual_seed(3))
    images[0, :, 0, 0], images[0, :, 1, 0] = 1.0, 0.0  # the ends of the histogram
    features = image_features(images)
    assert features.shape == (4, num_image_features(num_channels))
    for row, image in zip(features, images, strict=True):
        np.testing.assert_allclose(row.numpy(), twin.features(image.numpy()), rtol=0, atol=1e-14)
    bytes_ = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(image_features(bytes_), image_features(bytes_.double() / 255))


@pytest.mark.parametrize("images", [torch.full((1, 1, 4, 4), 1.5), torch.zeros(1, 4, 4), -torch.ones(1, 1, 4, 4)])
def test_features_refuse_what_is_no_image(images):
    with pytest.raises(InputError, match="^images: "):
        image_features(images)


def test_the_discriminant_equals_its_twin():
    groups = [RNG.normal(size=(n, 4)) * [1, 2, 0.5, 1] + n for n in (6, 3, 1)]
    statistics = [feature_statistics(torch.from_numpy(rows)) for rows in groups]
    f = RNG.normal(size=(5, 4)) + 3
    discriminant = Discriminant(statistics)
    rows = [twin.lda(groups, row) for row in f]
    np.testing.assert_allclose(discriminant.distances(torch.from_numpy(f)), [row[0] for row in rows], rtol=1e-9)
    probabilities = discriminant.probabilities(torch.from_numpy(f))
    np.testing.assert_allclose(probabilities, [row[1] for row in rows], rtol=1e-9, atol=1e-300)
    score = discriminant.out_of_federation_score(torch.from_numpy(f))
    np.testing.assert_allclose(score, [min(row[0]) / 4 for row in rows], rtol=1e-9)


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    features = torch.from_numpy(INPUTS[3])
    parts = [feature_statistics(part) for part in features.split(3)]
    for name, tensor in feature_statistics(features).items():
        torch.testing.assert_close(sum(part[name] for part in parts), tensor)


def test_the_moments_selector_needs_one_exchange_tells_sites_apart_and_knows_a_stranger():
    run = Run(sites=["a", "b", "c"], selector="moments", num_features=num_image_features(1))
    images = [site_images(k, 24, 0) for k in range(3)]
    absent = "c"
    for r in range(3):
        replies = {}
        for k, (site, message) in enumerate(run.algorithm.configure(r).items()):
            assert message.scalars["needs_statistics"] == (r == 0 or (r == 1 and site == absent))
            template = run.algorithm.template(site)
            groups = dict(template.groups)
            if message.scalars["needs_statistics"]:
                groups["selector_statistics"] = feature_statistics(image_features(images[k]))
            if not (r == 0 and site == absent):
                replies[site] = Message(groups, {**template.scalars, "num_samples": 24})
        run.algorithm.aggregate(r, replies)
        model = MomentsSelectorModel(run.algorithm.selector.statistics(run.algorithm.groups, run.algorithm.sites))
        probabilities = torch.softmax(model(torch.cat([site_images(k, 20, 1) for k in range(3)])), dim=1)
        if r == 0:
            assert (probabilities[:, 2] == 0).all()
        else:
            assert (probabilities.argmax(1) == torch.arange(3).repeat_interleave(20)).double().mean() > 0.9
    known, stranger = site_images(1, 20, 2), torch.rand(20, 1, 32, 32, generator=torch.manual_seed(4))
    assert model.out_of_federation_score(known).max() < 5 < model.out_of_federation_score(stranger).min()


def test_a_site_without_images_sends_no_statistics():
    run = Run(selector="moments", num_features=6)
    reply = run.replies()["a"]
    empty = Message({**reply.groups, "selector_statistics": empty_statistics(6)}, reply.scalars)
    assert "an image is needed" in run.round(change={"a": empty})["refused"]["a"]
    with pytest.raises(InputError, match="0 sites have sent statistics"):
        Discriminant([empty_statistics(6)] * 3)


# A new site


def test_a_new_site_joins_a_training():
    run = Run(sites=["a", "b", "d"])
    run.round()
    old = run.algorithm.state_dict()
    shares = {"a": 0.5, "b": 0.2, "d": 0.3}
    state = with_new_site(old, "c", shares, head=["weight"])
    joined = Run()
    joined.algorithm = FedSM()
    joined.algorithm.load_state_dict(state)
    expected = sum(share * numbers(run.personal(site)) for site, share in shares.items())
    np.testing.assert_allclose(numbers(joined.personal("c")), expected, **EXACT)
    for name in ("selector", *MOMENTS):
        rows, before = joined.algorithm.groups[name]["weight"], old["groups"][name]["weight"]
        assert torch.equal(rows[[0, 1, 3]], before) and (rows[2] == 0).all()
    message = joined.algorithm.configure(1)["c"]
    assert message.scalars["label"] == 2 and message.scalars["selector_step"] == 1
    assert joined.round()["num_sites"] == 4
    assert old["sites"] == ["a", "b", "d"] and len(old["groups"]["selector"]["weight"]) == 3


def test_a_new_site_of_the_moments_selector_is_asked_for_its_statistics():
    run = Run(sites=["a", "b"], selector="moments", num_features=6)
    run.round()
    state = with_new_site(run.algorithm.state_dict(), "c", {"a": 0.5, "b": 0.5})
    run.algorithm = FedSM(selector="moments", num_features=6)
    run.algorithm.load_state_dict(state)
    needs = {site: m.scalars["needs_statistics"] for site, m in run.algorithm.configure(1).items()}
    assert needs == {"a": False, "b": False, "c": True}


def test_a_new_site_must_fit():
    state = Run().algorithm.state_dict()
    shares = dict.fromkeys("abcd", 0.25)
    with pytest.raises(ConfigurationError, match="^site='a'"):
        with_new_site(state, "a", shares)
    with pytest.raises(InputError, match="no weight 'head.weight' with 4 rows"):
        with_new_site(state, "e", shares)
    with pytest.raises(ConfigurationError, match="^shares="):
        mixture(random_models(2), {"a": 0.5, "b": 0.6})


# Bad input


@pytest.mark.parametrize(
    "options, field",
    [
        ({"pull": 1.1}, "pull"),
        ({"pull": float("nan")}, "pull"),
        ({"threshold": -0.1}, "threshold"),
        ({"selector": "cnn"}, "selector"),
        ({"buffers": "global"}, "buffers"),
        ({"selector_steps": 0}, "selector_steps"),
        ({"selector_lr": 0.0}, "selector_lr"),
        ({"selector_weighting": "steps"}, "selector_weighting"),
        ({"selector": "moments", "num_features": 0}, "num_features"),
    ],
)
def test_options_out_of_range_are_named(options, field):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        FedSM(**options)


@pytest.mark.parametrize("selector", ["learned", "moments"])
def test_a_selector_with_one_site_only_is_refused(selector):
    with pytest.raises(ConfigurationError, match="^selector='.*nothing to select; use none"):
        Run(sites=["a"], selector=selector)


def test_a_learned_selector_without_weights_is_refused():
    with pytest.raises(InputError, match="needs a group 'selector'"):
        FedSM().setup(SITES, Message({"weights": tensors(PROBLEM.start)}), seed=0)


def test_a_pull_below_the_plain_mean_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_mlopt"), "propagate", True)
    Run(pull=0.25)
    assert "pull" not in caplog.text
    Run(pull=0.2)
    assert "pull=0.2: below 1/4" in caplog.text


@pytest.mark.parametrize(
    "arguments, field", [((1, 1), "num_sites"), ((0, 3), "num_channels"), ((3, 5, 200), "width"), ((3, 5, 0), "width")]
)
def test_a_selector_out_of_range_is_refused(arguments, field):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        selector_model(*arguments)


def test_the_default_selector_is_small_and_its_reply_has_the_form_the_server_asks_for():
    model = selector_model(3, 5)
    assert 3_000 < sum(weight.numel() for weight in model.parameters()) < 5_000
    algorithm = FedSM()
    init = {"weights": {"w": torch.zeros(1)}, "selector": {n: w.detach() for n, w in model.named_parameters()}}
    algorithm.setup(list("abcde"), Message(init), seed=0)
    groups, scalars = train_selector(model, [torch.rand(2, 3, 16, 16)], algorithm.configure(0)["b"])
    template = algorithm.template("b")
    reply = Message({**template.groups, **groups}, {"round": 0, "num_samples": 2, **scalars})
    assert check_reply(reply, template) is None
