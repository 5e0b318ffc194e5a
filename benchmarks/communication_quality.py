"""The convergence part of `communication.py`: what codecs and error feedback cost in loss, between real processes."""

import gc
import hashlib
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path

import torch
import torch.distributed as dist
from common import SHARED, Results
from optimizers_quality import ResidualBlock
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_mlopt.communication import compress
from hf_mlopt.communication.ddp import Compression
from hf_mlopt.data import load_images


WORLD = 4  # so that means go in two phases, and what comes back is coded as well
MOMENTUM, WARMUP_STEPS, CURVE_POINTS = 0.9, 15, 6
SEEDS = (0, 1, 2)
FEEDBACK = {
    "none": {},
    "classic": {"error_feedback": "classic"},
    "step-ahead": {"error_feedback": "step-ahead", "step_ahead": 1.0},
    "step-ahead, averaged": {"error_feedback": "step-ahead", "step_ahead": 1.0, "error_average_period": 20},
    # Added when the others had been seen; the grid held the four above.
    "a tenth ahead": {"error_feedback": "step-ahead", "step_ahead": 0.1},
}
_PAIRS = [(codec, feedback) for codec in ("bingrad-b", "top-k-0.01") for feedback in FEEDBACK] + [
    (codec, feedback) for codec in ("orq-3", "orq-5", "orq-9", "sign") for feedback in ("none", "step-ahead")
]
BASELINES = {"fp32": None, "bf16": {"grad_codec": "bf16"}}
MODES = BASELINES | {f"{codec} / {feedback}": {"grad_codec": codec} | FEEDBACK[feedback] for codec, feedback in _PAIRS}
SHORT_MODES = ("fp32", "bf16", "bingrad-b / step-ahead", "top-k-0.01 / step-ahead, averaged")


class Text:
    """
    A Llama of two layers over the bytes of 317 TinyStories. The stories at the end of the file are held out. Its
    batches are 8 windows of 64 bytes on each rank.
    """

    name, batch, rates = "LM", 8, (0.03, 0.1, 0.3)

    def __init__(self, short: bool):
        self.steps = 30 if short else 200
        text = torch.tensor(list((SHARED / "text" / "tinystories.txt").read_bytes()))
        train, validation, test = text.split([len(text) - 32_000, 12_000, 20_000])
        self.train = _windows(train)
        self.parts = {"validation": _windows(validation), "test": _windows(test)}
        if short:
            self.parts = {name: rows[::8] for name, rows in self.parts.items()}
        self.size = len(self.train)

    def model(self) -> nn.Module:
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.08, use_cache=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def loss(self, model: nn.Module, index: torch.Tensor) -> torch.Tensor:
        return model(input_ids=self.train[index], labels=self.train[index]).loss

    def settle(self, model: nn.Module) -> None:
        pass

    def judge(self, model: nn.Module, part: str, rank: int) -> list[float]:
        """Number of windows of this rank and the sum of their losses."""
        rows = self.parts[part][rank::WORLD]
        return [len(rows), sum(len(some) * float(model(input_ids=some, labels=some).loss) for some in rows.split(32))]


class Images:
    """A ResNet of 78,000 parameters on the first images of CIFAR-10, which are lossy; batches of 32 on each rank."""

    name, batch, rates = "ResNet", 32, (0.03, 0.1, 0.3)

    def __init__(self, short: bool):
        self.steps = 20 if short else 200
        files = (SHARED / "vision" / f"cifar10_sub_{part}_jpeg.npz" for part in ("train", "test"))
        train, test = (load_images(str(file), None) for file in files)
        # The files are in the order of the classes.
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
        inputs, labels = torch.from_numpy(train.images)[order], torch.from_numpy(train.labels)[order]
        self.parts = {"validation": (inputs[:1_500], labels[:1_500])}
        self.parts["test"] = torch.from_numpy(test.images), torch.from_numpy(test.labels)
        self.inputs, self.labels = inputs[1_500:], labels[1_500:]
        if short:
            self.parts = {name: (inputs[::10], labels[::10]) for name, (inputs, labels) in self.parts.items()}
        self.size = len(self.labels)

    def model(self) -> nn.Module:
        stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        blocks = ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def loss(self, model: nn.Module, index: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(self.inputs[index]), self.labels[index])

    def settle(self, model: nn.Module) -> None:
        """Statistics of batch normalisation at these weights, the same on all ranks."""
        update_bn(self.inputs[:640].split(self.batch), model)

    def judge(self, model: nn.Module, part: str, rank: int) -> list[float]:
        """Number of images of this rank, the sum of their losses, and how many are right."""
        inputs, labels = (values[rank::WORLD] for values in self.parts[part])
        logits = torch.cat([model(some) for some in inputs.split(250)])
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return [len(labels), float(loss), float((logits.argmax(1) == labels).sum())]


TASKS = {task.name: task for task in (Text, Images)}


def _windows(tokens: torch.Tensor) -> torch.Tensor:
    """Rows share a token, so that each is a target once."""
    return tokens.unfold(0, 65, 64)


