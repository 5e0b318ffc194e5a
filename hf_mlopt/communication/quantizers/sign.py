"""Sign times mean magnitude, the 1-bit code of signSGD with error feedback."""

from dataclasses import dataclass

import torch

from hf_mlopt.communication.quantizers.interface import BlockCodec
from hf_mlopt.communication.quantizers.rounding import at_least_zero


@dataclass(frozen=True, kw_only=True)
class ScaledSign(BlockCodec):
    """
    sign(v) · ‖v‖₁/d of each block, with sign(0) = 1; EF-SGD, [Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes](https://huggingface.co/papers/1901.09847).
    """

    name = "sign"
    alphabet = 2
    levels_per_block = 1
    biased = True
    contractive = True

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        at_least_zero(rows_ND, codes_ND)
        return torch.abs(rows_ND, out=draw.memory.like("magnitude", rows_ND)).mean(dim=1, keepdim=True)

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        values_ND.copy_(codes_ND).mul_(2 * levels_NP).sub_(levels_NP)
