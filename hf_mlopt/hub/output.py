"""An output directory that appears complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_mlopt.errors import InputError


_MARK = ".incomplete-"  # `.<name>.incomplete-<pid>`, beside the output so that the last step is one rename


def check_output(path: str | Path, needed_bytes: int = 0) -> Path:
    """
    Makes sure, before any expensive work, that an output directory can be written. Leaves nothing behind.

    Args:
        path (`str` or `Path`): The directory to be written. It must not exist, or be empty.
        needed_bytes (`int`, *optional*, defaults to 0): Bytes that will be written.

    Returns:
        `Path`: The directory as an absolute path.

    Raises:
        InputError: If it is a file, holds something, is a mount point, cannot be created, or the disk is too full.
    """
    output = Path(path).expanduser().resolve()
    if output.is_dir():
        if any(output.iterdir()):
            raise InputError(f"output={str(path)!r}: the directory is not empty; name a new one")
        if os.path.ismount(output):  # a finished directory cannot be renamed onto it
            raise InputError(f"output={str(path)!r}: is a mount point; name a directory inside it")
    elif output.exists():
        raise InputError(f"output={str(path)!r}: is a file; name a directory")
    existing = next(parent for parent in output.parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=existing))  # permissions alone do not show a read-only disk
    except OSError as error:
        raise InputError(f"output={str(path)!r}: cannot write in {existing} ({error.strerror})") from None
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"output={str(path)!r}: needs {needed_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free; "
            "free some space or name a directory on another disk"
        )
    return output


@contextmanager
def staged_output(output: str | Path) -> Iterator[Path]:
    """
    Gives a hidden directory beside `output` to write into and renames it to `output` at the end.

    An exception, `KeyboardInterrupt` included, removes it. What a killed process left is removed by the next run with
    the same output.

    Args:
        output (`str` or `Path`): The directory to appear; absent or empty, see [`check_output`].
    """
    output = Path(output).expanduser().resolve()
    _remove_leftovers(output)
    staging = output.with_name(f".{output.name}{_MARK}{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        yield staging
        os.replace(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def unfinished_directory(output: Path) -> Path:
    """Where a run keeps what it has done until it is complete."""
    return output.with_name(f".{output.name}.unfinished")


def _remove_leftovers(output: Path) -> None:
    if not output.parent.is_dir():
        return
    prefix = f".{output.name}{_MARK}"
    for entry in output.parent.iterdir():
        pid = entry.name.removeprefix(prefix)
        # Our own pid too: in a container every run may have the same one.
        if entry.name.startswith(prefix) and pid.isdecimal() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to somebody else
        return True
    return True
