"""
Packed safetensors files: a bitmask and the values that are not zero, in place of every tensor with many zeros.

The layout, byte by byte, is in docs/pack.md. Zero means that all bits of an element are 0, so unpacking gives back
every bit, -0.0 and NaN included. Tensors pass through memory in pieces; none is ever held whole.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import (
    DTYPE_BYTES,
    ShardReader,
    ShardWriter,
    TensorInfo,
    header_bytes,
    read_header,
    write_error,
)


FORMAT = 1
INDEX = "packed.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # what pruning makes zeros in; fewer bits an element would save little

_INTEGERS = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}  # by bytes of an element
_PIECE = 1 << 21  # elements; a multiple of 8, so that every piece begins with a new byte of the bitmask
_SECOND_ENTRY = 256  # bytes: two tensors in place of one make the header longer by about as much


def pieces(reader: ShardReader, name: str, elements: int = _PIECE) -> Iterator[tuple[int, np.ndarray]]:
    """
    The elements of a tensor in order, as unsigned integers of their width.

    Args:
        reader (`ShardReader`): Where it is.
        name (`str`): Its name there.
        elements (`int`, *optional*): Elements in a piece.

    Yields:
        `tuple[int, np.ndarray]`: Number of the first element, and the piece, `[<= elements]`. Its memory is used again
            for the next one.
    """
    info = reader.tensors[name]
    buffer = np.empty(min(elements, info.numel), _INTEGERS[DTYPE_BYTES[info.dtype]])
    for start in range(0, info.numel, elements):
        piece = buffer[: min(elements, info.numel - start)]
        reader.read_into(name, piece, start * piece.itemsize)
        yield start, piece


def bitmask_info(numel: int) -> TensorInfo:
    """What holds one bit for each of `numel` elements."""
    return TensorInfo("U8", (-(-numel // 8),))


def raw_header(file: Path) -> bytes:
    """The bytes of a safetensors file before its data; `InputError` if it is none or not whole."""
    _, first = read_header(file)
    with open(file, "rb") as stream:
        return stream.read(first)


def header_tensors(header: bytes, file: Path) -> dict[str, TensorInfo]:
    """
    The tensors of a header in the order of their data.

    Raises:
        InputError: If it cannot be read, or does not account for every byte of the data.
    """
    found, end = {}, 0
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            found[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]))
            if entry["data_offsets"] != [end, end + found[name].nbytes]:
                raise ValueError(f"the bytes of {name} are not where they should be")
            end += found[name].nbytes
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: its header cannot be used ({error}); download it again") from None
    return found


def packed_layout(reader: ShardReader) -> dict[str, TensorInfo]:
    """
    What the packed file of an open file holds. Reads all of it, to count the zeros.

    Returns:
        `dict[str, TensorInfo]`: Tensors that would not get smaller under their own name, the others as `NAME.bitmask`
            and `NAME.values`.
    """
    layout = {}
    for name, info in reader.tensors.items():
        bitmask, values = f"{name}.bitmask", f"{name}.values"
        parts = None
        if info.dtype in FLOATS and bitmask not in reader.tensors and values not in reader.tensors:
            count = sum(int(np.count_nonzero(piece)) for _, piece in pieces(reader, name))
            parts = {bitmask: bitmask_info(info.numel), values: TensorInfo(info.dtype, (count,))}
        if parts and sum(part.nbytes for part in parts.values()) + _SECOND_ENTRY < info.nbytes:
            layout |= parts
        else:
            layout[name] = info
    # Wide elements first, as safetensors itself orders them: readers want 4-byte elements at a multiple of 4 bytes.
    return dict(sorted(layout.items(), key=lambda item: -DTYPE_BYTES[item[1].dtype]))


def packed_bytes(header: bytes, layout: dict[str, TensorInfo]) -> int:
    """Size of the packed file of this layout, for an original with this header."""
    return len(header_bytes(layout, _metadata(header))) + sum(info.nbytes for info in layout.values())


def _metadata(header: bytes) -> dict[str, str]:
    return {"hf_mlopt_packed": str(FORMAT), "original_header": header[8:].decode("utf-8")}


def write_packed(reader: ShardReader, header: bytes, layout: dict[str, TensorInfo], file: Path) -> None:
    """
    Packs one file.

    Args:
        reader (`ShardReader`): The original.
        header (`bytes`): Its header, see [`raw_header`].
        layout (`dict[str, TensorInfo]`): See [`packed_layout`].
        file (`Path`): The file to write.
    """
    with ShardWriter(file.parent, {file.name: layout}, _metadata(header)) as writer:
        for name in reader.tensors:
            if name in layout:
                writer.copy(name, reader)
            else:
                _pack(name, reader, writer, layout)
        writer.sync()


def _pack(name: str, reader: ShardReader, writer: ShardWriter, layout: dict[str, TensorInfo]) -> None:
    written = 0  # bytes of values
    for start, piece in pieces(reader, name):
        present = piece != 0
        values = np.compress(present, piece)  # several times faster than piece[present]
        writer.write(f"{name}.bitmask", np.packbits(present, bitorder="little"), start // 8)
        if len(values):
            writer.write(f"{name}.values", values, written)
        written += values.nbytes
    if written != layout[f"{name}.values"].nbytes:
        raise InputError(f"{name}: its file was changed while it was read; run again")


def original_header(file: Path) -> bytes:
    """
    The header of the file that was packed into this one.

    Raises:
        InputError: If it is no packed file, is of another format, or does not hold what its original needs.
    """
    metadata = json.loads(raw_header(file)[8:]).get("__metadata__") or {}
    if metadata.get("hf_mlopt_packed") != str(FORMAT) or "original_header" not in metadata:
        found = metadata.get("hf_mlopt_packed")
        raise InputError(f"{file}: is no packed file of format {FORMAT} (it says {found!r}); pack it again")
    text = metadata["original_header"].encode("utf-8")
    header = len(text).to_bytes(8, "little") + text
    held, expected = {name: info for name, (info, _) in read_header(file)[0].items()}, {}
    for name, info in header_tensors(header, file).items():
        if name in held:
            expected[name] = info
            continue
        bitmask, values = f"{name}.bitmask", f"{name}.values"
        count = held[values].numel if values in held else 0
        expected |= {bitmask: bitmask_info(info.numel), values: TensorInfo(info.dtype, (count,))}
    wrong = sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))
    if wrong:
        raise InputError(f"{file}: {wrong[0]} is not what the original needs; pack it again")
    return header


def unpacked(reader: ShardReader, name: str, info: TensorInfo) -> Iterator[np.ndarray]:
    """
    The elements of an original tensor in order, as unsigned integers.

    Args:
        reader (`ShardReader`): The packed file.
        name (`str`): The tensor's name in the original.
        info (`TensorInfo`): What it is there.

    Raises:
        InputError: If bitmask and values do not fit each other.
    """
    if name in reader.tensors:
        for _, piece in pieces(reader, name):
            yield piece
        return
    values_name, taken = f"{name}.values", 0
    dtype, total = _INTEGERS[DTYPE_BYTES[info.dtype]], reader.tensors[values_name].numel
    for start, bits in pieces(reader, f"{name}.bitmask", _PIECE // 8):
        count = min(_PIECE, info.numel - 8 * start)
        present = np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little").view(bool))
        values = np.empty(len(present), dtype)
        if len(values):
            reader.read_into(values_name, values, taken * values.itemsize)
        taken += len(values)
        piece = np.zeros(count, dtype)
        piece[present] = values
        yield piece
    if taken != total:
        raise InputError(f"{name}: its bitmask and its {total:,} values do not fit each other; the file is damaged")


def write_file(file: Path, header: bytes, data: Iterable[np.ndarray]) -> None:
    """
    Writes a safetensors file from beginning to end.

    Args:
        file (`Path`): The file, which must be absent.
        header (`bytes`): What it begins with, see [`raw_header`].
        data (`Iterable[np.ndarray]`): What follows.

    Raises:
        InputError: If the disk is full or cannot be written.
    """
    size = len(header) + sum(info.nbytes for info in header_tensors(header, file).values())

    def attempt(call, *arguments):  # what goes wrong in reading `data` is no fault of this file
        try:
            return call(*arguments)
        except OSError as error:
            raise write_error(file, error, size) from None

    with attempt(open, file, "xb", 0) as stream:
        for piece in chain((header,), data):
            view = memoryview(piece).cast("B")
            while len(view):
                view = view[attempt(stream.write, view) :]
        attempt(os.fsync, stream.fileno())
