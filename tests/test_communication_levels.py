"""The levels that BinGrad and ORQ find, against search over all candidates."""

import math

import pytest
import torch

from hf_mlopt.communication.quantizers import orq_levels as module
from hf_mlopt.communication.quantizers.memory import Memory
from hf_mlopt.communication.quantizers.orq_levels import binned_points, count_rule, end_rule, orq_levels, sorted_points
from tests.reference import gradient_codecs as reference


def sample(distribution: str, *shape: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    if distribution == "gaussian":
        return torch.randn(shape)
    if distribution == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample(shape)
    if distribution == "student":
        return torch.distributions.StudentT(3.0).sample(shape)
    return torch.where(torch.rand(shape) < 0.25, 2 + 0.5 * torch.randn(shape), -0.5 + 0.4 * torch.randn(shape))


DISTRIBUTIONS = ("gaussian", "laplace", "student", "skewed")


def points(rows: torch.Tensor):
    return sorted_points(rows, Memory("cpu"))


def relative_error(rows: torch.Tensor, levels: torch.Tensor) -> float:
    """E‖Q(v) - v‖² / ‖v‖² of stochastic rounding, without drawing."""
    v, b = rows.double(), levels.double().contiguous()
    inside = v.clamp(b[:, :1], b[:, -1:])
    k = (torch.searchsorted(b, inside.contiguous(), right=True) - 1).clamp(0, b.shape[1] - 2)
    rounding = (b.gather(1, k + 1) - inside) * (inside - b.gather(1, k))
    return ((rounding + (v - inside).square()).sum() / v.square().sum()).item()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [3, 4, 17, 60])
def test_the_count_rule_finds_the_best_entry(distribution, size):
    rows = sample(distribution, 20, size)
    p = points(rows)
    low, high = rows.amin(1, keepdim=True).double(), rows.amax(1, keepdim=True).double()
    first = torch.zeros_like(low, dtype=torch.int64)
    value, position, stop = count_rule(p, low, first, high, first + size)
    expected = [reference.best_between(row, min(row), max(row)) for row in rows.tolist()]
    assert value[:, 0].tolist() == expected
    assert torch.equal(p.values_NM.gather(1, position).double(), value) and torch.equal(stop, position + 1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [3, 4, 17, 60])
def test_the_end_rule_finds_the_best_ends(distribution, size):
    rows = sample(distribution, 20, size).sort(dim=1).values
    middle = size // 2
    inner = rows[:, middle : middle + 1].double().expand(-1, 2)
    border = torch.tensor([[middle + 1, middle]]).expand(20, -1)
    value, position = end_rule(points(rows), inner, border)
    for i, row in enumerate(rows.tolist()):
        left = -reference.best_end([-x for x in row], -row[middle])
        assert value[i].tolist() == pytest.approx([left, reference.best_end(row, row[middle])], rel=1e-12)
        assert row[position[i, 0]] >= value[i, 0] - 1e-9 and row[position[i, 1]] <= value[i, 1] + 1e-9


def test_the_best_end_is_an_entry_where_the_equation_has_no_root_between_two():
    # The error falls up to 4 and grows from there: the equation of the gap before 4 has its root, 4.75, behind it.
    row = [0.0, 1.0, 4.0, 6.0]
    inner, border = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1, 0]])
    value, _ = end_rule(points(torch.tensor([row])), inner, border)
    assert value[0, 1] == pytest.approx(reference.best_end(row, 0.0)) == 4.0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_levels", [3, 5, 9])
