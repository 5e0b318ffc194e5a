import pytest
import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pruning import METHODS, PruningConfig
from hf_mlopt.pruning.allocation import (
    allocate,
    energy_curve,
    expert_sparsities,
    outlier_fraction,
    owl_sparsities,
    removed_energy,
    sparsity_grid,
)
from hf_mlopt.pruning.apply import prune_weights_
from hf_mlopt.pruning.patterns import num_pruned
from hf_mlopt.pruning.targets import Target
from tests.reference import allocation as reference
from tests.reference import pruning as scores


HIDDEN, INTERMEDIATE = 32, 16
SOURCES = {"gate_up": "hidden", "down": "intermediate"}


def layer(experts=4, seed=0, scale_E=None, hidden=HIDDEN, intermediate=INTERMEDIATE):
    """Weights of gate, up and down, and moments of their inputs; experts differ in size by `scale_E`."""
    generator = torch.Generator().manual_seed(seed)
    scale_E = torch.exp(torch.randn(experts, generator=generator)) if scale_E is None else torch.tensor(scale_E)
    weights = {
        "gate_up": torch.randn(experts, 2 * intermediate, hidden, generator=generator),
        "down": torch.randn(experts, hidden, intermediate, generator=generator),
    }
    moments = {}
    for source, width in (("hidden", hidden), ("intermediate", intermediate)):
        noise_ED = torch.randn(experts, width, generator=generator, dtype=torch.float64)
        moments[source] = torch.exp(2 * noise_ED) * scale_E.double()[:, None] ** 2
    return weights, moments


def matrices(name, intermediate=INTERMEDIATE):
    return (slice(0, intermediate), slice(intermediate, None)) if name == "gate_up" else (slice(None),)


def fused(weights):
    return [Target(name, weights[name], SOURCES[name], matrices=matrices(name)) for name in weights]


def statistics(method, moments):
    if not METHODS[method].calibrated:
        return {}
    return {
        key: torch.diag_embed(value).float() if METHODS[method].hessian else value for key, value in moments.items()
    }


def twin_scores(method, weights, moments):
    """S of gate, up and down of every expert, as the twin wants it."""
    twin = scores.SCORES.get(method, scores.wanda_score)  # of SparseGPT, before it starts
    experts = []
    for expert in range(len(weights["down"])):
        experts.append([])
        for name, weight_EOD in weights.items():
            Q = moments[SOURCES[name]][expert].tolist()
            experts[-1] += [twin(weight_EOD[expert, rows].double().tolist(), Q) for rows in matrices(name)]
    return experts


def load(weights, moments, method="moe-pruner", sparsity=0.5, uncovered=()):
    uncovered_E = torch.tensor([expert in uncovered for expert in range(len(weights["down"]))])
    config = PruningConfig(method=method, sparsity=sparsity)
    return expert_sparsities(fused(weights), statistics(method, moments), config, uncovered_E)


@pytest.mark.parametrize("widths", ((4096, 14336), (2048, 768), (5120, 1536), (2880,), (32, 64), (48, 72), (56, 21)))
@pytest.mark.parametrize("sparsity", (0.2, 0.29, 0.5, 0.625, 0.7, 0.8))
def test_every_step_of_the_grid_is_worth_the_same_in_every_matrix(sparsity, widths):
    grid = sparsity_grid(sparsity, widths)
    assert max(abs(point - sparsity) for point in grid) <= 0.15 + 1e-12 and 0 <= grid[0] and grid[-1] <= 0.95
    middle = grid.index(sparsity)
    for width in widths:
        step = round(width * (grid[1] - grid[0]))
        assert step > 0
        first = scores.num_removed(sparsity, width) - middle * step
        assert [num_pruned(point, width) for point in grid] == [first + place * step for place in range(len(grid))]


def test_the_grid_of_a_real_model():
    grid = sparsity_grid(0.5, (4096, 14336))
    assert len(grid) == 13 and grid[0] == pytest.approx(0.35, abs=0.001) and grid[-1] == pytest.approx(0.65, abs=0.001)


