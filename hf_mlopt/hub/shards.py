"""
Safetensors files read and written tensor by tensor, at their places in the file.

The safetensors library writes a file in one call, from memory. Here the header is written first and the file gets its
full size at once, so a disk that is too full is known before any work, tensors may come in any order and again after
a crash, and nothing is held back in a buffer.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_mlopt.errors import InputError


DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
COPY_BYTES = 16 << 20  # a piece of a tensor that is copied or read ahead


@dataclass(frozen=True)
class TensorInfo:
    """
    What a header says of one tensor.

    Args:
        dtype (`str`): In the words of safetensors, e.g. `"BF16"`.
        shape (`tuple[int]`): Its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


Layout = dict[str, dict[str, TensorInfo]]  # file name -> tensor name -> what it is, in the order of the file


class ShardReader:
    """
    The tensors of a checkpoint's safetensors files, wherever they lie.

    Args:
        files (`Iterable[Path]`): The files; all headers are read and checked here, no weights.

    Raises:
        InputError: If a file cannot be read, is no safetensors file, or is not as long as its header says.
    """

    def __init__(self, files: Iterable[Path]):
        self.layout: Layout = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}  # name -> file descriptor, first byte
        self._descriptors: list[int] = []
        try:
            for file in files:
                self._open(Path(file))
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        tensors, first = read_header(file)
        descriptor = os.open(file, os.O_RDONLY)
        self._descriptors.append(descriptor)
        self.layout[file.name] = {}
        for name, (info, start) in tensors.items():
            if name in self._places:
                raise InputError(f"{file}: holds {name}, as another file of the checkpoint does.")
            self.layout[file.name][name] = self.tensors[name] = info
            self._places[name] = (descriptor, first + start)

    def read_into(self, name: str, buffer, offset: int = 0) -> None:
        """Fills a writable buffer (anything `memoryview` takes) with the bytes of a tensor from `offset` on."""
        view = memoryview(buffer).cast("B")
        descriptor, start = self._places[name]
        done = 0
        while done < len(view):  # one call reads at most 2 GiB
            count = os.preadv(descriptor, [view[done:]], start + offset + done)
            if count == 0:
                raise InputError(f"{name}: the file ended before the tensor did; it was changed while it was read.")
            done += count

    def read_ahead(self, names: Iterable[str], stop) -> None:
        """Brings tensors into the operating system's cache, so that reading them later waits for no disk. `stop()`
        is asked between pieces."""
        scratch = memoryview(bytearray(COPY_BYTES))
        for name in names:
            size = self.tensors[name].nbytes
            for offset in range(0, size, COPY_BYTES):
                if stop():
                    return
                self.read_into(name, scratch[: min(COPY_BYTES, size - offset)], offset)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_header(file: Path) -> tuple[dict[str, tuple[TensorInfo, int]], int]:
    """
    Reads the header of one safetensors file.

    Returns:
        `tuple[dict[str, tuple[TensorInfo, int]], int]`: Every tensor with the offset of its first byte in the data, in
        the order of the file, and the offset of the data in the file.

    Raises:
        InputError: If it is no safetensors file, or not as long as its header says.
    """
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        found = parse_local_safetensors_file_metadata(file).tensors
        with open(file, "rb") as stream:
            first = 8 + int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        ordered = sorted(found.items(), key=lambda item: tuple(item[1].data_offsets))
        unknown = next((info.dtype for _, info in ordered if info.dtype not in DTYPE_BYTES), None)
        end = 0 if unknown else _end_of_data(ordered)
        tensors = {name: (TensorInfo(info.dtype, tuple(info.shape)), info.data_offsets[0]) for name, info in ordered}
    except (OSError, SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: incomplete or no safetensors file ({reason}); download it again") from None
    if unknown is not None:
        raise InputError(f"{file}: holds tensors of type {unknown}, which is not understood.")
    if size != first + end:
        raise InputError(f"{file}: has {size:,} bytes, its header says {first + end:,}; download it again")
    return tensors, first


def _end_of_data(ordered) -> int:
    """Bytes of all tensors; `ValueError` if they do not stand one after the other, each as long as its shape says."""
    place = 0
    for name, info in ordered:
        start, end = info.data_offsets
        size = TensorInfo(info.dtype, tuple(info.shape)).nbytes
        if start != place or end - start != size or any(length < 0 for length in info.shape):
            raise ValueError(f"{name} is not {size} bytes that begin where the tensor before it ends")
        place = end
    return place


class ShardWriter:
    """
    Safetensors files of known layout, created at full size and filled in any order.

    Args:
        directory (`Path`): Where the files go; it must exist. Files that are there already are gone on with: what they
            hold is kept, so they must have the same layout.
        layout (`dict[str, dict[str, TensorInfo]]`): Tensors by file.
        metadata (`dict[str, str]`, *optional*): Header metadata of every file.

    Raises:
        InputError: If the disk is too full or cannot be written.
    """

    def __init__(self, directory: Path, layout: Mapping, metadata: Mapping[str, str] | None = None):
        self.directory, self.layout = Path(directory), layout
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> file descriptor, first byte, bytes
        self._descriptors: list[int] = []
        try:
            for file, tensors in layout.items():
                self._create(file, tensors, metadata or {"format": "pt"})
        except BaseException:
            self.close()
            raise

    def _create(self, file: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        header = header_bytes(tensors, metadata)
        size = len(header) + sum(info.nbytes for info in tensors.values())
        try:
            descriptor = os.open(self.directory / file, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            _reserve(descriptor, size)
            os.ftruncate(descriptor, size)
        except OSError as error:
            raise write_error(self.directory / file, error, size) from None
        self._put(file, descriptor, 0, header)
        place = len(header)
        for name, info in tensors.items():
            self._places[name] = (descriptor, place, info.nbytes)
            place += info.nbytes

    def _put(self, file: str, descriptor: int, place: int, data) -> None:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(descriptor, view[done : done + (1 << 30)], place + done)
        except OSError as error:
            raise write_error(self.directory / file, error, len(view)) from None

    def write(self, name: str, data, offset: int = 0) -> None:
        """Writes the bytes of a tensor (anything `memoryview` takes), or a part of them from `offset` on."""
        descriptor, start, size = self._places[name]
        length = memoryview(data).nbytes
        if offset + length > size:  # it would run into the next tensor
            raise ValueError(f"{name}: {length} bytes from {offset} on do not fit into {size}")
        self._put(name, descriptor, start + offset, data)

    def copy(self, name: str, reader: ShardReader, source: str | None = None) -> None:
        """Copies a tensor as it is, a piece at a time; `source` is its name there, if another."""
        source = source or name
        size = reader.tensors[source].nbytes
        scratch = memoryview(bytearray(min(COPY_BYTES, size)))
        for offset in range(0, size, COPY_BYTES):
            piece = scratch[: min(COPY_BYTES, size - offset)]
            reader.read_into(source, piece, offset)
            self.write(name, piece, offset)

    def sync(self) -> None:
        """Has everything written reach the disk."""
        for descriptor, file in zip(self._descriptors, self.layout, strict=True):
            try:
                os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)
            except OSError as error:  # what the system held back may fail only now
                raise write_error(self.directory / file, error, 0) from None

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _reserve(descriptor: int, size: int) -> None:
    """Takes the room on the disk, where the file system can."""
    if not hasattr(os, "posix_fallocate") or not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file with these tensors one after the other."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, start + info.nbytes],
        }
        start += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes, as the format asks
    return len(text).to_bytes(8, "little") + text


def index_json(layout: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    """The text of `model.safetensors.index.json` for a checkpoint of several files."""
    weight_map = {name: file for file, tensors in layout.items() for name in tensors}
    total = sum(info.nbytes for tensors in layout.values() for info in tensors.values())
    parameters = sum(info.numel for tensors in layout.values() for info in tensors.values())
    record = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(record, indent=2) + "\n"


@contextmanager
def write_errors(directory: Path) -> Iterator[None]:
    """Turns an `OSError` of writing small files in a directory into the one line a user gets."""
    try:
        yield
    except OSError as error:
        raise write_error(Path(error.filename or directory), error, 0) from None


def write_error(path: Path, error: OSError, needed: int) -> InputError:
    """The one line a user gets when a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        size = f" for {needed / 1e9:.2f} GB" if needed >= 1e7 else ""
        return InputError(f"{path}: no room on the disk{size}; free some space, then run again (with --resume)")
    return InputError(f"{path}: cannot be written ({error.strerror})")
