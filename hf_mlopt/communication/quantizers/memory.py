"""Memory that one chunk after another is worked on in. Fresh memory costs more than the arithmetic: pages must be
mapped and cleared each time."""

import numpy as np
import torch

from hf_mlopt.communication.packing import native


__all__ = ["Memory", "namespace", "native"]


class Memory:
    """
    Named tensors that are reused.

    Args:
        device (`torch.device`): Where they live.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._held: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; its earlier holder of the same name must be done with it."""
        count = 1
        for size in shape:
            count *= size
        held = self._held.get(name)
        if held is None or held.numel() < count or held.dtype != dtype:
            held = self._held[name] = torch.empty(count, dtype=dtype, device=self.device)
        return held[:count].view(shape)

    def like(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensor(name, tuple(tensor.shape), tensor.dtype if dtype is None else dtype)


def namespace(array):
    """numpy or torch, whichever `array` is of: both spell the functions used here alike."""
    return np if isinstance(array, np.ndarray) else torch
