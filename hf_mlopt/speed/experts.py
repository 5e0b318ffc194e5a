"""
One layer's experts with random weights, and the ways to run them that pruning makes possible.

The CUDA-only part, `torch.sparse.to_sparse_semi_structured`, has not been run by us; the loop around it is tested on a
CPU with dense matrices in its place.
"""

# T tokens   H hidden   I expert intermediate   J = 2 * I, or I without a gate   E experts   K experts per token
# S slots = T * K   O output features   D input features

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.moe import MoELayer
from hf_mlopt.pruning.patterns import smallest_per_group


_SPARSE_DTYPES = (torch.bfloat16, torch.float16)


def fill_with_noise_(experts: nn.Module, device: torch.device, seed: int = 0) -> None:
    """Gives an experts module from the meta device random weights of a usual size, on `device`."""
    generator = torch.Generator(device).manual_seed(seed)
    experts.to_empty(device=device).requires_grad_(False)
    for parameter in experts.parameters():
        bound = (3 / parameter.shape[-1]) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)


def keep_experts(experts: nn.Module, count: int) -> nn.Module:
    """The first `count` experts as a module of their own; a view, without a copy of the weights."""
    return _with_parameters(experts, lambda value: value[:count], count)


def with_half_zeros(experts: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with about half of all weights zero, at random places."""

    def zeroed(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        generator = torch.Generator(value.device).manual_seed(seed)
        for matrix in value:  # one expert's at a time bounds the memory of the mask
            matrix.mul_(torch.rand(matrix.shape, device=value.device, generator=generator) < 0.5)
        return value

    return _with_parameters(experts, zeroed, experts.num_experts)


def _with_parameters(experts: nn.Module, change: Callable, num_experts: int) -> nn.Module:
    """The same module with other weights; `change` is given those that have a row or a matrix for each expert."""
    module = copy.copy(experts)
    module._parameters = dict(experts._parameters)
    for name, value in experts.named_parameters(recurse=False):
        if value.ndim > 1 and len(value) == experts.num_experts:
            module._parameters[name] = nn.Parameter(change(value.data), requires_grad=False)
    module.num_experts = num_experts
    return module


def run_fused(experts: nn.Module, implementation: str, hidden_TH, index_TK, weight_TK) -> torch.Tensor:
    """The experts as transformers runs them, `[tokens, hidden]`."""
    return ALL_EXPERTS_FUNCTIONS[implementation](experts, hidden_TH, index_TK, weight_TK)


def run_expert_by_expert(experts: nn.Module, up: list, down: list, hidden_TH, index_TK, weight_TK) -> torch.Tensor:
    """
    What `run_fused` computes, by one call for each matrix of each expert that has tokens: 2:4 kernels know no groups.

    Args:
        experts (`nn.Module`): Fused experts, for everything but their matrices.
        up, down (`list[torch.Tensor]`): The matrices of each expert, `[output, input]`, dense or 2:4.
        hidden_TH, index_TK, weight_TK (`torch.Tensor`): As transformers hands them to fused experts.
    """
    expert_S, order_S = torch.sort(index_TK.reshape(-1))
    counts_E = torch.bincount(expert_S, minlength=experts.num_experts).tolist()
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    bias = [getattr(experts, f"{name}_bias") if experts.has_bias else None for name in (up_name, "down_proj")]
    outputs = []
    for expert, rows_SH in enumerate(hidden_TH[order_S // index_TK.shape[-1]].split(counts_E)):
        if len(rows_SH):
            up_SJ = F.linear(rows_SH, up[expert], None if bias[0] is None else bias[0][expert])
            inner_SI = experts._apply_gate(up_SJ) if experts.has_gate else experts.act_fn(up_SJ)
            outputs.append(F.linear(inner_SI, down[expert], None if bias[1] is None else bias[1][expert]))
    output_SH = torch.cat(outputs)
    if getattr(experts, "has_post_expert_norm", False):
        output_SH = experts.post_expert_norm(output_SH)
    weighted_SH = output_SH * weight_TK.reshape(-1)[order_S, None]
    unsorted_SH = torch.empty_like(weighted_SH)
    unsorted_SH[order_S] = weighted_SH
    return unsorted_SH.view(*index_TK.shape, -1).sum(dim=1).to(hidden_TH.dtype)


def matrices_2_of_4(layer: MoELayer, projection: str, convert: Callable) -> list[torch.Tensor]:
    """
    The matrices of a projection with the two smaller of every four weights removed, each as `convert` returns it.

    Args:
        layer (`MoELayer`): A fused layer.
        projection (`str`): Its name, e.g. `"down_proj"`.
        convert (`Callable`): From a contiguous `[output, input]` to what `F.linear` takes;
            `torch.sparse.to_sparse_semi_structured`, or anything else in a test.
    """
    matrices = []
    for weight_OD in layer.stacked(projection):
        pruned_OD = weight_OD.masked_fill(smallest_per_group(weight_OD.abs(), 2, 4), 0.0)
        matrices.append(convert(pruned_OD.contiguous()))
    return matrices


def no_2_of_4(layer: MoELayer, device: torch.device) -> str | None:
    """Why 2:4 kernels cannot be tried on this device and layer, in words; None if they can."""
    if device.type != "cuda":
        return f"torch's 2:4 kernels need a CUDA GPU, and this ran on the {device.type.upper()}"
    dtype = layer.stacked("down_proj").dtype
    if dtype not in _SPARSE_DTYPES:
        return f"torch has 2:4 kernels for bfloat16 and float16, and these weights are {str(dtype)[6:]}"
    for projection in layer.projections:
        width = layer.stacked(projection).shape[-1]
        if width % 4:
            return f"4 does not divide the input width {width} of {projection}"
    return None


def expert_bytes(experts: nn.Module) -> int:
    """Bytes of all parameters of the experts."""
    return sum(parameter.nbytes for parameter in experts.parameters())


def bytes_2_of_4(experts: nn.Module) -> int | None:
    """Bytes with 2:4 matrices: half the values and 2 bits of index for each; None where torch has no such kernel."""
    if experts.down_proj.dtype not in _SPARSE_DTYPES:
        return None
    return sum(
        parameter.nbytes // 2 + parameter.numel() // 8 if parameter.ndim == 3 else parameter.nbytes
        for parameter in experts.parameters()
    )
