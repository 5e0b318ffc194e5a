"""Public names that are imported on first use, so that importing a room is quick and pulls in no torch."""

from collections.abc import Callable
from importlib import import_module


def lazy_names(module: str, public: dict[str, str]) -> tuple[list[str], Callable[[str], object]]:
    """
    What a package's `__init__` needs to offer names it has not imported yet.

    Args:
        module (`str`): `__name__` of the package.
        public (`dict[str, str]`): Public name to the module that defines it.

    Returns:
        `tuple`: `__all__` and `__getattr__`.
    """

    def getattr_(name: str) -> object:
        if name in public:
            return getattr(import_module(public[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return sorted(public), getattr_
