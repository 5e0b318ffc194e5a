"""
ORQ: stochastic rounding between levels that minimise its variance.

[Optimal Gradient Quantization Condition for Communication-Efficient Distributed
Training](https://huggingface.co/papers/2002.11082). Free end points, binned statistics and the shared codebook are
ours.
"""

from dataclasses import dataclass, replace

import torch

from hf_mlopt.communication.quantizers.interface import BlockCodec, check_flat
from hf_mlopt.communication.quantizers.memory import Memory
from hf_mlopt.communication.quantizers.orq_levels import Points, binned_points, orq_levels, sorted_points
from hf_mlopt.communication.quantizers.rounding import (
    largest_magnitude,
    look_up,
    root_mean_square,
    round_between_levels,
    safe_divisor,
)
from hf_mlopt.errors import ConfigurationError, InputError


_LEVELS = (3, 5, 9, 17, 33, 65, 129)
_SOLVED_AT_ONCE = 1 << 20  # the solver takes many small steps, whose cost does not grow with the number of blocks
_SAMPLES = 1 << 16  # entries a shared codebook is fitted on


def clip_factor(clip: str) -> float | None:
    """
    The c of "c sigma", or `None` for "none" and "optimal".

    Raises:
        ConfigurationError: If `clip` is none of these, or c is not positive.
    """
    if clip in ("none", "optimal"):
        return None
    try:
        factor = float(str(clip).removesuffix("sigma"))
    except ValueError:
        factor = 0.0
    if not str(clip).endswith("sigma") or not 0 < factor < float("inf"):
        raise ConfigurationError("clip", clip, "must be none, optimal, or a positive multiple such as 2.5sigma")
    return factor


def clipped_ends(ends_N2: torch.Tensor, rows_ND: torch.Tensor, factor: float) -> torch.Tensor:
    """Ends brought within ±cσ. σ is taken about zero, so that a block far from zero keeps its range."""
    reach_N1 = root_mean_square(rows_ND).to(ends_N2.dtype) * factor
    return ends_N2.minimum(reach_N1).maximum(-reach_N1)


@dataclass(frozen=True, kw_only=True)
class SolvedLevels(BlockCodec):
    """
    What both kinds of ORQ share.

    Args:
        levels (`int`, defaults to 9): Number of levels, 2^K + 1.
        clip (`str`, defaults to "none"): End points. `"none"`: smallest and largest entry, unbiased. `"2.5sigma"`, or
            another factor: entries beyond it saturate. `"optimal"`: ends of least squared error, fit for error
            feedback at any number of levels.
        sweeps (`int`, *optional*): Times each level is set again from its neighbours; 2, or 5 where ends are free and
            there are at least five levels.
    """

    levels: int = 9
    clip: str = "none"
    sweeps: int | None = None
    stochastic = True

    def __post_init__(self):
        super().__post_init__()
        if self.levels not in _LEVELS:
            raise ConfigurationError("levels", self.levels, f"ORQ bisects, so it must be one of {_LEVELS}")
        if self.sweeps is not None and self.sweeps < 0:
            raise ConfigurationError("sweeps", self.sweeps, "must be at least 0; leave it out for a good number")
        clip_factor(self.clip)

    @property
    def biased(self) -> bool:
        return self.clip != "none"

    @property
    def contractive(self) -> bool | None:
        return True if self.clip == "optimal" else None

    @property
    def alphabet(self) -> int:
        return self.levels

    def _name(self, *parts: str) -> str:
        clip = () if self.clip == "none" else (self.clip,)
        return "-".join(("orq", str(self.levels), *parts, *clip))

    def _solve(self, points: Points, ends_N2: torch.Tensor | None) -> torch.Tensor:
        optimal = self.clip == "optimal"
        sweeps = (5 if optimal and self.levels > 3 else 2) if self.sweeps is None else self.sweeps
        return orq_levels(points, self.levels, ends_N2=ends_N2, optimal_ends=optimal, sweeps=sweeps)


