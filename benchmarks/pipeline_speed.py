"""The parts of `pipeline.py` that take time: stages that sleep, stragglers, and two stages that compute."""

import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.distributed as dist
from common import Results
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import LlamaConfig, LlamaForCausalLM

from hf_mlopt.pipeline import PipelineConfig, Worker, distributed_channels, parse, time_per_batch
from hf_mlopt.pipeline.partition import balance, layer_costs, split


STAGES, UNIT = 4, 0.02  # seconds of a forward, F; a backward takes 2 F
TORCH = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
LONG = "dsp:18,12,6,0"  # differences of 6
REAL_M, REAL_SHAPE, REAL_HIDDEN = 8, (4, 128), 256


class Case(NamedTuple):
    mode: str
    recompute: str = "no"
    micro_batches: int = 0  # between two flushes, of torch's schedules

    @property
    def label(self) -> str:
        if self.mode in TORCH:
            return f"{self.mode} M={self.micro_batches}"
        is_plain = self.mode in ("bp", "one process") or self.recompute == "yes"
        return self.mode if is_plain else f"{self.mode}, recompute=no"


class Condition(NamedTuple):
    name: str
    factor: float = 1.0  # of the time of a third of the operations
    latency: float = 0.0  # in F
    work: tuple[float, ...] = (1.0,) * STAGES  # time of every operation of a stage

    def slowdown(self, seed: int) -> Callable[[int, str, int], float]:
        """The same operations are slow in the run and in the event model."""

        def factor(stage: int, kind: str, n: int) -> float:
            is_slow = random.Random(f"{seed} {stage} {kind} {n}").random() < 1 / 3
            return self.factor if is_slow else 1.0

        return factor


PLAIN = Condition("none")
# One of four devices is half as fast. Of 16 equal layers it first has four, like the others, and then two: 5, 2, 5, 4
# layers are the best that whole layers allow.
SLOW = Condition("one stage x2", work=(1.0, 2.0, 1.0, 1.0))
REBALANCED = Condition("one stage x2, rebalanced", work=(5 / 4, 2 * 2 / 4, 5 / 4, 4 / 4))
STRAGGLERS = (
    Condition("1/3 of operations x2", factor=2.0),
    Condition("1/3 of operations x4", factor=4.0),
    Condition("latency 0.5 F", latency=0.5),
    Condition("latency 1.5 F", latency=1.5),
    SLOW,
    REBALANCED,
)
ASYNCHRONOUS = tuple(Case(mode, recompute) for mode in ("lag1", "dsp") for recompute in ("yes", "no"))
STRAGGLER_CASES = (Case("bp"), Case("gpipe", "no", 8), Case("1f1b", "no", 8), *ASYNCHRONOUS[1:], Case(LONG))


class Sleep(torch.autograd.Function):
    """A message holds the time at which it was sent, so that links of any latency can be emulated by the receiver."""

    @staticmethod
    def forward(ctx, message, weight, block, kind, n):
        ctx.block, ctx.n = block, n
        return block.work(message, kind, n)

    @staticmethod
    def backward(ctx, message):
        return ctx.block.work(message, "B", ctx.n), torch.zeros(1, dtype=torch.float64), None, None, None


class SleepingBlock(nn.Module):
    """A stage of a device that this machine has not: its operations take their time and compute nothing."""

    def __init__(self, index: int, condition: Condition, repeats: bool):
        super().__init__()
        self.index, self.condition, self.repeats = index, condition, repeats
        self.is_first, self.is_last = index == 0, index == STAGES - 1
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.unit, self.slowdown = UNIT, condition.slowdown(0)

    def forward(self, boundary, batch):
        kind = "R" if self.repeats and torch.is_grad_enabled() else "F"
        message = torch.zeros(1, 1, dtype=torch.float64) if self.is_first else boundary[0]
        outputs = Sleep.apply(message, self.weight, self, kind, batch["n"])
        return (0.0 * outputs.sum(),) if self.is_last else (outputs,)

    def work(self, message: torch.Tensor, kind: str, n: int) -> torch.Tensor:
        if (kind == "F" and not self.is_first) or (kind == "B" and not self.is_last):
            late = float(message) + self.unit * self.condition.latency - time.monotonic()
            time.sleep(max(0.0, late))
        own = (2.0 if kind == "B" else 1.0) * self.condition.work[self.index]
        time.sleep(self.unit * own * self.slowdown(self.index, kind, n))
        return torch.full((1, 1), time.monotonic(), dtype=torch.float64)


class Numbered(nn.Module):
    """A block for torch's schedules, which hand a stage no number of the batch."""

    def __init__(self, block: nn.Module, batches: Callable[[int], dict]):
        super().__init__()
        self.block, self.batches, self.n = block, batches, 0

    def forward(self, x):
        outputs = self.block(() if self.block.is_first else (x,), self.batches(self.n))
        self.n += 1
        return outputs[0].reshape(1) if self.block.is_last else outputs[0]


