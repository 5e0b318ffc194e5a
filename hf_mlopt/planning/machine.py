"""What this machine has, asked without torch."""

import shutil
import subprocess
from pathlib import Path


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def own_memory() -> int:
    """Bytes that this process has now."""
    import psutil

    return psutil.Process().memory_info().rss


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the limit of a container."""
    import psutil

    available = psutil.virtual_memory().available
    limit = _container_limit()
    if limit is None:
        return available
    return min(available, max(limit - own_memory(), 0))


def _container_limit() -> int | None:
    for file in _LIMITS:
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 1 << 60 else None
    return None


def free_disk(path: Path) -> int:
    """Bytes free where a path is or would be."""
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def gpu_memory(device: str) -> int | None:
    """
    Free bytes of the GPU that a run would use, as `nvidia-smi` says; None if it would use none.

    Args:
        device (`str`): `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    return next(iter(gpu_memories(device)), None)


def gpu_memories(device: str) -> list[int]:
    """
    Free bytes of all GPUs that runs could use; of `cuda:N`, of that one alone.

    Args:
        device (`str`): `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if device == "cpu":
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=2, check=True).stdout.split()
        free = [int(line) << 20 for line in lines]
        _, named, number = device.partition(":")
        return [free[int(number)]] if named else free
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
