"""
[SparseGPT](https://huggingface.co/papers/2301.00774), batched over experts: weights are removed column by column and
the ones that stay make up for them. With router-weighted second moments H = Σ g² x xᵀ it is gate-weighted SparseGPT.

Differences from the published code: the comparison group is the output row inside a block of columns, not the block,
so that every row has the same sparsity; inputs that were always zero get no special case: damping makes their weights
cheaper than others of the same size.
"""

# E experts   O output features   D input features

import torch
from transformers.utils import logging

from hf_mlopt.errors import InputError
from hf_mlopt.pruning.patterns import num_pruned, smallest_per_group, smallest_per_row


logger = logging.get_logger(__name__)

_BLOCK = 128
_DAMPING = 0.01
_MAX_DAMPING = 1.0


def sparsegpt(weight_EOD, hessian_EDD, sparsity: float | None, n_of_m: tuple[int, int] | None):
    r"""
    Prunes and updates the weights of all experts, Algorithm 1 of the paper.

    Args:
        weight_EOD (`torch.Tensor`): `[experts, output, input]`.
        hessian_EDD (`torch.Tensor`): Σ x xᵀ per expert, `[experts, input, input]`; its scale does not matter.
        sparsity (`float`, *optional*), n_of_m (`tuple[int, int]`, *optional*): The pattern, one of both.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: New weights in float32 and the bool mask of removed ones, both shaped as
        `weight_EOD`.

    Raises:
        InputError: If the second moments are not finite or cannot be factored.
    """
    weight_EOD = weight_EOD.detach().float().clone()
    width = weight_EOD.shape[-1]
    inverse_EDD = _inverse_factor(hessian_EDD)
    pruned_EOD = torch.zeros_like(weight_EOD, dtype=torch.bool)
    # Blocks end between groups of N:M.
    block = _BLOCK if n_of_m is None else max(1, _BLOCK // n_of_m[1]) * n_of_m[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        factor_EBB = inverse_EDD[:, start:stop, start:stop]
        quota = None if sparsity is None else num_pruned(sparsity, stop) - num_pruned(sparsity, start)
        part_EOB = weight_EOD[..., start:stop]
        pruned_EOB, error_EOB = _prune_block(part_EOB, factor_EBB, quota, n_of_m)
        pruned_EOD[..., start:stop] = pruned_EOB
        weight_EOD[..., stop:] -= error_EOB @ inverse_EDD[:, start:stop, stop:]
    return weight_EOD.masked_fill_(pruned_EOD, 0.0), pruned_EOD


def _prune_block(weight_EOB, factor_EBB, quota: int | None, n_of_m: tuple[int, int] | None):
    """Prunes one block of columns in place; returns its mask and the errors that later columns must make up for."""
    diagonal_EB = factor_EBB.diagonal(dim1=-2, dim2=-1)
    pruned_EOB = torch.zeros_like(weight_EOB, dtype=torch.bool)
    error_EOB = torch.zeros_like(weight_EOB)
    if n_of_m is None:
        pruned_EOB = smallest_per_row((weight_EOB / diagonal_EB[:, None]).square(), quota)
    for column in range(weight_EOB.shape[-1]):
        if n_of_m is not None and column % n_of_m[1] == 0:
            group = slice(column, column + n_of_m[1])
            score = (weight_EOB[..., group] / diagonal_EB[:, None, group]).square()
            pruned_EOB[..., group] = smallest_per_group(score, *n_of_m)
        removed_EO = weight_EOB[..., column] * pruned_EOB[..., column]
        error_EOB[..., column] = removed_EO / diagonal_EB[:, None, column]
        weight_EOB[..., column:] -= error_EOB[..., column, None] * factor_EBB[:, None, column, column:]
    return pruned_EOB, error_EOB


def _inverse_factor(hessian_EDD: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹ of every expert, with H damped by 1 % of its mean diagonal, more if needed."""
    hessian_EDD = hessian_EDD.float()
    diagonal_ED = hessian_EDD.diagonal(dim1=-2, dim2=-1)
    if not bool(torch.isfinite(diagonal_ED).all()):
        raise InputError("the second moments for SparseGPT hold NaN or Inf.")
    mean_E = diagonal_ED.mean(dim=-1)
    mean_E = torch.where(mean_E > 0, mean_E, torch.ones_like(mean_E))
    damping_E = torch.full_like(mean_E, _DAMPING)
    while bool((damping_E <= _MAX_DAMPING).all()):
        damped_EDD = hessian_EDD.clone()
        damped_EDD.diagonal(dim1=-2, dim2=-1).add_((damping_E * mean_E)[:, None])
        factor_EDD, singular_E = torch.linalg.cholesky_ex(damped_EDD)
        if not bool(singular_E.any()):
            factor_EDD, singular_E = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor_EDD), upper=True)
        if not bool(singular_E.any()):
            return factor_EDD
        damping_E[singular_E > 0] *= 10  # of these experts only: results must not depend on their neighbours
        logger.info(f"SparseGPT: {int((singular_E > 0).sum())} second moments are close to singular, more damping")
    raise InputError(f"the second moments for SparseGPT cannot be factored even with damping {_MAX_DAMPING:g}.")
