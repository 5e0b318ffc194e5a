"""RSGD against its twin, and what it equals in special cases."""

import numpy as np
import pytest
import torch

from hf_mlopt.optimizers import RSGD, stability_bound
from tests.least_squares import LeastSquares, drive, flat, parameters, set_gradients
from tests.reference import rsgd as twin


PROBLEM = LeastSquares()
STEPS = 200
LOOKS = range(0, STEPS, 7)  # steps after which x and y are looked at; every phase of a period of 3, 4 or 5
CONSTANT = [0.02] * STEPS
# Warm-up from 0, zeros in the middle, linear decay to 0: the residual must survive all of them.
SCHEDULE = [0.002 * t for t in range(20)] + [0.0] * 3 + [0.03 * (1 - t / 176) for t in range(177)]


def at(optimizer, params, point):
    """The parameters at "w", "x" or "y". The optimizer goes on at w."""
    for group in optimizer.param_groups:
        group["eval_point"] = point
    optimizer.eval()
    seen = flat(params)
    optimizer.train()
    return seen


def trajectory(lrs, groups=None, look=True, **options):
    """{point: [steps, numbers]}; x and y after the steps in `LOOKS` alone, w after all of them."""
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params if groups is None else groups(params), lr=0.1, **options)
    seen = {"w": [], "x": [], "y": []}
    for t, w in enumerate(drive(optimizer, params, PROBLEM.gradient, lrs)):
        seen["w"].append(w)
        for point in ("x", "y") if look and t in LOOKS else ():
            seen[point].append(at(optimizer, params, point))
    return {point: np.array(values) for point, values in seen.items()}


def of_torch(lrs, scale=1.0, **options):
    params = parameters(PROBLEM.start)
    optimizer = torch.optim.SGD(params, lr=0.1, **options)
    return np.array(list(drive(optimizer, params, PROBLEM.gradient, [scale * eta for eta in lrs])))


def of_twin(lrs, mu=0.0, wd=0.0, rho=0.9, lam=0.3, **options):
    return list(twin.rsgd(PROBLEM.start, PROBLEM.gradient, lrs, twin.Momentum(mu, wd), rho, lam, **options))


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-13)


def assert_same(ours, *theirs):
    """`theirs`: w, x, and y unless there is none, after each step."""
    assert_close(ours["w"], theirs[0])
    for point, values in zip(("x", "y"), theirs[1:], strict=False):
        assert_close(ours[point], [values[t] for t in LOOKS])


# ---- the twin


