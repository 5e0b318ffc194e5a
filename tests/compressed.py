"""A net whose gradients fill many buckets, and the plain loop that trains it on several ranks."""

import hashlib
from contextlib import nullcontext

import torch
import torch._dynamo  # DDP and optimizers would import it, in every process
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_mlopt.communication import compress


WIDTH, DEPTH = 16, 6
BUCKET_MB = 4 * (WIDTH * WIDTH + WIDTH) / 2**20  # a layer each
SETTINGS = {"grad_codec": "bingrad-b", "grad_codec_args": {"block": 64}, "min_bytes": 0}


class Layers(nn.Module):
    """`DEPTH` linear layers, of which the last `idle` are not used, and one output."""

    def __init__(self, seed=0, idle=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 1, bias=False)
        self.idle = idle
        self.to(dtype)

    def forward(self, x):
        for layer in self.layers[: DEPTH - self.idle]:
            x = layer(x).tanh() + x
        return self.head(x)[:, 0]


def batch(rank, step, part=0):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
    x = torch.randn(4, WIDTH, generator=generator)
    return x, x.sum(1).sin()


def loss_of(model, *which):
    x, y = batch(*which)
    return (model(x.to(next(model.parameters()).dtype)).float() - y).square().mean()


def wrap(model, **settings):
    return DistributedDataParallel(model, **{"bucket_cap_mb": BUCKET_MB, **settings})


def sgd(model, lr=0.01, **settings):
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def backward(model, rank, step, accumulation=1):
    """The gradients of one update."""
    for part in range(accumulation):
        last = part == accumulation - 1
        with nullcontext() if last else model.no_sync():
            (loss_of(model, rank, step, part) / accumulation).backward()


def train(model, optimizer, rank, steps, accumulation=1, start=0, after=lambda step: None):
    """`model` is wrapped and has its hook; `after` is called at the end of every step."""
    for step in range(start, start + steps):
        backward(model, rank, step, accumulation)
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def coded(rank, steps=0, net=None, optimizer=sgd, accumulation=1, after=lambda step: None, ddp=None, **settings):
    """A net trained with compression: the wrapped model, its optimizer, the [`Compression`]."""
    model = wrap(net or Layers(), **(ddp or {}))
    optimizer = optimizer(model)
    compression = compress(model, optimizer, **{**SETTINGS, **settings})
    train(model, optimizer, rank, steps, accumulation, after=after)
    return model, optimizer, compression


def digest(model):
    """Of every bit of the parameters."""
    text = hashlib.sha256()
    for parameter in model.parameters():
        text.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return text.hexdigest()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
