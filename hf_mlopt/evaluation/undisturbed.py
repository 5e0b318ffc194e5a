"""Measuring a model in the middle of something else."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """
    Puts a model into evaluation mode, and on leaving gives every module its mode and every generator its state back.

    lm-eval and data sets draw from the generators of Python and NumPy, a model with dropout from those of torch.
    """
    modes = {module: module.training for module in model.modules()}  # a frozen part may be in evaluation mode already
    python, numpy = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
