"""A site's part in a masked sum: a key for the round, and its reply as words that say nothing by themselves."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.privacy.clipping import change, changed
from hf_mlopt.secure_sum import Party, Request, Roster


KEYS = "keys"
LEAST_SITES = 3
# Of a reply's scalars those that the server needs, as means.
MEAN_SCALARS = ("lr_sum",)
_NUM_TAIL = 3 + len(MEAN_SCALARS)
# A share of 1 of uniform weights, as a power of two that leaves ten more binary digits to the sum.
_UNIFORM = 1024.0
# Adam divides one moment by the root of the other, however small: a second word has what is left of the first one's
# step of 2^-24, in steps of 2^-72.
_FINE = ("selector", "selector_m", "selector_v")
_COARSE_STEP, _FURTHER = 2.0**-24, 2.0**48
# What a site is sent of the other sites of an earlier round, which need not be those of another site.
_OF_ONE_SITE = ("personal", "personal_buffers")
_PARTY = "secure-sum.json"


def roster_of(message: Message) -> Roster:
    """
    The sites of a masked sum, as its message lists them.

    Raises:
        InputError: If the message has no such list: it asks for an update that anyone could read.
    """
    scalars = message.scalars
    if "secure_members" not in scalars:
        raise InputError("secure_sum=True: the server asks for an update without a mask; have it set secure_sum")
    members = {name: bytes.fromhex(key) for name, key in json.loads(scalars["secure_members"]).items()}
    return Roster("federated", members, epoch=scalars["round"])


def request_of(message: Message) -> Request:
    """The sum that a message asks for: of this round and attempt, and from the very model that it holds for all."""
    common = {group: tensors for group, tensors in message.groups.items() if group not in _OF_ONE_SITE}
    context = Message(common).digest().encode()
    return Request(message.scalars["attempt"], f"round-{message.scalars['round']}", context)


def new_key(folder: Path, site: str, message: Message) -> Message:
    """
    A key for one vector, in a file, since the process that is asked for the vector need not be the one that is asked
    for the key. [`masked`] removes it, so that neither a restart nor a message that comes twice can use a mask again.
    That holds off a server that follows the protocol: one that asks anew for the same round, without one of the
    sites, learns that site's update as the difference of two sums.

    Args:
        folder (`Path`): The site's own.
        site (`str`): Its name.
        message (`Message`): With the task [`KEYS`].
    """
    party = Party(site)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _PARTY
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(party.state_dict(), file)
    os.replace(partial, path)
    return Message({}, {"round": message.scalars["round"], "public_key": party.public_key.hex()})


def masked(folder: Path, site: str, sent: Message, reply: Message) -> Message:
    """
    A reply under masks.

    Args:
        folder (`Path`): The site's own, with what [`new_key`] left.
        site (`str`): Its name.
        sent (`Message`): What the server sent.
        reply (`Message`): What the site would answer.

    Returns:
        `Message`: `masked` / `words`, `[size]`, int64, and the scalars `round`, `start_digest`, `roster`, `request`.

    Raises:
        InputError: If the vector does not fit into the sum, or the site has no key for it.
    """
    roster, request = roster_of(sent), request_of(sent)
    path = folder / _PARTY
    if not path.is_file():
        raise InputError(f"site {site!r} has no key for this sum: it has been used, or is lost")
    party = Party.resume(site, json.loads(path.read_text(encoding="utf-8")))
    party.join(roster)
    values = _vector(sent, reply)
    _require_range(values, roster)
    words = party.mask(values, request).words
    path.unlink()
    return Message(
        {"masked": {"words": torch.from_numpy(words.view(np.int64))}},
        {
            "round": sent.scalars["round"],
            "start_digest": reply.scalars["start_digest"],
            "roster": roster.digest.hex(),
            "request": request.to_bytes().hex(),
        },
    )


def vector_size(like: Mapping[str, Group]) -> int:
    """Numbers in the vector of a reply that looks like these groups."""
    return sum(_sizes(like)) + _NUM_TAIL


def mean_of(total: np.ndarray, sent: Message, like: Mapping[str, Group]) -> tuple[Message, int, float]:
    """
    What a sum of vectors means.

    Args:
        total (`np.ndarray`): `[size]`, float64.
        sent (`Message`): What one of the sites was sent.
        like (`Mapping[str, Group]`): Groups that look like those of a reply.

    Returns:
        `tuple`: The mean reply, float64, with the mean scalars; the number of samples of all sites; and their mean
        training loss over the samples.

    Raises:
        InputError: If it is no sum of such vectors.
    """
    tail = total[-_NUM_TAIL:]
    weight, num_samples, loss = tail[:3]
    if not (weight > 0 and num_samples > 0 and num_samples == round(num_samples)):
        raise InputError("masked sum: the masks do not cancel; the sites have answered different requests")
    weights = {"samples": num_samples, "uniform": _UNIFORM * len(roster_of(sent).members)}
    parts = dict(zip(_order(like), torch.from_numpy(total[:-_NUM_TAIL]).split(_sizes(like)), strict=True))
    groups = {
        group: {
            name: _joined(group, parts[group, name]).view(tensor.shape) / weights[_weighting(sent, group)]
            for name, tensor in tensors.items()
        }
        for group, tensors in like.items()
    }
    start = {name: tensor.double() for name, tensor in sent.groups["weights"].items()}
    groups["weights"] = changed(start, groups["weights"])
    scalars = {name: float(value / weight) for name, value in zip(MEAN_SCALARS, tail[3:], strict=True)}
    return Message(groups, scalars), int(num_samples), float(loss / num_samples)


def _vector(sent: Message, reply: Message) -> np.ndarray:
    """p Δ, p times the further groups, and then p, n, n times the loss, and p times the mean scalars."""
    num_samples = reply.scalars["num_samples"]
    weights = {"samples": float(num_samples), "uniform": _UNIFORM}
    groups = {**reply.groups, "weights": change(sent.groups["weights"], reply.groups["weights"])}
    parts = [
        _parted(group, groups[group][name].double().flatten() * weights[_weighting(sent, group)])
        for group, name in _order(groups)
    ]
    weight = weights[sent.scalars["site_weights"]]
    scalars = [weight * reply.scalars[name] for name in MEAN_SCALARS]
    tail = [weight, num_samples, num_samples * reply.scalars["train_loss"], *scalars]
    return torch.cat([*parts, torch.tensor(tail, dtype=torch.float64)]).numpy()


def _parted(group: str, values: torch.Tensor) -> torch.Tensor:
    if group not in _FINE:
        return values
    coarse = (values / _COARSE_STEP).round() * _COARSE_STEP
    return torch.cat([coarse, (values - coarse) * _FURTHER])


def _joined(group: str, words: torch.Tensor) -> torch.Tensor:
    if group not in _FINE:
        return words
    coarse, rest = words.chunk(2)
    return coarse + rest / _FURTHER


def _weighting(sent: Message, group: str) -> str:
    """How sites count in the mean of a group."""
    return json.loads(sent.scalars.get("group_weights", "{}")).get(group, sent.scalars["site_weights"])


def _sizes(like: Mapping[str, Group]) -> list[int]:
    return [like[group][name].numel() * (2 if group in _FINE else 1) for group, name in _order(like)]


def _order(groups: Mapping[str, Group]) -> list[tuple[str, str]]:
    return sorted((group, name) for group, tensors in groups.items() for name in tensors)


def _require_range(values: np.ndarray, roster: Roster) -> None:
    """Without the values in the message, which goes to the server."""
    limit = roster.fixed_point.limit
    if not np.isfinite(values).all():
        raise InputError("the update is not finite; lower the learning rate")
    if np.abs(values).max() > limit:
        raise ConfigurationError(
            "secure_sum",
            True,
            f"an entry of the update times the site's weight is beyond {limit:g}, the share of each of "
            f"{len(roster.members)} sites in the range of the sum; lower the learning rate, set clip_update, or take "
            "site_weights uniform",
        )