@dataclass(frozen=True, kw_only=True)
class ORQ(SolvedLevels):
    """
    Levels of their own for each block, sent with it. Arguments as for [`SolvedLevels`], and:

    Args:
        statistics (`str`, defaults to "sorted"): `"sorted"` is exact; `"binned"` reads 256 bins of each block.
    """

    statistics: str = "sorted"

    def __post_init__(self):
        super().__post_init__()
        if self.statistics not in ("sorted", "binned"):
            raise ConfigurationError("statistics", self.statistics, "must be sorted or binned")

    @property
    def name(self) -> str:
        return self._name(*(("binned",) if self.statistics == "binned" else ()))

    @property
    def levels_per_block(self) -> int:
        return self.levels

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        points = (binned_points if self.statistics == "binned" else sorted_points)(rows_ND, draw.memory)
        factor = clip_factor(self.clip)
        ends_N2 = None if factor is None else clipped_ends(points.ends_N2, rows_ND, factor)
        levels_NL = self._solve(points, ends_N2)
        round_between_levels(rows_ND, levels_NL, draw, codes_ND)
        return levels_NL

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        look_up(levels_NP, codes_ND, values_ND, memory)

    def _encoded_at_once(self, device: torch.device) -> int:
        return max(_SOLVED_AT_ONCE, super()._encoded_at_once(device))


@dataclass(frozen=True, kw_only=True)
class SharedORQ(SolvedLevels):
    """
    One set of levels for the whole tensor, times a scale of each block: as quick as a plain absmax code. The levels
    travel with the message (4 bytes each), so that ranks need not agree on them.

    Without clipping the scale is the block's largest magnitude and the levels span [-1, 1], which keeps the code
    unbiased; otherwise the scale is the root mean square. Constant blocks are exact only in the former case.

    Args:
        codebook (`tuple[float, ...]`, *optional*): Levels for scaled entries, from [`fit`]. By default each tensor
            gets its own, fitted on up to 65,536 of its entries.
    """

    codebook: tuple[float, ...] | None = None
    levels_per_block = 1

    def __post_init__(self):
        super().__post_init__()
        given = self.codebook
        if given is not None and (len(given) != self.levels or list(given) != sorted(given)):
            raise ConfigurationError("codebook", given, f"must be {self.levels} ascending levels: use fit")

    @property
    def name(self) -> str:
        return self._name("shared")

    def fit(self, flat: torch.Tensor) -> "SharedORQ":
        """
        This codec with the levels fixed to those that suit `flat`, to be used for many steps.

        Args:
            flat (`torch.Tensor`): `[numel]`, a gradient like those to be encoded. Blocks that are not finite are left
                out.

        Raises:
            InputError: If `flat` is empty or not a flat tensor of floats.
        """
        check_flat(flat)
        if not flat.numel():
            raise InputError("fit needs entries to fit levels on, not an empty tensor")
        return replace(self, codebook=tuple(self._solve_shared(flat.detach()).tolist()))

    @property
    def shared_levels(self) -> int:
        return self.levels

    def _shared(self, flat: torch.Tensor) -> torch.Tensor:
        if self.codebook is None:
            return self._solve_shared(flat)
        return torch.tensor(self.codebook, dtype=torch.float32, device=flat.device)

    def _solve_shared(self, flat: torch.Tensor) -> torch.Tensor:
        """Levels for scaled entries of evenly spaced blocks, `[levels]`, float32."""
        rows_ND = next(self.spans(flat.numel(), flat.numel())).of(flat)
        rows_ND = rows_ND[:: max(1, -(-rows_ND.numel() // _SAMPLES))].float()
        memory = Memory(flat.device)
        scaled_ND = (rows_ND / safe_divisor(self._scale(rows_ND, memory)))[:, :_SAMPLES]
        samples_1M = torch.where(scaled_ND.isfinite(), scaled_ND, 0.0).reshape(1, -1)
        points = sorted_points(samples_1M, memory)
        factor = clip_factor(self.clip)
        if self.clip == "none":
            ends_12 = torch.tensor([[-1.0, 1.0]], device=flat.device)
        else:
            ends_12 = None if factor is None else clipped_ends(points.ends_N2, samples_1M, factor)
        return self._solve(points, ends_12)[0]

    def _scale(self, rows_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
        return largest_magnitude(rows_ND, memory) if self.clip == "none" else root_mean_square(rows_ND)

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        scale_N1 = self._scale(rows_ND, draw.memory)
        scaled_ND = torch.div(rows_ND, safe_divisor(scale_N1), out=draw.memory.like("scaled", rows_ND))
        round_between_levels(scaled_ND, shared_S[None], draw, codes_ND)
        return scale_N1

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        look_up(shared_S[None], codes_ND, values_ND, memory).mul_(levels_NP)
