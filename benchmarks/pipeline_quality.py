"""The quality part of `pipeline.py`: what staleness costs in loss at equal samples; stages are threads."""

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import torch
from common import SHARED, Results
from optimizers_quality import ResidualBlock
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_mlopt.data import load_images
from hf_mlopt.pipeline import PipelineConfig, Worker, local_channels, parse, run_local
from hf_mlopt.pipeline.partition import split


STAGES, WARMUP, CURVE_POINTS = 4, 0.1, 10
SEEDS = (0, 1, 2)


class Mode(NamedTuple):
    mode: str
    recompute: str = "yes"
    predict: str = "none"
    update_every: int = 1  # a batch then comes in as many parts

    @property
    def speed_label(self) -> str:
        """Where `pipeline_speed.py` has its time: to predict weights, and parts of a batch, cost none there."""
        return f"{self.mode}, recompute=no" if self.recompute == "no" else self.mode


MODES = {
    "bp": Mode("bp"),
    "bp, update_every=4": Mode("bp", update_every=4),  # what parts of a batch alone change, as in batch normalisation
    "fr": Mode("fr"),
    "lag1": Mode("lag1"),
    "dsp": Mode("dsp"),
    "lag1, recompute=no": Mode("lag1", recompute="no"),
    "dsp, recompute=no": Mode("dsp", recompute="no"),
    "dsp, predict": Mode("dsp", predict="momentum"),
    "lag1, predict, update_every=4": Mode("lag1", predict="momentum", update_every=4),
    "dsp, predict, update_every=4": Mode("dsp", predict="momentum", update_every=4),
}
TARGET = "lag1, predict, update_every=4"  # to lose at most 1 % of loss against bp
SHORT_MODES = ("bp", "dsp, recompute=no", TARGET)


class Task:
    """What the tasks share: a fixed order of the training data, and blocks that are called one after the other."""

    name: str
    rates: tuple[float, ...]
    batch: int
    steps: int
    size: int

    def blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    def rows(self, index: torch.Tensor | slice, part: str = "train") -> dict:
        raise NotImplementedError

    def optimizer(self, parameters, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, rate, weight_decay=0.0)

    def order(self, seed: int) -> torch.Tensor:
        """Rows of each batch, `[steps, batch]`; every epoch in an order of its own."""
        drawn = torch.Generator().manual_seed(seed)
        epochs = math.ceil(self.steps * self.batch / self.size)
        rows = torch.cat([torch.randperm(self.size, generator=drawn) for _ in range(epochs)])
        return rows[: self.steps * self.batch].view(self.steps, self.batch)

    @torch.no_grad()
    def judge(self, blocks: list[nn.Module], part: str) -> dict:
        """Mean loss, and the accuracy of images, over a part that is not trained on."""
        for block in blocks:
            block.eval()
        loss = right = count = 0
        for start in range(0, self.held_out[part], 250):
            batch = self.rows(slice(start, min(start + 250, self.held_out[part])), part)
            rows = len(batch["labels"])
            mean, logits = outputs_of(blocks, batch)
            loss, count = loss + rows * float(mean), count + rows
            if batch["labels"].dim() == 1:
                right += int((logits.argmax(1) == batch["labels"]).sum())
        found = {"loss": loss / count if math.isfinite(loss) else None}
        return found | ({"accuracy": right / count} if batch["labels"].dim() == 1 else {})


class ImagePart(nn.Module):
    """Some layers of a classifier that is written down layer by layer."""

    def __init__(self, layers: nn.Module, is_first: bool, is_last: bool):
        super().__init__()
        self.layers, self.is_first, self.is_last = layers, is_first, is_last

    def forward(self, boundary, batch):
        hidden = self.layers(batch["pixel_values"] if self.is_first else boundary[0])
        return (functional.cross_entropy(hidden, batch["labels"]), hidden) if self.is_last else (hidden,)


class Images(Task):
    """The first images of CIFAR-10, which are lossy."""

    batch = 64

    def __init__(self, short: bool):
        self.steps = 16 if short else self.steps
        files = (SHARED / "vision" / f"cifar10_sub_{part}_jpeg.npz" for part in ("train", "test"))
        train, test = (load_images(str(file), None) for file in files)
        # The files are in the order of the classes.
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
        images, labels = torch.from_numpy(train.images)[order], torch.from_numpy(train.labels)[order]
        self.parts = {"train": (images[1_500:], labels[1_500:]), "validation": (images[:1_500], labels[:1_500])}
        self.parts["test"] = torch.from_numpy(test.images), torch.from_numpy(test.labels)
        if short:
            self.parts["test"] = tuple(values[::10] for values in self.parts["test"])
        self.held_out = {part: len(labels) for part, (_, labels) in self.parts.items()}
        self.size = self.held_out["train"]

    def rows(self, index: torch.Tensor | slice, part: str = "train") -> dict:
        images, labels = self.parts[part]
        return {"pixel_values": images[index], "labels": labels[index]}


