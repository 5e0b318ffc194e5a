"""What each rank keeps for itself between steps (residuals, error memory, queues), written and read per rank."""

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging

from hf_mlopt.errors import InputError


logger = logging.get_logger(__name__)


class RankState(Protocol):
    """
    An object with state. Its `state_dict` holds tensors, numbers, strings and plain containers of them; `reset` begins
    afresh in place of a state that cannot be used.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def reset(self) -> None: ...


def save_rank_state(states: dict[str, RankState], folder: str | Path, rank: int, world_size: int) -> None:
    """
    Writes `mlopt_rank_state_{rank}.pt`; nothing when no state is registered.

    Raises:
        TypeError: If a state holds something that a safe load would refuse; better now than on resuming.
    """
    if not states:
        return
    path = _path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)  # this rank may be ahead of the one that writes the model
    content = {name: state.state_dict() for name, state in states.items()}
    torch.save({"world_size": world_size, "states": content}, path)
    try:
        torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        path.unlink()
        raise TypeError(f"rank states {sorted(states)} must hold tensors and plain containers only") from error


def load_rank_state(states: dict[str, RankState], folder: str | Path, rank: int, world_size: int) -> None:
    """
    Hands every registered state what [`save_rank_state`] wrote for it. Tensors arrive on the CPU. From a checkpoint
    of another number of processes, a state that has a `merge` gets what that makes of all ranks' states.

    Raises:
        InputError: If the checkpoint was written by another number of processes and a state cannot be merged: what
            one rank has kept belongs to its share of the data, and cannot be divided anew.
    """
    if not states:
        return
    path = _path(folder, rank)
    # A rank that did not exist then still learns from another's file that the number of processes has changed.
    readable = path if path.is_file() else next(Path(folder).glob("mlopt_rank_state_*.pt"), None)
    saved = _read(readable) if readable is not None else {"world_size": world_size, "states": {}}
    written_by = saved["world_size"]
    if written_by != world_size:
        if not all(hasattr(state, "merge") for state in states.values()):
            raise InputError(
                f"resume_from_checkpoint={str(folder)!r}: written by {written_by} processes, resumed by {world_size}; "
                f"start {written_by}, or begin what each rank has kept afresh with reset_local_state"
            )
        everyone = [_read(_path(folder, other))["states"] for other in range(written_by)]
        own = {name: state.merge([other[name] for other in everyone]) for name, state in states.items()}
        logger.info(f"{folder} was written by {written_by} processes: their states {sorted(states)} are merged.")
    else:
        own = saved["states"] if readable == path else {}
    for name, state in states.items():
        if name in own:
            state.load_state_dict(own[name])
        else:
            logger.warning(f"{folder} holds no state {name!r} for rank {rank}: it starts afresh.")


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True, map_location="cpu")


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"mlopt_rank_state_{rank}.pt"
