"""
Binary codes with the best two levels of each block.

[Optimal Gradient Quantization Condition for Communication-Efficient Distributed
Training](https://huggingface.co/papers/2002.11082), fully biased (BinGrad-b) and partially biased (BinGrad-pb).
"""

from dataclasses import dataclass

import numpy as np
import torch

from hf_mlopt.communication.quantizers.interface import BlockCodec
from hf_mlopt.communication.quantizers.memory import Memory, native
from hf_mlopt.communication.quantizers.orq_levels import orq_levels, sorted_points
from hf_mlopt.communication.quantizers.rounding import at_least_zero, round_between_levels
from hf_mlopt.errors import ConfigurationError


_SOLVED_AT_ONCE = 1 << 20  # the solver takes many small steps, whose cost does not grow with the number of blocks


def conditional_means(rows_ND: torch.Tensor, codes_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
    r"""
    Writes whether each entry is at or above its block's mean t, and returns the means b_- and b_+ of both kinds.

    With A = Σ|v - t| and R = Σ(v - t), zero but for rounding, the entries at or above t sum to (A + R)/2 above it:
    b_+ = t + (A + R)/(2 n_+), b_- = t - (A - R)/(2 n_-). No masked sums; a constant block is exact.
    """
    mean_N = rows_ND.mean(dim=1)
    centred_ND = torch.sub(rows_ND, mean_N[:, None], out=memory.like("centred", rows_ND))
    at_least_zero(centred_ND, codes_ND)
    code = native(codes_ND)
    if isinstance(code, np.ndarray):  # summing bytes is slower than packing them and counting bits
        above_N = torch.from_numpy(np.bitwise_count(np.packbits(code, axis=1)).sum(axis=1, dtype=np.float32))
    else:
        above_N = code.sum(dim=1, dtype=torch.float32)
    residual_N = centred_ND.sum(dim=1)
    spread_N = centred_ND.abs_().sum(dim=1)
    below_N = rows_ND.shape[1] - above_N
    # An empty side has nothing to sum: its level is t, and no code names it.
    high_N = mean_N + (spread_N + residual_N) / (2 * above_N.clamp(min=1))
    low_N = mean_N - (spread_N - residual_N) / (2 * below_N.clamp(min=1))
    return torch.stack((low_N, high_N), dim=1)


@dataclass(frozen=True, kw_only=True)
class TwoLevels(BlockCodec):
    """One bit per entry and both levels, b_- and b_+, of each block."""

    alphabet = 2
    levels_per_block = 2
    biased = True
    contractive = True

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        low_N1, high_N1 = levels_NP[:, :1], levels_NP[:, 1:]
        values_ND.copy_(codes_ND).mul_(high_N1 - low_N1).add_(low_N1)


@dataclass(frozen=True, kw_only=True)
class BinGradB(TwoLevels):
    """
    Each entry becomes the mean of its side of the block's mean t. Least squares would put t at (b_- + b_+)/2
    (Lloyd-Max); the mean is within 0.5 % of it and takes one pass.
    """

    name = "bingrad-b"

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        return conditional_means(rows_ND, codes_ND, draw.memory)


@dataclass(frozen=True, kw_only=True)
class BinGradPB(TwoLevels):
    """
    Stochastic between b_- and b_+, saturating outside: unbiased for what lies between. From BinGrad-b's levels on,
    each is set by the end rule of [`orq_levels`] in turn, the case of ORQ with two levels and free ends.

    Args:
        sweeps (`int`, defaults to 4): Times both levels are set.
    """

    sweeps: int = 4
    name = "bingrad-pb"
    stochastic = True

    def __post_init__(self):
        super().__post_init__()
        if self.sweeps < 1:
            raise ConfigurationError("sweeps", self.sweeps, "must be at least 1; 4 is enough")

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        start_N2 = conditional_means(rows_ND, codes_ND, draw.memory)
        points = sorted_points(rows_ND, draw.memory)
        levels_NP = orq_levels(points, 2, ends_N2=start_N2, optimal_ends=True, sweeps=self.sweeps)
        round_between_levels(rows_ND, levels_NP, draw, codes_ND)
        return levels_NP

    def _encoded_at_once(self, device: torch.device) -> int:
        return max(_SOLVED_AT_ONCE, super()._encoded_at_once(device))