class ResNet(Images):
    """Eleven convolutions, two of them beside others, with batch normalisation."""

    name, rates, steps = "ResNet", (0.01, 0.03, 0.1), 800

    def blocks(self) -> list[nn.Module]:
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        shapes = (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)
        layers = [nn.Sequential(ResidualBlock(*shape)) for shape in shapes]
        layers[0].insert(0, stem)
        layers[-1].append(head)
        return [ImagePart(part, k == 0, k == STAGES - 1) for k, part in enumerate(layers)]

    def optimizer(self, parameters, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, rate, momentum=0.9)


class ViT(Images):
    """Four layers, 17 tokens."""

    name, rates, steps = "ViT", (1e-4, 3e-4, 1e-3), 480

    def blocks(self) -> list[nn.Module]:
        config = ViTConfig(
            hidden_size=96, num_hidden_layers=STAGES, num_attention_heads=4, intermediate_size=192, image_size=32,
            patch_size=8, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return split(ViTForImageClassification(config), range(STAGES + 1))


class Text(Task):
    """A Llama of four layers over the bytes of 317 TinyStories. The stories at the end of the file are held out."""

    name, rates, steps, batch = "LM", (1e-3, 3e-3, 1e-2), 480, 16

    def __init__(self, short: bool):
        self.steps = 16 if short else self.steps
        text = torch.tensor(list((SHARED / "text" / "tinystories.txt").read_bytes()))
        parts = text.split([len(text) - 32_000, 12_000, 20_000])
        # Rows share a token, so that each is a target once.
        windows = [part.unfold(0, 65, 64) for part in parts]
        self.parts = dict(zip(("train", "validation", "test"), windows, strict=True))
        self.held_out = {part: len(rows) for part, rows in self.parts.items()}
        self.size = self.held_out["train"]

    def blocks(self) -> list[nn.Module]:
        config = LlamaConfig(
            vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=STAGES, num_attention_heads=4,
            max_position_embeddings=65, use_cache=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return split(LlamaForCausalLM(config), range(STAGES + 1))

    def rows(self, index: torch.Tensor | slice, part: str = "train") -> dict:
        return {"input_ids": self.parts[part][index], "labels": self.parts[part][index]}


TASKS = {task.name: task for task in (ResNet, ViT, Text)}


def outputs_of(blocks: list[nn.Module], batch: dict) -> tuple[torch.Tensor, ...]:
    boundary = ()
    for block in blocks:
        boundary = block(boundary, batch)
    return boundary


class Probe:
    """Copies a block's weights and gradient before some of its updates, which every block does at the same version."""

    def __init__(self, block: nn.Module, updates: set[int]):
        self.parameters, self.updates = list(block.parameters()), updates
        self.seen, self.copies = 0, {}

    def __call__(self) -> None:
        if self.seen in self.updates:
            self.copies[self.seen] = [(p.detach().clone(), p.grad.clone()) for p in self.parameters]
        self.seen += 1


def train(task: Task, mode: Mode, rate: float, seed: int) -> dict:
    """
    One run, with a thread for each stage. The learning rate rises during the warm-up, then falls linearly to 0.

    Returns:
        `dict`: Losses on `validation` and `test`, None if it diverged; mean training losses of the parts of the run;
        the cosine of each block's gradient with that of back-propagation at the same weights, by update.
    """
    start, parts = time.perf_counter(), mode.update_every
    torch.manual_seed(seed)
    blocks = task.blocks()
    order = task.order(seed).view(task.steps * parts, -1)

    def batches(n: int) -> dict:
        return task.rows(order[n])

    schedule = parse(mode.mode, STAGES)
    config = PipelineConfig(
        STAGES, mode.mode, recompute=mode.recompute, predict=mode.predict, update_every=parts, transport="local"
    )
    looks = {round(task.steps * share) - 1 for share in (0.25, 0.5, 0.9)}
    warmup = math.ceil(WARMUP * task.steps)
    workers, probes = [], []
    for k, (block, channels) in enumerate(zip(blocks, local_channels(schedule), strict=True)):
        block.train()
        probes.append(Probe(block, looks))
        optimizer = task.optimizer(block.parameters(), rate)
        fall = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 1) * (1 - step / task.steps)
        )
        settings = {"config": config, "scheduler": fall, "before_step": probes[-1]}
        workers.append(Worker(block, k, STAGES, schedule, optimizer, channels, **settings))
    try:
        losses = run_local(workers, batches, len(order))
    except FloatingPointError as error:
        return {"validation": None, "loss": None, "reason": str(error), "seconds": time.perf_counter() - start}
    size = math.ceil(len(losses) / CURVE_POINTS)
    found = {"validation": task.judge(blocks, "validation")["loss"], **task.judge(blocks, "test")}
    found["train_curve"] = [statistics.mean(losses[i : i + size]) for i in range(0, len(losses), size)]
    predictions = [worker.prediction for worker in workers if worker.prediction]
    found["fallbacks"] = sum(prediction.fallbacks for prediction in predictions)  # forwards without their prediction
    found["seconds"] = time.perf_counter() - start
    return found | {"cosines": _cosines(blocks, probes, batches, parts)}


