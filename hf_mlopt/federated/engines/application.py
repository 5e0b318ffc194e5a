"""What runs at the ends of an engine that starts its processes elsewhere: found by name, since no code travels."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from hf_mlopt.errors import ConfigurationError, InputError


Values = dict[str, Any]  # texts, numbers and truth values, as Flower's run and node configurations hold them
Blobs = dict[str, np.ndarray]  # group to the bytes of its tensors, `[nbytes]`, uint8


class Application(Protocol):
    """
    A module with these two functions, which the run configuration names under `application`. It must be installed at
    the server and at every site.
    """

    def answer_factory(self, run_config: Values, node_config: Values) -> tuple[str, Callable]:
        """
        Name of the site, and the function that answers its messages, an [`Answer`]. Without a resident it is called
        for every message, and once before the first round, so what takes long belongs into the answer.
        `node_config` holds `site`, or in a simulation `partition-id` and `num-partitions`.
        """

    def serve(self, engine: Any, run_config: Values) -> None:
        """All rounds, over an [`Engine`] that has not been asked for its sites yet."""


def load_application(run_config: Values) -> Application:
    """
    The module that a run configuration names.

    Raises:
        InputError: If there is none, or it lacks one of the two functions.
    """
    name = run_config.get("application")
    if not isinstance(name, str) or not name:
        raise ConfigurationError("application", name, "the dotted name of a module that is installed at every site")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"application={name!r}: cannot be imported ({error}); install it here") from error
    missing = [needed for needed in ("answer_factory", "serve") if not hasattr(module, needed)]
    if missing:
        raise ConfigurationError("application", name, f"has no function {' and no '.join(missing)}")
    return module
