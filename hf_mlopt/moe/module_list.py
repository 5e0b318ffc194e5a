"""
Observation of experts in a `ModuleList`, as remote code and models of transformers 4 have them.

Such a block multiplies by the router weights outside the experts, where no hook sees them. They are taken from the
router logits by the routing rules in use, and a rule is accepted only when it reproduces what the block did: each
expert got exactly the tokens it predicts, and the weighted sum of the expert outputs is the block's output.
"""

# T tokens   H hidden   K experts per token   S slots = T * K   I expert intermediate   E experts

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.moe.layers import MoELayer
from hf_mlopt.moe.routed_tokens import Observation, Observer, RoutedTokens, row_norms


def _softmax_topk(logits_TE: torch.Tensor, top_k: int):
    return torch.topk(torch.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)


def _softmax_topk_normalised(logits_TE: torch.Tensor, top_k: int):
    weight_TK, index_TK = _softmax_topk(logits_TE, top_k)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), index_TK


_ROUTING_RULES = (_softmax_topk_normalised, _softmax_topk)


@contextmanager
def observe_module_list(
    layer: MoELayer, observer: Observer, observation: Observation, output_norms: bool = False
) -> Iterator[None]:
    """Calls `observer(layer, routed_tokens)` after each forward pass of the block."""
    recorder = _Recorder(layer, observer, observation, output_norms)
    down = next(name for name, reads in layer.projections.items() if reads == "intermediate")
    handles = [
        layer.router.register_forward_hook(recorder.router),
        layer.block.register_forward_hook(recorder.block),
    ]
    for number, expert in enumerate(layer.experts):
        handles.append(expert.register_forward_hook(recorder.expert(number)))
        handles.append(getattr(expert, down).register_forward_pre_hook(recorder.intermediate(number)))
    shared = getattr(layer.block, "shared_experts", None)
    if isinstance(shared, nn.Module):
        handles.append(shared.register_forward_hook(recorder.shared_experts))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Keeps what the hooks of one block saw until the block has finished."""

    def __init__(self, layer: MoELayer, observer: Observer, observation: Observation, output_norms: bool):
        self.layer, self.observer, self.observation = layer, observer, observation
        self.output_norms = output_norms
        self.rule = None
        self.clear()

    def clear(self):
        self.logits_TE = self.hidden_TH = self.shared_TH = None
        self.inputs, self.intermediates, self.outputs = {}, {}, {}

    def router(self, _module, args, output):
        self.hidden_TH = args[0].reshape(-1, args[0].shape[-1])
        self.logits_TE = output.reshape(-1, output.shape[-1])

    def expert(self, number: int):
        def hook(_module, args, output):
            self.inputs[number] = args[0].reshape(-1, args[0].shape[-1])
            self.outputs[number] = output.reshape(-1, output.shape[-1])

        return hook

    def intermediate(self, number: int):
        def hook(_module, args):
            self.intermediates[number] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    def shared_experts(self, _module, _args, output):
        self.shared_TH = output.reshape(-1, output.shape[-1])

    def block(self, _module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        rules = _ROUTING_RULES if self.rule is None else (self.rule,)
        for rule in rules:
            routed = self._routed(*rule(self.logits_TE, self.layer.top_k))
            if routed is not None and (self.rule or self._explains(routed, output.reshape(-1, output.shape[-1]))):
                self.rule = rule
                self.clear()
                return self.observer(self.layer, routed)
        raise InputError(
            f"{self.layer.name}: the routing of this {type(self.layer.block).__name__} is not understood: "
            "softmax and top-k of the router logits do not reproduce its output."
        )

    def _routed(self, weight_TK: torch.Tensor, index_TK: torch.Tensor) -> RoutedTokens | None:
        """The routed tokens under these router weights; None where the experts saw other tokens."""
        expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
        token_S = order_S // index_TK.shape[-1]
        # A block may call an expert no token chose, with no rows; dict order is the call order.
        called = [number for number in sorted(self.inputs) if len(self.inputs[number])]
        inputs_SH = torch.cat([self.inputs[number] for number in called])
        if not torch.equal(inputs_SH, self.hidden_TH[token_S]):
            return None
        gate_S = weight_TK.reshape(-1)[order_S]
        intermediate_SI = torch.cat([self.intermediates[number] for number in called])
        norm_S = torch.cat([row_norms(self.outputs[number]) for number in called]) if self.output_norms else None
        slots = expert_S, token_S, gate_S, intermediate_SI
        return RoutedTokens(self.hidden_TH, index_TK, weight_TK, *slots, self.observation.token_mask, norm_S)

    def _explains(self, routed: RoutedTokens, output_TH: torch.Tensor) -> bool:
        output_SH = torch.cat([self.outputs[number] for number in sorted(self.outputs) if len(self.outputs[number])])
        total_TH = torch.zeros(output_TH.shape, dtype=torch.float32, device=output_TH.device)
        total_TH.index_add_(0, routed.token_S, output_SH.float() * routed.gate_S[:, None].float())
        if self.shared_TH is not None:
            total_TH += self.shared_TH.float()
        tolerance = 1e-4 if output_TH.dtype == torch.float32 else 2e-2
        return bool((total_TH - output_TH.float()).norm() <= tolerance * output_TH.float().norm())
