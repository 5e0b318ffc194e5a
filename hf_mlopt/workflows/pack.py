"""`hf-mlopt pack` and `hf-mlopt unpack`: the zeros of a pruned checkpoint taken out for storage, and put back."""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from hf_mlopt.errors import InputError
from hf_mlopt.hub import check_output, hub_errors, resolve_checkpoint, staged_output
from hf_mlopt.hub.packed import (
    FORMAT,
    INDEX,
    header_tensors,
    original_header,
    packed_bytes,
    packed_layout,
    raw_header,
    unpacked,
    write_file,
    write_packed,
)
from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.hub.shards import ShardReader, write_error


logger = logging.getLogger(__name__)

# The same weights a second time, for other loaders. Neither read nor copied: they are not what is worked on.
_OTHER_WEIGHTS = ("pytorch_model*", "tf_model*", "flax_model*", "consolidated*", "*.gguf")


@dataclass(frozen=True)
class PackResult:
    """
    What `pack` or `unpack` did.

    Args:
        output (`Path`): The directory written.
        dense_bytes (`int`): Size of the weight files of the ordinary checkpoint.
        packed_bytes (`int`): Size of those of the packed one.
        num_packed (`int`): Tensors stored as bitmask and values.
        num_tensors (`int`): All tensors.
    """

    output: Path
    dense_bytes: int
    packed_bytes: int
    num_packed: int
    num_tensors: int


def pack_checkpoint(model: str, output: str, revision: str | None = None) -> PackResult:
    """
    Writes a checkpoint with the zeros of its weights taken out; every other file is copied as it is.

    Args:
        model (`str`): Local directory or Hub id of a pruned checkpoint in safetensors.
        output (`str`): Directory to write; must be absent or empty.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        InputError: For anything that cannot be done, before anything is written.
    """
    check_output(output)
    directory = fetch_checkpoint(model, revision)
    files = weight_files(directory)
    names = {file: f"packed-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)}
    headers = {file: raw_header(file) for file in files}
    tensors = {file: header_tensors(headers[file], file) for file in files}
    layouts = {}
    for file in tqdm(files, desc="counting zeros", unit="file", leave=False, disable=None):
        with ShardReader([file]) as reader:
            layouts[file] = packed_layout(reader)
    num_packed = sum(name not in layouts[file] for file in files for name in tensors[file])
    if num_packed == 0:
        raise InputError(f"model={model!r}: no tensor has enough zeros to get smaller; prune it first")
    sizes = {file: packed_bytes(headers[file], layouts[file]) for file in files}
    others = other_files(directory, files)
    output = check_output(output, sum(sizes.values()) + sum(file.stat().st_size for file in others))
    result = PackResult(
        output=output,
        dense_bytes=sum(file.stat().st_size for file in files),
        packed_bytes=sum(sizes.values()),
        num_packed=num_packed,
        num_tensors=sum(map(len, tensors.values())),
    )
    with staged_output(output) as staging:
        for file in tqdm(files, desc="packing", unit="file", leave=False, disable=None):
            with ShardReader([file]) as reader:
                write_packed(reader, headers[file], layouts[file], staging / names[file])
        copy_files(others, staging)
        index = {"format": FORMAT, "files": {name: file.name for file, name in names.items()}}
        index |= {"dense_bytes": result.dense_bytes, "packed_bytes": result.packed_bytes}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return result


def unpack_checkpoint(model: str, output: str, revision: str | None = None) -> PackResult:
    """
    Gives the checkpoint back that was packed, every file of it to the byte.

    Args:
        model (`str`): Directory that `pack` wrote, or the Hub id of one that was uploaded.
        output (`str`): Directory to write; must be absent or empty.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        InputError: For anything that cannot be done, before anything is written unless the file is damaged inside.
    """
    check_output(output)
    directory = Path(model).expanduser()
    if not directory.is_dir():
        if is_local_name(model):
            raise InputError(f"model={model!r}: no such directory")
        directory = _download(model, revision)
    originals = _read_index(model, directory)
    headers = {file: original_header(file) for file in originals}
    tensors = {file: header_tensors(headers[file], file) for file in originals}
    size = sum(len(headers[file]) + sum(info.nbytes for info in tensors[file].values()) for file in originals)
    others = [file for file in other_files(directory, originals) if file.name != INDEX]
    output = check_output(output, size + sum(file.stat().st_size for file in others))
    num_packed = 0
    with staged_output(output) as staging:
        for file in tqdm(originals, desc="unpacking", unit="file", leave=False, disable=None):
            with ShardReader([file]) as reader:
                data = (piece for name, info in tensors[file].items() for piece in unpacked(reader, name, info))
                write_file(staging / originals[file], headers[file], data)
                num_packed += sum(name not in reader.tensors for name in tensors[file])
        copy_files(others, staging)
    packed = sum(file.stat().st_size for file in originals)
    return PackResult(output, size, packed, num_packed, sum(map(len, tensors.values())))


def _read_index(model: str, directory: Path) -> dict[Path, str]:
    """Packed file -> name of its original."""
    index = directory / INDEX
    if not index.is_file():
        raise InputError(f"model={model!r}: is not packed, it has no {INDEX}")
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["files"]
        originals = {directory / packed: original for packed, original in files.items()}
        # An index from anywhere must not name a file outside the output.
        names = [*files, *files.values()]
        foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index}: cannot be used ({error}); download it again") from None
    if foreign:
        raise InputError(f"{index}: {foreign[0]!r} is no name of a safetensors file")
    missing = [file.name for file in originals if not file.is_file()]
    if missing:
        raise InputError(f"model={model!r}: {len(missing)} of {len(originals)} files are missing, {missing[0]} first")
    return originals


