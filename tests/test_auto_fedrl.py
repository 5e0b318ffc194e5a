"""Auto-FedRL: its parts against float64 twins, the policies on a known landscape, and what it does to algorithms."""

import json
import math

import numpy as np
import pytest
import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms.auto_fedrl import AutoFedRL
from hf_mlopt.federated.algorithms.averaging import sample_shares, weighted_mean
from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.fedavgm import FedAvgM
from hf_mlopt.federated.algorithms.fedsm import FedSM
from hf_mlopt.federated.algorithms.message import Message
from hf_mlopt.federated.algorithms.policies import POLICIES, STD_FLOOR, build_policy
from hf_mlopt.federated.algorithms.policy_learner import PolicyLearner
from hf_mlopt.federated.algorithms.reinforce import (
    Action,
    advantages,
    mean_losses,
    policy_gradient,
    relative_improvement,
)
from hf_mlopt.federated.algorithms.scaffold import Scaffold
from hf_mlopt.federated.algorithms.search_space import HyperParameters, SearchSpace
from tests.federations import same_bits
from tests.reference import auto_fedrl as twin


SITES = ["c", "a", "b"]
SAMPLES = {"a": 10, "b": 20, "c": 30}
EXACT = {"rtol": 0, "atol": 1e-13}
START = {"w": torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3), "b": torch.tensor(2.0, dtype=torch.float64)}
SMALL = SearchSpace(learning_rate=(1e-3, 0.3), local_epochs=(1, 4))


class Run:
    """Sites with quadratics of different minima; `losses` replaces the validation losses by given ones."""

    def __init__(self, inner=None, space=SMALL, seed=7, losses=None, sites=SITES, **options):
        self.algorithm = AutoFedRL(inner or FedAvg(), space, **options)
        self.algorithm.setup(sites, Message({"weights": START}), seed)
        self.losses, self.metrics = losses, []

    def reply(self, site, message):
        target = {"a": 0.5, "b": -0.3, "c": 1.0}[site]
        lr, steps = message.scalars.get("learning_rate", 0.05), message.scalars.get("local_epochs", 2)
        groups, r = {}, message.scalars["round"]
        loss = 1 + sum(float((t - target).square().sum()) for t in message.groups["weights"].values())
        for name in ("weights", "personal"):
            if name in message.groups:
                groups[name] = {n: target + (1 - lr) ** steps * (t - target) for n, t in message.groups[name].items()}
        loss = loss if self.losses is None else self.losses[r]
        scalars = {"round": r, "num_samples": SAMPLES[site], "eval_loss": float(loss), "num_steps": steps}
        return Message(groups, scalars)

    def replies(self):
        sent = self.algorithm.configure(self.algorithm.round)
        return {site: self.reply(site, message) for site, message in sent.items()}

    def round(self, drop=(), change=()):
        arrived = {site: reply for site, reply in self.replies().items() if site not in drop}
        arrived = {**dict(reversed(arrived.items())), **dict(change)}
        self.metrics.append(self.algorithm.aggregate(self.algorithm.round, arrived))
        return self.metrics[-1]

    @property
    def policy(self):
        return self.algorithm.learner.tensors["policy"]


def action(round, z, loss, cost=1.0, reward=None, state=None):
    return Action(round, state or {}, list(z), {"a": loss}, {"a": 1.0}, cost, reward)


# Search spaces


def test_the_papers_space_equals_its_table():
    space, sites = SearchSpace("paper"), ["a", "b", "c"]
    assert space.num_dimensions(sites) == 6  # K + 3
    for z, lr, epochs, server_lr in ((0.5, 5e-2, 40, 1.5), (-0.5, 5e-4, 2, 0.5), (0.0, 0.02525, 21, 1.0)):
        values = space.hyper_parameters(torch.full((6,), z, dtype=torch.float64), sites)
        assert values.learning_rate == pytest.approx(lr) and values.server_lr == pytest.approx(server_lr)
        assert values.local_epochs == epochs and values.local_steps is None
        assert values.shares == pytest.approx(dict.fromkeys(sites, 1 / 3))
    beyond = space.hyper_parameters(torch.full((6,), -3.0, dtype=torch.float64), sites)
    assert (beyond.learning_rate, beyond.local_epochs, beyond.server_lr) == (1e-4, 1, 0.1)  # the lower clamps
    assert space.hyper_parameters(torch.full((6,), 3.0), sites).learning_rate > 5e-2  # there are no upper ones
    z = torch.tensor([0.0, 0.0, 0.0, 0.5, -0.5, 0.1], dtype=torch.float64)
    expected = twin.softmax([0.9 * number + 0.55 for number in (0.5, -0.5, 0.1)])
    np.testing.assert_allclose(list(space.hyper_parameters(z, sites).shares.values()), expected, **EXACT)