@pytest.mark.parametrize("clip", ["none", 2.5, 1.0, "optimal"])
def test_orq_agrees_with_trying_every_candidate(distribution, num_levels, clip):
    rows = sample(distribution, 4, 48, seed=num_levels)
    ends = None
    if isinstance(clip, float):
        reach = clip * rows.double().square().mean(1, keepdim=True).sqrt()
        ends = points(rows).ends_N2.double().minimum(reach).maximum(-reach)
    found = orq_levels(points(rows), num_levels, ends_N2=ends, optimal_ends=clip == "optimal", sweeps=3)
    for row, levels in zip(rows.tolist(), found, strict=True):
        expected = reference.orq(row, num_levels, clip, sweeps=3)
        torch.testing.assert_close(levels.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@pytest.mark.parametrize("num_levels", [3, 5, 9])
def test_two_sweeps_come_within_half_a_per_cent_of_the_optimum(distribution, num_levels):
    rows = sample(distribution, 3, 256, seed=1)
    found = orq_levels(points(rows), num_levels, sweeps=2)
    optimum = sum(reference.orq_exact_error(row, num_levels) for row in rows.tolist())
    error = relative_error(rows, found) * rows.double().square().sum().item()
    assert optimum * (1 - 1e-9) <= error <= optimum * 1.005


def test_sweeps_help_where_bisection_errs():
    rows = sample("student", 64, 512)
    errors = [relative_error(rows, orq_levels(points(rows), 9, sweeps=sweeps)) for sweeps in (0, 2, 8)]
    assert errors[0] > 1.01 * errors[1] > 1.01 * errors[2]


# Expected error relative to ‖v‖² of 2048 entries, the mean of 64 blocks.
MEASURED = {
    ("gaussian", 3, "none"): 1.718,
    ("gaussian", 5, "none"): 0.339,
    ("gaussian", 9, "none"): 0.077,
    ("laplace", 5, "none"): 0.504,
    ("laplace", 9, "none"): 0.114,
    ("gaussian", 3, "optimal"): 0.266,
    ("gaussian", 5, "optimal"): 0.125,
    ("gaussian", 9, "optimal"): 0.048,
    ("laplace", 3, "optimal"): 0.363,
    ("laplace", 5, "optimal"): 0.186,
    ("laplace", 9, "optimal"): 0.074,
    ("gaussian", 2, "optimal"): 0.455,
    ("laplace", 2, "optimal"): 0.580,
}


@pytest.mark.parametrize("distribution, num_levels, clip", MEASURED)
def test_errors_are_those_on_record(distribution, num_levels, clip):
    rows = sample(distribution, 64, 2048, seed=2)
    found = orq_levels(points(rows), num_levels, optimal_ends=clip == "optimal", sweeps=16 if clip == "optimal" else 2)
    tolerance = 0.03 if distribution == "gaussian" else 0.05
    assert relative_error(rows, found) == pytest.approx(MEASURED[distribution, num_levels, clip], rel=tolerance)


@pytest.mark.parametrize("num_levels", [5, 9])
def test_five_sweeps_are_enough_for_free_ends(num_levels):
    rows = sample("gaussian", 32, 2048, seed=3)
    five, many = (
        relative_error(rows, orq_levels(points(rows), num_levels, optimal_ends=True, sweeps=sweeps))
        for sweeps in (5, 40)
    )
    assert many <= five <= 1.025 * many


@pytest.mark.parametrize("distribution", ["gaussian", "skewed"])
def test_two_free_ends_are_the_best_of_a_grid(distribution):
    rows = sample(distribution, 1, 200, seed=4)
    found = orq_levels(points(rows), 2, optimal_ends=True, sweeps=16)
    row = rows[0].tolist()
    grid = torch.linspace(min(row), max(row), 60).tolist()
    best = min(reference.expected_error(row, (low, high)) for low in grid for high in grid if low < high)
    assert reference.expected_error(row, found[0].tolist()) <= best
    levels = found[0].double().tolist()
    for side in (0, 1):
        for nudge in (-1e-3, 1e-3):
            moved = [level + nudge * (k == side) for k, level in enumerate(levels)]
            assert reference.expected_error(row, levels) <= reference.expected_error(row, moved)


def test_symmetric_entries_give_the_levels_of_the_fixed_point():
    half = sample("gaussian", 1, 20_000, seed=5).abs()
    rows = torch.cat((half, -half), dim=1)
    low, high = orq_levels(points(rows), 2, optimal_ends=True, sweeps=40)[0].tolist()
    assert high == pytest.approx(-low, rel=2e-3)
    assert high == pytest.approx(rows.abs()[rows.abs() >= high].sum().item() / 40_000, rel=1e-3)
    assert high == pytest.approx(0.647, rel=0.02)


@pytest.mark.parametrize("num_levels", [2, 3, 5, 9, 17])
@pytest.mark.parametrize("find", [sorted_points, binned_points])
@pytest.mark.parametrize("optimal", [False, True])
def test_degenerate_blocks(num_levels, find, optimal):
    def levels(rows):
        found = orq_levels(find(rows, Memory("cpu")), num_levels, optimal_ends=optimal, sweeps=3)
        assert found.isfinite().all() and (found.diff(dim=1) >= 0).all()
        return found

    assert torch.equal(levels(torch.zeros(2, 7)), torch.zeros(2, num_levels))
    assert torch.equal(levels(torch.full((1, 7), 0.1)), torch.full((1, num_levels), 0.1))
    assert torch.equal(levels(torch.tensor([[-3.0]])), torch.full((1, num_levels), -3.0))
    two_values = levels(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]))
    assert two_values[0, 0] == 1 and two_values[0, -1] == 2
    levels(torch.tensor([[1e-44, 0.0, 3e-45, -1e-44, 0.0]]))
    levels(torch.tensor([[0.0] * 30 + [1e10]]))


