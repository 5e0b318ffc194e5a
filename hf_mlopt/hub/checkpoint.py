"""Checkpoints on disk: telling one from anything else, and writing one that plain Transformers reads."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.errors import InputError
from hf_mlopt.hub.output import check_output, staged_output
from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.moe.names import EXPERT_COUNT_KEYS


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
)
_COPIED = (*_TOKENIZER, "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_SMALL_FILES = [*_COPIED, "config.json", "*.index.json", "README.md", "pruning_report.json"]


@dataclass(frozen=True)
class Checkpoint:
    """
    A source of weights that was found to be one.

    Args:
        name (`str`): What `from_pretrained` is given: a directory or a Hub id.
        directory (`Path`): Where its small files lie: the directory itself, or the snapshot in the Hub cache.
        revision (`str`, *optional*): Commit on the Hub; `None` for a directory.
        weight_bytes (`int`, *optional*): Size of the weights; `None` if the Hub does not say.
        license (`str`, *optional*): License named by the card beside the weights.
    """

    name: str
    directory: Path
    revision: str | None = None
    weight_bytes: int | None = None
    license: str | None = None


def resolve_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """
    Finds a checkpoint and reads enough of it to refuse what is not one, before any weight is loaded.

    Of a directory, all weight files must be there and whole. Of a repository on the Hub only the small files are
    fetched; Transformers fetches the weights.

    Args:
        model (`str` or `Path`): A local directory, or the id of a model on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        InputError: If it is no checkpoint (the message names what is missing), or the Hub cannot provide it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_packed(str(model), path)
        read_config(path)
        size = sum(file.stat().st_size for file in _weight_files(path))
        return Checkpoint(str(path), path, weight_bytes=size, license=_license(path))
    if path.exists():
        raise InputError(f"model={str(model)!r}: is a file; name the directory that holds config.json and the weights")
    if is_local_name(str(model)):
        raise InputError(f"model={str(model)!r}: no such directory")
    with hub_errors(str(model)):
        directory = _fetch_small_files(str(model), revision)
    _refuse_packed(str(model), directory)
    read_config(directory)
    index = directory / f"{_WEIGHTS[0]}.index.json"
    size = _read_index(index).get("metadata", {}).get("total_size") if index.is_file() else None
    return Checkpoint(str(model), directory, directory.name, size, _license(directory))


@contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """
    Turns what goes wrong between here and the Hub into one line. Also for use around `from_pretrained`.

    Args:
        model (`str`): The Hub id, for the message.

    Raises:
        InputError: In place of any `OSError` or malformed id.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError:
        reason = "neither a directory here nor the form of a Hub id"
    except GatedRepoError:
        reason = "gated on the Hub; accept its conditions on its page and log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = "the Hub has no such revision of it"
    except RepositoryNotFoundError:
        reason = "neither a directory here nor a model on the Hub (a private one needs `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "no such directory here, and the Hub cannot be reached; name a local checkpoint or go online"
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
    else:
        return
    raise InputError(f"model={model!r}: {reason}")


@contextmanager
def mismatch_errors(model: str) -> Iterator[None]:
    """
    For use around the loading of weights: transformers raises a `RuntimeError` where tensors cannot be put together.

    Raises:
        InputError: In its place.
    """
    try:
        yield
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise InputError(
            f"model={model!r}: its weight files do not fit together: tensors of some experts are missing or have "
            "another shape than the others; download it again"
        ) from None


def checkpoint_bytes(model: "PreTrainedModel") -> int:
    """Bytes that the weights of a model take on disk; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def save_checkpoint(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    output: str | Path,
    *,
    provenance: dict,
    files: dict[str, str | Callable[[Path], object]] | None = None,
    source: Path | None = None,
) -> Path:
    """
    Writes an ordinary checkpoint. It appears complete or not at all.

    Tensors have the names they had in the source, those of its family on the Hub for a model made here, and those of
    the plain family for one that was dequantized at loading.

    Args:
        model ([`~transformers.PreTrainedModel`]): Saved in the dtype it has.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved if `source` holds no tokenizer.
        output (`str` or `Path`): The directory, absent or empty.
        provenance (`dict`): JSON-able record of what was done, the block `hf_mlopt` of `config.json`.
        files (`dict`, *optional*): Further files by name: the text, or a function that writes to the path it is given.
        source (`Path`, *optional*): Directory of the original. Its tokenizer, chat template, generation config and
            licence are copied byte by byte (saving them anew rewrites what older readers expect), and its `use_cache`
            is kept.

    Returns:
        `Path`: The directory as an absolute path.

    Raises:
        InputError: As [`check_output`] does, and if the model is quantized.
    """
    if getattr(model, "is_quantized", False):
        raise InputError("model: its weights are quantized; load it in bfloat16 instead")
    record = json.loads(json.dumps(provenance))  # fails here rather than after the weights are written
    output = check_output(output, checkpoint_bytes(model))
    with staged_output(output) as directory:
        with _plain_conversions(model):
            model.save_pretrained(directory, max_shard_size="5GB", save_original_format=True)
        complete_checkpoint(directory, tokenizer, provenance=record, files=files, source=source)
    return output


def complete_checkpoint(
    directory: Path, tokenizer, *, provenance: dict, files=None, source: Path | None = None
) -> None:
    """
    Puts everything but the weights and the raw `config.json` into a directory, see [`save_checkpoint`].

    Args:
        directory (`Path`): Holds `config.json` and the weights already.
        tokenizer, provenance, files, source: As in [`save_checkpoint`].
    """
    copied = _copy_from(source, directory) if source else []
    if tokenizer is not None and ("tokenizer_config.json" not in copied or _has_code(directory)):
        tokenizer.save_pretrained(directory)
    _finish_config(directory / "config.json", provenance, source)
    for name, content in (files or {}).items():
        if callable(content):
            content(directory / name)
        else:
            (directory / name).write_text(content, encoding="utf-8")