def test_no_draw_leaves_the_bounds_of_the_log_space():
    space, sites = SearchSpace(), ["a", "b"]
    for z in [
        *torch.randn(50, 5, generator=torch.manual_seed(0), dtype=torch.float64) * 3,
        *1e4 * torch.eye(5).double(),
    ]:
        for sign in (1, -1):
            values = space.hyper_parameters(sign * z, sites)
            assert 5e-4 <= values.learning_rate <= 5e-2
            assert 2 <= values.local_epochs <= 40 and type(values.local_epochs) is int
            assert 0.5 <= values.server_lr <= 1.5
    middle = space.hyper_parameters(torch.zeros(5), sites)
    assert middle.learning_rate == pytest.approx(math.sqrt(5e-4 * 5e-2))
    assert middle.local_epochs == round(math.sqrt(2 * 40)) and middle.server_lr == 1.0
    up = space.hyper_parameters(torch.full((5,), math.atanh(0.5)), sites)
    assert up.learning_rate == pytest.approx(5e-4 * 100**0.75) and up.server_lr == pytest.approx(1.25)


@pytest.mark.parametrize("num_sites, low, high", [(3, 0.17, 0.55), (5, 0.09, 0.38), (8, 0.055, 0.26)])
def test_the_softmax_bounds_a_sites_share(num_sites, low, high):
    space = SearchSpace(learning_rate=None, local_epochs=None, server_lr=None)
    sites, shares = [str(k) for k in range(num_sites)], []
    for sign in (30.0, -30.0):  # one site against all others
        z = torch.full((num_sites,), -sign, dtype=torch.float64)
        z[0] = sign
        shares.append(space.hyper_parameters(z, sites).shares["0"])
    assert shares == pytest.approx([high, low], abs=0.006)


def test_log_det_makes_the_density_of_the_squashed_draw_integrate_to_1():
    space = SearchSpace(local_epochs=None, server_lr=None, aggregation_weights=None)
    policy = build_policy("gaussian", [9], 2.5, 0.6)
    parameters = {"mean": torch.tensor([0.4]).double(), "log_std": torch.tensor([-0.5]).double()}
    u = torch.linspace(-1, 1, 20002, dtype=torch.float64)[1:-1]
    density = [
        math.exp(policy.log_prob(parameters, {}, z[None]) - space.log_det(z[None])) for z in torch.atanh(u)[::10]
    ]
    assert sum(density) * float(u[10] - u[0]) == pytest.approx(1, abs=1e-3)
    assert SearchSpace("paper").log_det(torch.ones(3)) == 0