def train(task: Text | Images, mode: str, rate: float, seed: int) -> dict:
    """
    One run on all ranks of this group. The learning rate rises during the warm-up, and falls to 0 in a straight line.

    Returns:
        `dict`: Losses on `validation` and `test`, None if it diverged; bytes that a rank sends in a step after the
        warm-up.
    """
    start, rank = time.perf_counter(), dist.get_rank()
    torch.manual_seed(seed)
    model = DistributedDataParallel(task.model())
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)
    settings, compression = MODES[mode], None
    if settings is not None:
        compression = compress(model, optimizer, warmup_steps_uncompressed=WARMUP_STEPS, seed=seed, **settings)
    drawn, curve = torch.Generator().manual_seed(seed), []
    looks = [round(task.steps * point / CURVE_POINTS) for point in range(1, CURVE_POINTS)]  # and after the last step
    for step in range(task.steps):
        if step == WARMUP_STEPS and compression is not None:
            compression.take_traffic()
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP_STEPS, 1) * (1 - step / task.steps)
        model.train()
        index = torch.randint(task.size, (WORLD, task.batch), generator=drawn)[rank]
        optimizer.zero_grad()
        task.loss(model, index).backward()
        optimizer.step()
        if step + 1 in looks:
            curve.append([step + 1, _judged(task, model.module, "test")["loss"]])
            if curve[-1][1] is None:
                break
    traffic = _traffic(model, compression)
    found = {part: _judged(task, model.module, part) for part in ("validation", "test")}
    curve.append([step + 1, found["test"]["loss"]])
    diverged = any(loss is None for _, loss in curve)
    if not diverged:
        _check_replicas(model.module)
    own_group = None
    if compression is not None:
        compression.detach()
        own_group = compression.state.group
    del model, optimizer, compression
    gc.collect()  # DDP's reducer must be gone before a group ends and before the next one is made
    if own_group is not None:
        dist.barrier()
        dist.destroy_process_group(own_group)
    validation = None if diverged else found["validation"]["loss"]
    seconds = time.perf_counter() - start
    return {"validation": validation, **found["test"], "train_curve": curve, **traffic, "seconds": seconds}


@torch.no_grad()
def _judged(task: Text | Images, model: nn.Module, part: str) -> dict:
    """Mean loss over a part that the ranks share, and the accuracy if the task has one; at the clean weights."""
    task.settle(model)
    model.eval()
    sums = torch.tensor(task.judge(model, part, dist.get_rank()), dtype=torch.float64)
    dist.all_reduce(sums)
    count, loss, *right = sums.tolist()
    found = {"loss": loss / count if math.isfinite(loss) else None}
    return found | {"accuracy": right[0] / count} if right else found


def _traffic(model: DistributedDataParallel, compression: Compression | None) -> dict:
    total = sum(parameter.numel() for parameter in model.parameters())
    if compression is None:
        return {"bytes_per_step": 2 * (WORLD - 1) / WORLD * 4 * total, "of_bf16": 2.0, "coded_fraction": 0.0}
    traffic = compression.state.traffic
    coded, logs = traffic.coded / max(traffic.elements, 1), compression.logs()
    return {"bytes_per_step": logs["grad_bytes"], "of_bf16": logs["grad_of_bf16"], "coded_fraction": coded}


def _check_replicas(model: nn.Module) -> None:
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    everyone: list = [None] * WORLD
    dist.all_gather_object(everyone, digest)
    if len(set(everyone)) != 1:
        raise AssertionError("the ranks ended with different weights")


def measure_quality(results: Results, short: bool, groups: int = 1) -> None:
    """
    Tunes every mode on the first seed, then runs it on the others at the learning rate that was best on the validation
    part; a tie goes to the smaller rate. The ResNet takes both baselines and the three modes that were best on the LM.

    Args:
        results ([`Results`]): What rows are added to.
        short (`bool`): Few steps, one seed, one learning rate, few modes.
        groups (`int`, *optional*, defaults to 1): Runs at a time, each in four processes of one thread.
    """
    seeds = SEEDS[:1] if short else SEEDS
    results.note(
        quality_setting=f"{WORLD} ranks, gloo, SGD with momentum {MOMENTUM}; in the first {WARMUP_STEPS} steps the "
        "learning rate rises and gradients are in fp32, then it falls linearly to 0; bytes_per_step, of_bf16 and "
        f"coded_fraction are of the steps after; seconds, of {groups} runs at a time, include evaluation"
    )
    with _groups(groups, short) as workers:
        best = _measure_task(results, workers, "LM", SHORT_MODES if short else tuple(MODES), seeds, short)
        compressed = [mode for mode in best if mode not in BASELINES]
        modes = (*BASELINES, *compressed[: 1 if short else 3])
        _measure_task(results, workers, "ResNet", modes, seeds, short)


