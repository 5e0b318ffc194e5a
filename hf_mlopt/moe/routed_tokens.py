"""What an observer of a mixture-of-experts layer is given."""

# T tokens   H hidden   K experts per token   S slots = T * K   I expert intermediate

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_mlopt.moe.layers import MoELayer


@dataclass
class RoutedTokens:
    """
    One forward pass of one layer's experts.

    Args:
        hidden_TH (`torch.Tensor`): Input of the experts, `[tokens, hidden]`.
        topk_index_TK (`torch.Tensor`): Chosen experts, `[tokens, top-k]`.
        topk_weight_TK (`torch.Tensor`): The router weights exactly as the block hands them to its experts.
        expert_S, token_S, gate_S (`torch.Tensor`): Expert, token and router weight of each row of `intermediate_SI`.
        intermediate_SI (`torch.Tensor`): Input of the down projection, `[tokens * top-k, intermediate]`.
        token_mask_T (`torch.Tensor`, *optional*): False where padding; None if there is no padding.
        output_norm_S (`torch.Tensor`, *optional*): Euclidean norm of each row's expert output before the router weight
            is applied, float32; None unless asked for.
    """

    hidden_TH: torch.Tensor
    topk_index_TK: torch.Tensor
    topk_weight_TK: torch.Tensor
    expert_S: torch.Tensor
    token_S: torch.Tensor
    gate_S: torch.Tensor
    intermediate_SI: torch.Tensor
    token_mask_T: torch.Tensor | None = None
    output_norm_S: torch.Tensor | None = None


def row_norms(output_SH: torch.Tensor) -> torch.Tensor:
    """The `output_norm_S` of expert outputs."""
    return torch.linalg.vector_norm(output_SH.detach(), dim=-1, dtype=torch.float32)


Observer = Callable[[MoELayer, RoutedTokens], None]


class Observation:
    """
    A running observation.

    Args:
        implementation (`str`): The experts implementation the forward passes run on.
    """

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.token_mask: torch.Tensor | None = None

    def note_padding(self, _module, args, kwargs):
        """Forward pre-hook of a model: remembers which tokens of the batch are padding."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.token_mask = None
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            inputs = kwargs.get("input_ids", args[0] if args else None)
            inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
            new = mask.shape[1] if inputs is None else inputs.shape[1]  # with a cache the mask covers the past too
            self.token_mask = mask[:, mask.shape[1] - new :].reshape(-1).bool()
