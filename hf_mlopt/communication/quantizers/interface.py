"""What every codec can do, and how those that work block by block share it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_mlopt.communication.packing import pack, packed_bytes, unpack
from hf_mlopt.communication.quantizers.draws import Draw, stream
from hf_mlopt.communication.quantizers.memory import Memory
from hf_mlopt.communication.quantizers.rounding import elements_at_once
from hf_mlopt.errors import ConfigurationError, InputError


# N blocks   D entries of a block   P float32 parameters of a block (levels or scales)   S of all blocks together


@dataclass(frozen=True)
class Payload:
    """
    An encoded tensor.

    Args:
        codes (`torch.Tensor`): uint8, packed.
        levels (`torch.Tensor`): float32, 1-D: levels, scales or values.
        numel (`int`): Number of elements encoded.
    """

    codes: torch.Tensor
    levels: torch.Tensor
    numel: int


class Span(NamedTuple):
    """Elements `start` … `start + rows * width`, which are blocks `block` … `block + rows`."""

    start: int
    rows: int
    width: int
    block: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.start + self.rows * self.width].view(self.rows, self.width)


def reinterpret(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes read as `dtype`, copied only where they are not aligned for it."""
    if raw.storage_offset() % dtype.itemsize or not raw.is_contiguous():
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(dtype)


