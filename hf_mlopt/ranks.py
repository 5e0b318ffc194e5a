"""
Work spread over the processes of `accelerate launch` or `torchrun`: each takes its share, and what they found is put
together. Without `torch.distributed` everything here does nothing.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from hf_mlopt.errors import InputError


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """Processes that share the work."""
    return dist.get_world_size() if _several() else 1


def my_share(batches: list) -> list:
    """The batches of this process: every `world_size`-th."""
    return batches[rank() :: world_size()]


def sum_(sums: dict) -> None:
    """Adds the tensors of all processes, in place and in the order of their names; all end with the same bits."""
    if _several():
        for name in sorted(sums):
            dist.all_reduce(sums[name])


def all_agree(fine: bool, device: torch.device) -> bool:
    """Whether every process says so."""
    if not _several():
        return fine
    votes = torch.tensor(int(fine), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def from_first(value):
    """What the first process has, given to all."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(function: Callable[[], object]):
    """
    What `function()` gives in the first process, given to all; only that process calls it.

    Raises:
        InputError: In every process, if the first was refused: otherwise the others would wait for it.
    """
    value, refusal = None, None
    if rank() == 0:
        try:
            value = function()
        except InputError as error:
            refusal = str(error)
    value, refusal = from_first((value, refusal))
    if refusal is not None:
        raise InputError(refusal)
    return value


def interleaved(share: list) -> list:
    """The whole of which every process has every `world_size`-th item, from its own rank on."""
    if not _several():
        return share
    shares = [None] * world_size()
    dist.all_gather_object(shares, share)
    return [share[place] for place in range(max(map(len, shares))) for share in shares if place < len(share)]


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