@pytest.mark.parametrize(("rho", "lam"), [(0.9, 0.3), (0.5, 0.0), (0.99, 0.7), (0.6, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize(("mu", "wd"), [(0.0, 0.0), (0.8, 0.05)])
def test_twin(rho, lam, mu, wd):
    ours = trajectory(SCHEDULE, momentum=mu, residual=rho, detach=lam, weight_decay=wd)
    assert_same(ours, *zip(*of_twin(SCHEDULE, mu, wd, rho, lam), strict=True))


@pytest.mark.parametrize(
    ("period", "reset_period", "rho"),
    [(3, 0, 0.9), (1, 7, 0.9), (4, 8, 0.5), (5, 5, 0.9), (4, 6, 0.9), (201, 0, 0.9), (4, 0, 0.0)],
)
def test_twin_with_periods(period, reset_period, rho):
    ours = trajectory(
        SCHEDULE, momentum=0.8, residual=rho, weight_decay=0.05, period=period, reset_period=reset_period
    )
    theirs = of_twin(SCHEDULE, 0.8, 0.05, rho=rho, period=period, reset_period=reset_period)
    assert_same(ours, *zip(*theirs, strict=True))


def test_twin_with_groups():
    """Every option and a schedule of its own in each group."""
    lrs = [(eta, 0.02, 2 * eta) for eta in SCHEDULE]
    options = [
        {"momentum": 0.9, "residual": 0.9, "detach": 0.3, "weight_decay": 0.0},
        {"momentum": 0.0, "residual": 0.5, "detach": 1.0, "weight_decay": 0.1},
        {"momentum": 0.5, "residual": 0.0, "detach": 0.0, "weight_decay": 0.02},
    ]
    ours = trajectory(lrs, groups=lambda params: [{"params": [p], **o} for p, o in zip(params, options, strict=True)])
    sizes = (3, 4, 1)
    mu, rho, lam, wd = (np.repeat([o[name] for o in options], sizes) for name in options[0])
    theirs = of_twin([np.repeat(eta, sizes) for eta in lrs], mu, wd, rho, lam)
    assert_same(ours, *zip(*theirs, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("period", [1, 3])
def test_twin_with_jumps(period, foreach):
    """Learning rates of all magnitudes, 0 for long, as numbers and as tensors; ρ that jumps, to 0 as well."""
    generator = np.random.default_rng(1)
    lrs = generator.choice([0.0, 1e-12, 1e-6, 1e-3, 0.03, 0.06], STEPS)
    rhos = generator.choice([0.0, 0.4, 0.9, 0.99], STEPS)
    lrs[50:100], rhos[50:100] = 0.0, 0.4
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.1, momentum=0.5, period=period, foreach=foreach)
    expected = twin.rsgd(
        PROBLEM.start, PROBLEM.gradient, lrs, twin.Momentum(0.5), lambda t: rhos[t], lam=0.3, period=period
    )
    for t, (w, x, y) in enumerate(expected):
        lr = torch.tensor(lrs[t]) if t // 10 % 3 == 1 else float(lrs[t])
        optimizer.param_groups[0].update(lr=lr, residual=float(rhos[t]))
        set_gradients(params, PROBLEM.gradient(flat(params), t))
        optimizer.step()
        assert_close([at(optimizer, params, point) for point in ("w", "x", "y")], [w, x, y])


def test_looking_at_x_and_y_does_not_change_w():
    assert_close(trajectory(SCHEDULE, momentum=0.9)["w"], trajectory(SCHEDULE, look=False, momentum=0.9)["w"])


def test_maximize_is_descent_on_the_negative():
    ours, theirs = (parameters(PROBLEM.start) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    up = drive(RSGD(ours, maximize=True, **options), ours, lambda w, t: -PROBLEM.gradient(w, t), SCHEDULE)
    down = drive(RSGD(theirs, **options), theirs, PROBLEM.gradient, SCHEDULE)
    np.testing.assert_array_equal(list(up), list(down))


# ---- what it equals


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("mu", "wd"), [(0.0, 0.0), (0.9, 0.05)])
@pytest.mark.parametrize("foreach", [False, True])
def test_without_residual_it_is_sgd(lam, mu, wd, foreach):
    """Bit for bit, but for the loop with momentum, which takes two operations of torch's in one."""
    ours = trajectory(SCHEDULE, residual=0.0, detach=lam, momentum=mu, weight_decay=wd, foreach=foreach)
    sgd = of_torch(SCHEDULE, momentum=mu, weight_decay=wd, foreach=foreach)
    tolerance = 2e-15 if mu > 0 and not foreach else 0.0
    for point, expected in (("w", sgd), ("x", sgd[LOOKS]), ("y", sgd[LOOKS])):
        np.testing.assert_allclose(ours[point], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("mu", "wd"), [(0.0, 0.0), (0.9, 0.05)])
def test_detached_fully_w_is_sgd_and_x_its_average(mu, wd):
    ours = trajectory(SCHEDULE, residual=0.8, detach=1.0, momentum=mu, weight_decay=wd)
    sgd = of_torch(SCHEDULE, momentum=mu, weight_decay=wd)
    average, averages = PROBLEM.start, []
    for w in sgd:
        average = 0.8 * average + 0.2 * w
        averages.append(average)
    assert_same(ours, sgd, averages, sgd)


def test_attached_it_is_heavy_ball():
    ours = trajectory(CONSTANT, residual=0.7, detach=0.0)
    heavy_ball = of_torch(CONSTANT, scale=1 - 0.7, momentum=0.7)
    assert_same(ours, heavy_ball, heavy_ball)
    assert np.abs(ours["y"] - heavy_ball[LOOKS]).max() > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_with_a_growing_residual_it_is_schedule_free(lam):
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.02, detach=lam)
    theirs = twin.schedule_free_sgd(PROBLEM.start, PROBLEM.gradient, CONSTANT, beta=1 - lam)
    for t, expected in enumerate(theirs):
        optimizer.param_groups[0]["residual"] = t / (t + 1)
        set_gradients(params, PROBLEM.gradient(flat(params), t))
        optimizer.step()
        assert_close([at(optimizer, params, point) for point in ("w", "x", "y")], expected)


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_order_of_operations_of_detached_error_feedback(lam, period):
    ours = trajectory(SCHEDULE, residual=0.8, detach=lam, momentum=0.9, period=period)
    theirs = twin.detached_error_feedback(
        PROBLEM.start, PROBLEM.gradient, SCHEDULE, lambda v: (1 - 0.8) * v, lam, 0.9, period
    )
    assert_same(ours, *zip(*theirs, strict=True))


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_with_resets_it_is_lookahead(mu):
    ours = trajectory(CONSTANT, momentum=mu, residual=0.4, period=5, reset_period=5)
    theirs = twin.lookahead(PROBLEM.start, PROBLEM.gradient, CONSTANT, k=5, a=0.6, mu=mu)
    assert_same(ours, *zip(*theirs, strict=True))


# ---- stability


@pytest.mark.parametrize(
    ("rho", "lam", "bound"),
    [(0, 0.4, 2), (0.5, 0.3, 3.75), (0.9, 0.3, 5.94), (0.99, 0.3, 6.59), (0.9, 0, 38), (0.7, 1, 2)],
)
def test_stability_bound_of_known_cases(rho, lam, bound):
    assert stability_bound(rho, lam) == pytest.approx(bound, abs=0.005)


def growth(rho, lam, lr):
    """Spectral radius of a step at curvature 1, which maps (w, e) linearly, from two runs of two steps at once."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))
    optimizer = RSGD([parameter], lr=lr, residual=rho, detach=lam)
    parameter.grad = torch.tensor([1.0, -1.0], dtype=torch.float64) / lr  # anything, so that e differs
    states = []
    for _ in range(2):
        optimizer.step()
        w, x, y = (at(optimizer, [parameter], point) for point in ("w", "x", "y"))
        states.append(np.stack([w, x - y]))
        parameter.grad = parameter.detach().clone()
    return np.abs(np.linalg.eigvals(states[1] @ np.linalg.inv(states[0]))).max()


@pytest.mark.parametrize("rho", [0.01, 0.2, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_stability_bound(rho, lam):
    bound = stability_bound(rho, lam)
    assert growth(rho, lam, 0.999 * bound) < 1 < growth(rho, lam, 1.001 * bound)
    assert growth(rho, lam, 0.001 * bound) < 1


@pytest.mark.parametrize(("factor", "low", "high"), [(0.99, 0, 0.2), (1.01, 5, np.inf)])
def test_a_run_near_the_stability_bound(factor, low, high):
    parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = RSGD([parameter], lr=factor * stability_bound(0.9, 0.3))
    for _ in range(500):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert low <= abs(parameter.item()) < high


# ---- views and memory


@pytest.mark.parametrize("point", ["w", "x", "y"])
@pytest.mark.parametrize("period", [1, 4])
def test_views_are_idempotent_and_inverse(point, period):
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.1, momentum=0.9, period=period, eval_point=point)
    ours = list(drive(optimizer, params, PROBLEM.gradient, SCHEDULE[:50]))
    w, x, y = of_twin(SCHEDULE[:50], 0.9, period=period)[-1]
    optimizer.train()
    np.testing.assert_array_equal(flat(params), ours[-1])
    for _ in range(2):
        optimizer.eval()
        assert_close(flat(params), {"w": w, "x": x, "y": y}[point])
    for _ in range(2):
        optimizer.train()
        assert_close(flat(params), w)


def test_views_of_new_parameters_are_the_parameters():
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.1)
    optimizer.eval()
    np.testing.assert_array_equal(flat(params), PROBLEM.start)


def test_views_work_where_gradients_are_recorded():
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.1)
    list(drive(optimizer, params, PROBLEM.gradient, [0.1]))
    with torch.enable_grad():
        optimizer.eval()
        optimizer.train()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in params)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"residual"}),
        ({"momentum": 0.9}, {"residual", "momentum_buffer"}),
        ({"momentum": 0.9, "period": 3}, {"residual", "momentum_buffer", "pending"}),
    ],
)
@pytest.mark.parametrize("foreach", [False, True])
def test_buffers_are_those_in_use(options, names, foreach):
    params = parameters(PROBLEM.start)
    optimizer = RSGD(params, lr=0.1, foreach=foreach, **options)
    assert not optimizer.state
    set_gradients(params, PROBLEM.start)
    optimizer.step()
    for parameter in params:
        state = optimizer.state[parameter]
        assert {name for name, value in state.items() if torch.is_tensor(value)} == names
        assert all(state[name].shape == parameter.shape for name in names)