def _cosines(blocks: list[nn.Module], probes: list[Probe], batches: Callable, parts: int) -> dict:
    """The blocks end with weights of long ago."""
    cosines = {}
    for block in blocks:
        block.train()
    for update in sorted(probes[0].copies):
        for probe in probes:
            for parameter, (weight, _) in zip(probe.parameters, probe.copies[update], strict=True):
                parameter.data.copy_(weight)
                parameter.grad = None
        for n in range(update * parts, (update + 1) * parts):
            (outputs_of(blocks, batches(n))[0] / parts).backward()
        cosines[update + 1] = []
        for probe in probes:
            own = _flat([gradient for _, gradient in probe.copies[update]])
            exact = _flat([parameter.grad for parameter in probe.parameters])
            cosines[update + 1].append(float(functional.cosine_similarity(own, exact, dim=0)))
    return cosines


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def measure_quality(results: Results, short: bool, workers: int, tune_all: bool) -> None:
    """
    Tunes back-propagation on the first seed by the validation part, and runs every mode at that learning rate, or
    with `tune_all` at its own. What has a row is not run again.

    Args:
        results ([`Results`]): What rows are added to.
        short (`bool`): Few steps, one seed, one learning rate, few modes.
        workers (`int`): Runs at a time, each in a process of one thread of computation.
        tune_all (`bool`): Tune every mode on the first seed, at three times the cost.
    """
    modes, seeds = (SHORT_MODES, SEEDS[:1]) if short else (tuple(MODES), SEEDS)
    whose = "each mode" if tune_all else "bp"
    results.note(
        quality_setting=f"{STAGES} stages; a batch makes an update, with update_every=4 in four parts; SGD with "
        f"momentum 0.9 for the ResNet, AdamW else; the learning rate rises for {WARMUP:.0%} of the steps and falls to "
        f"0; it is the best of three on the first seed, by the validation part, for {whose}; fr runs with the first "
        f"seed only, being lag1 with other queues; seconds are of {workers} runs at a time"
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes load torch
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(short,)) as pool:
        rates = _tuned(results, pool, modes if tune_all else ("bp",), short)
        there = [row for row in results.record["rows"] if row["kind"] == "quality"]
        done = {(row["task"], row["mode_name"], row["seed"]) for row in there}
        jobs = [
            (task, mode, rates[task, mode if tune_all else "bp"], seed)
            for seed in seeds
            for task in TASKS
            for mode in modes
            if (task, mode, seed) not in done and not (mode == "fr" and seed != SEEDS[0])
        ]
        for run in _finished(pool, jobs):
            results.add(**_row(run))
    edge = [f"{task}: {mode}" for (task, mode), rate in rates.items() if rate in TASKS[task].rates[::2]]
    results.note(quality_best_at_the_edge=edge, **summaries(results.record["rows"]))


