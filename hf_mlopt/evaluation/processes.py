"""Evaluation spread over the processes of `accelerate launch` or `torchrun`."""

import torch.distributed as dist


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """Processes that share the work."""
    return dist.get_world_size() if _several() else 1


def from_first(value):
    """What the first process has, given to all."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def interleaved(share: list) -> list:
    """The whole of which every process has every `world_size`-th item, from its own rank on."""
    if not _several():
        return share
    shares = [None] * world_size()
    dist.all_gather_object(shares, share)
    return [share[place] for place in range(max(map(len, shares))) for share in shares if place < len(share)]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
