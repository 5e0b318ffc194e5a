"""Removes weights in place: scores, pattern and surgery for all experts of a target, in chunks that bound memory."""

# E experts   O output features   D input features

from collections.abc import Collection, Iterator, Sequence

import torch

from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.patterns import select
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.sparsegpt import sparsegpt


# Weights scored at once: on a CPU what its caches hold, on an accelerator enough to keep it busy (256 MB of scores).
_CPU_CHUNK = 1 << 20
_ACCELERATOR_CHUNK = 1 << 26


def prune_weights_(
    weight_EOD: torch.Tensor,
    moments: torch.Tensor | None,
    config: PruningConfig,
    dense: Collection[int] = (),
    matrices: tuple[slice, ...] = (slice(None),),
    sparsities: Sequence[float] | torch.Tensor | None = None,
) -> None:
    """
    Prunes `[experts, output, input]` weights in place.

    Args:
        weight_EOD (`torch.Tensor`): A view of the parameters.
        moments (`torch.Tensor`, *optional*): `[experts, input]`, or `[experts, input, input]` for SparseGPT; None for
            methods that read no activations.
        config (`PruningConfig`): Method and pattern.
        dense (`Collection[int]`, *optional*): Experts to leave as they are.
        matrices (`tuple[slice]`, *optional*): The output rows of each matrix stored in `weight_EOD`.
        sparsities (`Sequence[float]` or `torch.Tensor`, *optional*): A sparsity for each expert, `[experts]`, in place
            of the one of `config`; a tensor must be float64.

    Raises:
        ValueError: If `sparsities` are not one per expert, not float64, or given with an N:M pattern.
    """
    method = METHODS[config.method]
    if sparsities is not None:
        sparsities = _one_per_expert(sparsities, len(weight_EOD), config)
    if not method.row_local and len(matrices) > 1:
        for rows in matrices:
            prune_weights_(weight_EOD[:, rows], moments, config, dense, sparsities=sparsities)
        return
    for experts, rows in chunks(weight_EOD, method.hessian, method.row_local):
        for sparsity, members in _equal_sparsity(experts, config.sparsity, sparsities):
            index = members if isinstance(members, list) else experts
            part_EOD = weight_EOD[index, rows]
            moments_E = None if moments is None else moments[index]
            if method.hessian:
                updated_EOD, pruned_EOD = sparsegpt(part_EOD, moments_E, sparsity, config.n_of_m)
            else:
                pruned_EOD = select(method.score(part_EOD, moments_E), sparsity, config.n_of_m)
            for place in [members.index(expert) for expert in set(dense) & set(members)]:
                pruned_EOD[place] = False
                if method.hessian:
                    updated_EOD[place] = part_EOD[place].float()
            if method.hessian:
                part_EOD.copy_(updated_EOD)
            else:
                part_EOD.masked_fill_(pruned_EOD, 0.0)
            if isinstance(index, list):
                weight_EOD[index, rows] = part_EOD  # indexed by a list it is a copy, not a view


def _one_per_expert(sparsities, num_experts: int, config: PruningConfig) -> list[float]:
    if isinstance(sparsities, torch.Tensor) and sparsities.dtype != torch.float64:
        raise ValueError(f"sparsities are {sparsities.dtype}, in which 0.29 of 100 weights is 28: give float64")
    sparsities = sparsities.tolist() if isinstance(sparsities, torch.Tensor) else list(sparsities)
    if len(sparsities) != num_experts:
        raise ValueError(f"{len(sparsities)} sparsities for {num_experts} experts: give one for each")
    if config.n_of_m is not None:
        raise ValueError(f"sparsities={sparsities} and pattern={config.pattern!r}: a pattern leaves no choice")
    return sparsities


def _equal_sparsity(experts: slice, sparsity: float | None, sparsities: list[float] | None):
    """Yields each sparsity of a chunk with the experts that have it: a range if all do, otherwise a list."""
    members = range(experts.start, experts.stop)
    found = {sparsity} if sparsities is None else set(sparsities[experts])
    for value in sorted(found):
        yield value, members if len(found) == 1 else [expert for expert in members if sparsities[expert] == value]


def chunks(weight_EOD: torch.Tensor, hessian: bool, row_local: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of experts and of output rows; rows are split only where a single expert exceeds a chunk."""
    num_experts, outputs, width = weight_EOD.shape
    # Hessians: factors of a few experts at once, for batched operations without the memory of all.
    limit = _CPU_CHUNK if weight_EOD.device.type == "cpu" and not hessian else _ACCELERATOR_CHUNK
    experts_at_once = max(1, limit // max(outputs * width, width * width if hessian else 0))
    rows_at_once = outputs
    if row_local and not hessian and outputs * width > limit:
        rows_at_once = max(1, limit // width)
    for first in range(0, num_experts, experts_at_once):
        for row in range(0, outputs, rows_at_once):
            yield slice(first, min(first + experts_at_once, num_experts)), slice(row, min(row + rows_at_once, outputs))
