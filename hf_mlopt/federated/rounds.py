"""One round: what is sent, what comes back, and the row of it in the history."""

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_mlopt.federated.algorithms import Message, ServerAlgorithm
from hf_mlopt.federated.algorithms.message import Scalar
from hf_mlopt.federated.client import EVALUATE, TRAIN
from hf_mlopt.federated.engines import Engine, Exchanged
from hf_mlopt.federated.storage import SpooledReplies


logger = logging.getLogger(__name__)

# Replies beyond this many bytes wait in files.
_IN_MEMORY = 256 * 2**20
# Of a reply, what the algorithm needs and a reader does not.
_NOT_SHOWN = ("round", "state_round", "start_digest")
# What every algorithm says of a round; the rest is what one has found out for itself.
_OF_ANY = ("round", "num_sites", "num_samples", "update_norm", "absent", "refused")


class RoundFailed(RuntimeError):
    """Too few sites have answered, or what they say together is no model. The round can be done again."""


def run_round(
    algorithm: ServerAlgorithm,
    engine: Engine,
    scalars: Mapping[str, Scalar],
    on_reply: Callable[[str], None],
    decode: Callable[[Message, Message], Message] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """
    Has the chosen sites train, and the algorithm make a new model of what they answer.

    Args:
        algorithm (`ServerAlgorithm`): Stands before the round, and after it behind.
        engine (`Engine`): Reaches the sites.
        scalars (`Mapping`): What every message says beside what the algorithm has it say.
        on_reply (`Callable[[str], None]`): Called for every site that is in, or has failed.
        decode (`Callable[[Message, Message], Message]`, *optional*): Undoes what sites did to their replies: (sent,
            reply) to reply; an `InputError` is a failure of the site.

    Returns:
        `tuple`: The row, JSON-able: `round`, `num_sites`, `num_samples`, `update_norm`, `train_loss` (mean over
        samples), `absent` (site to reason), `bytes_down`, `bytes_up`, `seconds`, `digest` (of the new weights),
        `sites` (site to its scalars), and of Auto-FedRL `tuned` (what held, and the reward); and what sites have found
        of the model they were sent.

    Raises:
        RoundFailed: If the round cannot count; the algorithm is as before.
    """
    started, round = time.perf_counter(), algorithm.round
    messages = {
        site: Message(message.groups, {**message.scalars, **scalars, "task": TRAIN})
        for site, message in algorithm.configure(round).items()
    }
    with _exchanged(messages) as exchanged:
        if decode is not None:
            exchanged.decode = lambda site, reply: decode(messages[site], reply)
        engine.exchange(messages, exchanged, on_reply)
        metrics = _aggregate(algorithm, exchanged)
    shown = {site: exchanged.scalars[site] for site in sorted(exchanged.scalars)}
    sites = {site: {k: v for k, v in one.items() if k not in _NOT_SHOWN} for site, one in shown.items()}
    used = [site for site in sites if site not in metrics["absent"]]
    evaluated = {site: _metrics_of(sites[site], remove=True) for site in sites}
    row = {
        "round": round,
        "num_sites": metrics["num_sites"],
        "num_samples": metrics["num_samples"],
        "update_norm": metrics["update_norm"],
        "train_loss": _mean({site: sites[site] for site in used}, "train_loss", "num_samples"),
        "absent": metrics["absent"],
        "start_digest": next((shown[site].get("start_digest") for site in used), None),
        "digest": Message({"weights": algorithm.groups["weights"]}).digest(),
        "bytes_down": sum(message.nbytes for message in messages.values()),
        "bytes_up": sum(one["bytes_up"] for one in sites.values()),
        "seconds": time.perf_counter() - started,
        "sites": sites,
    }
    if tuned := {name: value for name, value in metrics.items() if name not in _OF_ANY}:
        row["tuned"] = tuned
    return row, {site: found for site, found in evaluated.items() if found}


def evaluate_sites(
    algorithm: ServerAlgorithm, engine: Engine, scalars: Mapping[str, Scalar]
) -> tuple[dict[str, dict[str, float]], int]:
    """
    Has every site evaluate the model as it is now on data of its own. A site that does not answer is warned of.

    Args:
        algorithm (`ServerAlgorithm`): Has the model.
        engine (`Engine`): Reaches the sites.
        scalars (`Mapping`): What every message says beside what the algorithm has it say.

    Returns:
        `tuple[dict[str, dict[str, float]], int]`: Site to metrics, without those that have not answered or have no
        such data; and the bytes sent to them.
    """
    messages = {
        site: Message(message.groups, {**message.scalars, **scalars, "task": EVALUATE})
        for site, message in algorithm.evaluation().items()
    }
    with _exchanged(messages) as exchanged:
        engine.exchange(messages, exchanged, lambda site: None)
    for site, reason in sorted(exchanged.failures.items()):
        logger.warning("round %d: %s has not evaluated the model: %s", algorithm.round - 1, site, reason)
    found = {site: _metrics_of(exchanged.scalars[site]) for site in sorted(exchanged.scalars)}
    sent = sum(message.nbytes for message in messages.values())
    return {site: metrics for site, metrics in found.items() if metrics}, sent


def mean_over_sites(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over the rows that all sites have evaluated."""
    names = {name for metrics in found.values() for name in metrics} - {"num_evaluated"}
    return {name: _mean(found, name, "num_evaluated") for name in sorted(names)}


def _aggregate(algorithm: ServerAlgorithm, exchanged: Exchanged) -> dict[str, Any]:
    try:
        metrics = algorithm.aggregate(algorithm.round, exchanged.replies)
    except RuntimeError as error:
        told = str(error)
        for site, reason in exchanged.failures.items():
            told = told.replace(f"{site}: no reply", f"{site}: {reason}")
        raise RoundFailed(told) from error
    reasons = {**dict.fromkeys(metrics["absent"], "no reply"), **exchanged.failures, **metrics["refused"]}
    return {**metrics, "absent": dict(sorted(reasons.items()))}


@contextmanager
def _exchanged(messages: Mapping[str, Message]) -> Iterator[Exchanged]:
    if sum(message.nbytes for message in messages.values()) <= _IN_MEMORY:
        yield Exchanged()
        return
    folder = tempfile.mkdtemp(prefix="hf-mlopt-replies-")
    try:
        yield Exchanged(SpooledReplies(Path(folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _metrics_of(scalars: dict[str, Scalar], remove: bool = False) -> dict[str, float]:
    names = [name for name in scalars if name.startswith("eval_") or name == "num_evaluated"]
    return {name: scalars.pop(name) if remove else scalars[name] for name in names}


def _mean(rows: Mapping[str, Mapping[str, float]], name: str, weight: str) -> float | None:
    held = [row for row in rows.values() if all(_is_finite(row.get(key)) for key in (name, weight))]
    total = sum(row[weight] for row in held)
    return sum(row[name] * row[weight] / total for row in held) if total else None


def _is_finite(value: Scalar | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