def test_levels_of_the_categorical_policy():
    paper = SearchSpace("paper").levels(["a", "b"])
    assert paper[0] == [5e-4, 5e-2]
    assert paper[1] == [2, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [len(levels) for levels in paper[2:]] == [9, 10, 10]
    assert paper[2][0] == 0.5 and paper[2][-1] == 1.5 and paper[3][1] == pytest.approx(0.2)
    space = SearchSpace(local_epochs=None, local_steps=(1, 256), aggregation_weights=None)
    assert space.levels(["a"])[1] == pytest.approx([2.0**k for k in range(9)])
    values = space.hyper_parameters_of_levels(torch.tensor([0, 3, 8]), ["a"])
    assert values == HyperParameters(learning_rate=pytest.approx(5e-4), local_steps=8, server_lr=1.5)


@pytest.mark.parametrize(
    "options, field",
    [
        ({"kind": "linear"}, "search_space"),
        ({"learning_rate": (0.1, 0.01)}, "learning_rate"),
        ({"learning_rate": (0.1, 0.1)}, "learning_rate"),
        ({"learning_rate": (0.0, 0.1)}, "learning_rate"),
        ({"learning_rate": ()}, "learning_rate"),
        ({"server_lr": (0.5, float("inf"))}, "server_lr"),
        ({"server_lr": (float("nan"), 1.0)}, "server_lr"),
        ({"local_epochs": (0, 4)}, "local_epochs"),
        ({"local_epochs": (1.5, 4)}, "local_epochs"),
        ({"aggregation_weights": (-1.0, 1.0)}, "aggregation_weights"),
        ({"local_steps": (1, 4)}, "local_steps"),
        (
            {"learning_rate": None, "local_epochs": None, "server_lr": None, "aggregation_weights": None},
            "search_space",
        ),
    ],
)
def test_a_range_that_is_none_is_named(options, field):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        SearchSpace(**options)


# Rewards and gradients


def test_rewards_equal_their_twin():
    assert relative_improvement(2.0, 1.5) == twin.reward(2.0, 1.5) == 0.25
    assert relative_improvement(1.0, 1.5) == -0.5
    losses = {"a": 1.0, "b": 4.0}, {"a": 0.5, "b": 3.0, "c": 9.0}
    n = {"a": 10.0, "b": 30.0, "c": 50.0}
    expected = tuple(twin.mean_loss(L, n, "ab") for L in losses)  # of the sites in both rounds
    assert mean_losses(*losses, n) == pytest.approx(expected) == (3.25, 2.375)
    assert all(math.isnan(loss) for loss in mean_losses({"a": 1.0}, {"b": 1.0}, {"b": 1.0}))


@pytest.mark.parametrize("losses", [(0.0, 1.0), (1.0, -0.1), (float("nan"), 1.0), (1.0, float("inf")), (1.0, 0.0)])
def test_losses_that_are_no_losses_give_no_reward(losses):
    assert relative_improvement(*losses) is None


def test_costs_are_taken_off_the_reward_in_medians():
    actions = [action(r, [0.0], 1.0, cost, reward) for r, (cost, reward) in enumerate([(2, 0.3), (4, 0.1), (10, 0.2)])]
    np.testing.assert_allclose(advantages(actions, 0.0), [0.1, -0.1, 0.0], **EXACT)
    raw = np.array([0.3 - 0.1 * 2 / 4, 0.1 - 0.1, 0.2 - 0.1 * 10 / 4])
    np.testing.assert_allclose(advantages(actions, 0.1), raw - raw.mean(), **EXACT)


def a_policy(name, d=4):
    policy = build_policy(name, [3] * d, 2.5, 0.6)
    generator = torch.Generator().manual_seed(1)
    parameters = policy.parameters(generator)
    for tensor in parameters.values():
        tensor.add_(0.1 * torch.randn(tensor.shape, dtype=torch.float64, generator=generator))
    return policy, policy.project(parameters), generator


@pytest.mark.parametrize("name", POLICIES)
def test_log_probabilities_taken_again_give_the_gradient_of_those_retained(name):
    """Within one update, that is before the parameters have changed."""
    policy, parameters, generator = a_policy(name)
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in parameters.items()}
    state, actions, retained = policy.state(), [], []
    for r in range(4):
        z = policy.sample(parameters, state, generator)
        plain = {key: tensor.tolist() for key, tensor in state.items()}
        actions.append(action(r, z.tolist(), 1.0, reward=float(r * r), state=plain))
        retained.append(policy.log_prob(leaves, state, z))
        state = policy.next_state(parameters, state)
    signed = advantages(actions, 0.0)
    sum(log_prob * a for log_prob, a in zip(retained, signed, strict=True)).backward()
    gradient = policy_gradient(policy.log_prob, parameters, actions, signed)
    assert any(gradient[key].abs().max() > 0 for key in gradient)
    for key, leaf in leaves.items():
        torch.testing.assert_close(gradient[key], leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_draws_follow_their_log_probability(name):
    """The mean of the score is 0, and that of -log π the entropy, if draws and densities belong together."""
    policy, parameters, generator = a_policy(name, d=2)
    draws = [policy.sample(parameters, policy.state(), generator) for _ in range(800)]
    actions = [
        action(r, z.tolist(), 1.0, state={k: t.tolist() for k, t in policy.state().items()})
        for r, z in enumerate(draws)
    ]
    score = policy_gradient(policy.log_prob, parameters, actions, [1 / len(draws)] * len(draws))
    key = {"gaussian": "mean", "cholesky": "factor", "mlp": "bias2", "categorical": "logits0"}[name]
    assert score[key].abs().max() < 0.25  # a single one is about 1 / .6
    log_probs = torch.stack([policy.log_prob(parameters, policy.state(), z) for z in draws])
    if policy.is_discrete:
        heads = [torch.distributions.Categorical(logits=logits) for logits in parameters.values()]
        entropy = sum(head.entropy() for head in heads)
    else:
        entropy = policy.distribution(parameters, policy.state()).entropy()
    assert float(-log_probs.mean()) == pytest.approx(float(entropy), abs=0.1)


def test_the_cholesky_policy_has_the_covariance_of_its_factor():
    policy, parameters, _ = a_policy("cholesky", d=3)
    factor = parameters["factor"]
    L = np.zeros((3, 3))
    for i in range(3):
        L[i][i] = math.exp(factor[i][i])
        for j in range(i):
            L[i][j] = math.exp(factor[i][i]) * factor[i][j] / math.sqrt(3)
    z, covariance = np.array([0.3, -0.2, 0.1]), L @ L.T
    offset = z - parameters["mean"].numpy()
    expected = -0.5 * (offset @ np.linalg.solve(covariance, offset) + math.log(np.linalg.det(2 * np.pi * covariance)))
    assert float(policy.log_prob(parameters, {}, torch.from_numpy(z))) == pytest.approx(expected)


@pytest.mark.parametrize("name, key", [("gaussian", "log_std"), ("cholesky", "factor")])
def test_the_deviation_has_a_floor_and_the_mean_bounds(name, key):
    policy = build_policy(name, [2, 2], 0.5, 0.3)
    parameters = {"mean": torch.tensor([9.0, -9.0]).double(), key: torch.full((2,), -50.0).double()}
    if name == "cholesky":
        parameters[key] = torch.diag(parameters[key])
    projected = policy.project(parameters)
    assert projected["mean"].tolist() == [0.5, -0.5]
    std = policy.distribution(projected, {}).stddev
    torch.testing.assert_close(std, torch.full((2,), STD_FLOOR, dtype=torch.float64))


# The policy against its twins


LOSSES = [2.0, 1.7, 1.65, 1.8, 1.2, 1.1, 1.15, 1.0, 0.7]


@pytest.mark.parametrize("kind, bound, sigma", [("log", 2.5, 0.6), ("paper", 0.5, 85**-0.25)])
@pytest.mark.parametrize("kappa", [0.0, 0.2])
@pytest.mark.parametrize("window", [2, 5])
def test_the_gaussian_policy_equals_its_twin(kind, bound, sigma, kappa, window):
    space = SearchSpace(kind, learning_rate=(1e-3, 0.3), local_epochs=(1, 40))
    run = Run(space=space, losses=LOSSES, cost_weight=kappa, window=window, hyper_lr=0.1)
    draws, costs, after = [], [], []
    for r in range(len(LOSSES)):
        draws.append(run.algorithm.learner.draw(r)[0].numpy())
        metrics = run.round()
        costs.append(metrics["local_epochs"])
        after.append({name: tensor.clone() for name, tensor in run.policy.items()})
        assert metrics["policy_updated"] == (r >= 2)  # one reward has no advantage
        assert metrics["reward"] == (pytest.approx(1 - LOSSES[r] / LOSSES[r - 1]) if r else None)
    assert len(set(costs)) > 2
    expected = twin.diagonal(draws, LOSSES, window, sigma, bound, kappa, costs, hyper_lr=0.1)
    for policy, (mu, log_sigma) in zip(after, expected, strict=True):
        np.testing.assert_allclose(policy["mean"].numpy(), mu, rtol=0, atol=1e-11)
        np.testing.assert_allclose(policy["log_std"].numpy(), log_sigma, rtol=0, atol=1e-11)


def test_the_released_code_trains_on_the_oldest_round_alone():
    """The twin with the bug: its gradient is one term of the sum, that of the oldest draw of the window."""
    buggy, summed = (twin.ReleasedCS(3, 5, seed=1, overwrites=overwrites) for overwrites in (True, False))
    for L in LOSSES[:4]:
        z = buggy.draw()
        summed.draw()
        assert np.array_equal(z, summed.draws[-1]) or len(buggy.L) > 2
        before = {name: value.copy() for name, value in buggy.policy.items()}
        gradient, true_gradient = buggy.observe(L), summed.observe(L)
        if len(buggy.L) == 3:  # rewards of rounds 1 and 2, both twins still the same
            rho = [1 - 1.7 / 2.0, 1 - 1.65 / 1.7]
            oldest = before["P"] @ (buggy.draws[0] - before["mu"]) * -(rho[0] - sum(rho) / 2)
            newest = before["P"] @ (buggy.draws[1] - before["mu"]) * -(rho[1] - sum(rho) / 2)
            np.testing.assert_allclose(gradient["mu"], oldest, **EXACT)
            np.testing.assert_allclose(true_gradient["mu"], oldest + newest, **EXACT)


def test_a_reward_is_credited_to_the_draw_of_the_round_before():
    """Draws above 0 in the first dimension halve the loss, others leave it; the mean must rise."""
    learner = PolicyLearner(SearchSpace(), "gaussian", 5, 0.05, (0.7, 0.7), 0.0)
    learner.setup(["a"], seed=0)
    loss = 1.0
    for r in range(40):
        z, _ = learner.draw(r)
        learner.learn(action(r, z.tolist(), loss))
        loss *= 0.5 if z[0] > 0 else 0.999
    mean = learner.tensors["policy"]["mean"]
    assert mean[0] > 0.5 and mean[0] == mean.abs().max()


def test_the_state_of_the_mlp_policy_goes_on_from_round_to_round():
    learner = PolicyLearner(SearchSpace(), "mlp", 5, 0.05, (0.7, 0.7), 0.0)
    learner.setup(["a"], seed=0)
    policy = build_policy("mlp", [9] * 4, 2.5, 0.6)
    state = policy.state()
    for r, loss in enumerate(LOSSES[:5]):
        held = {name: tensor.tolist() for name, tensor in state.items()}
        assert learner.state_in_plain_numbers() == held
        state = policy.next_state(learner.tensors["policy"], state)  # of the parameters that made the draw
        learner.learn(action(r, learner.draw(r)[0].tolist(), loss, state=held))
    assert learner.state_in_plain_numbers()["mean"] != [0.0] * 4


def peak(u, target):
    """The share of the best progress: 1 at the target, in units of half a range."""
    return math.exp(-((np.clip(u, -1, 1) - target) ** 2).sum() / (2 * len(target) * 0.35**2))


def progress(draw_and_learn, seed, num_rounds=200):
    """On a loss that falls by 5 % a round at a hidden optimum of 11 dimensions; mean of the last 50 rounds."""
    rng = np.random.default_rng(seed)
    target, loss, shares = rng.uniform(-0.6, 0.6, size=11), 1.0, []
    for r in range(num_rounds):
        shares.append(peak(draw_and_learn(r, loss), target))
        loss *= (1 - 0.05 * shares[-1]) * math.exp(0.002 * rng.normal())
    return np.mean(shares[-50:])


def our_progress(name, seed):
    learner = PolicyLearner(SearchSpace(), name, 5, 0.01, (0.7, 0.7), 0.0)
    learner.setup(list("abcdefgh"), seed)

    def draw_and_learn(r, loss):
        z, _ = learner.draw(r)
        learner.learn(action(r, z.tolist(), loss, state=learner.state_in_plain_numbers()))
        return z.numpy() / 4 - 1 if name == "categorical" else np.tanh(z.numpy())

    return progress(draw_and_learn, seed)


def released_progress(seed, overwrites):
    policy = twin.ReleasedCS(11, 5, seed, overwrites)

    def draw_and_learn(r, loss):
        z = policy.draw()
        policy.observe(loss)
        return 2 * z

    return progress(draw_and_learn, seed)


def test_policies_find_the_optimum_of_a_landscape_that_the_released_one_does_not():
    seeds = range(2)
    released = [released_progress(seed, True) for seed in seeds]
    assert np.mean(released) < 0.4
    for name in POLICIES:
        ours = [our_progress(name, seed) for seed in (seeds if name == "gaussian" else seeds[:1])]
        assert min(ours) > max(max(released) + 0.15, 0.55), (name, ours, released)


# Around an algorithm


def test_the_draw_is_sent_and_asked_again_is_the_same():
    run = Run()
    first, again = run.algorithm.configure(0), run.algorithm.configure(0)
    assert first == again and list(first) == ["a", "b", "c"]
    _, values = run.algorithm.learner.draw(0)
    for message in first.values():
        scalars = message.scalars
        assert scalars["learning_rate"] == values.learning_rate and scalars["local_epochs"] == values.local_epochs
        assert scalars["evaluate"] is True and scalars["algorithm"] == "fedavg"
        assert "local_steps" not in scalars
    run.round()
    assert run.algorithm.configure(1)["a"].scalars["learning_rate"] != values.learning_rate
    only = Run(space=SearchSpace(learning_rate=None, local_epochs=None)).algorithm.configure(0)["a"].scalars
    assert "learning_rate" not in only and "local_epochs" not in only


def test_shares_and_server_lr_hold_in_the_aggregation():
    run = Run()
    _, values = run.algorithm.learner.draw(0)
    ends = {site: reply.groups["weights"] for site, reply in run.replies().items()}
    before = run.algorithm.groups["weights"]
    metrics = run.round()
    assert sum(values.shares.values()) == pytest.approx(1) and len(set(values.shares.values())) == 3
    step = 0.0
    for name, weight in before.items():
        mean = sum(values.shares[site] * ends[site][name] for site in SITES)
        expected = weight + values.server_lr * (mean - weight)
        torch.testing.assert_close(run.algorithm.groups["weights"][name], expected, rtol=0, atol=1e-14)
        step += float((expected - weight).square().sum())
    assert metrics["num_samples"] == 60 and metrics["update_norm"] == pytest.approx(math.sqrt(step))


def test_shares_of_the_sites_that_answered_sum_to_1():
    run = Run(space=SearchSpace(learning_rate=None, local_epochs=None, server_lr=None))
    _, values = run.algorithm.learner.draw(0)
    ends = {site: reply.groups["weights"] for site, reply in run.replies().items()}
    run.round(drop=["b"])
    total = values.shares["a"] + values.shares["c"]
    expected = (values.shares["a"] * ends["a"]["w"] + values.shares["c"] * ends["c"]["w"]) / total
    torch.testing.assert_close(run.algorithm.groups["weights"]["w"], expected, rtol=0, atol=1e-14)
    rows = {row["site"]: row for row in run.algorithm.trace}
    assert rows["b"]["aggregation_weight"] == 0 and rows["b"]["eval_loss"] is None
    assert rows["a"]["aggregation_weight"] == pytest.approx(values.shares["a"] / total)


def test_without_shares_and_server_lr_the_step_is_that_of_the_inner_algorithm_bit_for_bit():
    space = SearchSpace(server_lr=None, aggregation_weights=None)
    run, plain = Run(FedAvgM(0.5), space), FedAvgM(0.5)
    plain.setup(SITES, Message({"weights": START}), seed=7)
    for r in range(4):
        replies = run.replies()
        plain.aggregate(r, replies)
        run.round()
        assert Message(run.algorithm.groups) == Message(plain.groups)


def test_it_wraps_fedsm():
    inner = FedSM(selector="none")
    run = Run(inner)
    assert run.algorithm.tuned is inner.tuned is inner
    ends = {site: reply.groups["personal"] for site, reply in run.replies().items()}
    run.round()
    expected = 0.7 * ends["a"]["w"] + 0.15 * (ends["b"]["w"] + ends["c"]["w"])
    torch.testing.assert_close(run.algorithm.groups["personal/a"]["w"], expected)
    message = run.algorithm.configure(1)["a"]
    assert message.scalars["label"] == 0 and "learning_rate" in message.scalars
    assert "personal" in run.algorithm.template("a").groups


def test_the_trace_has_a_row_a_round_and_site():
    run = Run()
    for r in range(4):
        run.round(drop=["a"] if r == 1 else ())
    trace = run.algorithm.trace
    assert [(row["round"], row["site"]) for row in trace] == [(r, site) for r in range(4) for site in "abc"]
    for row in trace:
        metrics = run.metrics[row["round"]]
        assert row["learning_rate"] == metrics["learning_rate"] and row["local_epochs"] == metrics["local_epochs"]
        answered = (row["round"], row["site"]) != (1, "a")
        assert row["num_steps"] == (row["local_epochs"] if answered else None)
        later = run.metrics[row["round"] + 1]["reward"] if row["round"] < 3 else None
        assert row["reward"] == later
    assert sum(row["aggregation_weight"] for row in trace[:3]) == pytest.approx(1)


def test_losses_are_weighed_by_samples_or_alike():
    for weighting, weights in (("samples", SAMPLES), ("uniform", dict.fromkeys(SAMPLES, 1))):
        run = Run(loss_weighting=weighting)
        losses = {site: reply.scalars["eval_loss"] for site, reply in run.replies().items()}
        shares = sample_shares(weights, "samples")
        assert run.round()["eval_loss"] == pytest.approx(sum(shares[site] * losses[site] for site in SITES))


@pytest.mark.parametrize("sites, expected", [("abc", (1 + 2 + 6) / 3), ("ab", (10 * 1 + 20 * 2 + 30 * 6) / 60)])
def test_losses_are_weighed_by_the_rows_they_are_of_where_all_say_so(sites, expected):
    run, replies = Run(), {}
    for site, reply in run.replies().items():
        scalars = {**reply.scalars, "eval_loss": {"a": 1.0, "b": 2.0, "c": 6.0}[site]}
        replies[site] = Message(reply.groups, scalars | ({"num_evaluated": 5} if site in sites else {}))
    assert run.algorithm.aggregate(0, replies)["eval_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_trace_and_another_seed_another(policy):
    runs = [Run(policy=policy, seed=seed) for seed in (7, 7, 8)]
    for run in runs:
        for _ in range(6):
            run.round()
    assert runs[0].algorithm.trace == runs[1].algorithm.trace
    assert same_bits(runs[0].algorithm.groups["weights"], runs[1].algorithm.groups["weights"])
    assert runs[0].algorithm.trace != runs[2].algorithm.trace


def through_files(state):
    """As storage has it: the tensors apart, all else as JSON, groups without tensors dropped."""
    plain = json.loads(json.dumps({name: value for name, value in state.items() if name != "groups"}))
    header, arrays = Message({name: group for name, group in state["groups"].items() if group}).to_flat()
    return {**plain, "groups": Message.from_flat(header, arrays).groups}


@pytest.mark.parametrize("guard", [None, 1.05])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_search_goes_on_bit_for_bit(policy, guard):
    losses = [2.0, 1.7, 1.65, 1.8, 1.2, 1.1, 1.3, 1.0, 0.7]
    options = {"policy": policy, "guard": guard, "losses": losses}
    whole, reverted = Run(FedSM(selector="none"), **options), []
    for r in range(9):
        if r in (3, 6):  # at 3 just before a jump of the losses, at 6 too
            parts = Run(FedSM(selector="none"), **options)
            if r == 3:
                parts.algorithm = AutoFedRL(FedSM(selector="none"), SMALL, policy, guard=guard)
            parts.algorithm.load_state_dict(through_files(whole.algorithm.state_dict()))
            fork = whole
            whole = parts
            for run in (fork, parts):
                run.metrics = []
        reverted.append(whole.round()["reverted"])
        if r >= 3:
            fork.round()
            mine, theirs = whole.algorithm.state_dict(), fork.algorithm.state_dict()
            assert Message(mine.pop("groups")) == Message(theirs.pop("groups"))
            assert mine == theirs and whole.metrics == fork.metrics
    assert sum(reverted) == (2 if guard else 0)


def test_a_search_resumed_with_another_space_or_policy_is_refused_with_the_difference():
    state = Run().algorithm.state_dict()
    other = AutoFedRL(FedAvg(), SearchSpace(learning_rate=(1e-3, 0.1), local_epochs=(1, 4)))
    with pytest.raises(InputError, match=r"learning_rate=\[0.001, 0.3\] \(here \[0.001, 0.1\]\); give the same"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match=r"with policy=gaussian \(here mlp\)"):
        AutoFedRL(FedAvg(), SMALL, policy="mlp").load_state_dict(state)
    with pytest.raises(InputError, match="that of 'fedavg', not of 'fedsm'"):
        AutoFedRL(FedSM(selector="none"), SMALL).load_state_dict(state)
    with pytest.raises(InputError, match="that of 'fedavg', not of 'auto_fedrl'"):
        AutoFedRL(FedAvg(), SMALL).load_state_dict(FedAvg().state_dict())


# What must not teach the policy anything


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_loss_that_is_none_skips_the_update(bad):
    losses = [2.0, 1.7, 1.6, bad, 1.4, 1.2, 1.1]
    run = Run(losses=losses)
    updated = [run.round()["policy_updated"] for _ in losses]
    assert updated == [False, False, True, False, False, True, True]
    assert all(tensor.isfinite().all() for tensor in run.policy.values())


def test_equal_rewards_leave_the_policy_as_it_is():
    run = Run(losses=[2.0**-r for r in range(6)])
    before = dict(run.policy)
    assert not any(run.round()["policy_updated"] for _ in range(6))
    assert same_bits(run.policy, before)


def test_rewards_compare_the_sites_of_both_rounds():
    run = Run()
    first = {site: reply.scalars["eval_loss"] for site, reply in run.replies().items()}
    run.round(drop=["c"])
    second = {site: reply.scalars["eval_loss"] for site, reply in run.replies().items()}
    L = [(10 * losses["a"] + 20 * losses["b"]) / 30 for losses in (first, second)]
    assert run.round()["reward"] == pytest.approx(1 - L[1] / L[0])


@pytest.mark.parametrize("jump", [5.0, float("nan")])
def test_the_guard_takes_model_and_policy_back_to_before_the_draw(jump):
    losses = [2.0, 1.7, 1.6, 1.5, jump, 1.5, 1.4]
    run, free = Run(losses=losses, guard=2.0), Run(losses=losses)
    for _ in range(3):
        run.round(), free.round()
    before = run.algorithm.state_dict()["groups"]
    run.round(), free.round()
    assert run.round()["reverted"] and not free.round()["reverted"]
    after = run.algorithm.state_dict()["groups"]
    for name in ("weights", "auto_fedrl/policy", "auto_fedrl/policy_m", "auto_fedrl/policy_step"):
        assert same_bits(after[name], before[name])
        assert not same_bits(free.algorithm.state_dict()["groups"]["weights"], before["weights"])
    assert run.algorithm.round == 5
    # The next draw is another one, and its loss no reward of the one taken back.
    metrics = run.round()
    assert metrics["reward"] is None and not metrics["policy_updated"]
    assert run.round()["policy_updated"]


def test_a_reply_without_a_loss_counts_as_absent():
    run, without_b = Run(), Run()
    reply = run.replies()["b"]
    scalars = {name: value for name, value in reply.scalars.items() if name != "eval_loss"}
    metrics = run.round(change={"b": Message(reply.groups, scalars)})
    assert metrics["refused"] == {"b": "no eval_loss, which is a float"} and metrics["absent"] == []
    without_b.round(drop=["b"])
    assert same_bits(run.algorithm.groups["weights"], without_b.algorithm.groups["weights"])
    none = {site: Message(reply.groups, {**reply.scalars, "eval_loss": 1}) for site, reply in run.replies().items()}
    with pytest.raises(
        RuntimeError, match=r"round 1: no eval_loss, a float, from \['a', 'b', 'c'\]; give these sites"
    ):
        run.algorithm.aggregate(1, none)
    assert run.algorithm.round == 1


@pytest.mark.parametrize("num_samples", [0, -3, 1.5, True])
def test_shares_do_not_hide_a_bad_number_of_samples(num_samples):
    run = Run()
    reply = run.replies()["b"]
    bad = Message(reply.groups, {**reply.scalars, "num_samples": num_samples})
    assert "num_samples" in run.round(change={"b": bad, "x": "nothing"})["refused"]["b"]
    assert "not on the roster" in run.metrics[-1]["refused"]["x"]


@pytest.mark.parametrize(
    "inner, options, field",
    [
        (FedAvg, {"policy": "random"}, "policy"),
        (FedAvg, {"window": 1}, "window"),
        (FedAvg, {"hyper_lr": 0.0}, "hyper_lr"),
        (FedAvg, {"hyper_betas": (0.7, 1.0)}, "hyper_betas"),
        (FedAvg, {"cost_weight": -1.0}, "cost_weight"),
        (FedAvg, {"guard": 1.0}, "guard"),
        (FedAvg, {"loss_weighting": "steps"}, "loss_weighting"),
        (lambda: FedAvg(weighting="uniform"), {}, "weighting"),
        (Scaffold, {"guard": 2.0}, "guard"),
    ],
)
def test_options_out_of_range_are_named(inner, options, field):
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        AutoFedRL(inner(), **options)


def test_uniform_weights_are_fine_where_no_shares_are_searched():
    run = Run(FedAvg(weighting="uniform"), SearchSpace(aggregation_weights=None, server_lr=None))
    ends = [reply.groups["weights"] for reply in run.replies().values()]
    run.round()
    mean = weighted_mean(ends, [1 / 3] * 3)
    torch.testing.assert_close(run.algorithm.groups["weights"], mean, rtol=0, atol=1e-14)
