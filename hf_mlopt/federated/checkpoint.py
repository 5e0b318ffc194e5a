"""What the server needs to go on exactly, after every round."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.storage import load_message, save_message
from hf_mlopt.hub import staged_output


_TENSORS, _REST = "server.safetensors", "server.json"


def save_checkpoint(
    output_dir: Path,
    state: Mapping[str, Any],
    history: list[dict],
    training: str,
    run: Mapping[str, Any],
    limit: int | None,
) -> Path:
    """
    Writes `checkpoint-ROUND`, whole or not at all, and removes those older than the newest `limit`.

    Args:
        output_dir (`Path`): Folder of the training.
        state (`Mapping`): The algorithm's `state_dict()`.
        history (`list[dict]`): A row a round, JSON-able.
        training (`str`): Its name, by which sites know what they have kept of it.
        run (`Mapping`): What a resumed run must have in common with this one, JSON-able.
        limit (`int`, *optional*): How many to keep; all by default.
    """
    path = output_dir / f"checkpoint-{state['round']}"
    rest = {name: value for name, value in state.items() if name != "groups"}
    content = {"algorithm_state": rest, "history": history, "training": training, "run": dict(run)}
    with staged_output(path) as folder:
        save_message(Message(state["groups"]), folder / _TENSORS)
        (folder / _REST).write_text(json.dumps(content) + "\n", encoding="utf-8")
        # One of this round is there before its last evaluation.
        removed = [_out_of_sight(path)] if path.exists() else []
    if limit is not None:
        removed += [_out_of_sight(old) for old in checkpoints(output_dir)[:-limit] if old != path]
    for old in removed:
        shutil.rmtree(old)
    return path


def _out_of_sight(path: Path) -> Path:
    """Renames a checkpoint to be removed, since half of one looks like a whole one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def checkpoints(output_dir: Path) -> list[Path]:
    """Those in a folder, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / _REST).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def load_checkpoint(path: Path, run: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict], str]:
    """
    Reads what [`save_checkpoint`] wrote.

    Returns:
        `tuple`: The algorithm's state, the history, and the training's name.

    Raises:
        InputError: If it holds no checkpoint, or that of another run.
    """
    try:
        content = json.loads((path / _REST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"resume_from_checkpoint={str(path)!r}: holds no checkpoint of a server ({error})") from error
    for name, value in json.loads(json.dumps(dict(run))).items():  # as it is in the file
        if content["run"].get(name) != value:
            raise InputError(
                f"{name}={value!r}: the checkpoint {path.name} is of a run with {content['run'].get(name)!r}; "
                "keep it, or begin a new training"
            )
    groups = {group: dict(tensors) for group, tensors in load_message(path / _TENSORS).groups.items()}
    return {**content["algorithm_state"], "groups": groups}, content["history"], content["training"]