def stale_run(case: Case, block, batches, num_batches: int, optimizer, channels: dict, update_every: int = 1):
    """What runs `num_batches` at this rank with our runtime; the channels of a mode are made once."""
    world, rank = dist.get_world_size(), dist.get_rank()
    schedule = parse(case.mode, world)
    if case.mode not in channels:
        channels[case.mode] = distributed_channels(schedule, timeout=120)
    config = PipelineConfig(
        world, case.mode, recompute=case.recompute, predict="none", update_every=update_every, timeout_seconds=120
    )

    def run() -> None:
        Worker(block, rank, world, schedule, optimizer, channels[case.mode], config=config).run(batches, num_batches)

    return run


def torch_run(case: Case, block, batches, num_batches: int, optimizer, boundary: torch.Tensor):
    """The same with a schedule of torch, which flushes after `micro_batches` of them and then updates."""
    world, rank, size = dist.get_world_size(), dist.get_rank(), case.micro_batches
    module = Numbered(block, batches)
    example = torch.zeros(1, 1) if block.is_first else boundary
    outputs = torch.zeros(1, dtype=boundary.dtype) if block.is_last else boundary
    stage = PipelineStage(module, rank, world, torch.device("cpu"), input_args=(example,), output_args=(outputs,))
    schedule = TORCH[case.mode](stage, size, loss_fn=lambda loss, target: loss.sum())

    def run() -> None:
        module.n = 0
        for _ in range(num_batches // size):
            if block.is_last:
                schedule.step(target=torch.zeros(size), losses=[])
            else:
                schedule.step(*([torch.zeros(size, 1)] if block.is_first else []))
            optimizer.step()
            optimizer.zero_grad()

    return run


def _seconds(run: Callable[[], None]) -> float:
    """Until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def emulate(rank: int, send: Callable, plan: list[tuple]) -> None:
    """At a rank: for each condition, its cases in turn; rank 0 sends the seconds for each batch."""
    channels = {}
    for condition, cases, num_batches, repeats in plan:
        runs = {}
        for case in cases:
            block = SleepingBlock(rank, condition, case.recompute == "yes" and parse(case.mode, STAGES).m[rank] > 0)
            optimizer = torch.optim.SGD(block.parameters(), 0.1)
            count = max(num_batches, case.micro_batches)
            common = case, block, lambda n: {"n": n}, count, optimizer
            if case.mode in TORCH:
                run = torch_run(*common, torch.zeros(1, 1, dtype=torch.float64, requires_grad=True))
            else:
                run = stale_run(*common, channels)
            block.unit = 0.0  # connects
            run()
            block.unit = UNIT
            runs[case] = run, block, count
        taken = {case: [] for case in cases}
        for seed in range(repeats):
            for case, (run, block, count) in runs.items():
                block.slowdown = condition.slowdown(seed)
                taken[case].append(_seconds(run) / count)
        send((condition, num_batches, taken))
    for ends in channels.values():
        ends.close()


def predicted(case: Case, condition: Condition, num_batches: int, seed: int) -> float:
    """The event model's time for a batch, in F."""
    forward = list(condition.work)
    return time_per_batch(
        case.mode,
        forward,
        [2 * value for value in forward],
        recompute=forward if case.recompute == "yes" else None,
        latency=condition.latency,
        micro_batches=case.micro_batches or 8,
        slowdown=condition.slowdown(seed),
        num_batches=max(num_batches, case.micro_batches),
    )


def measure_speed(results: Results, short: bool) -> None:
    flushes = (4, 8) if short else (4, 8, 32)
    synchronous = [Case(mode, "no", size) for mode in TORCH for size in flushes]
    cases = (Case("bp"), *synchronous, Case("fr", "yes"), *ASYNCHRONOUS)
    rows = _emulated(results, "speed", [(PLAIN, cases, 8 if short else 32, 2 if short else 5)])
    if short:  # to fill and to empty the pipeline takes too large a share
        return
    by_label = {row["label"]: row for row in rows}
    free, repeated = by_label["dsp, recompute=no"], by_label["dsp"]
    claims = {
        "dsp, recompute=no, over bp (at least 3.3)": free["over_bp"],
        "dsp, recompute=no, over 1f1b M=8 (at least 1.25)": free["over_1f1b_8"],
        "dsp over bp (at least 2.6)": repeated["over_bp"],
        "farthest from the event model (at most 0.2)": max(abs(row["of_model"] - 1) for row in rows),
    }
    held = free["over_bp"] >= 3.3, free["over_1f1b_8"] >= 1.25, repeated["over_bp"] >= 2.6
    is_near = [row["label"] for row in rows if abs(row["of_model"] - 1) > 0.2]
    results.note(speed_claims=claims, speed_claims_hold=[*held, not is_near], speed_far_from_model=is_near)


def measure_stragglers(results: Results, short: bool) -> None:
    conditions = STRAGGLERS[1:5:2] + (SLOW,) if short else STRAGGLERS
    size, repeats = (8, 1) if short else (32, 3)
    rows = _emulated(results, "straggler", [(condition, STRAGGLER_CASES, size, repeats) for condition in conditions])
    far = [f"{row['condition']}: {row['label']}" for row in rows if abs(row["of_model"] - 1) > 0.2]
    results.note(stragglers_far_from_model=far)


def _emulated(results: Results, kind: str, plan: list[tuple]) -> list[dict]:
    rows = []
    for condition, num_batches, taken in together(STAGES, emulate, plan):
        bases = {"over_bp": taken[Case("bp")], "over_1f1b_8": taken[Case("1f1b", "no", 8)]}
        for case, seconds in taken.items():
            row = {"kind": kind, "condition": condition.name, "label": case.label, **case._asdict()}
            row["of_F"] = statistics.median(seconds) / UNIT
            row |= {"of_F_min": min(seconds) / UNIT, "of_F_max": max(seconds) / UNIT}
            for name, base in bases.items():
                row |= _spread(name, [other / own for other, own in zip(base, seconds, strict=True)])
            models = [predicted(case, condition, num_batches, seed) for seed in range(len(seconds))]
            row["model_of_F"] = statistics.median(models)
            row |= _spread("of_model", [own / UNIT / model for own, model in zip(seconds, models, strict=True)])
            row |= {"seconds": statistics.median(seconds), "batches": num_batches, "repeats": len(seconds)}
            results.add(**row)
            rows.append(row)
    return rows


def _spread(name: str, ratios: list[float]) -> dict:
    return {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}


REAL_CASES = (Case("one process"), Case("bp"), Case("1f1b", "no", REAL_M), Case("lag1", "yes"), Case("lag1"))


def compute(rank: int, send: Callable, num_batches: int, repeats: int, layers: int) -> None:
    """At one of two ranks with a thread each: a small Llama, cut for each case where it is balanced."""
    channels, runs, bounds, generator = {}, {}, {}, torch.Generator().manual_seed(0)
    ids = torch.randint(256, (num_batches, *REAL_SHAPE), generator=generator)

    def batches(n: int) -> dict:
        return {"input_ids": ids[n], "labels": ids[n]}

    costs = [layer_costs(_llama(layers), REAL_SHAPE)] if rank == 0 else [None]
    dist.broadcast_object_list(costs)
    for case in REAL_CASES:
        model = _llama(layers)
        if case.mode == "one process":
            runs[case] = _whole_run(model, batches, num_batches) if rank == 0 else lambda: None
            continue
        bounds[case.label] = balance(costs[0], 2, case.recompute == "yes")
        block = split(model, bounds[case.label])[rank]
        common = case, block, batches, num_batches, torch.optim.AdamW(block.parameters())
        if case.mode in TORCH:
            runs[case] = torch_run(*common, torch.zeros(*REAL_SHAPE, REAL_HIDDEN, requires_grad=True))
        else:
            runs[case] = stale_run(*common, channels, update_every=REAL_M)
    for run in runs.values():
        run()  # allocates, connects
    taken = {case: [] for case in runs}
    for _ in range(repeats):
        for case, run in runs.items():
            taken[case].append(_seconds(run) / num_batches)
    send((taken, bounds))
    for ends in channels.values():
        ends.close()


def _llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=REAL_HIDDEN, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=REAL_SHAPE[1], use_cache=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _whole_run(model: nn.Module, batches, num_batches: int):
    optimizer = torch.optim.AdamW(model.parameters())

    def run() -> None:
        for n in range(num_batches):
            (model(**batches(n)).loss / REAL_M).backward()
            if n % REAL_M == REAL_M - 1:
                optimizer.step()
                optimizer.zero_grad()

    return run


def measure_real(results: Results, short: bool) -> None:
    num_batches, repeats, layers = (8, 2, 2) if short else (32, 7, 8)
    for taken, bounds in together(2, compute, num_batches, repeats, layers):
        base = taken[REAL_CASES[0]]
        for case, seconds in taken.items():
            row = {"kind": "real", "label": case.label, **case._asdict(), "bounds": bounds.get(case.label)}
            row["samples_per_second"] = REAL_SHAPE[0] / statistics.median(seconds)
            row |= _spread("over_one_process", [other / own for other, own in zip(base, seconds, strict=True)])
            results.add(**row, seconds=statistics.median(seconds), batches=num_batches, repeats=repeats)


def together(world: int, work: Callable, *arguments) -> Iterator:
    """Runs `work(rank, send, *arguments)` in connected processes of one thread each; yields what rank 0 sends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes load torch
    context, processes = get_context("spawn"), []
    near, far = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                store = f"file://{folder}/store"
                values = (rank, world, store, far if rank == 0 else None, work, arguments)
                processes.append(context.Process(target=_rank, args=values, daemon=True))
                processes[-1].start()
            far.close()
            while (sent := near.recv()) is not None:  # raises if rank 0 ended, as it does when another one has
                yield sent
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, world: int, store: str, pipe, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    logging.getLogger("hf_mlopt").setLevel(logging.ERROR)  # that staleness costs quality is measured elsewhere
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(minutes=3))
    work(rank, pipe.send if pipe else lambda value: None, *arguments)
    dist.barrier()
    if pipe:
        pipe.send(None)  # before the end of the group, which may not return while threads of a transport are left
    dist.destroy_process_group()
