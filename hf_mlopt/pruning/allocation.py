"""
Which sparsity goes where: over the experts of a layer by the energy that pruning removes, or over the layers by their
outliers (OWL). Pure functions; rows of a matrix always have the same sparsity.
"""

# E experts   C covered experts   O output features   D input features   G grid points   L layers

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pruning.apply import chunks
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.grid import MAX_SPARSITY, sparsity_grid
from hf_mlopt.pruning.patterns import num_pruned
from hf_mlopt.pruning.scores import METHODS, magnitude, wanda
from hf_mlopt.pruning.targets import Target


def expert_sparsities(
    targets: Iterable[Target], statistics: dict[str, torch.Tensor], config: PruningConfig, uncovered_E: torch.Tensor
) -> list[float]:
    r"""
    `allocation="load"`: the sparsity of every expert of one layer, Σ_e Σ_ij S_ij² over the removed weights being least
    for the number of zeros that `config.sparsity` gives everywhere.

    S is the method's own score, for SparseGPT that of Wanda. With sums over tokens, and router weights in the gated
    methods, an expert that matters little to the layer loses more. The budget holds for each layer by itself: outputs
    of two layers have scales of their own, so their energies have no common unit.

    Args:
        targets (`Iterable[Target]`): The matrices of the routed experts of the layer.
        statistics (`dict[str, torch.Tensor]`): Moments by source, as for pruning. Those of covered experts must be
            their own sums, not divided by anything; those of the others are not judged.
        config (`PruningConfig`): Method and sparsity.
        uncovered_E (`torch.Tensor`): bool, `[experts]`: experts with too few tokens for their moments to be believed.

    Returns:
        `list[float]`: A sparsity per expert, for `prune_weights_`; exactly as many zeros as without allocation.

    Raises:
        ConfigurationError: If the widths of the matrices leave no choice, see [`sparsity_grid`].
    """
    targets = list(targets)
    grid = sparsity_grid(config.sparsity, {target.weight_EOD.shape[-1] for target in targets})
    energy_EG = torch.zeros(len(uncovered_E), len(grid), dtype=torch.float64)
    for target in targets:
        experts = slice(None) if target.expert is None else slice(target.expert, target.expert + 1)
        moments = statistics.get(target.statistic)
        moments = None if moments is None else moments[experts]
        energy_EG[experts] += removed_energy(target.weight_EOD, moments, config, grid, target.matrices)
    return allocate(energy_EG, grid, config.sparsity, uncovered_E)


def removed_energy(
    weight_EOD: torch.Tensor,
    moments: torch.Tensor | None,
    config: PruningConfig,
    grid: Sequence[float],
    matrices: tuple[slice, ...] = (slice(None),),
) -> torch.Tensor:
    """
    Σ S² of the weights that go at each sparsity of a grid, in chunks that bound memory.

    Args:
        weight_EOD (`torch.Tensor`): `[experts, output, input]`.
        moments (`torch.Tensor`, *optional*): As in `prune_weights_`; of a Hessian the diagonal is used.
        config (`PruningConfig`): The method.
        grid (`Sequence[float]`): Sparsities, ascending.
        matrices (`tuple[slice]`, *optional*): The output rows of each matrix stored in `weight_EOD`.

    Returns:
        `torch.Tensor`: `[experts, grid]`, float64 on the CPU, in units of the score squared.
    """
    method = METHODS[config.method]
    # SparseGPT has no score of single weights before it starts; Wanda's is that with H reduced to its diagonal.
    score = method.score or wanda
    second_ED = _second(moments)
    counts = [num_pruned(sparsity, weight_EOD.shape[-1]) for sparsity in grid]
    energy_EG = torch.zeros(len(weight_EOD), len(grid), dtype=torch.float64)
    for matrix in (slice(None),) if method.row_local else matrices:
        matrix_EOD = weight_EOD[:, matrix]
        for experts, rows in chunks(matrix_EOD, hessian=False, row_local=method.row_local):
            moments_E = None if second_ED is None else second_ED[experts]
            energy_EG[experts] += energy_curve(score(matrix_EOD[experts, rows], moments_E), counts)
    return energy_EG


