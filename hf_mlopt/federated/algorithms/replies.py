"""Whether the server may use what a site has sent."""

from collections.abc import Iterable
from typing import Any

import torch

from hf_mlopt.federated.algorithms.message import Message


def check_reply(message: Any, template: Message) -> str | None:
    """
    Looks for a reason not to use a reply; a reply is used whole or not at all.

    Args:
        message (`Message`): What a site sent.
        template (`Message`): What it should look like: the same groups, names, shapes and dtypes, and each scalar of
            the template with the same value, such as `round`. A reply further holds `num_samples`, an int above 0.

    Returns:
        `str`, *optional*: The reason with the names it is about; `None` for a good reply.
    """
    if not isinstance(message, Message):
        return f"is a {type(message).__name__}, not a message"
    for name, value in template.scalars.items():
        given = message.scalars.get(name)
        if type(given) is not type(value) or given != value:
            stale = " (a stale reply)" if name == "round" and type(given) is int and given < value else ""
            return f"{name}={given!r} instead of {value!r}{stale}"
    num_samples = message.scalars.get("num_samples")
    if type(num_samples) is not int or num_samples <= 0:
        return f"num_samples={num_samples!r}; an int above 0 is needed"
    if problem := _other_names("groups", message.groups, template.groups):
        return problem
    for group, tensors in template.groups.items():
        given = message.groups[group]
        if problem := _other_names(f"tensors of {group!r}", given, tensors):
            return problem
        for name, tensor in tensors.items():
            if problem := _other_tensor(given[name], tensor):
                return f"{group!r}, {name!r}: {problem}"
    return None


def _other_names(what: str, given: Iterable[str], wanted: Iterable[str]) -> str | None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    parts = [f"{word} {names}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
    return f"{what}: {', '.join(parts)}" if parts else None


def _other_tensor(given: torch.Tensor, wanted: torch.Tensor) -> str | None:
    if given.shape != wanted.shape:
        return f"shape {list(given.shape)} instead of {list(wanted.shape)}"
    if given.dtype != wanted.dtype:
        return f"dtype {given.dtype} instead of {wanted.dtype}"
    if given.is_floating_point() and not given.isfinite().all():
        return "not finite"
    return None