def fetch_checkpoint(model: str, revision: str | None = None) -> Path:
    """
    A directory on this machine with all files of an ordinary checkpoint; one on the Hub is downloaded.

    Raises:
        InputError: As [`resolve_checkpoint`] does.
    """
    checkpoint = resolve_checkpoint(model, revision)
    if checkpoint.revision is None:
        return checkpoint.directory
    directory = _download(model, checkpoint.revision)
    resolve_checkpoint(directory)  # what a cache holds may lack a shard
    return directory


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub_errors(model):
        try:
            found = snapshot_download(
                model,
                revision=revision,
                ignore_patterns=["*/*", *_OTHER_WEIGHTS],
                local_files_only=is_offline_mode(),  # huggingface_hub 1.33 asks the Hub for a commit even then
            )
            return Path(found)
        except LocalEntryNotFoundError as error:
            # Offline, a cache that Transformers filled holds config and weights, but perhaps no licence.
            snapshot = getattr(error, "snapshot_path", None)
            if snapshot and (Path(snapshot) / "config.json").is_file():
                return Path(snapshot)
            raise


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; `InputError` if it has none."""
    files = sorted(file for file in directory.glob("*.safetensors") if not _is_other_weights(file))
    if not files:
        raise InputError(f"model={str(directory)!r}: has no safetensors file; save it in that format")
    return files


def other_files(directory: Path, weights: Iterable[Path]) -> list[Path]:
    """All else that stands at the top of a checkpoint, but for its weights in other formats."""
    found = sorted(file for file in directory.iterdir() if file.is_file() and file not in set(weights))
    left_out = [file for file in found if _is_other_weights(file)]
    if left_out:
        logger.info(f"not copied, weights in another format: {', '.join(file.name for file in left_out)}")
    return [file for file in found if file not in left_out]


def _is_other_weights(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in _OTHER_WEIGHTS)


def copy_files(files: Iterable[Path], directory: Path) -> None:
    """Copies files to the byte, but not their modes: a read-only original is no reason for a read-only copy."""
    for file in files:
        try:
            shutil.copyfile(file, directory / file.name)
        except OSError as error:
            raise write_error(directory / file.name, error, file.stat().st_size) from None