def test_the_grid_stops_at_the_bounds():
    assert sparsity_grid(0.05, (80,)) == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2])
    assert sparsity_grid(0.9, (80,))[-1] == pytest.approx(0.95)


@pytest.mark.parametrize(("sparsity", "widths"), ((0.5, (24, 17)), (0.03, (32, 64)), (0.95, (4096,)), (0.97, (4096,))))
def test_no_choice_is_an_error(sparsity, widths):
    with pytest.raises(ConfigurationError, match=f"allocation='load'.*sparsity={sparsity:g}.*use uniform"):
        sparsity_grid(sparsity, widths)


@pytest.mark.parametrize("chunk", (1, 50, 1 << 20))
@pytest.mark.parametrize("kind", ("random", "ties", "zero", "skewed", "strided"))
def test_energy_curve_equals_its_twin(kind, chunk, monkeypatch):
    monkeypatch.setattr("hf_mlopt.pruning.apply._CPU_CHUNK", chunk)
    score_EOD = torch.rand(3, 5, 21, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        score_EOD = (4 * score_EOD).round()
    elif kind == "zero":
        score_EOD[1] = 0
    elif kind == "skewed":
        score_EOD = torch.exp(20 * score_EOD)
    elif kind == "strided":
        score_EOD = score_EOD.transpose(1, 2)
    before, width = score_EOD.clone(), score_EOD.shape[-1]
    counts = [0, 1, width // 2, width - 1, width]
    energy_EG = energy_curve(score_EOD, counts)
    assert energy_EG.dtype == torch.float64 and torch.equal(score_EOD, before)
    expected = [
        [reference.removed_energy([rows], count / width + 1e-6) for count in counts] for rows in score_EOD.tolist()
    ]
    torch.testing.assert_close(energy_EG, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", (100, 1 << 20))
@pytest.mark.parametrize("method", METHODS)
def test_removed_energy_equals_its_twin(method, chunk, monkeypatch):
    monkeypatch.setattr("hf_mlopt.pruning.apply._CPU_CHUNK", chunk)
    weights, moments = layer()
    config, grid = PruningConfig(method=method, sparsity=0.5), sparsity_grid(0.5, (HIDDEN, INTERMEDIATE))
    total_EG = sum(
        removed_energy(
            target.weight_EOD, statistics(method, moments).get(target.statistic), config, grid, target.matrices
        )
        for target in fused(weights)
    )
    expected = [
        [reference.removed_energy(expert, point) for point in grid] for expert in twin_scores(method, weights, moments)
    ]
    torch.testing.assert_close(total_EG, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("uncovered", ((), (1,)))
@pytest.mark.parametrize("sparsity", (0.5, 0.37))
@pytest.mark.parametrize("method", ("moe-pruner", "magnitude", "ria", "sparsegpt"))
def test_no_combination_of_the_grid_is_better(method, sparsity, uncovered, seed):
    weights, moments = layer(seed=seed, scale_E=[0.6, 1.0, 1.3, 0.9])
    if method == "magnitude":  # reads no moments, and these weights are alike
        weights = {name: value * torch.linspace(0.8, 1.2, 4)[:, None, None] for name, value in weights.items()}
    chosen = load(weights, moments, method, sparsity, uncovered)
    grid = sparsity_grid(sparsity, (HIDDEN, INTERMEDIATE))
    experts = twin_scores(method, weights, moments)
    least, best = reference.best_allocations(experts, grid, sparsity, uncovered)
    assert chosen in best and all(chosen[expert] == sparsity for expert in uncovered)
    uniform = sum(reference.removed_energy(expert, sparsity) for expert in experts)
    assert least < uniform and len(set(chosen)) > 1


@pytest.mark.parametrize("sparsity", (0.3, 0.37, 0.5, 0.66))
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_exactly_and_rows_are_uniform_inside_an_expert(method, sparsity):
    weights, moments = layer(experts=7, scale_E=[0.01, 0.5, 0.9, 1.0, 1.1, 3.0, 100.0])
    # Factors, and powers: a score that is relative to the matrix does not see factors.
    steps_E11 = torch.linspace(0.5, 2, 7)[:, None, None]
    weights = {name: steps_E11 * value.sign() * value.abs() ** steps_E11 for name, value in weights.items()}
    chosen = load(weights, moments, method, sparsity)
    assert all(abs(value - sparsity) <= 0.15 for value in chosen) and len(set(chosen)) > 1
    config, removed, uniform = PruningConfig(method=method, sparsity=sparsity), 0, 0
    for target in fused(weights):
        own = statistics(method, moments).get(target.statistic)
        prune_weights_(target.weight_EOD, own, config, (), target.matrices, sparsities=chosen)
        _, outputs, width = target.weight_EOD.shape
        for expert, value in enumerate(chosen):
            assert ((target.weight_EOD[expert] == 0).sum(dim=-1) == num_pruned(value, width)).all()
        removed += int((target.weight_EOD == 0).sum())
        uniform += 7 * outputs * num_pruned(sparsity, width)
    assert removed == uniform


def test_an_expert_of_little_energy_loses_most_and_one_of_much_least():
    low, *middle, high = load(*layer(experts=5, scale_E=[1e-4, 1.0, 1.0, 1.0, 1e4]))
    grid = sparsity_grid(0.5, (HIDDEN, INTERMEDIATE))
    assert low == grid[-1] and high == grid[0] and all(grid[0] < value < grid[-1] for value in middle)


@pytest.mark.parametrize("method", METHODS)
def test_equal_experts_get_the_same(method):
    weights, moments = layer(experts=1, scale_E=[1.0])
    weights = {name: value.repeat(6, 1, 1) for name, value in weights.items()}
    moments = {source: value.repeat(6, 1) for source, value in moments.items()}
    assert load(weights, moments, method) == [0.5] * 6


def test_energies_without_any_difference_leave_it_uniform():
    grid = sparsity_grid(0.5, (32,))
    assert allocate(torch.zeros(3, len(grid)), grid, 0.5) == [0.5] * 3
    rising = torch.arange(len(grid), dtype=torch.float64).repeat(3, 1)
    assert allocate(rising, grid, 0.5) == [0.5] * 3


@pytest.mark.parametrize("factor", (1e-3, 7.0, 1e4))
def test_the_unit_of_the_scores_does_not_matter(factor):
    """Router weights of the whole layer times `factor`, as an unnormalised router would have them."""
    weights, moments = layer(experts=6)
    scaled = {source: value * factor**2 for source, value in moments.items()}
    assert load(weights, scaled) == load(weights, moments)
    larger = {name: value * factor for name, value in weights.items()}
    assert load(larger, moments, "magnitude") == load(weights, moments, "magnitude")


def test_router_weights_of_one_expert_protect_it():
    weights, moments = layer(experts=6, scale_E=[1.0] * 6)
    before = load(weights, moments)
    for value_ED in moments.values():
        value_ED[2] *= 3.0**2
    after = load(weights, moments)
    assert after[2] < before[2] and all(after[expert] >= before[expert] for expert in (0, 1, 3, 4, 5))


def test_uncovered_experts_neither_move_nor_count():
    weights, moments = layer(experts=6)
    others = [0, 1, 3, 5]
    chosen = load(weights, moments, uncovered=(2, 4))
    alone = load({k: v[others] for k, v in weights.items()}, {k: v[others] for k, v in moments.items()})
    assert chosen[2] == chosen[4] == 0.5 and [chosen[expert] for expert in others] == alone
    assert load(weights, moments, uncovered=range(6)) == [0.5] * 6


@pytest.mark.parametrize("method", METHODS)
def test_experts_in_a_list_get_what_fused_ones_get(method):
    weights, moments = layer(experts=5)
    separate = []
    for expert in range(5):
        for name, weight_EOD in weights.items():
            for rows in matrices(name):
                separate.append(Target(name, weight_EOD[expert, None, rows], SOURCES[name], expert))
    none_E = torch.zeros(5, dtype=torch.bool)
    config = PruningConfig(method=method, sparsity=0.5)
    assert expert_sparsities(separate, statistics(method, moments), config, none_E) == load(weights, moments, method)


def owl_layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for outputs, width in ((6, 16), (16, 10)):
        noise_ED = torch.randn(3, width, generator=generator, dtype=torch.float64)
        parts.append((torch.randn(3, outputs, width, generator=generator), torch.exp(2 * noise_ED)))
    return parts


@pytest.mark.parametrize("chunk", (1, 100, 1 << 20))
@pytest.mark.parametrize("threshold", (2.0, 5.0))
def test_outlier_fraction_equals_its_twin(threshold, chunk, monkeypatch):
    monkeypatch.setattr("hf_mlopt.pruning.apply._CPU_CHUNK", chunk)
    parts = owl_layer()
    twins = [(weight_EOD[e].tolist(), second_ED[e].tolist()) for weight_EOD, second_ED in parts for e in range(3)]
    found = outlier_fraction(parts, threshold)
    assert found == reference.outlier_fraction(twins, threshold) and 0 < found < 1
    hessians = [(weight_EOD, torch.diag_embed(second_ED)) for weight_EOD, second_ED in parts]
    assert outlier_fraction(hessians, threshold) == found
    assert outlier_fraction([(weight_EOD, 100 * second_ED) for weight_EOD, second_ED in parts], threshold) == found


def test_outlier_fraction_by_hand():
    weight_EOD = torch.ones(1, 4, 25)
    weight_EOD[0, 0, 0] = -20.0  # the mean is 1.19
    assert outlier_fraction([(weight_EOD, None)]) == 0.01
    assert outlier_fraction([(weight_EOD, None), (torch.full((1, 1, 100), 1e-6), None)]) == 0.5 * 0.01
    assert outlier_fraction([(torch.zeros(1, 2, 3), None)]) == 0.0


@pytest.mark.parametrize("sizes", (None, [1, 5, 2, 3]))
def test_owl_equals_its_twin(sizes):
    outliers = [0.02, 0.001, 0.015, 0.004]
    found = owl_sparsities(outliers, 0.6, sizes, lmbda=0.1)
    weights = sizes or [1] * 4
    assert found == pytest.approx(reference.owl(outliers, 0.6, 0.1, weights), abs=1e-12)
    assert max(found) - min(found) == pytest.approx(0.2)
    mean = sum(value * weight for value, weight in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(0.6, abs=1e-14)
    assert sorted(range(4), key=found.__getitem__) == sorted(range(4), key=outliers.__getitem__, reverse=True)


def test_owl_by_hand():
    assert owl_sparsities([0.0, 0.01, 0.02], 0.5) == pytest.approx([0.58, 0.5, 0.42])
    assert owl_sparsities([0.01, 0.01, 0.01], 0.5) == [0.5] * 3
    assert owl_sparsities([0.3], 0.5) == [0.5]


@pytest.mark.parametrize(("sparsity", "bound"), ((0.9, 0.95), (0.05, 0.0)))
def test_owl_shares_what_the_bounds_take(sparsity, bound):
    sizes = [1, 2, 1, 4]
    found = owl_sparsities([0.0, 0.001, 0.02, 0.015], sparsity, sizes)
    assert bound in found and all(0 <= value <= 0.95 for value in found)
    assert sum(v * s for v, s in zip(found, sizes, strict=True)) / 8 == pytest.approx(sparsity, abs=1e-12)
    assert found[0] >= found[1] >= found[3] >= found[2]
    assert owl_sparsities([0.0, 1.0], 0.95) == pytest.approx([0.95, 0.95])
    with pytest.raises(ConfigurationError, match="sparsity=0.96: must be at most 0.95"):
        owl_sparsities([0.0, 1.0], 0.96)
