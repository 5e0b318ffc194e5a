"""RSGD around other optimizers: against its twin, RSGD itself, and the bases alone."""

import copy

import numpy as np
import pytest
import torch

from hf_mlopt.optimizers import RSGD, RSGDWrapper
from tests.least_squares import LeastSquares, drive, flat, parameters, set_gradients
from tests.reference import rsgd as twin


PROBLEM = LeastSquares()
STEPS = 100
SCHEDULE = [0.002 * t for t in range(20)] + [0.0] * 3 + [0.03 * (1 - t / 76) for t in range(77)]
BASES = {
    "AdamW": {"weight_decay": 0.1, "base_args": {"betas": (0.8, 0.95)}},
    "Adam": {"base_args": {"amsgrad": True}},
    "SGD": {"weight_decay": 0.05, "base_args": {"momentum": 0.9, "nesterov": True}},
    "RMSprop": {},
    "Adagrad": {},
    "NAdam": {},
    "RAdam": {},
}


def wrapped(params, base="AdamW", **options):
    return RSGDWrapper(params, lr=0.1, base=base, **options)


def at(optimizer, params, point):
    for group in optimizer.param_groups:
        group["eval_point"] = point
    optimizer.eval()
    seen = flat(params)
    optimizer.train()
    return seen


def run(make, lrs=SCHEDULE):
    params = parameters(PROBLEM.start)
    return np.array(list(drive(make(params), params, PROBLEM.gradient, lrs)))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


# ---- the twin


@pytest.mark.parametrize(
    ("rho", "lam", "period", "reset_period"),
    [(0.9, 0.3, 1, 0), (0.5, 0.0, 1, 0), (0.9, 1.0, 1, 9), (0.9, 0.3, 4, 0), (0.6, 0.5, 5, 10), (0.0, 0.3, 1, 0)],
)
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_twin(base, rho, lam, period, reset_period):
    args = {"AdamW": {"betas": (0.8, 0.95), "eps": 1e-6}, "SGD": {"momentum": 0.8}}[base]
    of_base = {"AdamW": twin.AdamW(0.8, 0.95, 1e-6, wd=0.1), "SGD": twin.Momentum(0.8, wd=0.1)}[base]
    periods = {"period": period, "reset_period": reset_period}
    params = parameters(PROBLEM.start)
    optimizer = wrapped(params, base, base_args=args, residual=rho, detach=lam, weight_decay=0.1, **periods)
    expected = twin.rsgd(PROBLEM.start, PROBLEM.gradient, SCHEDULE, of_base, rho, lam, **periods)
    for t, (w, theirs) in enumerate(zip(drive(optimizer, params, PROBLEM.gradient, SCHEDULE), expected, strict=True)):
        assert_close(w, theirs[0])
        if t % 7 == 0:
            assert_close([at(optimizer, params, "x"), at(optimizer, params, "y")], theirs[1:])


