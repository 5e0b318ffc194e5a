"""Where a run reads and writes, looked at before any data are read."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.workflows.train_data import is_text_file


def check_output_dir(output_dir: str, resumes: bool, may_hold: Collection[str] = (), can_resume: bool = True) -> None:
    """
    Refuses a directory that a run cannot write, or one that would mix its files with others.

    Args:
        output_dir (`str`): Field of a recipe.
        resumes (`bool`): Whether the run goes on from what is there.
        may_hold (`Collection[str]`, *optional*): Names that do not matter.
        can_resume (`bool`, *optional*, defaults to `True`): Whether a run of this kind ever does, for the remedy.

    Raises:
        ConfigurationError: If it is a file, holds something in a new run, or cannot be written.
    """
    output = Path(output_dir).resolve()
    if output.exists() and not output.is_dir():
        raise ConfigurationError("output_dir", output_dir, "is a file; name a directory")
    if not resumes and output.is_dir() and any(path.name not in may_hold for path in output.iterdir()):
        remedy = ", or go on with the run in it: --resume-from-checkpoint true" if can_resume else ""
        raise ConfigurationError("output_dir", output_dir, f"is not empty; name a new directory{remedy}")
    require_writable(output_dir, output)


def require_writable(output_dir: str, folder: Path) -> None:
    """Refuses a folder that cannot be written, or made where it does not exist; the error names `output_dir`."""
    folder = folder.resolve()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError("output_dir", output_dir, f"cannot write in {existing}")


def check_text_files(sources: Mapping[str, str | None]) -> None:
    """
    Refuses a source that can only mean a local file of text and is none.

    Args:
        sources (`Mapping[str, str | None]`): Field to what it names.
    """
    for name, source in sources.items():
        if source and is_text_file(source) and not Path(source).is_file():
            raise ConfigurationError(name, source, "no such file")
