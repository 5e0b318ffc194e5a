"""SAEFOptimizer in the Trainer: gradients stay on their rank, and the optimizer's step exchanges updates."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_mlopt import ranks
from hf_mlopt.communication.saef import SAEFOptimizer
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.training.combinations import refusal
from hf_mlopt.training.local_steps import unwrapped


if TYPE_CHECKING:
    from hf_mlopt.training.trainer import MLOptTrainer


class SAEFCallback(TrainerCallback):
    """
    Keeps DDP from reducing gradients. It is a rank state as well: momentum and what was not sent are those of a rank,
    and Trainer saves the optimizer of the first one only.

    Args:
        trainer (`MLOptTrainer`): The trainer.

    Raises:
        ConfigurationError: Under FSDP or DeepSpeed, where no rank has whole weights to shift, or with `grad_codec`.
    """

    rank_state = "saef"

    def __init__(self, trainer: "MLOptTrainer"):
        self.trainer = trainer
        self._without_reduction = ExitStack()
        for kind in ("fsdp", "deepspeed"):
            if getattr(trainer, f"is_{kind}_enabled"):
                remedy = "leave it out, for DDP: saef moves the whole weights of a rank by what that has not sent"
                raise ConfigurationError(kind, getattr(trainer.args, kind), remedy)
        if getattr(trainer.args, "keep_zeros", False):
            raise refusal("masks", "saef", True)
        codec = getattr(trainer.args, "grad_codec", None)
        if codec is not None:
            raise refusal("codec", "saef", codec)

    @property
    def optimizer(self) -> SAEFOptimizer:
        """The optimizer below what accelerate wraps around it."""
        return unwrapped(self.trainer.optimizer)

    def on_train_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            self._without_reduction.enter_context(wrapped.no_sync())

    def on_step_end(self, args, state, control, **kwargs):
        # As in the authors' program; DDP sends the first rank's buffers before a pass that reduces.
        if ranks.world_size() > 1:
            for buffer in self.trainer.model.buffers():
                dist.broadcast(buffer, 0)

    def on_train_end(self, args, state, control, **kwargs):
        self._without_reduction.close()

    def logs(self) -> dict[str, float]:
        """What travelled since the last log line."""
        if not isinstance(self.optimizer, SAEFOptimizer):  # before training
            return {}
        traffic, world = self.optimizer.take_traffic(), self.optimizer.exchange.world
        return {**traffic.logs(2 * 2 * (world - 1) / world), "grad_unsent": traffic.unsent}

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()["state"]
        return {"state": state, "in_shards": self.optimizer.exchange.in_shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Groups, with their learning rates, are the same on all ranks and have come with the first one's.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": state_dict["state"]})

    def merge(self, state_dicts: list[dict[str, Any]]) -> dict[str, Any]:
        """
        The state that every rank of another number of ranks goes on with: the means of what ranks had not sent and of
        their momenta, so that what all of them together were to do is what it was.
        """
        first = state_dicts[0]
        if first["in_shards"] and any("server_residual" in state for state in first["state"].values()):
            raise InputError(
                "what the shards of saef's two-phase collective have lost cannot be divided among another number of "
                "ranks; begin it afresh with reset_local_state"
            )
        return {**first, "state": {index: _mean([s["state"][index] for s in state_dicts]) for index in first["state"]}}

    def reset(self) -> None:
        """Begins afresh from the clean weights."""
        self.optimizer.eval()
        self.optimizer.state.clear()


def _mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of every tensor; what all ranks share stays as it is."""
    return {
        name: value if name in ("x", "server_residual") else sum(state[name] for state in states) / len(states)
        for name, value in states[0].items()
    }
