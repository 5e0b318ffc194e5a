"""Federated algorithms: each against its float64 twin, and bit for bit where two of them coincide."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms import (
    ALGORITHMS,
    Ditto,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FederatedDOMO,
    FedProx,
    FedYogi,
    Message,
    Scaffold,
    ditto_gradient,
    domo_fused_step,
    fedprox_gradient,
    normalization_names,
    scaffold_gradient,
    scaffold_new_control,
)
from tests.federations import same_bits
from tests.least_squares import NAMES, SHAPES, LeastSquares, numbers, tensors
from tests.reference import domo as domo_twin
from tests.reference import federated as twin
from tests.reference.rsgd import Momentum


PROBLEM = LeastSquares()
SITES = ["d", "b", "a", "c"]  # site "a" has the data of client 0, and so on
SAMPLES = {0: 10, 1: 20, 2: 30, 3: 40}
STEPS, ETA, ROUNDS = 5, 0.02, 12
EXACT = {"rtol": 0, "atol": 1e-13}


def client(site):
    return "abcd".index(site)


class Run:
    """An algorithm and its sites; `correct(grads, weights, message, k)` and `after` are what a site adds to SGD."""

    def __init__(
        self,
        algorithm,
        correct=None,
        sites=SITES,
        dtype=torch.float64,
        etas=(ETA,) * STEPS,
        data=client,
        problem=PROBLEM,
    ):
        self.algorithm, self.correct, self.etas, self.data, self.state = algorithm, correct, etas, data, {}
        self.problem = problem
        algorithm.setup(sites, Message({"weights": tensors(problem.start, dtype)}), seed=3)

    def local_steps(self, site, message, start):
        k, r, w = self.data(site), message.scalars["round"], dict(start)
        for i, eta in enumerate(self.etas):
            grads = tensors(self.problem.client_gradient(k, numbers(w), r, i), w[NAMES[0]].dtype)
            if self.correct:
                grads = self.correct(grads, w, message, site)
            w = {name: w[name] - eta * grads[name] for name in w}
        return w

    def reply(self, site, message):
        end = self.local_steps(site, message, message.groups["weights"])
        return self.answer(site, message, {"weights": end})

    def answer(self, site, message, groups, **scalars):
        num_samples = SAMPLES[self.data(site)]
        return Message(groups, {"round": message.scalars["round"], "num_samples": num_samples, **scalars})

    def round(self, drop=()):
        sent = self.algorithm.configure(self.algorithm.round)
        replies = {site: self.reply(site, message) for site, message in sent.items()}
        arrived = {site: replies[site] for site in reversed(replies) if site not in drop}
        return self.algorithm.aggregate(self.algorithm.round, arrived)

    @property
    def weights(self):
        return self.algorithm.groups["weights"]


class ScaffoldRun(Run):
    def reply(self, site, message):
        kept = self.state.get(site, {})
        zeros = {name: torch.zeros_like(c) for name, c in message.groups["control"].items()}
        own = kept.get(message.scalars["state_round"], zeros)
        self.correct = lambda grads, w, message, site: scaffold_gradient(grads, message.groups["control"], own)
        start = message.groups["weights"]
        end = self.local_steps(site, message, start)
        new, change = scaffold_new_control(own, message.groups["control"], start, end, sum(self.etas))
        self.state[site] = {message.scalars["state_round"]: own, message.scalars["round"]: new}
        return self.answer(site, message, {"weights": end, "control_change": change})


class DOMORun(Run):
    """Sites with momentum of their own; `schedule[r]` holds the learning rates."""

    schedule, momentum = [[ETA] * STEPS] * ROUNDS, 0.8

    def reply(self, site, message):
        w, etas = dict(message.groups["weights"]), self.schedule[message.scalars["round"]]
        m = message.groups.get("local_momentum")
        if message.scalars["local_state"] == "keep":
            m = self.state.get(site)
        m = m or {name: torch.zeros_like(t) for name, t in w.items()}
        for i, eta in enumerate(etas):
            g = tensors(PROBLEM.client_gradient(client(site), numbers(w), message.scalars["round"], i))
            m = {name: self.momentum * m[name] + g[name] for name in w}
            w = {name: w[name] - eta * m[name] for name in w}
            if message.scalars["fusion_at"] == "step":
                w = domo_fused_step(w, message.groups["server_momentum"], eta, message.scalars["fusion"])
        self.state[site] = m
        groups = {"weights": w, **({"local_momentum": m} if "local_momentum" in message.groups else {})}
        return self.answer(site, message, groups, lr_sum=float(sum(etas)))


def present(algorithm, num_rounds=ROUNDS):
    """Which clients take part, by the algorithm's own choice."""
    probe = FedAvg(fraction=algorithm.fraction, min_sites=algorithm.min_sites)
    probe.setup(SITES, Message({"weights": tensors(PROBLEM.start)}), seed=3)
    chosen = []
    for r in range(num_rounds):
        sent = probe.configure(r)
        chosen.append([client(site) for site in sent])
        probe.aggregate(r, {s: Message(m.groups, {"round": r, "num_samples": 1}) for s, m in sent.items()})
    return chosen


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name, options, server", twin.SERVERS)
def test_servers_equal_their_twins(name, options, server, fraction):
    run = Run(ALGORITHMS[name](fraction=fraction, **options))
    sites = present(run.algorithm)
    assert {len(chosen) for chosen in sites} == {4 * fraction}
    for w in twin.fedopt(PROBLEM.start, PROBLEM.client_gradient, sites, SAMPLES, STEPS, ETA, server()):
        run.round()
        np.testing.assert_allclose(numbers(run.weights), w, **EXACT)


