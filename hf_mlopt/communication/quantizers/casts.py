"""Number formats as codecs: 32, 16 and 8 bits."""

from dataclasses import dataclass

import torch

from hf_mlopt.communication.quantizers.interface import (
    BlockCodec,
    Codec,
    Payload,
    check_flat,
    output_for,
    reinterpret,
    write,
)
from hf_mlopt.communication.quantizers.rounding import largest_magnitude, safe_divisor
from hf_mlopt.errors import ConfigurationError


_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Cast(Codec):
    """
    Each entry rounded to a number format; no levels. float16 overflows to infinity beyond 65,504.

    Args:
        format (`str`, defaults to "fp32"): `"fp32"` sends the bytes as they are, `"bf16"` or `"fp16"` half of them.
    """

    format: str = "fp32"
    biased = False
    contractive = True

    def __post_init__(self):
        if self.format not in _FORMATS:
            raise ConfigurationError("format", self.format, f"must be one of {', '.join(_FORMATS)}")

    @property
    def name(self) -> str:
        return self.format

    def code_bytes(self, numel: int) -> int:
        return numel * _FORMATS[self.format].itemsize

    def num_levels(self, numel: int) -> int:
        return 0

    def encode(self, flat: torch.Tensor, key: tuple[int, ...] = ()) -> Payload:
        check_flat(flat)
        # A copy even where the format is the input's own: a message must not change with the tensor it came from.
        codes = flat.detach().to(_FORMATS[self.format], copy=True).contiguous().view(torch.uint8)
        return Payload(codes, torch.empty(0, device=flat.device), flat.numel())

    def decode(self, payload: Payload, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        out = output_for(payload, out, accumulate)
        write(out, reinterpret(payload.codes, _FORMATS[self.format]), accumulate)
        return out


@dataclass(frozen=True, kw_only=True)
class FP8(BlockCodec):
    """float8 e4m3 times a scale of each block that brings its largest magnitude to 448, the format's largest."""

    name = "fp8"
    alphabet = 256
    levels_per_block = 1
    biased = True
    contractive = True

    def _encode_rows(self, rows_ND, shared_S, draw, codes_ND):
        limit = torch.finfo(torch.float8_e4m3fn).max
        scale_N1 = largest_magnitude(rows_ND, draw.memory) / limit
        scaled_ND = torch.div(rows_ND, safe_divisor(scale_N1), out=draw.memory.like("scaled", rows_ND))
        # A quotient an ulp beyond the limit still rounds to it.
        codes_ND.copy_(scaled_ND.to(torch.float8_e4m3fn).view(torch.uint8))
        return scale_N1

    def _decode_rows(self, codes_ND, levels_NP, shared_S, memory, values_ND):
        values_ND.copy_(codes_ND.view(torch.float8_e4m3fn)).mul_(levels_NP)
