"""An application for the engines that start processes elsewhere: small sums whose every bit is known."""

import os
import time
from pathlib import Path

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.base import Exchanged


_factory_calls = 0


def answer(site, message):
    """Doubles what it gets, for every site otherwise; `sleep` and `raise` in the message are done."""
    time.sleep(message.scalars.get("sleep", 0))
    if site == message.scalars.get("raises"):
        raise ValueError(f"no data at {site}")
    weights, number = message.groups["weights"], int(site.removeprefix("hosp"))
    tensors = {name: tensor + tensor * number for name, tensor in weights.items()}
    scalars = {"num_samples": 3 + number, "round": message.scalars["round"], "pid": os.getpid()}
    scalars["factory_calls"] = _factory_calls
    return Message({"weights": tensors, "empty": {"none": torch.empty(0, 2)}}, scalars)


def answer_factory(run_config, node_config):
    global _factory_calls
    _factory_calls += 1
    if node_config.get("site") == "refuses":
        raise InputError("site 'refuses': its data set is empty")
    return node_config.get("site", f"hosp{node_config.get('partition-id')}"), answer


def rounds(engine, num_rounds, **scalars):
    """The weights after some rounds, the processes that answered, and the failures of each round."""
    weights = {
        "bfloat16": torch.linspace(-1, 1, 1000).bfloat16(),
        "float64": torch.linspace(0, 1, 7, dtype=torch.float64).reshape(1, 7),
        "int64": torch.tensor(2**40 + 1),
    }
    names, processes, failures = engine.sites(), [], []
    for number in range(num_rounds):
        exchanged = Exchanged()
        message = Message({"weights": weights}, {"round": number, **scalars})
        engine.exchange(dict.fromkeys(names, message), exchanged, lambda site: None)
        replies = [exchanged.replies[site].groups["weights"] for site in sorted(exchanged.replies)]
        weights = {name: sum(reply[name] for reply in replies) for name in weights}
        processes.append(sorted(reply.scalars["pid"] for reply in exchanged.replies.values()))
        failures.append(exchanged.failures)
    return Message({"weights": weights}), processes, failures


def serve(engine, run_config):
    weights, processes, failures = rounds(engine, run_config["rounds"])
    Path(run_config["output"]).write_text(repr([engine.sites(), weights.digest(), processes, failures]))
