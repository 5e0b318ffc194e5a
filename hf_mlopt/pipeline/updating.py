"""From the gradient of a group of batches to new weights of a block."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from hf_mlopt.pipeline.clipping import LaggedNorm
from hf_mlopt.pipeline.prediction import Prediction


@dataclass
class Update:
    """
    What `on_update` is told.

    Args:
        index (`int`): Updates of this block so far.
        first, end (`int`): The first batch of the group, and the one after its last.
        loss (`float`, *optional*): Of the group; only at the last stage.
        grad_norm (`float`): Norm of the block's gradient before clipping.
    """

    index: int
    first: int
    end: int
    loss: float | None
    grad_norm: float


class BlockUpdate:
    """
    Steps the optimizer and the scheduler of a block.

    Args:
        optimizer (`torch.optim.Optimizer`): Of the block.
        scheduler (*optional*): Of its learning rates.
        max_grad_norm (`float`): Bound of the gradient norm; 0 is none.
        prediction ([`Prediction`], *optional*): Is shown every step.
        norms ([`LaggedNorm`], *optional*): The norm of all blocks that is clipped by; otherwise the block's own.
        before_step (`Callable`, *optional*): Called when the gradient of a group is complete.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler,
        max_grad_norm: float,
        prediction: Prediction | None = None,
        norms: LaggedNorm | None = None,
        before_step: Callable[[], None] | None = None,
    ):
        self.optimizer, self.scheduler, self.max_grad_norm = optimizer, scheduler, max_grad_norm
        self.prediction, self.norms, self.before_step = prediction, norms, before_step
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def complete(self, first: int, end: int) -> float:
        """
        To be called once the last batch of the group `first`, ..., `end - 1` is back-propagated.

        Returns:
            `float`: Squared norm of the block's gradient.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if self.before_step is not None:
            self.before_step()
        grads = self._gradients()
        squared = sum(norm.double().square() for norm in torch._foreach_norm(grads)).item() if grads else 0.0
        if not math.isfinite(squared):
            raise FloatingPointError(f"the gradient of batches {first} to {end - 1} is not finite")
        return squared

    def step(self, end: int, squared: float, has_graphs: bool) -> None:
        """
        Args:
            end (`int`): The batch after the group.
            squared (`float`): From [`complete`].
            has_graphs (`bool`): Whether graphs of batches in flight hold the weights. Their backward is to see the new
                ones beside the old activations, as in [PipeMare](https://huggingface.co/papers/1910.05124); autograd
                would refuse weights that changed.
        """
        if self.max_grad_norm > 0:
            self._clip(math.sqrt(self.norms.known(end - 1, squared) if self.norms else squared))
        if self.prediction:
            self.prediction.before_step()
        with self._unnoticed_by_graphs() if has_graphs else nullcontext():
            self.optimizer.step()
        if self.prediction:
            self.prediction.after_step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _clip(self, norm: float) -> None:
        factor = self.max_grad_norm / (norm + 1e-6)  # as `torch.nn.utils.clip_grad_norm_`
        if factor < 1 and (grads := self._gradients()):
            torch._foreach_mul_(grads, factor)

    def _unnoticed_by_graphs(self) -> AbstractContextManager:
        return torch.autograd._unsafe_preserve_version_counter(tuple(self._parameters))