def test_twin_with_groups():
    """Options of the wrapper and of the base, and a schedule, of their own in each group."""
    options = [
        {"residual": 0.9, "detach": 0.3, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {"residual": 0.5, "detach": 1.0, "betas": (0.5, 0.9), "weight_decay": 0.1},
        {"residual": 0.7, "detach": 0.0, "betas": (0.0, 0.9), "weight_decay": 0.2},
    ]
    sizes = (3, 4, 1)
    rho, lam, wd = (np.repeat([o[name] for o in options], sizes) for name in ("residual", "detach", "weight_decay"))
    beta1, beta2 = (np.repeat([o["betas"][n] for o in options], sizes) for n in range(2))
    lrs = [(eta, 0.02, 2 * eta) for eta in SCHEDULE]
    of_base = twin.AdamW(beta1, beta2, wd=wd)
    expected = twin.rsgd(PROBLEM.start, PROBLEM.gradient, [np.repeat(eta, sizes) for eta in lrs], of_base, rho, lam)
    ours = run(lambda params: wrapped([{"params": [p], **o} for p, o in zip(params, options, strict=True)]), lrs)
    assert_close(ours, [w for w, _, _ in expected])


# ---- what it equals


@pytest.mark.parametrize("options", [{"detach": 0.3}, {"residual": 0.5, "detach": 0.0}, {"period": 3}])
def test_over_sgd_it_is_rsgd(options):
    ours = run(
        lambda params: wrapped(params, "SGD", base_args={"momentum": 0.8}, weight_decay=0.05, **options),
    )
    assert_close(ours, run(lambda params: RSGD(params, lr=0.1, momentum=0.8, weight_decay=0.05, **options)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{"residual": 0.0}, {"residual": 0.8, "detach": 1.0}])
def test_detached_fully_or_without_residual_w_is_that_of_the_base(base, options):
    arguments = copy.deepcopy(BASES[base])
    keywords = {**arguments.pop("base_args", {}), "weight_decay": 0.0, **arguments}
    alone = run(lambda params: getattr(torch.optim, base)(params, lr=0.1, **keywords))
    assert_close(run(lambda params: wrapped(params, base, **options, **BASES[base])), alone)


def test_detached_fully_x_is_the_average_of_the_base():
    params = parameters(PROBLEM.start)
    optimizer = wrapped(params, residual=0.8, detach=1.0)
    average = PROBLEM.start
    for w in drive(optimizer, params, PROBLEM.gradient, SCHEDULE):
        average = 0.8 * average + 0.2 * w
        assert_close(at(optimizer, params, "x"), average)
    assert np.abs(average - w).max() > 0.001


# ---- the base


def test_a_class_is_as_good_as_its_name():
    np.testing.assert_array_equal(run(wrapped), run(lambda params: wrapped(params, torch.optim.AdamW)))


class AveragedSignDescent(torch.optim.Optimizer):
    """One that is not of torch; its state is a number, and a float32 average whatever the parameter is."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["mean"] = state.get("mean", 0.0) + parameter.grad.float() / 3
                parameter.sub_(state["mean"].sign() * group["lr"] / state["count"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_optimizer_from_elsewhere(dtype):
    params = parameters(PROBLEM.start, dtype)
    optimizer = wrapped(params, AveragedSignDescent, residual=0.0)
    list(drive(optimizer, params, lambda w, t: np.ones(8), [0.1] * 2))
    np.testing.assert_allclose(flat(params), PROBLEM.start - 0.15, atol=1e-12 if dtype == torch.float64 else 0.01)
    mean = optimizer.state[params[0]]["base"]["mean"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"][0]["base"]["count"] == 2
    torch.testing.assert_close(optimizer.state[params[0]]["base"]["mean"], mean, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.base.state[params[0]]["mean"], mean, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["AdamX", "Optimizer2", torch.nn.Linear, "lr_scheduler"])
def test_what_is_no_optimizer_is_refused_with_those_that_are(base):
    with pytest.raises(ValueError, match="base=.*AdamW.*SGD"):
        wrapped(parameters(PROBLEM.start), base)


def test_keywords_which_the_base_does_not_take():
    with pytest.raises(ValueError, match="base_args=.*nesterov.*AdamW"):
        wrapped(parameters(PROBLEM.start), base_args={"nesterov": True})


def test_values_which_the_base_does_not_take():
    with pytest.raises(ValueError, match="beta"):
        wrapped(parameters(PROBLEM.start), base_args={"betas": (1.5, 0.9)})


def test_keywords_are_not_changed():
    arguments = {"betas": (0.8, 0.9)}
    wrapped(parameters(PROBLEM.start), base_args=arguments)
    assert arguments == {"betas": (0.8, 0.9)}


def test_the_state_of_the_base_is_in_the_state_dict_and_goes_on_from_it():
    params = parameters(PROBLEM.start)
    optimizer = wrapped(params)
    list(drive(optimizer, params, PROBLEM.gradient, SCHEDULE[:30]))
    saved = copy.deepcopy(optimizer.state_dict())
    assert {"base", "residual"} <= saved["state"][0].keys()
    assert set(saved["state"][0]["base"]) == {"step", "exp_avg", "exp_avg_sq"}

    again = parameters(flat(params))
    resumed = wrapped(again)
    resumed.load_state_dict(saved)
    lrs = SCHEDULE[30:]
    for one, its in ((optimizer, params), (resumed, again)):
        list(drive(one, its, PROBLEM.gradient, lrs))
    np.testing.assert_array_equal(flat(again), flat(params))
    assert resumed.state_dict()["state"][0]["base"]["step"] == STEPS


def test_a_schedule_of_beta_reaches_the_base():
    """OneCycleLR moves betas as well as the learning rate."""

    def cycled(make):
        params = parameters(PROBLEM.start)
        optimizer = make(params)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
        for t in range(19):
            set_gradients(params, PROBLEM.gradient(flat(params), t))
            optimizer.step()
            scheduler.step()
        return flat(params)

    ours = cycled(lambda params: wrapped(params, residual=0.0, weight_decay=0.01))
    theirs = cycled(lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.01))
    assert_close(ours, theirs)


@pytest.mark.parametrize("period", [1, 3])
def test_buffers_are_those_in_use(period):
    params = parameters(PROBLEM.start)
    optimizer = wrapped(params, "SGD", period=period)
    set_gradients(params, PROBLEM.start)
    optimizer.step()
    for parameter in params:
        tensors = {name for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
        assert tensors == ({"residual"} if period == 1 else {"residual", "pending"})
