"""
Masks: which weights of a pruned checkpoint are left, one bit each, to prune another fine-tune of the same base alike.

The bits lie as in a packed file, see docs/pack.md. Here a weight is zero if its value is, +0.0 or -0.0: multiplying
with a mask leaves -0.0 behind.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.hub.packed import FLOATS, bitmask_info, pieces, raw_header
from hf_mlopt.hub.shards import ShardReader, ShardWriter, TensorInfo, read_header


FORMAT = 1


def pruned_tensors(reader: ShardReader, min_zeros: float) -> dict[str, int]:
    """
    Matrices with many zeros.

    Args:
        reader (`ShardReader`): A checkpoint; all of its matrices are read.
        min_zeros (`float`): Fraction of a tensor that must be zero, in (0, 1].

    Returns:
        `dict[str, int]`: Number of zeros by name, of float tensors with at least two dimensions.
    """
    found = {}
    for name, info in reader.tensors.items():
        if info.dtype in FLOATS and len(info.shape) >= 2 and info.numel:
            zeros = info.numel - sum(int(np.count_nonzero(_kept(piece))) for _, piece in pieces(reader, name))
            if zeros >= min_zeros * info.numel:
                found[name] = zeros
    return found


def _kept(piece: np.ndarray) -> np.ndarray:
    return (piece << 1) != 0  # without the sign


def masks_layout(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What a file with the masks of these tensors holds."""
    return {f"{name}.bitmask": bitmask_info(info.numel) for name, info in tensors.items()}


def write_masks(reader: ShardReader, tensors: dict[str, TensorInfo], record: dict, file: Path) -> None:
    """
    Writes the masks of some tensors.

    Args:
        reader (`ShardReader`): The pruned checkpoint.
        tensors (`dict[str, TensorInfo]`): Those of its tensors.
        record (`dict`): JSON-able: where the masks come from, the number of `weights` and of `zeros`.
        file (`Path`): The file to write.
    """
    shapes = {name: list(info.shape) for name, info in tensors.items()}
    metadata = {
        "hf_mlopt_masks": str(FORMAT),
        "shapes": json.dumps(shapes),
        "source": json.dumps(record),
    }
    with ShardWriter(file.parent, {file.name: masks_layout(tensors)}, metadata) as writer:
        for name in tensors:
            for start, piece in pieces(reader, name):
                writer.write(f"{name}.bitmask", np.packbits(_kept(piece), bitorder="little"), start // 8)
        writer.sync()


def read_masks(file: Path) -> tuple[dict[str, tuple[int, ...]], dict]:
    """
    What a file of masks says of itself.

    Returns:
        `tuple[dict[str, tuple[int, ...]], dict]`: Shape of every masked tensor, and where the masks come from.

    Raises:
        InputError: If it is no file of masks, or not whole.
    """
    metadata = json.loads(raw_header(file)[8:]).get("__metadata__") or {}
    if metadata.get("hf_mlopt_masks") != str(FORMAT):
        found = metadata.get("hf_mlopt_masks")
        raise InputError(f"{file}: is no file of masks of format {FORMAT} (it says {found!r}); export it again")
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        record = json.loads(metadata["source"])
        record["weights"], record["zeros"]  # as the one who exported them counted
        layout = masks_layout({name: TensorInfo("U8", shape) for name, shape in shapes.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: its metadata cannot be used ({error}); export it again") from None
    held = {name: info for name, (info, _) in read_header(file)[0].items()}
    wrong = sorted(name for name in held.keys() | layout.keys() if held.get(name) != layout.get(name))
    if wrong:
        raise InputError(f"{file}: {wrong[0]} does not fit the shapes it names; export it again")
    return shapes, record


def check_masks(shapes: dict[str, tuple[int, ...]], tensors: dict[str, TensorInfo], model: str) -> None:
    """
    Makes sure that masks fit a checkpoint.

    Args:
        shapes (`dict[str, tuple[int]]`): Of the masked tensors.
        tensors (`dict[str, TensorInfo]`): All tensors of the checkpoint.
        model (`str`): What the user called it.

    Raises:
        InputError: If a masked tensor is missing, has another shape, or holds no plain floats.
    """
    remedy = "masks fit other fine-tunes of the model they were exported from, saved under the same names"
    for name, shape in shapes.items():
        info = tensors.get(name)
        if info is None:
            raise InputError(f"model={model!r}: has no tensor {name}; {remedy}")
        if info.shape != shape:
            raise InputError(f"model={model!r}: {name} has shape {list(info.shape)}, its mask {list(shape)}; {remedy}")
        if info.dtype not in FLOATS:
            raise InputError(
                f"model={model!r}: {name} is stored as {info.dtype}, which cannot be masked; dequantize it"
            )


def masked(reader: ShardReader, name: str, masks: ShardReader) -> Iterator[np.ndarray]:
    """
    The elements of a tensor with those zeroed that its mask leaves out, as unsigned integers.

    Args:
        reader (`ShardReader`): The checkpoint.
        name (`str`): A tensor of it; one without a mask is left as it is.
        masks (`ShardReader`): The masks.
    """
    bitmask = f"{name}.bitmask"
    for start, piece in pieces(reader, name):
        if bitmask in masks.tensors:
            bits = np.empty(-(-len(piece) // 8), np.uint8)
            masks.read_into(bitmask, bits, start // 8)
            piece *= np.unpackbits(bits, count=len(piece), bitorder="little")
        yield piece
