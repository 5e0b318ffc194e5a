"""Small federations: least squares that a twin can follow in float64, a net with all that travels, and faults."""

import functools
import os
import signal
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines import InProcessEngine
from hf_mlopt.federated.storage import load_message


ETA, STEPS = 0.05, 3
SITES = ("d", "b", "a", "c")
SAMPLES = {"a": 10, "b": 20, "c": 30, "d": 40}
NAMES = ("weight", "norm.bias")  # of `Regression`
START = np.linspace(-1.0, 1.0, 8)

SETTINGS = {
    "num_rounds": 3,
    "local_steps": STEPS,
    "per_device_train_batch_size": 64,
    "learning_rate": ETA,
    "mlopt_optim": "sgd",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}


class ShiftNorm(nn.Module):
    """Its name makes it a normalization layer, so that FedBN keeps its parameter; it only adds up."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(START[5:]))

    def forward(self, x):
        return x @ self.bias


class Regression(nn.Module):
    """`x @ w` with w in two parameters, float64; half the mean square of the residuals."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.tensor(START[:5])), ShiftNorm()

    def forward(self, x, labels):
        residual = x[:, :5] @ self.weight + self.norm(x[:, 5:]) - labels
        return {"loss": residual.square().mean() / 2, "logits": residual}


def rows_of(site, count=None):
    """`[count, 8]` and `[count]`: data that differ from site to site."""
    generator = np.random.default_rng([ord(letter) for letter in site])
    count = SAMPLES[site] if count is None else count
    return generator.normal(size=(count, 8)), generator.normal(size=count)


def gradient(site, w, *_):
    """That of `Regression` on all rows of a site."""
    A, b = rows_of(site)
    return A.T @ (A @ w - b) / len(b)


def regression_data(site, count=None):
    A, b = rows_of(site, count)
    return [{"x": torch.tensor(x), "labels": torch.tensor(y)} for x, y in zip(A, b, strict=True)]


def flat(group, names=NAMES):
    return np.concatenate([group[name].double().numpy().reshape(-1) for name in names])


class Net(nn.Module):
    """Batch normalization, dropout, a tied pair and a frozen layer: all that can go wrong on the way."""

    def __init__(self, seed=None, dtype=torch.float32, width=3, dropout=0.2):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.first, self.norm, self.drop = nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(dropout)
        self.middle, self.tied, self.last = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.tied.weight = self.middle.weight
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.to(dtype)

    def forward(self, x, labels):
        hidden = self.drop(self.norm(self.first(x.to(self.last.weight.dtype)))).tanh()
        y = self.last(self.base(self.tied(self.middle(hidden))))[:, 0]
        return {"loss": ((y - labels.to(y.dtype)) ** 2).mean(), "logits": y}


def net_data(site, count=24):
    generator = torch.Generator().manual_seed(sum(map(ord, site)))
    x = torch.randn(count, 5, generator=generator) + len(site) + ord(site[0]) % 5
    return [{"x": row, "labels": row.sum()} for row in x]


make_net = functools.partial(Net, 0)
NET_SITES = {name: {"train": net_data(name), "test": net_data(name + "t", 7 + i)} for i, name in enumerate("abcd")}
NET_SETTINGS = {"per_device_train_batch_size": 8, "local_steps": 2, "learning_rate": 0.01}


def arguments(folder, **settings):
    return FederatedTrainingArguments(str(folder), **{**SETTINGS, **settings})


def federation(folder, model_init=Regression, sites=None, **settings):
    """A `FederatedTrainer`; keywords that are not of its arguments are its own."""
    own = {name: settings.pop(name) for name in ("engine", "callbacks", "site_callbacks") if name in settings}
    own |= {name: settings.pop(name) for name in ("eval_dataset", "compute_metrics") if name in settings}
    if sites is None and "engine" not in own:
        sites = {site: regression_data(site) for site in SITES}
    return FederatedTrainer(model_init, arguments(folder, **settings), sites, **own)


def net_federation(folder, sites=NET_SITES, model_init=make_net, **settings):
    return federation(folder, model_init, sites, **{**NET_SETTINGS, **settings})


def weights_of(trainer):
    return trainer.algorithm.groups["weights"]


def same_bits(group, other):
    return Message({"x": group}) == Message({"x": other})


def digests(history):
    return [row["digest"] for row in history]


def without_timings(value):
    """A history, but for what no two runs have in common."""
    if isinstance(value, dict):
        return {key: without_timings(inner) for key, inner in value.items() if key != "seconds"}
    return [without_timings(inner) for inner in value] if isinstance(value, list) else value


def kept_by(trainer, site):
    """Round to what the site keeps after it."""
    folder = trainer.client.store.folder / site / trainer.training
    return {int(path.stem.removeprefix("round-")): load_message(path) for path in folder.glob("round-*.safetensors")}


def record_messages(trainer):
    """Has a trainer note all that passes between server and sites: (site, sent, answered)."""
    seen, exchanged_by = [], trainer.engine.answer

    def answer(site, message):
        reply = exchanged_by(site, message)
        seen.append((site, message, reply))
        return reply

    trainer.engine.answer = answer
    return seen


class FaultyEngine(InProcessEngine):
    """
    In process, with faults on the way.

    Args:
        faults: (site, round) to a function of (answer, site, message) that gives the reply in its place; `None` from
            it is a reply that was lost.
        shuffled: Whether sites answer in reverse order.
        twice: Whether each reply comes twice.
    """

    def __init__(self, names, answer, faults=None, shuffled=False, twice=False):
        super().__init__(names, answer)
        self.faults, self.shuffled, self.twice = faults or {}, shuffled, twice

    def exchange(self, messages, exchanged, on_reply):
        for site in sorted(messages, reverse=self.shuffled):
            message = messages[site]
            fault = self.faults.get((site, message.scalars.get("round"))) or _no_fault
            try:
                reply = fault(self.answer, site, message)
            except Exception as error:
                reply = Message({}, {"error": f"{type(error).__name__}: {error}"})
            if reply is None:
                exchanged.failures[site] = "no answer within 1 s"
                continue
            for _ in range(1 + self.twice):
                exchanged.take(site, reply)
            on_reply(site)


def _no_fault(answer, site, message):
    return answer(site, message)


def give_faults(trainer, faults=None, **how):
    trainer.engine = FaultyEngine(trainer.engine.names, trainer.client.answer, faults, **how)
    return trainer


def lost(answer, site, message):
    """The site has trained, and its reply does not arrive."""
    answer(site, message)


def asked_twice(answer, site, message):
    first, second = answer(site, message), answer(site, message)
    assert untimed(first) == untimed(second)
    return second


def untimed(message):
    return Message(message.groups, {name: v for name, v in message.scalars.items() if name != "seconds"})


def raising(answer, site, message):
    raise OSError("the disk is full")


def corrupted(change):
    """A fault: `change(weights, scalars)` of a good reply."""

    def fault(answer, site, message):
        reply = answer(site, message)
        weights = {name: tensor.clone() for name, tensor in reply.groups["weights"].items()}
        scalars = dict(reply.scalars)
        change(weights, scalars)
        return Message({**reply.groups, "weights": weights}, scalars)

    return fault


class KillAt(TrainerCallback):
    """The process ends without a word in the given call of an event."""

    def __init__(self, event, count):
        setattr(self, event, killing(lambda *args, **kwargs: None, count))


def killing(function, count):
    """The function, but that its process ends in the given call."""
    left = count

    def counted(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def killed(function):
    """Whether a fork of this process that calls `function` is killed in it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's handler would wait for what hangs
        signal.alarm(120)
        try:
            function()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
