"""Means over ranks of coded vectors. All ranks end with the same bits: all decode the same bytes, in rank order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_mlopt.communication.quantizers import Codec


@dataclass
class Exchange:
    """
    What a coded mean gave.

    Args:
        mean (`torch.Tensor`): `[numel]`, float32, the same bits on every rank.
        sent (`torch.Tensor`, *optional*): `[numel]`, what the others decode from this rank, where asked for.
        bytes_sent (`int`): Bytes that left this rank.
        down_error (`torch.Tensor`, *optional*): `[numel]`, what this rank's shard of the mean lost on its way back, 0
            elsewhere.
        down_norm (`float`): Sum of squares of what that shard should have sent.
    """

    mean: torch.Tensor
    sent: torch.Tensor | None
    bytes_sent: int
    down_error: torch.Tensor | None = None
    down_norm: float = 0.0


Key = Callable[[int, int], tuple[int, ...]]  # phase and rank, or shard -> the names of its random numbers


def all_gather_mean(flat: torch.Tensor, codec: Codec, key: Key, group, want_sent: bool) -> Exchange:
    """
    Every rank sends its whole vector to all others, which decode and average.

    Args:
        flat (`torch.Tensor`): `[numel]`, float32.
        codec (`Codec`): How it travels.
        key (`Callable`): Of the random numbers.
        group (`ProcessGroup`): The ranks.
        want_sent (`bool`): Whether to return what this rank's message says.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    message = codec.to_bytes(codec.encode(flat, key(0, rank)))
    messages = gather_messages(message, [message.numel()] * world, group)
    mean, sent = torch.zeros_like(flat), None
    for source, other in enumerate(messages):
        payload = codec.from_bytes(other, flat.numel())
        if source == rank and want_sent:
            sent = codec.decode(payload)
            mean.add_(sent)
        else:
            codec.decode(payload, mean, accumulate=True)
    return Exchange(mean.div_(world), sent, message.numel() * (world - 1))


def two_phase_mean(
    flat: torch.Tensor,
    up: Codec,
    down: Codec,
    key: Key,
    group,
    want_sent: bool,
    down_residual: torch.Tensor | None = None,
) -> Exchange:
    """
    Every rank owns a shard: it gets the shard's coded parts from all others, averages them in float32 and sends the
    mean, coded once more, to all.

    Args:
        flat (`torch.Tensor`): `[numel]`, float32.
        up (`Codec`), down (`Codec`): How parts and means travel.
        key (`Callable`): Of the random numbers.
        group (`ProcessGroup`): The ranks.
        want_sent (`bool`): Whether to return what this rank's messages say.
        down_residual (`torch.Tensor`, *optional*): `[numel]`, of which this rank's shard holds what it lost before: it
            is added to the mean, and `down_error` is what was lost now.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    bounds = shard_bounds(flat.numel(), world, getattr(up, "block", 1))
    sizes = [stop - start for start, stop in bounds]
    payloads = [
        up.encode(flat[start:stop], key(0, rank * world + shard)) for shard, (start, stop) in enumerate(bounds)
    ]
    sent = None
    if want_sent:
        sent = torch.empty_like(flat)
        for payload, (start, stop) in zip(payloads, bounds, strict=True):
            up.decode(payload, sent[start:stop])
    received = send_to_owners([up.to_bytes(payload) for payload in payloads], up.wire_bytes(sizes[rank]), group)
    mean = torch.zeros(sizes[rank], dtype=torch.float32, device=flat.device)
    for message in received:
        up.decode(up.from_bytes(message, sizes[rank]), mean, accumulate=True)
    mean.div_(world)
    start, stop = bounds[rank]
    if down_residual is not None:
        mean.add_(down_residual[start:stop])
    message = down.to_bytes(down.encode(mean, key(1, rank)))
    result = torch.empty_like(flat)
    gathered = gather_messages(message, [down.wire_bytes(size) for size in sizes], group)
    for other, (first, last) in zip(gathered, bounds, strict=True):
        down.decode(down.from_bytes(other, last - first), result[first:last])
    error, norm = None, 0.0
    if down_residual is not None:
        error, norm = torch.zeros_like(flat), float(mean.square().sum())
        torch.sub(mean, result[start:stop], out=error[start:stop])
    uplink = sum(up.wire_bytes(size) for shard, size in enumerate(sizes) if shard != rank)
    downlink = max(down.wire_bytes(size) for size in sizes) * (world - 1)
    return Exchange(result, sent, uplink + downlink, error, norm)


def shard_bounds(numel: int, world: int, block: int) -> list[tuple[int, int]]:
    """
    Begin and end of each rank's shard: whole blocks, as even as they come, the last blocks' rest at the end.

    Args:
        numel (`int`): Elements in all.
        world (`int`): Ranks.
        block (`int`): Elements that share levels.
    """
    blocks = -(-numel // block)
    edges = [min(numel, (blocks * shard // world) * block) for shard in range(world)] + [numel]
    return list(zip(edges, edges[1:], strict=False))


@contextmanager
def naming_this_rank() -> Iterator[None]:
    """Says what a collective that fails means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()}: gradients were not exchanged; another process has ended, whose own output says "
            f"why, or did not come in time ({error})"
        ) from error


def send_to_owners(messages: list[torch.Tensor], own_size: int, group) -> list[torch.Tensor]:
    """Message i goes to rank i; what all ranks have sent here, in rank order."""
    world = len(messages)
    outgoing = _for_wire(torch.cat(messages), group)
    incoming = torch.empty(own_size * world, dtype=torch.uint8, device=outgoing.device)
    with naming_this_rank():
        dist.all_to_all_single(incoming, outgoing, [own_size] * world, [m.numel() for m in messages], group=group)
    return list(incoming.to(messages[0].device).split(own_size)) if own_size else [messages[0][:0]] * world


def gather_messages(message: torch.Tensor, sizes: list[int], group) -> list[torch.Tensor]:
    """The messages of all ranks, whose sizes all know; shorter ones travel as long as the longest."""
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=message.device)
    padded[: message.numel()] = message
    padded = _for_wire(padded, group)
    gathered = [torch.empty_like(padded) for _ in sizes]
    with naming_this_rank():
        dist.all_gather(gathered, padded, group=group)
    return [other[:size].to(message.device) for other, size in zip(gathered, sizes, strict=True)]


def _for_wire(message: torch.Tensor, group) -> torch.Tensor:
    """gloo moves what lies in host memory."""
    return message.cpu() if dist.get_backend(group) == "gloo" else message
