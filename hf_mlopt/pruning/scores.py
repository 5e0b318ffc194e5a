"""
Scores of weights: functions of (weight, moments). A larger score means keep. A new metric is one function here.
"""

# E experts   O output features   D input features

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # so that what needs no more than the table does without
    import torch


def magnitude(weight_EOD: "torch.Tensor", second_ED: "torch.Tensor | None") -> "torch.Tensor":
    """|W|, `[experts, output, input]`, float32; reads no activations."""
    return weight_EOD.abs().float()


def wanda(weight_EOD: "torch.Tensor", second_ED: "torch.Tensor") -> "torch.Tensor":
    r"""
    |W_ij| · ‖X_j‖, [Wanda](https://huggingface.co/papers/2306.11695); with moments weighted by the router, the score
    |W_ij| · ‖X_j · Gate‖ of [MoE-Pruner](https://huggingface.co/papers/2410.12013), Eq. (9).

    Args:
        weight_EOD (`torch.Tensor`): `[experts, output, input]`, any float dtype.
        second_ED (`torch.Tensor`): Σ_t (g_t^γ x_tj)², `[experts, input]`.

    Returns:
        `torch.Tensor`: `[experts, output, input]`, float32, in units of weight times activation norm.
    """
    return weight_EOD.abs().float().mul_(second_ED.sqrt().float()[:, None])


def ria(weight_EOD: "torch.Tensor", second_ED: "torch.Tensor") -> "torch.Tensor":
    r"""
    (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖^0.5, relative importance and activations,
    [RIA](https://openreview.net/forum?id=Tr0lPx9woF), with its exponent 0.5.

    Args and returns are those of [`wanda`]. A row or column of zeros scores zero.
    """
    size_EOD = weight_EOD.abs().float()
    tiny = 2.0**-126  # the smallest normal number of float32
    inverse_EO1 = size_EOD.sum(dim=-1, keepdim=True).clamp_(min=tiny).reciprocal_()
    inverse_E1D = size_EOD.sum(dim=-2, keepdim=True).clamp_(min=tiny).reciprocal_()
    return size_EOD.mul_(inverse_EO1 + inverse_E1D).mul_(second_ED.pow(0.25).float()[:, None])


@dataclass(frozen=True)
class MethodSpec:
    """
    What a pruning method needs.

    Args:
        score (`Callable`, *optional*): Score function; None for methods that also update weights (SparseGPT).
        gated (`bool`): Whether statistics are weighted by the router.
        hessian (`bool`): Whether it needs full second moments Σ x xᵀ rather than their diagonal.
        calibrated (`bool`): Whether it reads activations at all.
        row_local (`bool`): Whether a row's scores depend on no other row, so that rows can be taken in chunks.
    """

    score: Callable | None
    gated: bool = False
    hessian: bool = False
    calibrated: bool = True
    row_local: bool = True


METHODS = {
    "moe-pruner": MethodSpec(wanda, gated=True),
    "wanda": MethodSpec(wanda),
    "magnitude": MethodSpec(magnitude, calibrated=False),
    "ria": MethodSpec(ria, row_local=False),
    "sparsegpt": MethodSpec(None, hessian=True),
    "sparsegpt-gated": MethodSpec(None, gated=True, hessian=True),
}
