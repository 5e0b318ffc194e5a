"""Stochastic rounding between evenly spaced levels: the codes that levels fitted to the data are compared with."""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from hf_mlopt.communication.quantizers.interface import BlockCodec
from hf_mlopt.communication.quantizers.memory import Memory
from hf_mlopt.communication.quantizers.orq import clip_factor
from hf_mlopt.communication.quantizers.rounding import largest_magnitude, root_mean_square, round_on_grid, safe_divisor
from hf_mlopt.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Linear(BlockCodec):
    """
    Levels evenly spaced from the smallest to the largest entry of each block; unbiased.

    Args:
        levels (`int`, defaults to 9): Number of levels, 2 … 256.
    """

    levels: int = 9
    levels_per_block = 2
    biased = False
    contractive = None
    stochastic = True

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.levels <= 256:
            raise ConfigurationError("levels", self.levels, "must be between 2 and 256")

    @property
    def name(self) -> str:
        return f"linear-{self.levels}"

    @property
    def alphabet(self) -> int:
        return self.levels

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        low_N1, high_N1 = rows_ND.amin(dim=1, keepdim=True), rows_ND.amax(dim=1, keepdim=True)
        step_N1 = (high_N1 - low_N1) / (self.levels - 1)
        position_ND = torch.sub(rows_ND, low_N1, out=draw.memory.like("position", rows_ND))
        round_on_grid(position_ND.div_(safe_divisor(step_N1)), self.levels - 1, draw, codes_ND)
        return torch.cat((low_N1, step_N1), dim=1)

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        values_ND.copy_(codes_ND).mul_(levels_NP[:, 1:]).add_(levels_NP[:, :1])


@dataclass(frozen=True, kw_only=True)
class Symmetric(BlockCodec):
    """
    An odd number of levels evenly spaced over ±scale, so that zero is one of them and stays zero. What is sent is the
    step between levels.
    """

    levels_per_block = 1
    contractive = None
    stochastic = True

    @abstractmethod
    def _scale(self, rows_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Largest level, `[blocks, 1]`; larger entries saturate."""

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        half = (self.alphabet - 1) // 2
        step_N1 = self._scale(rows_ND, draw.memory) / half
        position_ND = torch.div(rows_ND, safe_divisor(step_N1), out=draw.memory.like("position", rows_ND))
        round_on_grid(position_ND.add_(half), 2 * half, draw, codes_ND)
        return step_N1

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        values_ND.copy_(codes_ND).sub_((self.alphabet - 1) // 2).mul_(levels_NP)


@dataclass(frozen=True, kw_only=True)
class QSGD(Symmetric):
    """
    [QSGD](https://huggingface.co/papers/1610.02132), Eq. (3): v_i becomes scale · sign(v_i) · l/s, with |v_i|/scale
    rounded stochastically to a multiple of 1/s; s = (levels - 1)/2. Unbiased. Codes have a fixed length here; the
    paper's Elias code is left out.

    Args:
        levels (`int`, defaults to 9): Number of levels counted with both signs, odd, 3 … 255.
        norm (`str`, defaults to "max"): The scale: `"max"`, the block's largest magnitude, as in the paper's
            experiments, or `"l2"`, its 2-norm, as in its theory. At a few levels the latter rounds most entries to 0.
    """

    levels: int = 9
    norm: str = "max"
    biased = False

    def __post_init__(self):
        super().__post_init__()
        if self.levels not in range(3, 256, 2):
            raise ConfigurationError("levels", self.levels, "must be odd and between 3 and 255, zero in the middle")
        if self.norm not in ("max", "l2"):
            raise ConfigurationError("norm", self.norm, "must be max or l2")

    @property
    def name(self) -> str:
        return f"qsgd-{self.levels}" + ("-l2" if self.norm == "l2" else "")

    @property
    def alphabet(self) -> int:
        return self.levels

    def _scale(self, rows_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
        if self.norm == "l2":
            return torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
        return largest_magnitude(rows_ND, memory)


@dataclass(frozen=True, kw_only=True)
class TernGrad(Symmetric):
    """
    [TernGrad](https://huggingface.co/papers/1705.07878), Eq. (3): s · sign(v_i) with probability |v_i|/s, else 0,
    with s the block's largest magnitude.

    Args:
        clip (`str`, defaults to "none"): `"2.5sigma"`, or another factor, first clips entries at that many root mean
            squares, Eq. (11), which is biased and much less noisy.
    """

    clip: str = "none"
    alphabet = 3

    def __post_init__(self):
        super().__post_init__()
        if self.clip == "optimal":
            raise ConfigurationError("clip", self.clip, "must be none or a factor such as 2.5sigma; orq-3 has optimal")
        clip_factor(self.clip)

    @property
    def biased(self) -> bool:
        return self.clip != "none"

    @property
    def name(self) -> str:
        return "terngrad" + ("" if self.clip == "none" else f"-{self.clip}")

    def _scale(self, rows_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
        largest_N1, factor = largest_magnitude(rows_ND, memory), clip_factor(self.clip)
        return largest_N1 if factor is None else largest_N1.minimum(factor * root_mean_square(rows_ND))
