"""Before the first round: who is there, and whether they can train together."""

import json
import logging
from collections.abc import Mapping

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.client import HELLO
from hf_mlopt.federated.engines import Engine, Exchanged


logger = logging.getLogger(__name__)


def roll_call(engine: Engine, own: Mapping[str, object]) -> dict[str, Message]:
    """
    Asks every site what it has.

    Args:
        engine (`Engine`): Knows the sites.
        own (`Mapping`): What the server's model is, as a site describes its own: `layout`, `frozen`, `vocabulary` and
            `version`.

    Returns:
        `dict[str, Message]`: Site, in order of name, to its answer.

    Raises:
        InputError: If a site does not answer, has no data, or another model than the server.
    """
    names = engine.sites()
    for site in names:
        if names.count(site) > 1:
            raise InputError(f"sites={sorted(names)}: two sites are named {site!r}; names must differ")
        if site in (".", "..") or "/" in str(site) or "\\" in str(site):
            raise InputError(f"sites: {site!r} would leave its folder; a name must not be a path")
    exchanged = Exchanged()
    engine.exchange({site: Message({}, {"task": HELLO}) for site in names}, exchanged, lambda site: None)
    for site, reason in exchanged.failures.items():
        raise InputError(f"site {site!r} cannot take part: {reason}")
    for site, answer in exchanged.replies.items():
        _check(site, answer, own)
    return {site: exchanged.replies[site] for site in sorted(names)}


def require_held_out(roster: Mapping[str, Message]) -> None:
    """
    Refuses a site without rows to evaluate on; what tunes hyper-parameters goes by them.

    Raises:
        InputError: With the site's name.
    """
    for site, answer in roster.items():
        if not answer.scalars.get("num_evaluated", 0) > 0:
            raise InputError(
                f"auto_fedrl: site {site!r} has no rows to evaluate on, which the policy is rewarded by; give it some"
            )


def _check(site: str, answer: Message, own: Mapping[str, object]) -> None:
    found = answer.scalars
    if not found.get("num_samples", 0) > 0:
        raise InputError(f"site {site!r} has no rows to train on; leave it out, or give it data")
    if found.get("layout") != own["layout"]:
        raise InputError(
            f"site {site!r} has another model: {_difference(str(found.get('layout', '{}')), own['layout'])}; "
            "all sites need the same architecture and vocabulary"
        )
    if found.get("frozen") != own["frozen"]:
        raise InputError(f"site {site!r} has other frozen weights; all sites need the same base model")
    if found.get("vocabulary") != own["vocabulary"]:
        raise InputError(f"site {site!r} has another vocabulary of the same size; all sites need the same tokenizer")
    if found.get("version") != own["version"]:
        logger.warning("site %r has hf-mlopt %s, the server %s", site, found.get("version"), own["version"])


def _difference(theirs: str, ours: str) -> str:
    theirs, ours = json.loads(theirs), json.loads(ours)
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    first = f"{names[0]} is {theirs.get(names[0], 'absent')}, at the server {ours.get(names[0], 'absent')}"
    return first if len(names) == 1 else f"{first} ({len(names)} tensors differ)"
