"""Local steps across ranks: P optimizer steps without communication, then one average of all that the ranks hold."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_mlopt import ranks
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.optimizers import DOMO


if TYPE_CHECKING:
    from hf_mlopt.training.trainer import MLOptTrainer

logger = logging.get_logger(__name__)


class LocalStepsCallback(TrainerCallback):
    """
    Drives [`DOMO`] and its relatives: DDP stays in place but does not reduce gradients, and after every `local_steps`
    optimizer steps the ranks average their models and the float buffers in one all-reduce.

    A round also ends, shorter, before a checkpoint, and with the last step. Steps are counted as attempted
    (`global_step`): a gradient scaler may skip one on a single rank, and collectives must still meet. Clipping and the
    logged gradient norm are those of each rank.

    Args:
        trainer (`MLOptTrainer`): The trainer; callbacks are only handed the unwrapped model.
    """

    def __init__(self, trainer: "MLOptTrainer"):
        self.trainer = trainer
        self.rounds = 0
        self._last_sync = 0
        self._weight = 1.0
        self._without_reduction = ExitStack()
        check_local_steps(trainer)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._last_sync = state.global_step
        self._weight = _agree(self.trainer, state)
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            self._without_reduction.enter_context(wrapped.no_sync())
        elements = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            f"{args.local_steps} local steps a round, processes: {ranks.world_size()}; a round averages {elements:,} "
            "elements"
        )

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps
        if state.global_step % args.local_steps == 0 or is_last or control.should_save:
            self._sync(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._without_reduction.close()
        # Of the best model the weights have been loaded already; averaging would overwrite them.
        best_is_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if state.global_step > self._last_sync and not best_is_loaded:
            self.optimizer.train()
            self._sync(state)

    @property
    def optimizer(self) -> DOMO:
        """The optimizer below what accelerate wraps around it."""
        return unwrapped(self.trainer.optimizer)

    def _sync(self, state) -> None:
        buffers = [buffer for buffer in self.trainer.model.buffers() if buffer.is_floating_point()]
        self.optimizer.sync(self._mean if ranks.world_size() > 1 else None, buffers)
        self._last_sync = state.global_step
        self.rounds += 1

    def _mean(self, flat: torch.Tensor) -> torch.Tensor:
        """The weighted mean over the ranks, in place; every rank ends with the same bits."""
        own_is_finite = bool(flat.isfinite().all())
        flat.mul_(self._weight)
        where = f"rank {ranks.rank()}, round {self.rounds}"
        try:
            dist.all_reduce(flat)  # gloo has no average
        except RuntimeError as error:
            timeout = f"did not come within ddp_timeout={self.trainer.args.ddp_timeout} s"
            raise RuntimeError(
                f"{where}: the local models were not averaged; another process has ended, or {timeout} ({error})"
            ) from error
        if not flat.isfinite().all():
            finite = [None] * ranks.world_size()
            dist.all_gather_object(finite, own_is_finite)
            diverged = ", ".join(str(rank) for rank, fine in enumerate(finite) if not fine)
            raise RuntimeError(
                f"{where}: the model of rank {diverged} is not finite; lower learning_rate or clip gradients"
            )
        return flat


class LocalState:
    """What a rank alone knows at the end of a round: the base optimizer's state, where the variant keeps it."""

    def __init__(self, trainer: "MLOptTrainer"):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"local_steps": self.trainer.args.local_steps, "base": self._kept()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, own = state_dict["local_steps"], self.trainer.args.local_steps
        if saved != own:
            raise ConfigurationError(
                "local_steps", own, f"the checkpoint was written with {saved}; take that, or give reset_local_state"
            )
        base = unwrapped(self.trainer.optimizer).base
        for index, parameter in enumerate(_parameters(base)):
            for name, value in state_dict["base"].get(index, {}).items():
                base.state[parameter][name] = value.to(parameter.device) if _moves(name, value) else value

    def reset(self) -> None:
        """Begins afresh on every rank, from the server's model and momentum."""
        for state in unwrapped(self.trainer.optimizer).base.state.values():
            state.clear()

    def _kept(self) -> dict[int, dict[str, Any]]:
        optimizer = unwrapped(self.trainer.optimizer)
        if all(group["local_state"] != "keep" for group in optimizer.param_groups):
            return {}
        return {index: dict(optimizer.base.state.get(p, {})) for index, p in enumerate(_parameters(optimizer.base))}


def check_local_steps(trainer: "MLOptTrainer") -> None:
    """
    Refuses what cannot average whole models.

    Raises:
        ConfigurationError: With the field, and why.
    """
    args = trainer.args
    whole = "local steps average whole models, one a rank"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        kind = "fsdp" if trainer.is_fsdp_enabled else "deepspeed"
        raise ConfigurationError(kind, getattr(args, kind), f"{whole}; leave it out, for DDP")
    if args.n_gpu > 1:
        raise ConfigurationError("n_gpu", args.n_gpu, f"{whole}; start one process per GPU with accelerate launch")
    if getattr(trainer, "is_tp_enabled", False) or getattr(trainer.model, "_tp_plan_applied", False):
        raise ConfigurationError("tp_size", getattr(trainer.model, "tp_size", None), f"{whole}; not tensor parallel")
    synchronised = [n for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    if synchronised:
        raise ConfigurationError("model", synchronised[0], "SyncBatchNorm communicates in every step; use BatchNorm")
    cadence = args.save_strategy == SaveStrategy.STEPS and args.save_steps >= 1
    if cadence and args.save_steps % args.local_steps:
        remedy = f"must be a multiple of local_steps={args.local_steps}: a round must be over to be saved"
        raise ConfigurationError("save_steps", args.save_steps, remedy)


def _agree(trainer: "MLOptTrainer", state) -> float:
    """
    Compares what all ranks must have in common, before the first collective that would hang or mix things up.

    Returns:
        `float`: The weight of this rank's model in the average.

    Raises:
        InputError: On every rank, with the field and what each has.
    """
    optimizer = unwrapped(trainer.optimizer)
    if not isinstance(optimizer, DOMO):
        kind = type(optimizer).__name__
        remedy = f"needs an optimizer with rounds, not {kind}; set mlopt_optim to domo or one of its relatives"
        raise ConfigurationError("local_steps", trainer.args.local_steps, remedy)
    own = {
        "local_steps": trainer.args.local_steps,
        "max_steps": state.max_steps,
        "variant": optimizer.param_groups[0]["variant"],
        "local_weights": trainer.args.local_weights,
        "parameters": [list(parameter.shape) for parameter in _parameters(optimizer)],
        "examples": len(trainer.train_dataset) if trainer.args.local_weights == "examples" else 1,
    }
    if ranks.world_size() == 1:
        return 1.0
    everyone: list[dict] = [None] * ranks.world_size()
    dist.all_gather_object(everyone, own)
    for field in own.keys() - {"examples"}:
        values = [other[field] for other in everyone]
        if any(value != values[0] for value in values):
            shown = "other shapes" if field == "parameters" else values
            raise InputError(f"{field}: the ranks disagree ({shown}); start all of them with the same")
    return own["examples"] / sum(other["examples"] for other in everyone)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, where accelerate has wrapped it."""
    return getattr(optimizer, "optimizer", optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _moves(name: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and name != "step"  # torch keeps that one on the CPU
