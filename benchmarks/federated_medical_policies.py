"""The runs of `federated_medical.py` that tune: Auto-FedRL beside fixed hyper-parameters and searches."""

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federated_medical_tasks import TASKS, Task
from transformers import TrainerCallback

from hf_mlopt.federated import RoundFailed


POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {"policy": "gaussian"},
    "categorical": {"policy": "categorical"},
    "cholesky": {"policy": "cholesky"},
    "mlp": {"policy": "mlp"},
    "gaussian, hyper-rate 0.05": {"policy": "gaussian", "hyper_lr": 0.05},
    "no learning": {"policy": "gaussian", "hyper_lr": 1e-12},
}
WINDOWS = (2, 10)  # beside 5
SEARCH = "random search"
NUM_TRIED = 4  # settings that a search tries for an eighth of the rounds each; the best one has the other half


def tuned_methods(task: str) -> tuple[str, ...]:
    """Names of what is compared on a task of `TASKS`."""
    return (*(f"fixed {rate:g}" for rate in TASKS[task].rates), *TASKS[task].policies, SEARCH)


def auto_fedrl(method: str, seed: int, rounds: int, task: str = "cifar") -> dict:
    """
    One training with hyper-parameters that are fixed, searched or tuned by a policy.

    Args:
        method (`str`): Of [`tuned_methods`], or `window <rounds>`.
        rounds (`int`): A multiple of 8; those of a search are all its trainings' together.
        task (`str`): Of `TASKS`.

    Returns:
        `dict`: `accuracies` (number of rounds to the task's metric on test images), `validation` and `validation_loss`
        (after every round, on what sites hold out), `rates` (local, by round), `beyond_local` (median over
        rounds of the time beside the sites' training, over that time) and `seconds` (all in all).
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    if method == SEARCH:
        found = _search(TASKS[task], seed, rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = _trained(TASKS[task], folder, settings_of(method, task), seed, rounds, rounds // 8)
    return {**found, "seconds": time.perf_counter() - started}


def overhead(method: str, evaluates: bool, rounds: int) -> dict:
    """Seconds of a round, median, of the sites' training in it, and what comes beside that, as a ratio."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**settings_of(method, "cifar"), "evaluate_every": int(evaluates)}
        trainer = TASKS["cifar"].trainer(folder, settings, 0, rounds, [])
        trainer.train()
    history = trainer.history[1:]
    local = [sum(site["seconds"] for site in row["sites"].values()) for row in history]
    return {
        "round_seconds": statistics.median(row["seconds"] for row in history),
        "local_seconds": statistics.median(local),
        "beyond_local": _beyond_local(trainer.history),
    }


def settings_of(method: str, task: str) -> dict[str, Any]:
    """Fields of `FederatedTrainingArguments` that make the method."""
    kind, _, number = method.partition(" ")
    if kind == "fixed":
        return {"learning_rate": float(number)}
    options = {"policy": "gaussian", "window": int(number)} if kind == "window" else POLICIES[method]
    return {"learning_rate": TASKS[task].start, "auto_fedrl": {**TASKS[task].space, **options}}


def _search(task: Task, seed: int, rounds: int) -> dict:
    """Settings drawn from the policies' space; the best by the loss on what sites hold out is trained on."""
    generator, tried = np.random.default_rng(seed), []
    low, high = (math.log(bound) for bound in task.space["learning_rate"])
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_TRIED):
            settings = {
                "learning_rate": math.exp(generator.uniform(low, high)),
                "algorithm": "fedavgm",  # without momentum it is FedAvg with a rate of the server's
                "algorithm_args": {"server_momentum": 0.0, "server_lr": generator.uniform(*task.space["server_lr"])},
                "site_weights": str(generator.choice(["samples", "uniform"])),
            }
            place = str(Path(folder) / str(number))
            try:
                loss = _trained(task, place, settings, seed, rounds // 8, rounds // 8)["validation_loss"][-1]
            except RoundFailed:  # the rate has led out of the finite numbers
                loss = None
            tried.append((math.inf if loss is None else loss, place, settings))
        _, place, settings = min(tried, key=lambda one: one[0])
        return _trained(task, place, settings, seed, rounds // 8 + rounds // 2, rounds // 8, resume=True)


def _trained(
    task: Task, folder: str, settings: dict, seed: int, rounds: int, every: int, resume: bool = False
) -> dict:
    tester = _Tester(task, every)
    tester.trainer = trainer = task.trainer(folder, settings, seed, rounds, [tester])
    trainer.train(resume_from_checkpoint=True if resume else None)
    evaluations = [row["evaluation"] for row in trainer.history]
    tuned = [row.get("tuned", {}) for row in trainer.history]
    return {
        "accuracies": tester.found,
        "validation": [found[f"eval_{task.metric}"] for found in evaluations],
        "validation_loss": [found["eval_loss"] for found in evaluations],
        "rates": [row.get("learning_rate", settings["learning_rate"]) for row in tuned],
        "beyond_local": _beyond_local(trainer.history),
    }


class _Tester(TrainerCallback):
    """Tests the server's model every so many rounds."""

    def __init__(self, task: Task, every: int):
        self.task, self.every, self.found, self.trainer = task, every, {}, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step
        if "train_loss" in (logs or {}) and done % self.every == 0:
            self.trainer.load_server_model()
            self.found[str(done)] = self.task.judge(self.trainer)


def _beyond_local(history: list[dict]) -> float:
    """Median over the rounds after the first, which makes the model."""
    ratios = []
    for row in history[1:] or history:
        local = sum(site["seconds"] for site in row["sites"].values())
        ratios.append(row["seconds"] / local - 1)
    return statistics.median(ratios)
