"""Files of one party: states to go on from, and its block of the model. Each party writes its own and no other's."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.party import VerticalParty


ARRAYS, SCALARS = "state.safetensors", "state.json"
WEIGHTS, CONFIG = "model.safetensors", "vertical_config.json"


def save_state(party: VerticalParty, folder: str | Path):
    """
    Writes a checkpoint; a crash leaves the whole of it or nothing. Parties to whom this one gives derivatives write
    theirs first.

    Args:
        party ([`VerticalParty`]): Between two steps; call from its thread.
        folder (`str` or `Path`): Replaced if it exists. It tells labels and weights: keep it as safe as the data.
    """
    party.settle()
    folder, arrays = Path(folder), {}
    scalars = {"run": party.digest.hex(), "party": party.name, "state": _split(party.state_dict(), "", arrays)}
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, mode=0o700)
    save_file(arrays, scratch / ARRAYS)
    (scratch / SCALARS).write_text(json.dumps(scalars), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def load_state(party: VerticalParty, folder: str | Path, *, new_keys: bool = True):
    """
    Takes over a checkpoint, before training.

    Args:
        party ([`VerticalParty`]): With the roster and arguments of the checkpoint.
        folder (`str` or `Path`): From [`save_state`].
        new_keys (`bool`, *optional*, defaults to `True`): See [`VerticalParty.load_state_dict`].

    Raises:
        InputError: If the checkpoint is missing, unreadable, of another party or another run.
    """
    folder = Path(folder)
    try:
        arrays = load_file(folder / ARRAYS)
        scalars = json.loads((folder / SCALARS).read_text(encoding="utf-8"))
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"checkpoint={str(folder)!r}: cannot be read ({error}); take another one") from error
    for field, own in (("party", party.name), ("run", party.digest.hex())):
        if scalars[field] != own:
            text = f"checkpoint={str(folder)!r}: is of {field} {scalars[field]!r}, this is {own!r}; roster, arguments "
            raise InputError(f"{text}and code version must be those it was made with")
    party.load_state_dict(_join(scalars["state"], arrays), new_keys=new_keys)


def save_block(party: VerticalParty, folder: str | Path, feature_names: list[str] | None = None):
    """
    Writes the own block of the model: `model.safetensors` with `weight` `[K, d_l]` and, at the label owner, `bias`
    `[K]`, and `vertical_config.json`.

    Args:
        party ([`VerticalParty`]): Trained.
        folder (`str` or `Path`): Made if it does not exist.
        feature_names (`list[str]`, *optional*): Own columns; by default `x0`, `x1`, ….
    """
    count = party.parties.num_features[party.name]
    names = [f"x{number}" for number in range(count)] if feature_names is None else list(feature_names)
    if len(names) != count:
        raise InputError(f"feature_names: {len(names)} names for the {count} columns of {party.name!r}")
    weights = party.weights
    tensors = {"weight": np.ascontiguousarray(weights[:count].T)}
    if party.has_bias:
        tensors["bias"] = weights[count].copy()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "np"})
    arguments = party.arguments
    config = {"model_type": "vertical_linear", "party": party.name, "label_owner": party.parties.label_owner}
    config |= {"parties": list(party.parties.names), "run": party.digest.hex(), "version": party.store.version}
    config |= {name: getattr(arguments, name) for name in ("algorithm", "loss", "num_labels", "mode", "mask", "l2")}
    config["feature_names"] = names
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_block(folder: str | Path) -> tuple[np.ndarray, dict]:
    """
    Returns:
        `tuple`: Weights `[d_l, K]`, the bias last where there is one, and the contents of `vertical_config.json`.

    Raises:
        InputError: If a file is missing or unreadable.
    """
    folder = Path(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = tensors["weight"].T
    except Exception as error:  # safetensors raises its own kinds
        raise InputError(f"model={str(folder)!r}: no block of a vertical model can be read there ({error})") from error
    return (np.vstack([weights, tensors["bias"]]) if "bias" in tensors else weights.copy()), config


def _split(value, path: str, arrays: dict[str, np.ndarray]):
    """The tree with arrays replaced by their names, which go to `arrays`."""
    if isinstance(value, dict):
        return {key: _split(item, f"{path}/{key}", arrays) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        arrays[path] = np.ascontiguousarray(value)
        return {"array": path}
    return value


def _join(value, arrays: dict[str, np.ndarray]):
    if isinstance(value, dict):
        if list(value) == ["array"]:
            return arrays[value["array"]]
        return {key: _join(item, arrays) for key, item in value.items()}
    return value
