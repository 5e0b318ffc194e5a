"""The quality part of `optimizers.py`: three tasks, nine methods, and the points that they are evaluated at."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from common import SHARED, Results
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from transformers.utils import logging

from hf_mlopt.data import load_images, word_tokenizer
from hf_mlopt.models import WordLM, WordLMConfig
from hf_mlopt.optimizers import RSGD, RSGDWrapper


TASKS = ("digits", "WT2-mini", "CIFAR-10 subset")
# Learning rates that a method is tuned over, by the kind of its step; a method that wants others on a task says so.
MOMENTUM = {"digits": (0.03, 0.1, 0.3), "CIFAR-10 subset": (0.03, 0.1, 0.3), "WT2-mini": (2.0, 6.0, 18.0)}
PLAIN = {"digits": (0.3, 1.0, 3.0), "CIFAR-10 subset": (0.3, 1.0, 3.0), "WT2-mini": (7.0, 20.0, 60.0)}
ADAM = {"digits": (3e-3, 1e-2, 3e-2), "CIFAR-10 subset": (1e-3, 3e-3, 1e-2), "WT2-mini": (3e-3, 1e-2, 3e-2)}
LARGER, SMALLER = {"digits": (0.1, 0.3, 1.0)}, {"digits": (0.01, 0.03, 0.1)}
MU = 0.9


@dataclass(frozen=True)
class Method:
    """
    Args:
        make (`Callable`): Parameters and learning rate to optimizer.
        rates (`dict`): Task to the learning rates that are tried.
        points (`tuple[str]`): What is evaluated; the first is the method's own.
        falls (`bool`): Whether the learning rate falls to 0 in a straight line, where others keep theirs.
        averages_all (`bool`): Whether the residual is t / (t + 1) in step t.
    """

    make: Callable
    rates: dict
    points: tuple[str, ...] = ("x", "w", "y")
    falls: bool = False
    averages_all: bool = False


def _sgdm(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=MU)


# Nobody decays weights. What is an exact special case of RSGD is made of it, at the horizon that is usual for it.
METHODS = {
    "SGDm": Method(_sgdm, MOMENTUM, ("w",)),
    "SGDm, lr to 0": Method(_sgdm, MOMENTUM | LARGER, ("w",), falls=True),
    "SGDm + EMA": Method(lambda p, lr: RSGD(p, lr, MU, residual=0.99, detach=1.0), MOMENTUM),
    "Schedule-Free SGD": Method(
        lambda p, lr: RSGD(p, lr, detach=0.1), PLAIN | {"digits": (1.0, 3.0, 10.0)}, averages_all=True
    ),
    "Lookahead": Method(lambda p, lr: RSGD(p, lr, MU, residual=0.5, period=5, reset_period=5), MOMENTUM | LARGER),
    "AdamW": Method(lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0), ADAM, ("w",)),
    "RSGD": Method(RSGD, PLAIN),
    "RSGDm": Method(lambda p, lr: RSGD(p, lr, MU), MOMENTUM | SMALLER),
    "RSGD-AdamW": Method(RSGDWrapper, ADAM),
}


class Words:
    """
    An LSTM of 128 units over 4,000 words, trained on half of the validation file of WikiText-2 and tested on the start
    of its test file: not a result on WikiText-2. The state is zero at the start of every row of 35 targets.
    """

    metric, epochs, batch, clip = "perplexity", 2, 20, 0.25

    def __init__(self, short: bool):
        train, test = ((SHARED / "text" / f"wikitext2-{name}.txt").read_text() for name in ("valid", "test"))
        tokenizer = word_tokenizer([train], 4_000)
        train, test = (torch.tensor(tokenizer.backend_tokenizer.encode(text).ids) for text in (train, test))
        train = train[:6_000] if short else train[: len(train) // 2]
        if short:
            test = test[:2_000]
        held_out = {"test": test[:40_000], "validation": test[-20_000:]} if not short else {"test": test}
        # Rows share a token, so that each is a target once.
        self.train, self.parts = _rows(train), {name: _rows(part) for name, part in held_out.items()}
        self.parts.setdefault("validation", self.parts["test"])

    def model(self) -> nn.Module:
        return WordLM(WordLMConfig(vocab_size=4_000, hidden_size=128, num_layers=1, dropout=0.2))

    def loss(self, model: nn.Module, index: torch.Tensor) -> torch.Tensor:
        return model(input_ids=self.train[index], labels=self.train[index]).loss

    def judge(self, model: nn.Module, part: str) -> float:
        losses = [(len(rows), model(input_ids=rows, labels=rows).loss) for rows in self.parts[part].split(50)]
        nats = sum(count * float(loss) for count, loss in losses) / sum(count for count, _ in losses)
        return math.exp(nats) if nats < 50 else math.inf

    def settling(self) -> list:
        return []


class Images:
    """An MLP on the digits of scikit-learn, or a small ResNet on the first images of CIFAR-10, which are lossy."""

    metric = "accuracy"

    def __init__(self, name: str, short: bool):
        self.is_small, self.clip = name == "digits", None
        self.epochs, self.batch = (15, 32) if self.is_small else (2, 128)
        if self.is_small:
            train, test = load_images("digits", "train"), load_images("digits", "test")
        else:
            files = (SHARED / "vision" / f"cifar10_sub_{part}_jpeg.npz" for part in ("train", "test"))
            train, test = (load_images(str(file), None) for file in files)
        # The files are in the order of the classes.
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
        held_out = 200 if self.is_small else 1_500
        inputs, labels = torch.from_numpy(train.images), torch.from_numpy(train.labels)
        self.parts = {"validation": (inputs[order[:held_out]], labels[order[:held_out]])}
        self.inputs, self.labels = inputs[order[held_out:]], labels[order[held_out:]]
        self.parts["test"] = torch.from_numpy(test.images), torch.from_numpy(test.labels)
        if short:
            self.epochs, (self.inputs, self.labels) = 2, (self.inputs[:400], self.labels[:400])
            self.parts = {name: (images[::20], labels[::20]) for name, (images, labels) in self.parts.items()}
        self.train = range(len(self.labels))

    def model(self) -> nn.Module:
        if self.is_small:
            layers = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
            return nn.Sequential(nn.Flatten(), *layers)
        stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        blocks = ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def loss(self, model: nn.Module, index: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(self.inputs[index]), self.labels[index])

    def judge(self, model: nn.Module, part: str) -> float:
        inputs, labels = self.parts[part]
        found = torch.cat([model(images).argmax(1) for images in inputs.split(500)])
        return float((found == labels).double().mean())

    def settling(self) -> list:
        """Batches for the statistics of batch normalisation, of the size that is trained with."""
        return list(self.inputs[: 10 * self.batch].split(self.batch))


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity, or beside a convolution of one pixel where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.third, self.fourth = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.beside = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.fourth(self.third(self.second(self.first(hidden)).relu()))
        return (inner + self.beside(hidden)).relu()


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.unfold(0, 36, 35)


def train(task: Words | Images, method: Method, rate: float, seed: int) -> dict:
    """
    Returns:
        `dict`: `validation` at the method's own point, and `test`, epoch to point to value, for the first epoch and
        the last. None where it diverged.
    """
    torch.manual_seed(seed)
    model, judged = task.model(), {}
    optimizer = method.make(model.parameters(), rate)
    steps, total = 0, task.epochs * math.ceil(len(task.train) / task.batch)
    for epoch in range(1, task.epochs + 1):
        model.train()
        for index in torch.randperm(len(task.train)).split(task.batch):
            for group in optimizer.param_groups:
                if method.falls:
                    group["lr"] = rate * (1 - steps / total)
                if method.averages_all:
                    group["residual"] = steps / (steps + 1)
            loss = task.loss(model, index)
            if not loss.isfinite():
                return {"validation": None, "test": {}}
            optimizer.zero_grad()
            loss.backward()
            if task.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            steps += 1
        if epoch in (1, task.epochs):
            judged[epoch] = {point: judge(task, model, optimizer, point, "test") for point in method.points}
    own = judge(task, model, optimizer, method.points[0], "validation")
    return {"validation": own if math.isfinite(own) else None, "test": judged}


@torch.no_grad()
def judge(task: Words | Images, model: nn.Module, optimizer: torch.optim.Optimizer, point: str, part: str) -> float:
    """The metric at w, x or y, each with statistics of batch normalisation of its own."""
    moves = hasattr(optimizer, "eval")
    if moves:
        for group in optimizer.param_groups:
            group["eval_point"] = point
        optimizer.eval()
    update_bn(task.settling(), model)
    model.eval()
    value = task.judge(model, part)
    if moves:
        optimizer.train()
    return value


def measure_quality(results: Results, tasks: list[str], seeds: tuple[int, ...], short: bool) -> None:
    """
    Tunes every method on the first seed, then runs it on the others at the rate that was best on the validation part;
    a tie goes to the smaller rate.
    """
    chosen, at_edge = {}, []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_begin, initargs=(short,)) as pool:
        for task in tasks:
            tried = {
                method: entry.rates[task][1:2] if short else entry.rates[task] for method, entry in METHODS.items()
            }
            jobs = [(task, method, rate, seeds[0]) for method, rates in tried.items() for rate in rates]
            runs = _finished(pool, jobs, lambda run: results.add(**_tuning_row(run)))
            best = {method: _best([run for run in runs if run["method"] == method]) for method in METHODS}
            chosen[task] = {method: run["learning_rate"] for method, run in best.items()}
            for method, rates in tried.items():
                if chosen[task][method] in (rates[0], rates[-1]) and len(rates) > 1:
                    at_edge.append(f"{task}: {method}, {chosen[task][method]:g}")
            results.note(learning_rates=chosen, best_at_the_edge_of_the_grid=at_edge)
            for run in best.values():
                _add_quality(results, run)
            jobs = [(task, method, chosen[task][method], seed) for seed in seeds[1:] for method in METHODS]
            _finished(pool, jobs, lambda run: _add_quality(results, run))


def _finished(pool: ProcessPoolExecutor, jobs: list[tuple], add: Callable[[dict], None]) -> list[dict]:
    runs = []
    for future in as_completed([pool.submit(_run, *job) for job in jobs]):
        runs.append(future.result())
        add(runs[-1])
    return runs


def _best(runs: list[dict]) -> dict:
    """The best on the validation part; if all of them diverged, the one with the smallest rate."""
    runs = sorted(runs, key=lambda run: run["learning_rate"])
    finite = [run for run in runs if run["validation"] is not None]
    choose = min if runs[0]["metric"] == "perplexity" else max
    return choose(finite, key=lambda run: run["validation"]) if finite else runs[0]


def _tuning_row(run: dict) -> dict:
    return {"kind": "tuning"} | {key: value for key, value in run.items() if key != "test"}


def _add_quality(results: Results, run: dict) -> None:
    """A row for the first epoch and one for the last; a single one, without values, if it diverged."""
    row = {"kind": "quality"} | {
        key: run[key] for key in ("task", "metric", "method", "learning_rate", "seed", "seconds")
    }
    row["own"] = METHODS[run["method"]].points[0]
    for number, (epoch, points) in enumerate(run["test"].items()):
        finite = {point: value if math.isfinite(value) else None for point, value in points.items()}
        results.add(**row, epoch=epoch, is_last=number == 1, **finite)
    if not run["test"]:
        results.add(**row, epoch=None, is_last=True, diverged=True)


def _begin(short: bool) -> None:
    """What a process of the pool knows."""
    global _short, _tasks
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    _short, _tasks = short, {}


def _run(task: str, method: str, rate: float, seed: int) -> dict:
    if task not in _tasks:
        _tasks.clear()  # one task at a time is in memory
        _tasks[task] = Words(_short) if task == "WT2-mini" else Images(task, _short)
    start = time.perf_counter()
    found = train(_tasks[task], METHODS[method], rate, seed)
    named = {"task": task, "metric": _tasks[task].metric, "method": method, "learning_rate": rate, "seed": seed}
    return {**named, "seconds": time.perf_counter() - start, **found}
