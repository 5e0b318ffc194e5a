"""Runs single experts on tokens the router did not send to them."""

# T tokens   H hidden   I expert intermediate

from contextlib import suppress

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.moe.layers import MoELayer
from hf_mlopt.moe.observation import SeenEnough, capture_intermediate
from hf_mlopt.moe.switching import delegate_name


@torch.no_grad()
def intermediate_on_all_tokens(layer: MoELayer, hidden_TH: torch.Tensor, expert: int) -> torch.Tensor:
    """Input of the expert's down projection if it were given every token, `[tokens, intermediate]`."""
    if layer.is_fused:
        index_T1 = torch.full((len(hidden_TH), 1), expert, device=hidden_TH.device)
        weight_T1 = torch.ones(len(hidden_TH), 1, dtype=hidden_TH.dtype, device=hidden_TH.device)
        forward = ALL_EXPERTS_FUNCTIONS[delegate_name(layer)]
        with capture_intermediate(layer.experts, stop=True) as captured, suppress(SeenEnough):
            forward(layer.experts, hidden_TH, index_T1, weight_T1)
        return captured[0]
    down = next(name for name, reads in layer.projections.items() if reads == "intermediate")
    captured = []

    def record(_module, args):
        captured.append(args[0])
        raise SeenEnough

    module = layer.experts[expert]
    handle = getattr(module, down).register_forward_pre_hook(record)
    try:
        with suppress(SeenEnough):
            module(hidden_TH)
    finally:
        handle.remove()
    return captured[0]