def proximal(grads, w, message, site):
    return fedprox_gradient(grads, w, message.groups["weights"], message.scalars["proximal_mu"])


def test_fedprox_equals_its_twin():
    run = Run(FedProx(proximal_mu=0.7), proximal)
    sites = present(run.algorithm)
    expected = twin.fedopt(PROBLEM.start, PROBLEM.client_gradient, sites, SAMPLES, STEPS, ETA, twin.fedavg(), mu=0.7)
    for w in expected:
        run.round()
        np.testing.assert_allclose(numbers(run.weights), w, **EXACT)


def test_a_missing_gradient_stays_missing():
    w, start = tensors(PROBLEM.start), tensors(PROBLEM.start + 1)
    grads = {NAMES[0]: torch.ones(3, dtype=torch.float64)}
    assert list(fedprox_gradient(grads, w, start, 0.5)) == [NAMES[0]]
    assert list(scaffold_gradient(grads, w, start)) == [NAMES[0]]
    assert fedprox_gradient(grads, w, start, 0.0) is grads


@pytest.mark.parametrize("fraction, alpha", [(1.0, 1.0), (0.75, 1.0), (0.5, 0.6)])
def test_scaffold_equals_its_twin(fraction, alpha):
    run = ScaffoldRun(Scaffold(server_lr=alpha, fraction=fraction))
    sites = present(run.algorithm)
    for w, c, controls in twin.scaffold(PROBLEM.start, PROBLEM.client_gradient, sites, SAMPLES, STEPS, ETA, alpha):
        run.round()
        np.testing.assert_allclose(numbers(run.weights), w, **EXACT)
        np.testing.assert_allclose(numbers(run.algorithm.groups["control"]), c, rtol=0, atol=1e-11)
        for site, state in run.state.items():
            np.testing.assert_allclose(numbers(state[max(state)]), controls[client(site)], rtol=0, atol=1e-11)


class Quadratics:
    """Site k minimises half of (w - b_k)' H_k (w - b_k), all different; `solution` minimises the sum."""

    start = np.zeros(8)

    def __init__(self):
        generator = np.random.default_rng(1)
        self.b = generator.normal(size=(4, 8))
        self.h = generator.uniform(0.5, 2.0, size=(4, 8))
        self.solution = (self.h * self.b).sum(0) / self.h.sum(0)

    def client_gradient(self, k, w, r, i):
        return self.h[k] * (w - self.b[k])


@pytest.mark.parametrize("make, is_solved", [(ScaffoldRun, True), (Run, False)])
def test_scaffold_finds_the_solution_that_fedavg_misses(make, is_solved):
    problem = Quadratics()
    options = {"fraction": 0.75, "weighting": "uniform"}
    run = make(Scaffold(**options) if is_solved else FedAvg(**options), etas=(0.1,) * 5, problem=problem)
    for _ in range(400):
        run.round()
    distance = np.abs(numbers(run.weights) - problem.solution).max()
    assert distance < 1e-12 if is_solved else distance > 0.01


