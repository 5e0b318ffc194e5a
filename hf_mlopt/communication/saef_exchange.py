"""How coded updates of all parameters reach a server and come back, for [`SAEFOptimizer`]."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from hf_mlopt.communication.collectives import all_gather_mean, naming_this_rank, shard_bounds, two_phase_mean
from hf_mlopt.communication.quantizers import Cast, Codec, Payload, ScaledSign, TopK
from hf_mlopt.communication.quantizers.interface import BlockCodec
from hf_mlopt.communication.quantizers.registry import codec as codec_of
from hf_mlopt.errors import ConfigurationError


COLLECTIVES = ("all-gather", "two-phase")
_ALL = 1 << 62  # a block that holds every model


@dataclass(frozen=True, kw_only=True)
class PerTensor(Codec):
    """
    Tensors that lie one after the other, each coded by itself.

    Args:
        inner (`Codec`): Of each.
        sizes (`tuple[int, ...]`): Their elements.
    """

    inner: Codec
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def biased(self) -> bool:
        return self.inner.biased

    @property
    def contractive(self) -> bool | None:
        return self.inner.contractive

    def code_bytes(self, numel: int) -> int:
        return sum(self.inner.code_bytes(size) for size in self.sizes)

    def num_levels(self, numel: int) -> int:
        return sum(self.inner.num_levels(size) for size in self.sizes)

    def encode(self, flat: torch.Tensor, key: tuple[int, ...] = ()) -> Payload:
        parts = [self.inner.encode(part, (*key, i)) for i, part in enumerate(flat.split(self.sizes))]
        codes, levels = torch.cat([part.codes for part in parts]), torch.cat([part.levels for part in parts])
        return Payload(codes, levels, flat.numel())

    def decode(self, payload: Payload, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        out = torch.zeros(payload.numel, device=payload.codes.device) if out is None else out
        codes = payload.codes.split([self.inner.code_bytes(size) for size in self.sizes])
        levels = payload.levels.split([self.inner.num_levels(size) for size in self.sizes])
        for size, of_codes, of_levels, part in zip(self.sizes, codes, levels, out.split(self.sizes), strict=True):
            self.inner.decode(Payload(of_codes, of_levels, size), part, accumulate)
        return out


class Reply(NamedTuple):
    """
    Args:
        update (`torch.Tensor`): `[numel]`, float32, what all ranks subtract; the same bits on all.
        sent (`torch.Tensor`): `[numel]`, what this rank's message says.
        bytes_sent (`int`): Bytes that left this rank.
    """

    update: torch.Tensor
    sent: torch.Tensor
    bytes_sent: int


@dataclass(frozen=True)
class UpdateExchange:
    """
    Args:
        codec (`Codec`): What a rank sends.
        codec_down (`Codec`, *optional*): What is sent back; float32 without.
        group (`ProcessGroup`, *optional*): The ranks; by default all, or this process alone.
        per_tensor (`bool`, *optional*): Whether each parameter is coded by itself; by default with top-k.
        collective (`str`): `all-gather` or `two-phase`.
        seed (`int`): Of stochastic rounding.
    """

    codec: Codec
    codec_down: Codec | None
    group: object
    per_tensor: bool | None
    collective: str
    seed: int

    def __post_init__(self):
        if self.per_tensor and self.in_shards:
            raise ConfigurationError(
                "per_tensor", True, "needs collective='all-gather': shards cut through parameters"
            )

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.world > 1 else 0

    @property
    def in_shards(self) -> bool:
        return self.collective == "two-phase"

    def mean(self, delta: torch.Tensor, sizes: tuple[int, ...], server: torch.Tensor | None, step: int) -> Reply:
        """
        C(mean of C(Δ)).

        Args:
            delta (`torch.Tensor`): `[numel]`, float32, Δ of all parameters.
            sizes (`tuple[int, ...]`): Elements of each.
            server (`torch.Tensor`, *optional*): `[numel]`, s, what was lost on the way back; becomes the new one.
            step (`int`): Number of the step, for stochastic rounding.
        """

        def key(phase: int, rank: int) -> tuple[int, ...]:
            return (self.seed, step, 0, phase, rank)

        up, down = self._fitted(self.codec, sizes), self._fitted(self.codec_down, sizes)
        if self.world > 1 and self.in_shards:
            result = two_phase_mean(delta, up, down or Cast(), key, self.group, True, server)
            if (
                server is not None
            ):  # what this rank has lost of shards that were its own before stays for when they are
                begin, end = shard_bounds(delta.numel(), self.world, getattr(up, "block", 1))[self.rank]
                server[begin:end] = result.down_error[begin:end]
            return Reply(result.mean, result.sent, result.bytes_sent)
        if self.world > 1:
            result = all_gather_mean(delta, up, key, self.group, True)
            reply = Reply(result.mean, result.sent, result.bytes_sent)
        else:
            sent = up.decode(up.encode(delta, key(0, 0)))
            reply = Reply(sent.clone(), sent, 0)
        return reply if down is None else self._served(reply, down, key(1, 0), server)

    def _served(self, reply: Reply, down: Codec, key: tuple[int, ...], server: torch.Tensor | None) -> Reply:
        """All have the mean; the first codes it and all decode what that one has sent, so that no bit differs."""
        mean = reply.update if server is None else reply.update.add_(server)
        message = torch.empty(down.wire_bytes(mean.numel()), dtype=torch.uint8, device=mean.device)
        bytes_sent = reply.bytes_sent
        if self.rank == 0:
            message = down.to_bytes(down.encode(mean, key))
            bytes_sent += message.numel() * (self.world - 1)
        if self.world > 1:
            message = self.for_wire(message)
            with naming_this_rank():
                dist.broadcast(message, group_src=0, group=self.group)
        decoded = down.decode(down.from_bytes(message.to(mean.device), mean.numel()))
        if server is not None:
            torch.sub(mean, decoded, out=server)
        return Reply(decoded, reply.sent, bytes_sent)

    def average(self, flat: torch.Tensor) -> int:
        """Replaces a vector by its mean over the ranks, in full precision; the bytes that left this rank."""
        if self.world == 1:
            return 0
        # An all-reduce does not promise the same bits everywhere; this sums in rank order.
        result = two_phase_mean(flat, Cast(), Cast(), lambda *_: (), self.group, want_sent=False)
        flat.copy_(result.mean)
        return result.bytes_sent

    def any_of(self, votes: torch.Tensor) -> list[int]:
        """The largest of every vote over the ranks."""
        if self.world > 1:
            votes = self.for_wire(votes)
            with naming_this_rank():
                dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return votes.tolist()

    def for_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        """gloo moves what lies in host memory."""
        return tensor.cpu() if dist.get_backend(self.group) == "gloo" else tensor

    def _fitted(self, codec: Codec | None, sizes: tuple[int, ...]) -> Codec | None:
        """What codes parameters of these sizes in a row."""
        if self.world > 1 and self.in_shards:
            is_large = isinstance(codec, BlockCodec) and codec.block * self.world > sum(sizes)
            return replace(codec, block=max(1, -(-sum(sizes) // self.world))) if is_large else codec
        per_tensor = isinstance(codec, TopK) if self.per_tensor is None else self.per_tensor
        return PerTensor(inner=codec, sizes=sizes) if codec is not None and per_tensor else codec


def found_codec(field: str, given: str | Codec | None) -> Codec | None:
    """
    The codec of a name; `sign` has one scale for all that is coded at once.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    if isinstance(given, Codec) or given is None:
        return given
    try:
        return ScaledSign(block=_ALL) if given == "sign" else codec_of(given)
    except ConfigurationError as error:
        raise ConfigurationError(field, error.value, str(error).partition(": ")[2]) from None