def test_a_clipped_range_without_entries():
    rows = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
    levels = orq_levels(points(rows), 5, ends_N2=torch.tensor([[-0.5, 0.5]]))
    assert levels.tolist() == [[-0.5, -0.25, 0.0, 0.25, 0.5]]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_levels, optimal", [(3, False), (9, False), (2, True), (9, True)])
def test_bins_come_close_to_sorting(distribution, num_levels, optimal):
    rows = sample(distribution, 32, 2048, seed=6)
    exact, binned = (
        relative_error(rows, orq_levels(find(rows, Memory("cpu")), num_levels, optimal_ends=optimal, sweeps=5))
        for find in (sorted_points, binned_points)
    )
    assert exact * 0.97 <= binned <= exact * 1.03


def test_bins_keep_count_and_sum():
    rows = sample("student", 3, 1000, seed=7)
    binned = binned_points(rows, Memory("cpu"), bins=16)
    assert binned.counts[:, -1].tolist() == [1000] * 3
    torch.testing.assert_close(binned.sums[:, -1], rows.double().sum(1), rtol=1e-5, atol=1e-3)
    assert (binned.values_NM.diff(dim=1) > 0).all()
    width = (rows.amax(1) - rows.amin(1)) / 16
    for row, edges, count in zip(rows, width, binned.counts, strict=True):
        number = ((row - row.amin()) / edges).long().clamp(max=15).bincount(minlength=16)
        assert (count.diff() - number).abs().sum() <= 2  # rounding at a border


@pytest.mark.parametrize("find", [sorted_points, binned_points])
def test_the_path_of_other_devices_gives_the_same_levels(find, monkeypatch):
    rows = sample("laplace", 8, 500, seed=8)
    expected = orq_levels(find(rows, Memory("cpu")), 9, optimal_ends=True, sweeps=5)
    monkeypatch.setattr(module, "native", lambda tensor: tensor)
    assert torch.equal(orq_levels(find(rows, Memory("cpu")), 9, optimal_ends=True, sweeps=5), expected)


def test_entries_far_from_zero_keep_ordered_levels():
    rows = 1e4 + sample("gaussian", 4, 300)
    levels = orq_levels(points(rows), 9, optimal_ends=True, sweeps=5)
    assert (levels.diff(dim=1) >= 0).all() and math.isclose(levels.mean().item(), 1e4, rel_tol=1e-3)