def _tuned(results: Results, pool: ProcessPoolExecutor, modes: tuple[str, ...], short: bool) -> dict:
    """By task and mode the learning rate that is best on the first seed, whose run is kept; a row there is counts."""
    there = [row for row in results.record["rows"] if row["kind"] == "quality" and row["mode_name"] in modes]
    rates = {(row["task"], row["mode_name"]): row["learning_rate"] for row in there}
    missing = [(task, mode) for task in TASKS for mode in modes if (task, mode) not in rates]
    # Trials of a run that was cut short are made again.
    results.record["rows"] = [
        row
        for row in results.record["rows"]
        if row["kind"] != "tuning" or (row["task"], row["mode_name"]) not in missing
    ]
    trials = {pair: [] for pair in missing}
    jobs = [
        (task, mode, rate, SEEDS[0])
        for task, mode in missing
        for rate in (TASKS[task].rates[1:2] if short else TASKS[task].rates)
    ]
    for run in _finished(pool, jobs):
        trials[run["task"], run["mode_name"]].append(run)
        results.add(
            kind="tuning", **{name: run[name] for name in ("task", "mode_name", "learning_rate", "validation")}
        )
    for pair, runs in trials.items():
        best = _best(runs)
        rates[pair] = best["learning_rate"]
        results.add(**_row(best))
    return rates


def _row(run: dict) -> dict:
    fields = {key: value for key, value in run.items() if key != "validation"}
    row = {"kind": "quality"} | fields | MODES[run["mode_name"]]._asdict()
    return row | {"diverged": True} if run["loss"] is None else row


def _best(runs: list[dict]) -> dict:
    """If all diverged, the one with the smallest rate; a tie goes to that as well."""
    runs = sorted(runs, key=lambda run: run["learning_rate"])
    finite = [run for run in runs if run["validation"] is not None]
    return min(finite, key=lambda run: run["validation"]) if finite else runs[0]


def summaries(rows: list[dict]) -> dict:
    """By task and mode: mean and standard deviation of the loss, and its relative distance to bp, seed by seed."""
    rows = [row for row in rows if row["kind"] == "quality"]
    loss = {(row["task"], row["mode_name"], row["seed"]): row["loss"] for row in rows}
    summary: dict[str, dict] = {task: {} for task in TASKS}
    for task, mode in dict.fromkeys((row["task"], row["mode_name"]) for row in rows):
        of_mode = [row for row in rows if (row["task"], row["mode_name"]) == (task, mode)]
        if any(row["loss"] is None for row in of_mode):
            summary[task][mode] = {"loss": None, "diverged": sum(row["loss"] is None for row in of_mode)}
            continue
        losses = [row["loss"] for row in of_mode]
        entry = {"loss": statistics.mean(losses), "std": statistics.stdev(losses) if len(losses) > 1 else None}
        if "accuracy" in of_mode[0]:
            entry["accuracy"] = statistics.mean(row["accuracy"] for row in of_mode)
        for name, base in (("over_bp", "bp"), ("over_bp_in_parts", "bp, update_every=4")):
            pairs = [(row["loss"], loss.get((task, base, row["seed"]))) for row in of_mode]
            ratios = [own / other - 1 for own, other in pairs if other]
            if ratios and (name == "over_bp" or "update_every=4" in mode):
                entry |= {name: statistics.mean(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
        summary[task][mode] = entry
    near = {task: modes[TARGET]["over_bp"] for task, modes in summary.items() if "over_bp" in modes.get(TARGET, {})}
    held = {task: distance <= 0.01 for task, distance in near.items()}
    note = {"quality_summary": summary, "quality_target_within_1_percent": held}
    both = [[loss.get((task, mode, SEEDS[0])) for mode in ("fr", "lag1")] for task in TASKS]
    if all(None not in pair for pair in both):
        note["fr_equals_lag1"] = all(fr == lag1 for fr, lag1 in both)
    return note


def _finished(pool: ProcessPoolExecutor, jobs: list[tuple]) -> Iterator[dict]:
    for future in as_completed([pool.submit(_run, *job) for job in jobs]):
        yield future.result()


def _begin(short: bool) -> None:
    """What a process of the pool knows."""
    global _short, _tasks
    torch.set_num_threads(1)
    logging.getLogger("hf_mlopt").setLevel(logging.ERROR)  # that staleness costs quality is what is measured
    _short, _tasks = short, {}


def _run(task: str, mode: str, rate: float, seed: int) -> dict:
    if task not in _tasks:
        _tasks.clear()  # one task at a time is in memory
        _tasks[task] = TASKS[task](_short)
    found = train(_tasks[task], MODES[mode], rate, seed)
    return {"task": task, "mode_name": mode, "learning_rate": rate, "seed": seed, **found}
