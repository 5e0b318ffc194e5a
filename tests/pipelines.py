"""Small float64 pipelines: blocks, batches, and workers that are threads of this process."""

import hashlib
import random
import time

import torch
from torch import nn

from hf_mlopt.pipeline import PipelineConfig, Worker, local_channels, parse, run_local


class Middle(nn.Module):
    """A residual layer; the first block reads the batch. `sleep` seconds at most, to shake the order of threads."""

    def __init__(self, width=6, first=False, sleep=0.0, layer=None):
        super().__init__()
        self.first, self.sleep = first, sleep
        self.linear = nn.Linear(width, width)
        self.layer = layer or nn.Identity()

    def forward(self, boundary, batch):
        x = batch["x"] if self.first else boundary[0]
        if self.sleep:
            time.sleep(random.random() * self.sleep)
        return (x + self.layer(torch.tanh(self.linear(x))),)


class Last(Middle):
    def forward(self, boundary, batch):
        (y,) = super().forward(boundary, batch)
        error = (y[:, 0] - batch["labels"]) ** 2
        items = batch.get("num_items_in_batch")
        return (error.mean() if items is None else error.sum() / items, y)


def make_blocks(stages, sleep=0.0, layers=None, width=6):
    torch.manual_seed(0)
    blocks = [
        (Last if k == stages - 1 else Middle)(width, k == 0, sleep, layers(k) if layers else None)
        for k in range(stages)
    ]
    return [block.double() for block in blocks]


def tied_blocks(stages=3):
    blocks = make_blocks(stages)
    for block in blocks:
        block.tied = ("linear.weight", "linear.weight")
    blocks[0].linear.weight.data.copy_(blocks[-1].linear.weight.data)
    return blocks


def make_batch(n, rows=3, width=6):
    generator = torch.Generator().manual_seed(1000 + n)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": x.sum(1).sin(), "num_items_in_batch": None}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def make_config(stages, mode, **settings):
    plain = {"update_every": 1, "predict": "none", "recompute": "yes", "transport": "local", "timeout_seconds": 20.0}
    return PipelineConfig(stages=stages, mode=mode, **{**plain, **settings})


def make_workers(blocks, mode, optimizer="sgd", scheduler=None, callbacks=None, tied=False, worker=None, **settings):
    """`callbacks(k)` gives what is particular to stage k, `worker` what all are given; `settings` are the config's."""
    stages = len(blocks)
    schedule, config = parse(mode, stages), make_config(stages, mode, **settings)
    channels = local_channels(schedule, timeout=config.timeout_seconds, free=config.queue == "free", tied=tied)
    workers = []
    for k, block in enumerate(blocks):
        made = OPTIMIZERS[optimizer](block.parameters())
        extra = {**(worker or {}), **(callbacks(k) if callbacks else {})}
        if scheduler:
            extra["scheduler"] = scheduler(made)
        workers.append(Worker(block, k, stages, schedule, made, channels[k], config=config, **extra))
    return workers


def train(blocks, mode, optimizer="sgd", num_batches=14, batch=make_batch, **settings):
    workers = make_workers(blocks, mode, optimizer, **settings)
    return workers, run_local(workers, batch, num_batches)


def digest(blocks, losses=()):
    """SHA-256 of all parameters and losses."""
    sha = hashlib.sha256()
    for block in blocks:
        for value in block.state_dict().values():
            sha.update(value.detach().contiguous().numpy().tobytes())
    sha.update(torch.tensor(losses, dtype=torch.float64).numpy().tobytes())
    return sha.hexdigest()
