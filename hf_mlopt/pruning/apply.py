"""Removes weights in place: scores, pattern and surgery for all experts of a target, in chunks that bound memory."""

# E experts   O output features   D input features

from collections.abc import Iterator

import torch

from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.patterns import select
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.sparsegpt import sparsegpt


# Weights scored at once; 64 Mi float32 scores are 256 MB.
_CHUNK = 1 << 26


def prune_weights_(weight_EOD: torch.Tensor, moments: torch.Tensor | None, config: PruningConfig, dense: set[int]):
    """
    Prunes `[experts, output, input]` weights in place.

    Args:
        weight_EOD (`torch.Tensor`): A view of the parameters.
        moments (`torch.Tensor`, *optional*): `[experts, input]`, or `[experts, input, input]` for SparseGPT; None for
            methods that read no activations.
        config (`PruningConfig`): Method and pattern.
        dense (`set[int]`): Experts to leave as they are.
    """
    method = METHODS[config.method]
    for experts, rows in _chunks(weight_EOD.shape, method.hessian, method.row_local):
        chunk_EOD = weight_EOD[experts, rows]
        moments_E = None if moments is None else moments[experts]
        if method.hessian:
            updated_EOD, pruned_EOD = sparsegpt(chunk_EOD, moments_E, config.sparsity, config.n_of_m)
        else:
            pruned_EOD = select(method.score(chunk_EOD, moments_E), config.sparsity, config.n_of_m)
        for expert in dense & set(range(experts.start, experts.stop)):
            pruned_EOD[expert - experts.start] = False
            if method.hessian:
                updated_EOD[expert - experts.start] = chunk_EOD[expert - experts.start].float()
        if method.hessian:
            chunk_EOD.copy_(updated_EOD)
        else:
            chunk_EOD.masked_fill_(pruned_EOD, 0.0)


def _chunks(shape: torch.Size, hessian: bool, row_local: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of experts and of output rows; rows are split only where a single expert exceeds a chunk."""
    num_experts, outputs, width = shape
    per_expert = max(outputs * width, width * width if hessian else 0)
    experts_at_once = max(1, _CHUNK // per_expert)
    rows_at_once = outputs
    if row_local and not hessian and outputs * width > _CHUNK:
        rows_at_once = max(1, _CHUNK // width)
    for first in range(0, num_experts, experts_at_once):
        for row in range(0, outputs, rows_at_once):
            yield slice(first, min(first + experts_at_once, num_experts)), slice(row, min(row + rows_at_once, outputs))
