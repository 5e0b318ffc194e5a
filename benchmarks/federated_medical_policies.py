"""The runs of `federated_medical.py` on CIFAR: Auto-FedRL beside fixed hyper-parameters and searches."""

import math
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARED
from federated_quality import rows
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, default_data_collator

from hf_mlopt.data import ImageData, dirichlet_shares, image_dataset, load_images
from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments, RoundFailed, SiteData


NUM_SITES, LOCAL_STEPS = 8, 10
# A grid over the local rate; the first is the bad rate that is compared with, and the middle of the policies' range.
RATES = (2e-3, 1e-2, 5e-2, 2e-1)
# Local steps stay fixed, so that equal rounds are equal work.
SPACE = {
    "learning_rate": [2e-5, 2e-1],
    "local_epochs": None,
    "server_lr": [0.5, 1.5],
    "aggregation_weights": [0.1, 1.0],
}
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
METHODS = (*(f"fixed {rate:g}" for rate in RATES), *POLICIES, SEARCH)
NUM_TRIED = 4  # settings that a search tries for an eighth of the rounds each; the best one has the other half
_TEST_IMAGES, _TRAIN_IMAGES = 1000, 6000


def auto_fedrl(method: str, seed: int, rounds: int) -> dict:
    """
    One training with hyper-parameters that are fixed, searched or tuned by a policy.

    Args:
        method (`str`): Of `METHODS`, or `window <rounds>`.
        rounds (`int`): A multiple of 8; those of a search are all its trainings' together.

    Returns:
        `dict`: `accuracies` (number of rounds to the accuracy on test images), `validation` and `validation_loss`
        (after every round, on what sites hold out), `rates` (local, by round), `beyond_local` (median over
        rounds of the time beside the sites' training, over that time) and `seconds` (all in all).
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    if method == SEARCH:
        found = _search(seed, rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = _trained(folder, settings_of(method), seed, rounds, rounds // 8)
    return {**found, "seconds": time.perf_counter() - started}


def overhead(method: str, evaluates: bool, rounds: int) -> dict:
    """Seconds of a round, median, of the sites' training in it, and what comes beside that, as a ratio."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**settings_of(method), "evaluate_every": int(evaluates)}
        trainer = _trainer(folder, settings, 0, rounds, [])
        trainer.train()
    history = trainer.history[1:]
    local = [sum(site["seconds"] for site in row["sites"].values()) for row in history]
    return {
        "round_seconds": statistics.median(row["seconds"] for row in history),
        "local_seconds": statistics.median(local),
        "beyond_local": _beyond_local(trainer.history),
    }


def settings_of(method: str) -> dict[str, Any]:
    """Fields of `FederatedTrainingArguments` that make the method."""
    kind, _, number = method.partition(" ")
    if kind == "fixed":
        return {"learning_rate": float(number)}
    options = {"policy": "gaussian", "window": int(number)} if kind == "window" else POLICIES[method]
    return {"learning_rate": RATES[0], "auto_fedrl": {**SPACE, **options}}


def _search(seed: int, rounds: int) -> dict:
    """Settings drawn from the policies' space; the best by the loss on what sites hold out is trained on."""
    generator, tried = np.random.default_rng(seed), []
    low, high = (math.log(bound) for bound in SPACE["learning_rate"])
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_TRIED):
            settings = {
                "learning_rate": math.exp(generator.uniform(low, high)),
                "algorithm": "fedavgm",  # without momentum it is FedAvg with a rate of the server's
                "algorithm_args": {"server_momentum": 0.0, "server_lr": generator.uniform(*SPACE["server_lr"])},
                "site_weights": str(generator.choice(["samples", "uniform"])),
            }
            place = str(Path(folder) / str(number))
            try:
                loss = _trained(place, settings, seed, rounds // 8, rounds // 8)["validation_loss"][-1]
            except RoundFailed:  # the rate has led out of the finite numbers
                loss = None
            tried.append((math.inf if loss is None else loss, place, settings))
        _, place, settings = min(tried, key=lambda one: one[0])
        return _trained(place, settings, seed, rounds // 8 + rounds // 2, rounds // 8, resume=True)


def _trained(folder: str, settings: dict, seed: int, rounds: int, every: int, resume: bool = False) -> dict:
    tester = _Tester(every)
    trainer = _trainer(folder, settings, seed, rounds, [tester])
    tester.trainer = trainer
    trainer.train(resume_from_checkpoint=True if resume else None)
    evaluations = [row["evaluation"] for row in trainer.history]
    tuned = [row.get("tuned", {}) for row in trainer.history]
    return {
        "accuracies": tester.found,
        "validation": [found["eval_accuracy"] for found in evaluations],
        "validation_loss": [found["eval_loss"] for found in evaluations],
        "rates": [row.get("learning_rate", settings["learning_rate"]) for row in tuned],
        "beyond_local": _beyond_local(trainer.history),
    }


def _trainer(folder: str, settings: dict, seed: int, rounds: int, callbacks: list) -> FederatedTrainer:
    args = FederatedTrainingArguments(
        folder,
        **{
            "num_rounds": rounds,
            "local_steps": LOCAL_STEPS,
            "mlopt_optim": "sgd",
            "mlopt_optim_args": {"momentum": 0.9},
            "weight_decay": 5e-4,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 250,
            "seed": seed,
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        },
    )
    return FederatedTrainer(
        _model,
        args,
        _dealt(),
        data_collator=default_data_collator,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=callbacks,
    )


def _model() -> ResNetForImageClassification:
    """A ResNet of 8 layers that sees 16 of 32 pixels: a round of eight sites takes seconds."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))
    model.resnet.embedder.pooler = type(model.resnet.embedder.pooler)(kernel_size=1, stride=1)
    return model


class _Tester(TrainerCallback):
    """Tests the server's model every so many rounds."""

    def __init__(self, every: int):
        self.every, self.found, self.trainer = every, {}, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step
        if "train_loss" in (logs or {}) and done % self.every == 0:
            self.trainer.load_server_model()
            self.found[str(done)] = self.trainer.client.evaluate_on(_test_rows())["eval_accuracy"]


def _beyond_local(history: list[dict]) -> float:
    """Median over the rounds after the first, which makes the model."""
    ratios = []
    for row in history[1:] or history:
        local = sum(site["seconds"] for site in row["sites"].values())
        ratios.append(row["seconds"] / local - 1)
    return statistics.median(ratios)


@cache
def _images(part: str) -> ImageData:
    return load_images(str(SHARED / "vision" / f"cifar10_sub_{part}_jpeg.npz"), None)


@cache
def _test_rows() -> Any:
    data = _images("test")
    order = np.random.default_rng(0).permutation(len(data.labels))[:_TEST_IMAGES]
    return image_dataset(rows(data, order))


@cache
def _dealt() -> dict[str, SiteData]:
    data = _images("train")
    data = rows(data, np.random.default_rng(0).permutation(len(data.labels))[:_TRAIN_IMAGES])
    sites = {}
    for number, share in enumerate(dirichlet_shares(data.labels, NUM_SITES, 0.5, 0)):
        order = np.random.default_rng(number).permutation(share)
        count = max(1, len(order) // 10)
        held_out, train = (image_dataset(rows(data, some)) for some in (order[:count], order[count:]))
        sites[f"site_{number}"] = SiteData(train, held_out)
    return sites