def check_flat(flat: torch.Tensor) -> None:
    if flat.dim() != 1 or not flat.is_floating_point():
        raise InputError(f"a codec encodes a flat tensor of floats, not {flat.dtype} {list(flat.shape)}: flatten it")


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """
    A way to send a flat tensor in few bytes. A codec holds settings only, so that it is shared and compared freely.

    `biased`: whether decoded values differ from the input in expectation, beyond the rounding of a 16-bit float.
    `contractive`: whether E‖Q(v) - v‖² < ‖v‖² for every v, as error feedback needs; `None` where it depends on v.
    `stochastic`: whether `encode` reads its key.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that [`registry.codec`] makes this codec from, but for block and sweeps."""

    @property
    @abstractmethod
    def biased(self) -> bool: ...

    @property
    @abstractmethod
    def contractive(self) -> bool | None: ...

    @property
    def stochastic(self) -> bool:
        return False

    @abstractmethod
    def code_bytes(self, numel: int) -> int:
        """Bytes of `Payload.codes`."""

    @abstractmethod
    def num_levels(self, numel: int) -> int:
        """Length of `Payload.levels`."""

    @abstractmethod
    def encode(self, flat: torch.Tensor, key: tuple[int, ...] = ()) -> Payload:
        """
        Args:
            flat (`torch.Tensor`): `[numel]`, float32, bfloat16 or float16; not changed.
            key (`tuple[int, ...]`): Names the random numbers, such as (seed, step, bucket, phase, rank). The same key
                gives the same bits; ranks whose noise should average out need different keys.
        """

    @abstractmethod
    def decode(self, payload: Payload, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        """
        Args:
            payload (`Payload`): What [`encode`] or [`from_bytes`] gave.
            out (`torch.Tensor`, *optional*): `[numel]`, floating point, written; a new float32 tensor by default.
            accumulate (`bool`): Add to `out` instead of overwriting it.

        Returns:
            `torch.Tensor`: `out`.
        """

    def wire_bytes(self, numel: int) -> int:
        """Exact size in bytes of the message for `numel` elements."""
        return self.code_bytes(numel) + 4 * self.num_levels(numel)

    def to_bytes(self, payload: Payload) -> torch.Tensor:
        """One contiguous message, uint8 `[wire_bytes(numel)]`: codes, then levels in machine byte order."""
        if not len(payload.levels):
            return payload.codes
        return torch.cat((payload.codes, payload.levels.view(torch.uint8)))

    def from_bytes(self, message: torch.Tensor, numel: int) -> Payload:
        """
        The inverse of [`to_bytes`], without a copy of the codes.

        Raises:
            InputError: If `message` is not `wire_bytes(numel)` bytes.
        """
        if message.dtype != torch.uint8 or message.shape != (self.wire_bytes(numel),):
            given = f"{message.dtype} {list(message.shape)}"
            raise InputError(f"{numel} elements in {self.name} take {self.wire_bytes(numel)} bytes, not {given}")
        size = self.code_bytes(numel)
        return Payload(message[:size], reinterpret(message[size:], torch.float32), numel)


def write(out: torch.Tensor, values: torch.Tensor, accumulate: bool) -> None:
    out.add_(values) if accumulate else out.copy_(values)


def output_for(payload: Payload, out: torch.Tensor | None, accumulate: bool) -> torch.Tensor:
    """`out`, checked, or a new tensor."""
    if out is None:
        allocate = torch.zeros if accumulate else torch.empty
        return allocate(payload.numel, dtype=torch.float32, device=payload.codes.device)
    if out.shape != (payload.numel,):
        raise InputError(f"decoding gives {payload.numel} elements, out has shape {list(out.shape)}")
    return out


@dataclass(frozen=True, kw_only=True)
class BlockCodec(Codec):
    """
    A codec that cuts its input into blocks, each with its own levels or scale. A last block that is shorter is coded
    with the statistics of what it holds. A block with an entry that is not finite, or whose 2-norm float32 cannot hold
    (about 1.8e19), decodes to NaN throughout, so that every receiver can see it and skip the step.

    Args:
        block (`int`, defaults to 2048): Entries that share levels.
    """

    block: int = 2048

    def __post_init__(self):
        if self.block < 1:
            raise ConfigurationError("block", self.block, "must be at least 1; 2048 is a good size")

    @property
    @abstractmethod
    def alphabet(self) -> int:
        """Number of different codes."""

    @property
    @abstractmethod
    def levels_per_block(self) -> int:
        """float32 numbers sent with each block."""

    @property
    def shared_levels(self) -> int:
        """float32 numbers sent once for all blocks."""
        return 0

    def _shared(self, flat: torch.Tensor) -> torch.Tensor:
        """These numbers, for a tensor that is not empty."""
        return torch.empty(0, device=flat.device)

    @abstractmethod
    def _encode_rows(
        self, rows_ND: torch.Tensor, shared_S: torch.Tensor, draw: Draw, codes_ND: torch.Tensor
    ) -> torch.Tensor:
        """Writes the codes of finite float32 blocks and returns `levels_NP`."""

    @abstractmethod
    def _decode_rows(
        self,
        codes_ND: torch.Tensor,
        levels_NP: torch.Tensor,
        shared_S: torch.Tensor,
        memory: Memory,
        values_ND: torch.Tensor,
    ) -> None:
        """Writes the float32 values of the codes."""

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def code_bytes(self, numel: int) -> int:
        return packed_bytes(numel, self.alphabet)

    def num_levels(self, numel: int) -> int:
        return self.num_blocks(numel) * self.levels_per_block + (self.shared_levels if numel else 0)

    def spans(self, numel: int, at_once: int) -> Iterator[Span]:
        """Whole blocks, about `at_once` elements at a time, then the shorter last block."""
        whole, step = numel // self.block, max(1, at_once // self.block)
        for first in range(0, whole, step):
            yield Span(first * self.block, min(step, whole - first), self.block, first)
        if numel % self.block:
            yield Span(whole * self.block, 1, numel % self.block, whole)

    def encode(self, flat: torch.Tensor, key: tuple[int, ...] = ()) -> Payload:
        check_flat(flat)
        flat = flat.detach().contiguous()
        codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
        levels = torch.empty(self.num_levels(flat.numel()), dtype=torch.float32, device=flat.device)
        levels_NP, shared_S = self._parted(levels)
        if flat.numel():
            shared_S.copy_(self._shared(flat))
        state, memory = stream(key), Memory(flat.device)
        for span in self.spans(flat.numel(), self._encoded_at_once(flat.device)):
            rows_ND = span.of(flat).float()
            broken_N = ~torch.linalg.vector_norm(rows_ND, dim=1).isfinite()
            if flat.device.type != "cpu" or broken_N.any():  # elsewhere asking would wait for the device
                rows_ND = rows_ND.masked_fill(broken_N[:, None], 0)
            own_NP = self._encode_rows(rows_ND, shared_S, Draw(state, span.start, memory), span.of(codes))
            levels_NP[span.block : span.block + span.rows] = own_NP.masked_fill(broken_N[:, None], torch.nan)
        return Payload(pack(codes, self.alphabet), levels, flat.numel())

    def decode(self, payload: Payload, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        out = output_for(payload, out, accumulate)
        codes = unpack(payload.codes, self.alphabet, payload.numel)
        levels_NP, shared_S = self._parted(payload.levels)
        memory = Memory(codes.device)
        for span in self.spans(payload.numel, elements_at_once(codes.device)):
            own_NP = levels_NP[span.block : span.block + span.rows]
            target_ND = span.of(out)
            is_direct = out.dtype == torch.float32 and not accumulate
            values_ND = target_ND if is_direct else memory.like("values", target_ND, torch.float32)
            self._decode_rows(span.of(codes), own_NP, shared_S, memory, values_ND)
            if not is_direct:
                write(target_ND, values_ND, accumulate)
        return out

    def _parted(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels of the blocks, and those they share, as views."""
        size = len(levels) - (self.shared_levels if len(levels) else 0)
        return levels[:size].view(-1, self.levels_per_block), levels[size:]

    def _encoded_at_once(self, device: torch.device) -> int:
        return elements_at_once(device)
