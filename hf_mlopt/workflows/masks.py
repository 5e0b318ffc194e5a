"""`hf-mlopt masks`: the zeros of one checkpoint, exported and applied to another fine-tune of the same base."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hf_mlopt import __version__
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import check_output, staged_output
from hf_mlopt.hub.masks import check_masks, masked, masks_layout, pruned_tensors, read_masks, write_masks
from hf_mlopt.hub.packed import header_tensors, raw_header, write_file
from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.hub.shards import ShardReader
from hf_mlopt.workflows.pack import copy_files, fetch_checkpoint, other_files, weight_files


@dataclass(frozen=True)
class MaskResult:
    """
    What `masks export` or `masks apply` did.

    Args:
        output (`Path`): The file or directory written.
        num_tensors (`int`): Tensors with a mask.
        num_weights (`int`): Weights in them.
        num_zeros (`int`): How many of those the masks leave out.
    """

    output: Path
    num_tensors: int
    num_weights: int
    num_zeros: int


def export_masks(model: str, output: str, min_zeros: float = 0.1, revision: str | None = None) -> MaskResult:
    """
    Writes which weights of a pruned checkpoint are left, one bit each.

    Args:
        model (`str`): Local directory or Hub id of the pruned checkpoint.
        output (`str`): Safetensors file to write; must be absent.
        min_zeros (`float`, *optional*, defaults to 0.1): Fraction of zeros from which a matrix counts as pruned, in
            (0, 1].
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        InputError: For anything that cannot be done, before anything is written.
    """
    if not 0 < min_zeros <= 1:
        raise ConfigurationError("min_zeros", min_zeros, "must be in (0, 1]")
    target = Path(output).expanduser().resolve()
    if target.exists():
        raise InputError(f"output={output!r}: exists already; name a new file")
    if target.suffix != ".safetensors":
        raise InputError(f"output={output!r}: is a safetensors file; name it so, {target.stem}.safetensors")
    check_output(output)
    directory = fetch_checkpoint(model, revision)
    with ShardReader(weight_files(directory)) as reader:
        zeros = pruned_tensors(reader, min_zeros)
        if not zeros:
            raise InputError(
                f"model={model!r}: no matrix of it has {100 * min_zeros:g} % zeros; prune it first, or lower min_zeros"
            )
        tensors = {name: reader.tensors[name] for name in zeros}
        check_output(output, sum(info.nbytes for info in masks_layout(tensors).values()))
        counts = {"weights": sum(info.numel for info in tensors.values()), "zeros": sum(zeros.values())}
        with _staged_file(target) as staging:
            write_masks(reader, tensors, _origin(model, directory, revision) | counts, staging)
    return MaskResult(target, len(tensors), counts["weights"], counts["zeros"])


def apply_masks(masks: str, model: str, output: str, revision: str | None = None) -> MaskResult:
    """
    Writes a checkpoint with the weights zeroed that masks leave out, and everything else as it is.

    Args:
        masks (`str`): File that `masks export` wrote.
        model (`str`): Local directory or Hub id of a fine-tune of the model that the masks are of.
        output (`str`): Directory to write; must be absent or empty.
        revision (`str`, *optional*): Branch, tag or commit of the model on the Hub.

    Raises:
        InputError: For anything that cannot be done, before anything is written.
    """
    check_output(output)
    mask_file = Path(masks).expanduser()
    if not mask_file.is_file():
        raise InputError(f"masks={masks!r}: no such file")
    shapes, record = read_masks(mask_file)
    directory = fetch_checkpoint(model, revision)
    files = weight_files(directory)
    headers = {file: raw_header(file) for file in files}
    others = other_files(directory, files)
    with ShardReader(files) as reader, ShardReader([mask_file]) as mask_reader:
        check_masks(shapes, reader.tensors, model)
        output = check_output(output, sum(file.stat().st_size for file in [*files, *others]))
        with staged_output(output) as staging:
            for file in tqdm(files, desc="masking", unit="file", leave=False, disable=None):
                names = header_tensors(headers[file], file)
                data = (piece for name in names for piece in masked(reader, name, mask_reader))
                write_file(staging / file.name, headers[file], data)
            copy_files(others, staging)
            _mark(staging / "config.json", record, _origin(model, directory, revision))
    return MaskResult(output, len(shapes), record["weights"], record["zeros"])


def _origin(model: str, directory: Path, revision: str | None) -> dict:
    """Where a checkpoint comes from, without giving away where it lay on this machine."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    is_local = is_local_name(model)
    return {
        "model": Path(model).expanduser().resolve().name if is_local else model,
        "revision": None if is_local else directory.name,  # the snapshot's commit
        "hf_mlopt": config.get("hf_mlopt"),
    }


def _mark(config_file: Path, record: dict, origin: dict) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["hf_mlopt"] = {
        "method": "mask",
        "masks": record,
        "version": __version__,
        "base_model": origin["model"],
        "revision": origin["revision"],
    } | ({"derived_from": origin["hf_mlopt"]} if origin["hf_mlopt"] else {})
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _staged_file(target: Path) -> Iterator[Path]:
    """A hidden name beside a file to write to, which becomes the file at the end or goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.incomplete-{os.getpid()}")
    try:
        yield staging
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)
