"""The largest entries and where they are."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from hf_mlopt.communication.quantizers.interface import Codec, Payload, check_flat, output_for, reinterpret
from hf_mlopt.errors import ConfigurationError, InputError


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """
    The `ratio` largest entries by magnitude of the whole tensor, at least one, as 32-bit index and float32 value.
    Equal magnitudes are taken from the front. An entry that is NaN counts as the largest, so that receivers see it.

    Args:
        ratio (`float`, defaults to 0.01): Fraction kept, in (0, 1].
    """

    ratio: float = 0.01
    biased = True
    contractive = True

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ConfigurationError("ratio", self.ratio, "must be in (0, 1], the fraction of entries kept")

    @property
    def name(self) -> str:
        return f"top-k-{self.ratio}"

    def num_levels(self, numel: int) -> int:
        """Entries kept: the ratio rounded up, with the ratio the decimal number it is written as."""
        return math.ceil(Fraction(str(self.ratio)) * numel)

    def code_bytes(self, numel: int) -> int:
        return 4 * self.num_levels(numel)

    def encode(self, flat: torch.Tensor, key: tuple[int, ...] = ()) -> Payload:
        check_flat(flat)
        if flat.numel() >= 1 << 31:
            raise InputError(f"top-k indices have 32 bits, the tensor has {flat.numel()} elements: send it in parts")
        values, kept = flat.detach().float(), self.num_levels(flat.numel())
        size = values.abs().nan_to_num_(nan=torch.inf)
        smallest = torch.topk(size, kept, sorted=False).values.amin() if kept else torch.inf
        above = (size > smallest).nonzero().view(-1)
        ties = (size == smallest).nonzero().view(-1)[: kept - len(above)]
        index = torch.cat((above, ties)).sort().values
        return Payload(index.int().view(torch.uint8), values[index], flat.numel())

    def decode(self, payload: Payload, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        out = output_for(payload, out, accumulate)
        if not accumulate:
            out.zero_()
        index = reinterpret(payload.codes, torch.int32).long()
        return out.index_add_(0, index, payload.levels.to(out.dtype))