def test_a_lost_reply_does_not_part_the_controls_of_sites_and_server():
    run, undisturbed = ScaffoldRun(Scaffold()), ScaffoldRun(Scaffold())
    for _ in range(3):
        run.round(), undisturbed.round()
    run.round(drop=["c"])  # the site has trained, and does not know
    run.round()
    own = [run.state[site][4] for site in SITES]
    mean = sum(numbers(control) for control in own) / 4
    np.testing.assert_allclose(numbers(run.algorithm.groups["control"]), mean, rtol=0, atol=1e-12)
    assert sorted(run.state["c"]) == [2, 4]


def test_a_site_is_told_the_round_of_its_last_reply_that_was_used():
    run = ScaffoldRun(Scaffold())
    run.round(drop=["a"])
    run.round()
    run.round(drop=["b"])
    told = {site: message.scalars["state_round"] for site, message in run.algorithm.configure(3).items()}
    assert told == {"a": 2, "b": 1, "c": 2, "d": 2}


def test_scaffold_needs_steps_that_move():
    w = tensors(PROBLEM.start)
    with pytest.raises(ConfigurationError, match="lr_sum"):
        scaffold_new_control(w, w, w, w, 0.0)


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_ditto_equals_its_twin(lmbda):
    run = Run(Ditto(ditto_lambda=lmbda, fraction=0.5))
    personal = {site: tensors(PROBLEM.start) for site in SITES}
    sites = present(run.algorithm)
    expected = twin.ditto(PROBLEM.start, PROBLEM.client_gradient, sites, SAMPLES, STEPS, ETA, lmbda)

    def near_the_common_model(grads, v, message, site):
        return ditto_gradient(grads, v, message.groups["weights"], message.scalars["ditto_lambda"])

    for w, v in expected:
        for site, message in run.algorithm.configure(run.algorithm.round).items():
            run.correct = near_the_common_model
            personal[site] = run.local_steps(site, message, personal[site])
        run.correct = None
        run.round()
        np.testing.assert_allclose(numbers(run.weights), w, **EXACT)
        for site in SITES:
            np.testing.assert_allclose(numbers(personal[site]), v[client(site)], **EXACT)


class FedBNRun(Run):
    def reply(self, site, message):
        own = self.state.get(site, tensors(PROBLEM.start))
        self.state[site] = self.local_steps(site, message, {**own, **message.groups["weights"]})
        return self.answer(site, message, {"weights": {n: self.state[site][n] for n in message.groups["weights"]}})


def test_fedbn_equals_its_twin_and_sends_nothing_local():
    run = FedBNRun(FedBN(["norm.*"], fraction=0.5))
    is_local = numbers(
        {name: torch.full(shape, name == "norm.bias") for name, shape in zip(NAMES, SHAPES, strict=True)}
    )
    sites = present(run.algorithm)
    expected = twin.fedbn(PROBLEM.start, is_local > 0, PROBLEM.client_gradient, sites, SAMPLES, STEPS, ETA)
    for models in expected:
        for message in run.algorithm.configure(run.algorithm.round).values():
            assert list(message.groups) == ["weights"] and "norm.bias" not in message.groups["weights"]
        run.round()
        for site in SITES:
            model = {**run.state.get(site, tensors(PROBLEM.start)), **run.weights}
            np.testing.assert_allclose(numbers(model), models[client(site)], **EXACT)


def test_fedbn_keeps_buffers_local_and_refuses_what_should_have_stayed():
    algorithm = FedBN(["norm.bias"])
    buffers = {"norm.running_mean": torch.zeros(3)}
    algorithm.setup(["a"], Message({"weights": tensors(PROBLEM.start), "buffers": buffers}), seed=0)
    assert list(algorithm.configure(0)["a"].groups) == ["weights"]
    reply = Message({"weights": tensors(PROBLEM.start)}, {"round": 0, "num_samples": 1})
    with pytest.raises(RuntimeError, match="a: tensors of 'weights': unknown \\['norm.bias'\\]"):
        algorithm.aggregate(0, {"a": reply})


@pytest.mark.parametrize("names, which", [(["bn*"], "no weight"), (["*"], "every weight")])
def test_fedbn_refuses_a_filter_that_separates_nothing(names, which):
    with pytest.raises(ConfigurationError, match=which):
        FedBN(names).setup(SITES, Message({"weights": tensors(PROBLEM.start)}), seed=0)


def test_the_names_of_normalization_layers():
    class LlamaRMSNorm(torch.nn.LayerNorm):
        pass

    class NormedHead(torch.nn.Linear):
        pass

    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model = torch.nn.ModuleDict({"block": block, "last": LlamaRMSNorm(2), "head": NormedHead(2, 1)})
    assert normalization_names(model) == ["block.1.weight", "block.1.bias", "last.weight", "last.bias"]


