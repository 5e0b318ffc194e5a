"""The quality part of `federated.py`: DOMO and the methods it is compared with, through the federated Trainer."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
from common import SHARED, Results

from hf_mlopt.data import ImageData, dirichlet_shares, image_dataset, label_sorted_shares, load_images


SITES, SEEDS = 10, (0, 1, 2)
# Learning rates that every method is tuned over, on the first seed; the server's rate is 1.
RATES = (0.01, 0.03, 0.1)
# L: momentum of the sites, S: of the server, Z: the sites' begins every round at zero.
METHODS = {
    "FedAvg": ("fedavg", {}),
    "FedAvgLM": ("fedavg-lm", {}),
    "FedAvgLM-Z": ("fedavg-lm-z", {}),
    "FedAvgSM": ("fedavg-sm", {}),
    "FedAvgSLM": ("fedavg-slm", {}),
    "FedAvgSLM-Z": ("fedavg-slm-z", {}),
    "DOMO": ("domo", {"fusion": 0.3}),
    "DOMO-S": ("domo-s", {"fusion": 0.3}),
    "SCAFFOLD": ("scaffold", {}),
}
# Task: rounds, local steps, and how the images are dealt.
TASKS = {
    "CIFAR-10 subset, label-sorted": (30, 10, ("label-sorted", 0.1)),
    "CIFAR-10 subset, Dirichlet": (30, 10, ("dirichlet", 0.5)),
    "digits3, label-sorted": (30, 10, ("label-sorted", 0.1)),
}


def load(task: str, short: bool) -> tuple[ImageData, ImageData, ImageData]:
    """Images to train on, to tune by, and to test on."""
    if task.startswith("digits3"):
        train = load_images(f"{SHARED / 'vision' / 'digits3_16x16.npz'}:mnist", "train")
        test = load_images(f"{SHARED / 'vision' / 'digits3_16x16.npz'}:mnist", "test")
    else:
        train, test = (
            load_images(str(SHARED / "vision" / f"cifar10_sub_{p}_jpeg.npz"), None) for p in ("train", "test")
        )
    order = np.random.default_rng(0).permutation(len(train.labels))
    held_out = 1000
    if short:
        order, test = order[:1400], rows(test, np.arange(0, len(test.labels), 20))
        held_out = 200
    return rows(train, order[held_out:]), rows(train, order[:held_out]), test


def rows(data: ImageData, index: np.ndarray) -> ImageData:
    return replace(data, images=data.images[index], labels=data.labels[index])


def make_model(task: str):
    """20 layers with 16 to 64 channels, as for CIFAR; a third as deep for the digits."""
    from transformers import ResNetConfig, ResNetForImageClassification

    is_small = task.startswith("digits3")
    config = ResNetConfig(
        num_channels=1 if is_small else 3,
        num_labels=10,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1] if is_small else [3, 3, 3],
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    # The stem of ImageNet would leave 8 of 32 pixels.
    model.resnet.embedder.pooler = type(model.resnet.embedder.pooler)(kernel_size=1, stride=1)
    model.resnet.embedder.embedder.convolution.stride = (1, 1)
    return model


def run(task: str, method: str, rate: float, seed: int, short: bool, use_cpu: bool) -> dict:
    """
    One federated training.

    Returns:
        `dict`: `accuracies` (round to that on the test images, for a quarter, half and all of the rounds),
        `validation` (of the last round), `megabytes` sent and received, and `seconds`.
    """
    import torch
    from transformers import default_data_collator
    from transformers.utils import logging

    from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    num_rounds, local_steps, (partition, strength) = TASKS[task]
    num_rounds = 2 if short else num_rounds
    train, validation, test = load(task, short)
    deal = label_sorted_shares if partition == "label-sorted" else dirichlet_shares
    shares = deal(train.labels, SITES, strength, 0)
    algorithm, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        args = FederatedTrainingArguments(
            folder,
            algorithm=algorithm,
            algorithm_args=options,
            num_rounds=num_rounds,
            local_steps=local_steps,
            learning_rate=rate,
            weight_decay=5e-4,
            max_grad_norm=0.0,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=500,
            evaluate_every=0,
            seed=seed,
            use_cpu=use_cpu,
            disable_tqdm=True,
            mlopt_optim="sgd" if algorithm in ("fedavg", "scaffold") else None,
            dataloader_drop_last=True,
        )
        trainer = FederatedTrainer(
            lambda: make_model(task),
            args,
            {f"site_{k}": image_dataset(rows(train, share)) for k, share in enumerate(shares)},
            data_collator=default_data_collator,
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
            callbacks=[recorder := _Recorder({num_rounds // 4, num_rounds // 2, num_rounds}, image_dataset(test))],
        )
        recorder.trainer, started = trainer, time.perf_counter()
        trainer.train()
        own = trainer.client.evaluate_on(image_dataset(validation))["eval_accuracy"]
    traffic = sum(row["bytes_up"] + row["bytes_down"] for row in trainer.history)
    return {
        "accuracies": {str(round): found for round, found in recorder.found.items()},
        "validation": own,
        "megabytes": traffic / 1e6,
        "seconds": time.perf_counter() - started,
    }


def _recorder_class():
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Tests the server's model after some rounds."""

        def __init__(self, rounds: set[int], test):
            self.rounds, self.test, self.found, self.trainer = rounds, test, {}, None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.global_step in self.rounds and state.global_step not in self.found:
                self.trainer.load_server_model()
                metrics = self.trainer.client.evaluate_on(self.test)
                self.found[state.global_step] = metrics["eval_accuracy"]

    return Recorder


