"""What each expert makes of a token, before the router's weight is applied: E_e(x), with gradients where wanted."""

# T tokens   H hidden   K experts per token   S slots = T * K   E experts

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.errors import InputError
from hf_mlopt.moe.layers import MoELayer
from hf_mlopt.moe.switching import delegate_name, switched


Receiver = Callable[[MoELayer, torch.Tensor, torch.Tensor], None]


def by_slot(forward, experts, hidden_SH: torch.Tensor, expert_S: torch.Tensor) -> torch.Tensor:
    """
    The output of one expert per row, unweighted.

    Every row is sent to one expert with weight one. A list of experts flattened from a top-k is the same list that the
    implementation makes of that top-k, so it sorts and multiplies the same rows.

    Args:
        forward (`Callable`): A registered experts implementation.
        experts (`nn.Module`): Fused experts.
        hidden_SH (`torch.Tensor`): `[slots, hidden]`.
        expert_S (`torch.Tensor`): The expert of each row.

    Returns:
        `torch.Tensor`: `[slots, hidden]`.
    """
    ones_S1 = torch.ones(len(hidden_SH), 1, dtype=hidden_SH.dtype, device=hidden_SH.device)
    return forward(experts, hidden_SH, expert_S.reshape(-1, 1), ones_S1)


def weighted_sum(output_SH: torch.Tensor, topk_weight_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer's output `[tokens, hidden]` from its slots', weighed and summed bit for bit as transformers does."""
    weighted_SH = output_SH * topk_weight_TK.reshape(-1, 1)  # in float32 where the router's weights are
    return weighted_SH.view(*topk_weight_TK.shape, -1).sum(dim=1).to(dtype)


def expert_outputs(layer: MoELayer, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """
    What the given experts of a fused layer make of the given tokens, whoever the router would have chosen.

    Args:
        layer (`MoELayer`): Fused experts.
        hidden_TH (`torch.Tensor`): Their input, `[tokens, hidden]`.
        index_TK (`torch.Tensor`): Experts of each token, `[tokens, top-k]`.

    Returns:
        `torch.Tensor`: `[tokens, top-k, hidden]`.
    """
    require_fused([layer])
    forward = ALL_EXPERTS_FUNCTIONS[delegate_name(layer)]
    hidden_SH = hidden_TH.repeat_interleave(index_TK.shape[1], dim=0)
    return by_slot(forward, layer.experts, hidden_SH, index_TK.reshape(-1)).view(*index_TK.shape, -1)


@contextmanager
def receive_expert_outputs(
    layers: list[MoELayer], receive: Receiver, instead: Mapping[int, torch.Tensor] | None = None
) -> Iterator[None]:
    """
    Calls `receive(layer, index_TK, output_TKH)` at every forward pass of the given layers, which give what they gave,
    bit for bit.

    The context may span a backward pass, as gradient checkpointing needs, which runs layers a second time.

    Args:
        layers (`list[MoELayer]`): Layers with fused experts.
        receive (`Callable`): Is given the experts `[tokens, top-k]` and their outputs `[tokens, top-k, hidden]`.
        instead (`Mapping[int, torch.Tensor]`, *optional*): Per decoder layer, other experts `[tokens, k]` to hand over
            than those the router chose. Only those that the router did not choose are computed in addition; in one
            call with the others, which may round the layer's output differently in its last bit. A second call would
            cost a second gradient as large as the layer's weights.

    Raises:
        InputError: If experts are not fused, or run an implementation that cannot be observed.
    """
    require_fused(layers)
    of_module = {layer.experts: layer for layer in layers}
    delegates = {layer.experts: delegate_name(layer) for layer in layers}

    def observed(experts, hidden_TH, topk_index_TK, topk_weight_TK):
        layer, forward = of_module[experts], ALL_EXPERTS_FUNCTIONS[delegates[experts]]
        own_S = topk_index_TK.reshape(-1)
        hidden_SH = hidden_TH.repeat_interleave(topk_index_TK.shape[1], dim=0)
        if instead is None:
            output_SH = by_slot(forward, experts, hidden_SH, own_S)
            receive(layer, topk_index_TK, output_SH.view(*topk_index_TK.shape, -1))
        else:
            wanted_TK = instead[layer.index]
            slot_TK, token_M, expert_M = _slots_of(wanted_TK, topk_index_TK)
            hidden_SH = torch.cat([hidden_SH, hidden_TH[token_M]])
            output_SH = by_slot(forward, experts, hidden_SH, torch.cat([own_S, expert_M]))
            receive(layer, wanted_TK, output_SH[slot_TK])
            output_SH = output_SH[: len(own_S)]
        return weighted_sum(output_SH, topk_weight_TK, hidden_TH.dtype)

    with switched(list(of_module), observed):
        yield


def _slots_of(wanted_TK: torch.Tensor, own_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Where to find the outputs of `wanted` experts: among the slots of the `own` ones, or in rows to be appended.

    Returns:
        `tuple`: The row of each wanted output, `[tokens, k]`; token and expert of the rows to append.
    """
    equal_TKK = wanted_TK.unsqueeze(2) == own_TK.unsqueeze(1)
    found_TK, place_TK = equal_TKK.any(dim=2), equal_TKK.int().argmax(dim=2)
    missing_TK = ~found_TK
    first_T1 = torch.arange(len(own_TK), device=own_TK.device).unsqueeze(1) * own_TK.shape[1]
    appended_TK = own_TK.numel() - 1 + missing_TK.reshape(-1).cumsum(0).view_as(wanted_TK)
    token_M = missing_TK.nonzero()[:, 0]
    return torch.where(found_TK, first_T1 + place_TK, appended_TK), token_M, wanted_TK[missing_TK]


def require_fused(layers: list[MoELayer]) -> None:
    """Raises `InputError` where experts are a `ModuleList`."""
    for layer in layers:
        if not layer.is_fused:
            raise InputError(
                f"{layer.name}: experts in a ModuleList cannot be distilled; load the model without remote code, so "
                "that transformers fuses them."
            )
