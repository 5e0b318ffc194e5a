"""
Observes what flows through the experts of a model without changing a bit of its output.

The experts implementation is switched, through transformers' registry, to a function that delegates to the one that
was active and hands the routed tokens to an observer.
"""

# T tokens   H hidden   K experts per token   S slots = T * K   I expert intermediate   E experts

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.moe.expert_outputs import by_slot, weighted_sum
from hf_mlopt.moe.layers import MoELayer, moe_layers
from hf_mlopt.moe.module_list import observe_module_list
from hf_mlopt.moe.routed_tokens import Observation, Observer, RoutedTokens, row_norms
from hf_mlopt.moe.switching import delegate_name, switched


@contextmanager
def observe(model: nn.Module, observer: Observer, output_norms: bool = False) -> Iterator[Observation]:
    """
    Calls `observer(layer, routed_tokens)` at every forward pass of every mixture-of-experts layer of `model`.

    Logits are bit-identical to those without observation (a model that runs `eager` is observed through `batched_mm`
    and is bit-identical to that). Whatever implementation was active is restored, also after an exception. Tokens that
    a 2-D `attention_mask` excludes are marked in `RoutedTokens.token_mask_T`. With `output_norms` the norms of the
    experts' outputs are given too; this costs memory, the experts' input times top-k.

    Raises:
        InputError: If the model has no mixture of experts that is understood, or runs an experts implementation that
            cannot be observed.
    """
    with observe_layers(moe_layers(model), observer, output_norms) as observation:
        handle = model.register_forward_pre_hook(observation.note_padding, with_kwargs=True)
        try:
            yield observation
        finally:
            handle.remove()


@contextmanager
def observe_layers(layers: list[MoELayer], observer: Observer, output_norms: bool = False) -> Iterator[Observation]:
    """Like `observe`, for given layers, whose decoder layers the caller runs; padding is the caller's to note."""
    fused = {layer.experts: layer for layer in layers if layer.is_fused}
    delegates = {experts: delegate_name(layer) for experts, layer in fused.items()}
    observation = Observation("+".join(sorted(set(delegates.values()))) or "module_list")

    def observed(experts, hidden_TH, topk_index_TK, topk_weight_TK):
        forward = ALL_EXPERTS_FUNCTIONS[delegates[experts]]
        order_S, norm_S = slot_order(delegates[experts], topk_index_TK), None
        with capture_intermediate(experts) as captured:
            if output_norms:
                hidden_SH = hidden_TH.repeat_interleave(topk_index_TK.shape[1], dim=0)
                output_SH = by_slot(forward, experts, hidden_SH, topk_index_TK.reshape(-1))
                output_TH = weighted_sum(output_SH, topk_weight_TK, hidden_TH.dtype)
                norm_S = row_norms(output_SH)[order_S]
            else:
                output_TH = forward(experts, hidden_TH, topk_index_TK, topk_weight_TK)
        expert_S, gate_S = topk_index_TK.reshape(-1)[order_S], topk_weight_TK.reshape(-1)[order_S]
        slots = expert_S, order_S // topk_index_TK.shape[-1], gate_S, captured[0]
        mask_T = observation.token_mask
        observer(fused[experts], RoutedTokens(hidden_TH, topk_index_TK, topk_weight_TK, *slots, mask_T, norm_S))
        return output_TH

    with ExitStack() as stack:
        stack.enter_context(switched(list(fused), observed))
        for layer in layers:
            if not layer.is_fused:
                stack.enter_context(observe_module_list(layer, observer, observation, output_norms))
        yield observation


def slot_order(implementation: str, topk_index_TK: torch.Tensor) -> torch.Tensor:
    """The place in the flattened top-k of every row the implementation computes, in its order, `[slots]`."""
    expert_S = topk_index_TK.reshape(-1)
    if implementation == "grouped_mm":
        return torch.sort(expert_S)[1]
    return torch.arange(len(expert_S), device=expert_S.device)


class SeenEnough(Exception):
    """Ends a forward pass that has shown what it was run for."""


@contextmanager
def capture_intermediate(experts: nn.Module, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """
    Collects the input of `down_proj`, `[slots, intermediate]`, of the forward passes made inside the context; with
    `stop` each of them ends there, by `SeenEnough`.
    """
    captured: list[torch.Tensor] = []

    def record(intermediate_SI: torch.Tensor) -> torch.Tensor:
        captured.append(intermediate_SI)
        if stop:
            raise SeenEnough
        return intermediate_SI

    if not experts.has_gate:
        handle = experts.act_fn.register_forward_hook(lambda _module, _args, output: record(output))
        try:
            yield captured
        finally:
            handle.remove()
        return
    apply_gate = experts._apply_gate
    experts._apply_gate = lambda gate_up_SJ: record(apply_gate(gate_up_SJ))  # shadows the method on this instance only
    try:
        yield captured
    finally:
        del experts._apply_gate