_Recorder = _recorder_class()


def quality(results: Results, options) -> None:
    """
    Tunes every method on one seed, then runs the best rate on the others; a row for each run as it ends.

    Args:
        results (`Results`): Runs that have a row are not run again.
        options (`argparse.Namespace`): `short`, `workers`, `tasks`, `methods`, `seconds`, `cpu`.
    """
    import torch

    use_cpu = options.cpu or not torch.cuda.is_available()
    methods = ("FedAvg", "DOMO") if options.short else tuple(options.methods)
    rates, seeds = (RATES[:1], SEEDS[:1]) if options.short else (RATES, SEEDS)
    until = None if options.seconds is None else time.time() + options.seconds
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for task in options.tasks:
            jobs = [(task, method, rate, seeds[0]) for method in methods for rate in rates]
            _run_all(pool, jobs, results, options.short, use_cpu, until)
            tuned = _tuned(results, task)
            jobs = [(task, method, tuned[method], seed) for method in methods if method in tuned for seed in seeds[1:]]
            _run_all(pool, jobs, results, options.short, use_cpu, until)
    summarise(results)


def _run_all(pool, jobs: list[tuple], results: Results, short: bool, use_cpu: bool, until: float | None) -> None:
    done = {_job(row) for row in results.record["rows"] if row["kind"] == "quality"}
    for job, found in _finished(pool, [job for job in jobs if job not in done], short, use_cpu, until):
        results.add(kind="quality", **dict(zip(("task", "method", "rate", "seed"), job, strict=True)), **found)


def _job(row: dict) -> tuple:
    return row["task"], row["method"], row["rate"], row["seed"]


def _tuned(results: Results, task: str) -> dict[str, float]:
    """Method to the rate that is best by the images held out, on the first seed."""
    rows = [row for row in results.record["rows"] if row["kind"] == "quality" and row["task"] == task]
    first = sorted((row["validation"], row["rate"], row["method"]) for row in rows if row["seed"] == SEEDS[0])
    return {method: rate for _, rate, method in first}


def _finished(pool, pending: list, short: bool, use_cpu: bool, until: float | None) -> Iterator[tuple]:
    futures = {}
    for job in pending:
        futures[pool.submit(run, *job, short, use_cpu)] = job
    left = None if until is None else max(1.0, until - time.time())
    try:
        for future in as_completed(futures, timeout=left):
            try:
                yield futures.pop(future), future.result()
            except Exception as error:  # a rate at which training leaves the finite numbers
                print(f"failed: {error}"[:300], flush=True)
    except TimeoutError:
        for future, job in futures.items():
            future.cancel()
            print(f"not run: {job}", flush=True)


def summarise(results: Results) -> None:
    """Mean and standard deviation over seeds at each method's best rate, as rows of their own."""
    measured = [row for row in results.record["rows"] if row["kind"] == "quality"]
    results.record["rows"] = [row for row in results.record["rows"] if row["kind"] != "quality summary"]
    for task in dict.fromkeys(row["task"] for row in measured):
        for method, rate in sorted(_tuned(results, task).items()):
            chosen = [row for row in measured if (row["task"], row["method"], row["rate"]) == (task, method, rate)]
            table = {}
            for number in chosen[0]["accuracies"]:
                values = [row["accuracies"][number] for row in chosen]
                table[str(number)] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
            results.add(
                kind="quality summary",
                task=task,
                method=method,
                rate=rate,
                seeds=len(chosen),
                accuracy=table,
                megabytes=chosen[0]["megabytes"],
            )
