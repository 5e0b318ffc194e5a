"""The folder of a demo, which may replace that of an earlier one and nothing else."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_mlopt.hub import check_output, staged_output


@contextmanager
def demo_output(target: Path, written: set[str], num_bytes: int) -> Iterator[Path]:
    """
    A folder to write into that takes the place of `target` at the end.

    Args:
        target (`Path`): Absolute.
        written (`set[str]`): All names that a demo leaves. With anything of the user's own beside these, an earlier
            demo is not ours to delete.
        num_bytes (`int`): That the demo needs.

    Raises:
        InputError: If `target` holds anything but an earlier demo.
    """
    earlier = target.is_dir() and {path.name for path in target.iterdir()} == written
    if not earlier:
        check_output(target, num_bytes)
    with staged_output(target) as folder:
        yield folder
        if earlier:
            shutil.rmtree(target)
