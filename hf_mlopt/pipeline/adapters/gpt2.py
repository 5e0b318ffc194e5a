"""GPT-2: positions are added, and dropout follows, before the first layer only."""

import torch
from torch import nn

from hf_mlopt.pipeline.adapters.base import PassThrough
from hf_mlopt.pipeline.adapters.decoder import DecoderAdapter


class NoPositions(nn.Module):
    """Stands for the position embedding, which the model adds to whatever it is given."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)  # a 0-d tensor promotes no dtype


class GPT2Adapter(DecoderAdapter):
    """`GPT2LMHeadModel`; see [`DecoderAdapter`]."""

    layer_list = "h"
    before = {"wte": PassThrough, "wpe": NoPositions, "drop": PassThrough}
    after = {"ln_f": PassThrough}