DECAYING = [[0.03 * (1 - (7 * r + i) / 150) for i in range(STEPS)] for r in range(ROUNDS)]
DECAYING[5] = [0.0] * STEPS  # the server does nothing
DECAYING[7] = [0.01, 0.005]
DOMO_FAMILY = [
    ({}, "before", "zero"),
    ({"fusion": 0.3, "server_lr": 0.7, "server_unit": "param"}, "before", "zero"),
    ({"fusion": 0.3, "server_lr": 0.7, "fusion_at": "step"}, "inside", "zero"),
    ({"fusion": 0.0}, None, "zero"),
    ({"fusion": 0.0, "local_state": "average"}, None, "average"),
    ({"fusion": 0.4, "local_state": "keep"}, "before", "keep"),
]


@pytest.mark.parametrize("schedule", [DOMORun.schedule, DECAYING], ids=["constant", "decaying"])
@pytest.mark.parametrize("options, fused, local", DOMO_FAMILY)
def test_domo_equals_its_twin(options, fused, local, schedule):
    algorithm = FederatedDOMO(server_momentum=0.6, **options)
    run = DOMORun(algorithm)
    run.schedule = schedule
    p = [SAMPLES[k] / 100 for k in range(4)]
    expected = domo_twin.domo(
        PROBLEM.start,
        PROBLEM.client_gradient,
        schedule,
        [Momentum(DOMORun.momentum) for _ in p],
        p,
        algorithm.server_lr,
        0.6,
        algorithm.fusion,
        fused,
        local,
        algorithm.server_unit,
    )
    for x, y, m, _ in expected:
        run.round()
        np.testing.assert_allclose(numbers(run.weights), x, rtol=0, atol=1e-12)
        start = algorithm.configure(algorithm.round)["a"].groups["weights"]
        np.testing.assert_allclose(numbers(start), y, rtol=0, atol=1e-12)
        np.testing.assert_allclose(numbers(algorithm.groups["server_momentum"]), m, rtol=0, atol=1e-11)


def test_domo_takes_the_mean_of_what_the_sites_learning_rates_add_up_to():
    algorithm = FederatedDOMO(server_momentum=0.5, server_lr=1.0, fusion=0.0)
    algorithm.setup(["a", "b"], Message({"weights": {"w": torch.tensor([1.0])}}), seed=0)
    ends = {"a": (0.5, 1, 0.1), "b": (0.9, 3, 0.3)}
    replies = {
        site: Message({"weights": {"w": torch.tensor([w])}}, {"round": 0, "num_samples": n, "lr_sum": lr_sum})
        for site, (w, n, lr_sum) in ends.items()
    }
    algorithm.aggregate(0, replies)
    # S = 0.1 / 4 + 0.9 / 4, and the mean of the ends is 0.8
    torch.testing.assert_close(algorithm.groups["server_momentum"]["w"], torch.tensor([0.2 / 0.25]))
    assert algorithm.groups["lr_sum"]["last"].item() == pytest.approx(0.25)


@pytest.mark.parametrize("lr_sum", [None, 1, -0.1, float("nan"), float("inf")])
def test_domo_refuses_a_reply_without_a_good_sum_of_learning_rates(lr_sum):
    run = DOMORun(FederatedDOMO())
    replies = {site: run.reply(site, message) for site, message in run.algorithm.configure(0).items()}
    scalars = {**replies["a"].scalars, "lr_sum": lr_sum}
    if lr_sum is None:
        scalars.pop("lr_sum")
    replies["a"] = Message(replies["a"].groups, scalars)
    assert list(run.algorithm.aggregate(0, replies)["refused"]) == ["a"]


# What must coincide, in the dtype models are trained in.

