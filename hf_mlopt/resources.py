"""Where the files that travel with the package lie: recipes and card templates."""

from pathlib import Path
from typing import Literal

from hf_mlopt.errors import InputError


_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: Literal["recipes", "model_cards"]) -> Path:
    """
    Finds a folder of files that travel with the package.

    A wheel carries it inside the package; in a checkout (and an editable installation) it lies at the top level.

    Args:
        name (`str`): `"recipes"` or `"model_cards"`.

    Returns:
        `Path`: An existing directory.

    Raises:
        InputError: If the installation holds neither.
    """
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise InputError(f"{name}: not found in {_PACKAGE} or {_PACKAGE.parent}; reinstall hf-mlopt")