def energy_curve(score_EOD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """
    Σ of the squares of the smallest scores of every row, summed over rows, at each number of weights that go.

    Args:
        score_EOD (`torch.Tensor`): `[experts, output, input]`, float32, not negative.
        counts (`Sequence[int]`): Weights removed per row, ascending, 0 to input.

    Returns:
        `torch.Tensor`: `[experts, counts]`, float64 on the CPU.
    """
    energy_EG = torch.zeros(len(score_EOD), len(counts), dtype=torch.float64, device=score_EOD.device)
    bounds = list(zip([0, *counts[:-1]], counts, strict=True))
    for experts, rows in chunks(score_EOD, hessian=False, row_local=True):
        ascending_EOD = _sort_rows(score_EOD[experts, rows])
        parts = [ascending_EOD[..., start:stop].double().square_().sum(dim=(-2, -1)) for start, stop in bounds]
        energy_EG[experts] += torch.stack(parts, dim=-1)
    return energy_EG.cumsum(dim=-1).cpu()


def allocate(
    energy_EG: torch.Tensor, grid: Sequence[float], sparsity: float, uncovered_E: torch.Tensor | None = None
) -> list[float]:
    r"""
    One grid point per expert such that they are `sparsity` on average and Σ_e E_e is least.

    Args:
        energy_EG (`torch.Tensor`): E_e at each grid point, `[experts, grid]`, convex along the grid.
        grid (`Sequence[float]`): Of [`sparsity_grid`].
        sparsity (`float`): The budget, a point of the grid.
        uncovered_E (`torch.Tensor`, *optional*): bool, `[experts]`: experts that keep `sparsity`; the others meet the
            budget among themselves.

    Returns:
        `list[float]`: Sparsity per expert. Their steps on the grid add up to none. Among equal costs lower sparsities
        rise first, so equal experts stay equal.
    """
    place_of_budget = list(grid).index(sparsity)
    places_E = torch.full((len(energy_EG),), place_of_budget)
    covered_E = torch.ones(len(energy_EG), dtype=torch.bool) if uncovered_E is None else ~uncovered_E.cpu()
    if bool(covered_E.any()):
        energy_CG = energy_EG.cpu().double()[covered_E]
        # A row's energy is a sum of ascending terms, so convex in their number, and so are sums over rows and, with
        # equal steps, over matrices. Then each step of an expert costs at least as much as the one before, and the
        # cheapest steps of all experts, as many as the budget has, are an optimum.
        cost_CG = energy_CG.diff(dim=-1)
        # Grid before experts: a stable sort takes equal costs from the lowest sparsity up.
        cheapest = cost_CG.T.flatten().argsort(stable=True)[: place_of_budget * len(energy_CG)]
        places_E[covered_E] = torch.bincount(cheapest % len(energy_CG), minlength=len(energy_CG))
    return [grid[place] for place in places_E.tolist()]


def outlier_fraction(parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]], threshold: float = 5.0) -> float:
    r"""
    The fraction of a layer's weights with A_ij = ‖X_j‖ · |W_ij| above `threshold` times the layer's mean A,
    [OWL](https://huggingface.co/papers/2310.05175).

    ‖X_j‖ of an expert is over the tokens it was routed, as in pruning. Two passes in chunks: the mean, then the count.

    Args:
        parts (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): Weights `[experts, output, input]` and moments as in
            `prune_weights_`, of all matrices of the layer that will be pruned, before any of them is. Moments are the
            sums over the experts' own tokens; None takes A = |W|.
        threshold (`float`, *optional*, defaults to 5.0): M of the paper.
    """
    size = sum(weight_EOD.numel() for weight_EOD, _ in parts)
    mean = sum(score_EOD.sum(dtype=torch.float64) for score_EOD in _wanda_chunks(parts)) / size
    return int(sum((score_EOD > threshold * mean).sum() for score_EOD in _wanda_chunks(parts))) / size