def copy_config(source: Path, directory: Path, experts: tuple[int, int] | None = None) -> None:
    """
    Takes `config.json`, and the modeling code beside it, over from the original, as its readers know it.

    Args:
        source (`Path`), directory (`Path`): Of the original and of the new checkpoint.
        experts (`tuple[int, int]`, *optional*): Routed experts before and after, where some were removed.
    """
    config = read_config(source)
    if experts is not None:
        before, after = experts
        for holder in (config, *(value for value in config.values() if isinstance(value, dict))):
            holder |= {key: after for key in EXPERT_COUNT_KEYS if holder.get(key) == before}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in source.glob("*.py"):
        shutil.copyfile(file, directory / file.name)


def safetensors_files(checkpoint: Checkpoint) -> list[Path]:
    """
    The weight files of a checkpoint; those of the Hub are fetched into its cache.

    Raises:
        InputError: If the weights are not in safetensors files.
    """
    if checkpoint.revision is not None:
        from huggingface_hub import is_offline_mode, snapshot_download

        with hub_errors(checkpoint.name):
            patterns = ["model*.safetensors", "*.py"]
            snapshot_download(
                checkpoint.name,
                revision=checkpoint.revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=is_offline_mode(),
            )
    files = _weight_files(checkpoint.directory)
    if any(file.suffix != ".safetensors" for file in files):
        raise InputError(
            f"model={checkpoint.name!r}: its weights are in {files[0].name}, which cannot be read layer by layer; "
            "convert it to safetensors, or use --in-memory if it fits"
        )
    return files


@contextmanager
def _plain_conversions(model: "PreTrainedModel") -> Iterator[None]:
    """
    Has a dequantized model saved by the conversions of its family.

    Saving reverts the conversions recorded at loading. Those of a quantizer do not revert: bfloat16 weights of gpt-oss
    would be named `*_blocks` and found by no loader, FP8 ones raise.
    """
    recorded = getattr(model, "_weight_conversions", None)
    operations = [step for entry in recorded or () for step in getattr(entry, "operations", None) or ()]
    if not any(type(step).__module__.startswith("transformers.integrations.") for step in operations):
        yield
        return
    model._weight_conversions = None
    try:
        yield
    finally:
        model._weight_conversions = recorded


def _copy_from(source: Path, directory: Path) -> list[str]:
    found = {path.name: path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    for name, path in found.items():
        shutil.copyfile(path, directory / name)  # not its mode: a read-only original is no reason for a read-only copy
    return list(found)


def _has_code(directory: Path) -> bool:
    """Whether the tokenizer is made by code beside it, which saving carries along and copying does not."""
    return "auto_map" in json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))


def _finish_config(path: Path, provenance: dict, source: Path | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    # Loaders take these as orders: a leftover of a dequantized model makes them misread plain weights.
    for key in ("quantization_config", "sparsity_config"):
        config.pop(key, None)
    if source is not None:  # a Trainer sets `use_cache` to False on the model it is given
        config.pop("use_cache", None)
        config |= {key: value for key, value in read_config(source).items() if key == "use_cache"}
    config["hf_mlopt"] = provenance
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_packed(model: str, directory: Path) -> None:
    from hf_mlopt.hub.packed import INDEX  # it needs numpy, which this module does not

    if (directory / INDEX).is_file():
        raise InputError(f"model={model!r}: is packed; unpack it first: hf-mlopt unpack {model} --output DIR")


def read_config(directory: Path) -> dict:
    """The `config.json` of a checkpoint; `InputError` if there is none, or it is not that of a model."""
    path = directory / "config.json"
    if not path.is_file():
        hint = (
            "; an adapter is merged with merge_and_unload() first"
            if (directory / "adapter_config.json").is_file()
            else ""
        )
        raise InputError(f"model={str(directory)!r}: not a checkpoint, it has no config.json{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}: not the configuration of a model, it has no model_type")
    return config


def _read_index(path: Path) -> dict:
    """The index of shards: a mapping with `weight_map`."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{path}: not an index of shards, it has no weight_map; download it again")
    for shard in index["weight_map"].values():
        # It must not lead out of the directory.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise InputError(f"{path}: {shard!r} is no name of a file beside it; download it again")
    return index


def _weight_files(directory: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            files = [directory / name]
        elif index.is_file():
            files = [directory / shard for shard in sorted(set(_read_index(index)["weight_map"].values()))]
        else:
            continue
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"model={str(directory)!r}: {len(missing)} of {len(files)} shards are missing, {missing[0]} first"
            )
        for file in files:
            _require_whole(file)
        return files
    raise InputError(f"model={str(directory)!r}: not a checkpoint, it has no {_WEIGHTS[0]} (nor an index of shards)")


def _require_whole(file: Path) -> None:
    """Reads the header of a safetensors file, which says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise InputError(f"{file}: incomplete or no safetensors file ({error}); download it again") from None


def _license(directory: Path) -> str | None:
    import yaml
    from huggingface_hub import ModelCard

    card = directory / "README.md"
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (yaml.YAMLError, ValueError):  # a broken header is no reason to refuse the weights beside it
        return None


def _fetch_small_files(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError as error:
        # Offline, a cache that Transformers filled holds config and weights, but perhaps no licence.
        snapshot = getattr(error, "snapshot_path", None)
        if snapshot and (Path(snapshot) / "config.json").is_file():
            return Path(snapshot)
        raise