LIKE_FEDAVG = [
    (Run, lambda: FedAvgM(server_momentum=0.0, server_lr=1.0), None),
    (Run, lambda: FedProx(proximal_mu=0.0), proximal),
    (Run, lambda: Ditto(), None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_run, make, correct", LIKE_FEDAVG)
def test_special_cases_are_fedavg_bit_for_bit(make_run, make, correct, dtype):
    run, fedavg = make_run(make(), correct, dtype=dtype), Run(FedAvg(), dtype=dtype)
    for _ in range(4):
        run.round(), fedavg.round()
        assert same_bits(run.weights, fedavg.weights)


def test_scaffold_with_zero_controls_and_domo_without_momentum_are_fedavg_bit_for_bit():
    fedavg = Run(FedAvg(), etas=(ETA,))
    scaffold, domo = ScaffoldRun(Scaffold(), etas=(ETA,)), DOMORun(FederatedDOMO(server_momentum=0.0))
    domo.schedule, domo.momentum = [[ETA]] * ROUNDS, 0.0
    fedavg.round(), scaffold.round(), domo.round()
    assert same_bits(scaffold.weights, fedavg.weights)
    assert same_bits(domo.weights, fedavg.weights)


@pytest.mark.parametrize("value", [-0.0, 1e-45, 3e37, 0.1])
@pytest.mark.parametrize("make", [FedAvg, lambda: FedAvgM(0.0), Scaffold, lambda: FederatedDOMO(0.0)])
def test_one_site_gives_its_weights_bit_for_bit(make, value):
    algorithm = make()
    algorithm.setup(["a"], Message({"weights": {"w": torch.tensor([1.0, -2e20, 3e-30])}}), seed=0)
    weights = {"w": torch.tensor([value, value, 1.0])}
    for r in range(2):
        template = algorithm.template("a")
        groups = {**template.groups, "weights": weights}
        scalars = {**template.scalars, "num_samples": 7, "lr_sum": 0.1}
        algorithm.aggregate(r, {"a": Message(groups, scalars)})
        assert same_bits(algorithm.groups["weights"], weights)


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_equal_sites_are_one_site(name):
    """Three copies of a site, of different sizes."""
    alone = Run(ALGORITHMS[name](), sites=["a"], dtype=torch.float32)
    copies = Run(ALGORITHMS[name](), sites=["x", "y", "z"], dtype=torch.float32, data=lambda site: 0)
    for _ in range(4):
        alone.round(), copies.round()
        if name == "fedavg":
            assert same_bits(alone.weights, copies.weights)
        np.testing.assert_allclose(numbers(alone.weights), numbers(copies.weights), rtol=1e-6)


def test_uniform_weighting_forgets_the_samples():
    run = Run(FedAvg(weighting="uniform"), etas=(ETA,))
    run.round()
    mean = np.mean([PROBLEM.client_gradient(k, PROBLEM.start, 0, 0) for k in range(4)], axis=0)
    np.testing.assert_allclose(numbers(run.weights), PROBLEM.start - ETA * mean, **EXACT)


def test_fedadam_of_no_memory_and_large_tau_goes_the_way_of_fedavg():
    adam, fedavg = Run(FedAdam(server_lr=1e6, betas=(0.0, 0.0), tau=1e6)), Run(FedAvg())
    adam.round(), fedavg.round()
    np.testing.assert_allclose(numbers(adam.weights), numbers(fedavg.weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: FedAvgM(server_momentum=1.0), "server_momentum"),
        (lambda: FedAvgM(server_lr=0.0), "server_lr"),
        (lambda: FedAdam(tau=0.0), "tau"),
        (lambda: FedAdam(betas=(0.9, 1.0)), "betas"),
        (lambda: FedAdam(bias_correction="adam"), "bias_correction"),
        (lambda: FedYogi(server_lr=-1.0), "server_lr"),
        (lambda: FedProx(proximal_mu=-0.1), "proximal_mu"),
        (lambda: Ditto(ditto_lambda=float("nan")), "ditto_lambda"),
        (lambda: Scaffold(server_lr=float("inf")), "server_lr"),
        (lambda: FedBN([]), "local_names"),
        (lambda: FedBN("norm"), "local_names"),
        (lambda: FederatedDOMO(fusion=-0.1), "fusion"),
        (lambda: FederatedDOMO(fusion_at="end"), "fusion_at"),
        (lambda: FederatedDOMO(local_state="zero"), "local_state"),
        (lambda: FederatedDOMO(fusion_at="step", server_unit="param"), "server_unit"),
        (lambda: FedAvg(fraction=0.0), "fraction"),
        (lambda: FedAvg(fraction=1.1), "fraction"),
        (lambda: FedAvg(min_sites=0), "min_sites"),
        (lambda: FedAvg(weighting="steps"), "weighting"),
    ],
)
def test_options_out_of_range_are_named(make, field):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        make()


def test_the_guide_tells_of_every_algorithm():
    guide = (Path(__file__).parent.parent / "docs" / "federate.md").read_text(encoding="utf-8")
    assert [name for name in ALGORITHMS if f"`{name}`" not in guide] == []