def owl_sparsities(
    outliers_L: Sequence[float], sparsity: float, sizes_L: Sequence[int] | None = None, lmbda: float = 0.08
) -> list[float]:
    r"""
    `allocation="owl"`: the sparsity of every layer, less for more outliers,
    [OWL](https://huggingface.co/papers/2310.05175).

    Outlier fractions are mapped linearly to a range of width 2 λ, subtracted, and shifted to the mean `sparsity`, as
    the authors' code does it: a single extreme layer can be further than λ from `sparsity`. Ours are the mean over
    weights rather than layers, and the bounds [0, 0.95]; what they take or give, the other layers share equally.

    Args:
        outliers_L (`Sequence[float]`): Of [`outlier_fraction`], per layer.
        sparsity (`float`): The mean, at most 0.95.
        sizes_L (`Sequence[int]`, *optional*): Weights per layer that pruning covers; None if all have the same.
        lmbda (`float`, *optional*, defaults to 0.08): λ of the paper.

    Returns:
        `list[float]`: Sparsity per layer, with mean `sparsity` but for float64 rounding. Rows lose floor(p · d_in), so
        zeros are short of the budget by less than one per row.

    Raises:
        ConfigurationError: If `sparsity` is above 0.95.
    """
    if sparsity > MAX_SPARSITY:
        raise ConfigurationError("sparsity", sparsity, f"must be at most {MAX_SPARSITY} with allocation='owl'")
    sizes = [1] * len(outliers_L) if sizes_L is None else sizes_L
    low, spread = min(outliers_L), max(outliers_L) - min(outliers_L)
    if spread == 0:
        return [sparsity] * len(outliers_L)
    scaled = [2 * lmbda * (outliers - low) / spread for outliers in outliers_L]
    mean = sum(value * size for value, size in zip(scaled, sizes, strict=True)) / sum(sizes)
    return _clamp_to_mean([sparsity + mean - value for value in scaled], sparsity, sizes)


def _clamp_to_mean(values: list[float], mean: float, sizes: Sequence[int]) -> list[float]:
    """Clamps to [0, 0.95] and shifts those with room left until the weighted mean is `mean` again."""
    values = [min(max(value, 0.0), MAX_SPARSITY) for value in values]
    for _ in values:  # a round ends it or brings one more to the bound
        missing = sum((mean - value) * size for value, size in zip(values, sizes, strict=True))
        free = [value < MAX_SPARSITY if missing > 0 else value > 0 for value in values]
        room = sum(size for size, is_free in zip(sizes, free, strict=True) if is_free)
        if abs(missing) <= 1e-12 * sum(sizes) or room == 0:
            break
        shifted = [value + missing / room if is_free else value for value, is_free in zip(values, free, strict=True)]
        values = [min(max(value, 0.0), MAX_SPARSITY) for value in shifted]
    return values


def _second(moments: torch.Tensor | None) -> torch.Tensor | None:
    """Σ x_j² of every input: the moments, or the diagonal of a Hessian."""
    return moments.diagonal(dim1=-2, dim2=-1) if moments is not None and moments.ndim == 3 else moments


def _wanda_chunks(parts) -> Iterator[torch.Tensor]:
    for weight_EOD, moments in parts:
        second_ED = _second(moments)
        for experts, rows in chunks(weight_EOD, hessian=False, row_local=True):
            chunk_EOD = weight_EOD[experts, rows]
            yield magnitude(chunk_EOD, None) if second_ED is None else wanda(chunk_EOD, second_ED[experts])


def _sort_rows(score_EOD: torch.Tensor) -> torch.Tensor:
    if score_EOD.device.type == "cpu":  # numpy sorts floats tens of times faster here than torch
        return torch.from_numpy(np.sort(score_EOD.numpy(), axis=-1))
    return score_EOD.sort(dim=-1).values
