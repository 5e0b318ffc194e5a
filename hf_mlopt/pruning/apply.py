"""Removes weights in place: scores, pattern and surgery for all experts of a target, in chunks that bound memory."""

# E experts   O output features   D input features

from collections.abc import Collection, Iterator

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
    """
    method = METHODS[config.method]
    if not method.row_local and len(matrices) > 1:
        for rows in matrices:
            prune_weights_(weight_EOD[:, rows], moments, config, dense)
        return
    for experts, rows in _chunks(weight_EOD, method.hessian, method.row_local):
        chunk_EOD = weight_EOD[experts, rows]
        moments_E = None if moments is None else moments[experts]
        if method.hessian:
            updated_EOD, pruned_EOD = sparsegpt(chunk_EOD, moments_E, config.sparsity, config.n_of_m)
        else:
            pruned_EOD = select(method.score(chunk_EOD, moments_E), config.sparsity, config.n_of_m)
        for expert in set(dense) & set(range(experts.start, experts.stop)):
            pruned_EOD[expert - experts.start] = False
            if method.hessian:
                updated_EOD[expert - experts.start] = chunk_EOD[expert - experts.start].float()
        if method.hessian:
            chunk_EOD.copy_(updated_EOD)
        else:
            chunk_EOD.masked_fill_(pruned_EOD, 0.0)


def _chunks(weight_EOD: torch.Tensor, hessian: bool, row_local: bool) -> Iterator[tuple[slice, slice]]:
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
