"""Sums of losses over micro-batches, steps and ranks, read as means where a log line is written."""

from collections.abc import Callable
from typing import Any

import torch


class RunningMeans:
    """
    Named sums, read as means over steps.

    Every rank adds its share of a step's value and all ranks read together: reading is a collective operation.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def add(self, name: str, share: torch.Tensor) -> None:
        """Adds what one micro-batch of this rank contributes, of any shape."""
        share = share.detach().double()
        self._sums[name] = self._sums[name] + share if name in self._sums else share

    def begin_step(self) -> None:
        """What is added until the next call makes up one step."""
        self._steps += 1

    def read(self, summed: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """
        Means over the steps since the last reading; the sums where no step was begun.

        Args:
            summed (`Callable`): Sums a tensor over ranks.

        Returns:
            `dict`: Numbers, or lists of the shape of what was added.
        """
        means = {name: (summed(value) / max(self._steps, 1)).tolist() for name, value in sorted(self._sums.items())}
        self._sums, self._steps = {}, 0
        return means
