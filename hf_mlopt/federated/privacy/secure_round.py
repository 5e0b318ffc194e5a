r"""
A round of which the server learns the sum alone.

First every site makes a key (task `keys`), then the public keys go to all of them with the model, and what comes back
is masked: Σ p_k Δ_k, Σ p_k buffers, Σ p_k, Σ n_k, Σ n_k loss_k and Σ p_k lr_sum_k in fixed point; of FedSM the sums of
personal models and selectors too. The mean is that of an ordinary round up to q 2^-25 / Σ p_k, with p_k = n_k, or 1024
where weights are uniform; that of the selector up to 2^-48 of this.

What it does not do:

- The server hands out the public keys, so it is trusted to hand out the sites' own; a server that does not can read
  every update. Sites trust it to send all of them the same list.
- A site's number of rows is told at the roll call, the metrics of evaluations are told site by site, and errors in
  words. All but one of the sites together with the server know the update of the last one.
- Nobody sees a site's update, so nobody can refuse one that is made to spoil the model.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message, ServerAlgorithm
from hf_mlopt.federated.algorithms.averaging import site_seed
from hf_mlopt.federated.algorithms.message import Scalar
from hf_mlopt.federated.client import TRAIN
from hf_mlopt.federated.engines import Engine, Exchanged
from hf_mlopt.federated.privacy.masking import (
    KEYS,
    LEAST_SITES,
    mean_of,
    request_of,
    roster_of,
    vector_size,
)
from hf_mlopt.federated.rounds import RoundFailed
from hf_mlopt.secure_sum import MaskedSum, MaskedVector


_ATTEMPTS = 3
Take = Callable[[str, Message], Message]


def run_secure_round(
    algorithm: ServerAlgorithm,
    engine: Engine,
    scalars: Mapping[str, Scalar],
    on_reply: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """
    As [`~hf_mlopt.federated.rounds.run_round`], under masks.

    A sum without one of its vectors is void. Then all sites that are left train again, from other seeds: were their
    vectors the same, and the missing one only late, then the difference of the two sums would be that vector. Where
    training does not depend on the seed (full batches, no dropout) this is no help, and where it does the difference
    is still near that vector: a server that keeps late replies is held off by noise, or by waiting longer.

    Returns:
        `tuple`: The row as there, with `attempts`, and only `bytes_up` of each site; and no metrics of sites.

    Raises:
        RoundFailed: If the round cannot count; the algorithm is as before.
    """
    started, tried = time.perf_counter(), _Attempts(algorithm, engine, scalars, on_reply)
    total, message = tried.run()
    try:
        mean, num_samples, train_loss = mean_of(total.result(), message, tried.reply_groups)
        metrics = algorithm.aggregate_mean(algorithm.round, mean, list(total.roster.names), num_samples)
    except (InputError, RuntimeError) as error:
        raise RoundFailed(str(error)) from error
    absent = {**dict.fromkeys(metrics["absent"], "no reply"), **tried.failures}
    row = {
        "round": metrics["round"],
        "num_sites": metrics["num_sites"],
        "num_samples": num_samples,
        "update_norm": metrics["update_norm"],
        "train_loss": train_loss,
        "absent": dict(sorted(absent.items())),
        "start_digest": tried.start_digest,
        "digest": Message({"weights": algorithm.groups["weights"]}).digest(),
        "bytes_down": tried.bytes_down,
        "bytes_up": sum(tried.bytes_up.values()),
        "seconds": time.perf_counter() - started,
        "attempts": tried.count,
        "sites": {site: {"bytes_up": num_bytes} for site, num_bytes in sorted(tried.bytes_up.items())},
    }
    return row, {}


class _Attempts:
    """The exchanges of one round, and what they have cost."""

    def __init__(self, algorithm: ServerAlgorithm, engine: Engine, scalars: Mapping, on_reply: Callable[[str], None]):
        self.algorithm, self.engine, self.scalars, self.on_reply = algorithm, engine, scalars, on_reply
        self.configured = algorithm.configure(algorithm.round)
        self.reply_groups = algorithm.template(next(iter(self.configured))).groups
        self.failures: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self.bytes_down = self.count = 0
        self.start_digest: Scalar | None = None

    def run(self) -> tuple[MaskedSum, Message]:
        """A complete sum, and a message that it answers."""
        while self.count < _ATTEMPTS:
            messages = self._messages(self._public_keys())
            self.count += 1
            one = next(iter(messages.values()))
            total = MaskedSum(roster_of(one), request_of(one))
            self._exchange(messages, lambda site, reply, total=total: self._add(total, site, reply), self.on_reply)
            if not total.missing:
                return total, one
        raise RoundFailed(self._told(f"a site was missing in each of {_ATTEMPTS} attempts"))

    def _public_keys(self) -> dict[str, str]:
        """Of the sites that are left."""
        round, keys = self.algorithm.round, {}

        def take(site: str, reply: Message) -> Message:
            key = str(reply.scalars.get("public_key"))
            is_new = key not in [other for name, other in keys.items() if name != site]
            if reply.scalars.get("round") != round or not re.fullmatch("[0-9a-f]{64}", key) or not is_new:
                raise InputError(f"is no public key of its own for round {round}")
            keys[site] = key
            return Message({})

        left = [site for site in self.configured if site not in self.failures]
        ask = Message({}, {"task": KEYS, "round": round, "attempt": self.count})
        self._exchange(dict.fromkeys(left, ask), take, lambda site: None)
        least = max(LEAST_SITES, self.algorithm.min_sites)
        if len(keys) < least:
            raise RoundFailed(self._told(f"{len(keys)} sites can put together a masked sum, {least} are needed"))
        return keys

    def _messages(self, keys: Mapping[str, str]) -> dict[str, Message]:
        algorithm, members = self.algorithm, json.dumps(dict(sorted(keys.items())))
        added = {
            **self.scalars,
            "task": TRAIN,
            "attempt": self.count,
            "secure_members": members,
            "site_weights": algorithm.weighting,
            "group_weights": json.dumps(algorithm.group_weighting()),
        }
        messages = {}
        for site in keys:
            message = self.configured[site]
            other = {"seed": site_seed(algorithm.seed, algorithm.round, f"{site}/{self.count}")} if self.count else {}
            messages[site] = Message(message.groups, {**message.scalars, **added, **other})
        return messages

    def _add(self, total: MaskedSum, site: str, reply: Message) -> Message:
        if site not in total.missing:
            return Message({})  # it has come twice
        words = reply.groups.get("masked", {}).get("words")
        wanted = (vector_size(self.reply_groups),)
        if words is None or words.dtype != torch.int64 or words.shape != wanted:
            raise InputError(f"is no masked vector of {wanted[0]} words; have the site set secure_sum")
        for name, value in (("request", total.request.to_bytes()), ("roster", total.roster.digest)):
            if reply.scalars.get(name) != value.hex():
                raise InputError(f"is masked for another {name}; the masks would not cancel")
        total.add(MaskedVector(site, total.roster.digest, total.request, words.numpy().view(np.uint64)))
        self.start_digest = reply.scalars.get("start_digest")
        return Message({})

    def _exchange(self, messages: Mapping[str, Message], take: Take, on_reply: Callable[[str], None]) -> None:
        exchanged = Exchanged(decode=take)
        self.engine.exchange(messages, exchanged, on_reply)
        self.failures |= exchanged.failures
        self.bytes_down += sum(message.nbytes for message in messages.values())
        for site, found in exchanged.scalars.items():
            self.bytes_up[site] = self.bytes_up.get(site, 0) + found["bytes_up"]

    def _told(self, what: str) -> str:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.failures.items()))
        return f"round {self.algorithm.round}: {what}. {reasons}"
