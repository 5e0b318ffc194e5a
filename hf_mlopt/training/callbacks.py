"""Callbacks shared by several methods."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

MIN_SPARSITY = 0.05  # zeros from which a matrix counts as pruned; fewer are padding rows of embeddings


class KeepZerosCallback(TrainerCallback):
    """
    Keeps the zeros of a pruned model through training: their gradients are zero, so that clipping does not see them,
    and after every optimizer step what was zero is zero again, whatever momentum and weight decay would do.

    The masks are read off the weights when training begins, after a checkpoint is loaded, so that nothing has to be
    saved. Under FSDP2 each rank masks its shards. Not for weights that DeepSpeed ZeRO-3 partitions.

    Args:
        min_sparsity (`float`, *optional*, defaults to 0.05): Fraction of zeros from which a matrix counts as pruned.
            Below it lie padding rows of embeddings. Stacked experts count with any zero; a matrix of zeros only, such
            as a fresh LoRA adapter's, and vectors (biases, norms) are never held.
    """

    def __init__(self, min_sparsity: float = MIN_SPARSITY):
        self.min_sparsity = min_sparsity
        self._zeros: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._hooks = []

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._forget()
        for module in model.modules():
            if isinstance(module, FSDPModule):  # a forward pass may have left whole weights, which are thrown away
                module.reshard()
        for parameter in model.parameters():
            if parameter.requires_grad and is_pruned(parameter, self.min_sparsity):
                zeros = _local(parameter) == 0
                self._zeros.append((parameter, zeros))
                self._hooks.append(_mask_gradient(parameter, zeros))
        if not self._zeros:
            logger.warning("KeepZerosCallback found no pruned matrix in this model: nothing is held at zero.")

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for parameter, zeros in self._zeros:
            _local(parameter).masked_fill_(zeros, 0)

    def on_train_end(self, args, state, control, **kwargs):
        self._forget()  # one byte per weight

    @property
    def zeros(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Of every parameter that is held: where, as booleans of the shape that this rank has of it."""
        return dict(self._zeros)

    @torch.no_grad()
    def violations(self) -> int:
        """Weights of this rank that were zero when training began and are not zero now."""
        return sum(int(((_local(parameter) != 0) & zeros).sum()) for parameter, zeros in self._zeros)

    def _forget(self):
        for hook in self._hooks:
            hook.remove()
        self._zeros, self._hooks = [], []


class EvaluationPointCallback(TrainerCallback):
    """Leaves a trained model at the point that is evaluated and saved, for optimizers that train at another."""

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        switch = getattr(optimizer, "eval", None)
        if callable(switch):
            switch()


def held_zeros(trainer: Trainer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The zeros that the callbacks of a Trainer hold."""
    holders = [one for one in trainer.callback_handler.callbacks if isinstance(one, KeepZerosCallback)]
    return {parameter: zeros for holder in holders for parameter, zeros in holder.zeros.items()}


def is_pruned(parameter: torch.Tensor, min_sparsity: float = MIN_SPARSITY) -> bool:
    """Whether the zeros of a parameter are those of pruning; see [`KeepZerosCallback`]."""
    if parameter.dim() < 2:
        return False
    sparsity = sparsity_of(parameter)
    return 0 < sparsity < 1 and (parameter.dim() == 3 or sparsity >= min_sparsity)


def sparsity_of(parameter: torch.Tensor) -> float:
    """Fraction of zeros, over the shards of all ranks where the parameter is sharded."""
    zeros = (parameter.detach() == 0).sum()  # a mean of means would be wrong where shards differ in size
    return (zeros.full_tensor() if isinstance(zeros, DTensor) else zeros).item() / max(parameter.numel(), 1)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mask_gradient(parameter: torch.nn.Parameter, zeros: torch.Tensor):
    """Keeps the gradient of zeros at zero. DDP reads gradients before they accumulate, FSDP writes its own after."""
    if not isinstance(parameter, DTensor):
        return parameter.register_hook(lambda gradient: gradient.masked_fill(zeros, 0))

    def mask(sharded: torch.nn.Parameter) -> None:
        _local(sharded.grad).masked_fill_(zeros, 0)

    return parameter.register_post_accumulate_grad_hook(mask)