def _measure_task(results: Results, workers: list, task: str, modes: tuple, seeds: tuple, short: bool) -> list[str]:
    """The modes, from the smallest mean loss on the test part to the largest; what has a row is not run again."""
    rates = TASKS[task].rates[1:2] if short else TASKS[task].rates
    runs = [row for row in results.record["rows"] if row["kind"] == "quality" and row["task"] == task]
    untuned = [mode for mode in modes if mode not in {run["mode"] for run in runs}]
    jobs = [(task, mode, rate, seeds[0]) for mode in untuned for rate in rates]
    tuned = _finished(workers, jobs, lambda run: results.add(**_tuning_row(run)))
    for mode in untuned:
        runs.append(_best([run for run in tuned if run["mode"] == mode]))
        results.add(**_quality_row(runs[-1]))
    rate_of = {run["mode"]: run["learning_rate"] for run in runs}
    edge = [mode for mode, rate in rate_of.items() if len(rates) > 1 and rate in (rates[0], rates[-1])]
    results.note(**{f"quality_best_at_the_edge_{task}": edge})
    done = {(run["mode"], run["seed"]) for run in runs}
    jobs = [(task, mode, rate_of[mode], seed) for seed in seeds for mode in modes if (mode, seed) not in done]
    runs += _finished(workers, jobs, lambda run: results.add(**_quality_row(run)))
    summary = _summary(runs, modes)
    results.note(**{f"quality_summary_{task}": summary})
    return [entry["mode"] for entry in summary]


def _best(runs: list[dict]) -> dict:
    """The best on the validation part; if all of them diverged, the one with the smallest rate."""
    runs = sorted(runs, key=lambda run: run["learning_rate"])
    finite = [run for run in runs if run["validation"] is not None]
    return min(finite, key=lambda run: run["validation"]) if finite else runs[0]


def _tuning_row(run: dict) -> dict:
    kept = {key: run[key] for key in ("task", "mode", "learning_rate")}
    return {"kind": "tuning", **kept, "loss": run["validation"]}


def _quality_row(run: dict) -> dict:
    settings = MODES[run["mode"]] or {}
    row = {"kind": "quality", "task": run["task"], "mode": run["mode"], "codec": settings.get("grad_codec", "fp32")}
    row["error_feedback"] = settings.get("error_feedback", "none")
    row |= {key: value for key, value in run.items() if key not in ("task", "mode", "validation")}
    return row | {"diverged": True} if run["loss"] is None else row


def _summary(runs: list[dict], modes: tuple) -> list[dict]:
    """Mean and standard deviation over seeds, and the mean less that of bf16; what diverged with any seed is last."""
    entries = []
    for mode in modes:
        losses = [run["loss"] for run in runs if run["mode"] == mode]
        finite = None not in losses
        spread = statistics.stdev(losses) if finite and len(losses) > 1 else None
        entries.append({"mode": mode, "loss": statistics.mean(losses) if finite else None, "std": spread})
        right = [run["accuracy"] for run in runs if run["mode"] == mode and "accuracy" in run]
        if right:
            entries[-1]["accuracy"] = statistics.mean(right)
    base = next(entry["loss"] for entry in entries if entry["mode"] == "bf16")
    for entry in entries:
        entry["over_bf16"] = entry["loss"] - base if None not in (entry["loss"], base) else None
    return sorted(entries, key=lambda entry: math.inf if entry["loss"] is None else entry["loss"])


def _finished(workers: list[list], jobs: list[tuple], add: Callable[[dict], None]) -> list[dict]:
    """Gives jobs to groups of ranks as these become free."""
    waiting, runs, idle, busy = jobs[::-1], [], list(workers), {}
    while waiting or busy:
        while waiting and idle:
            group, job = idle.pop(), waiting.pop()
            for pipe in group:
                pipe.send(job)
            busy |= {pipe: group for pipe in group}
        for pipe in connection.wait(list(busy)):
            run = pipe.recv()  # raises if the rank was killed
            if isinstance(run, str):
                raise RuntimeError(f"a rank failed:\n{run}")
            group = busy.pop(pipe)
            if group not in busy.values():  # all of its ranks are done, and have found the same
                runs.append(run)
                add(run)
                idle.append(group)
    return runs


@contextmanager
def _groups(count: int, short: bool) -> Iterator[list[list]]:
    """Pipes to the ranks of each group."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes load torch
    context, processes, groups = get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            groups.append([])
            for rank in range(WORLD):
                near, far = context.Pipe()
                arguments = (Path(folder) / f"group{number}", rank, far, short)
                processes.append(context.Process(target=_serve, args=arguments, daemon=True))
                processes[-1].start()
                far.close()
                groups[-1].append(near)
        try:
            yield groups
            for pipe in sum(groups, []):
                pipe.send(None)
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _serve(store: Path, rank: int, pipe: connection.Connection, short: bool) -> None:
    """A rank: runs what it is sent until it is sent None."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(minutes=5)
    )
    task = None
    while (job := pipe.recv()) is not None:
        name, mode, rate, seed = job
        try:
            if task is None or task.name != name:
                task = TASKS[name](short)
            found = train(task, mode, rate, seed)
        except Exception:
            pipe.send(traceback.format_exc())
            raise
        pipe.send({"task": name, "mode": mode, "learning_rate": rate, "seed": seed, **found})
    dist.barrier()
    dist.destroy_process_group()
