"""Callbacks shared by several methods."""

import torch
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class KeepZerosCallback(TrainerCallback):
    """
    Keeps the zeros of a pruned model through training: after every optimizer step, what was zero is zero again.

    The masks are read off the weights when training begins, after a checkpoint is loaded, so that nothing has to be
    saved. Gradients, momentum and weight decay are left alone. Not for weights that DeepSpeed ZeRO-3 partitions.

    Args:
        min_sparsity (`float`, *optional*, defaults to 0.05): Fraction of zeros from which a matrix counts as pruned.
            Below it lie padding rows of embeddings; a matrix of zeros only, such as a fresh LoRA adapter's, and
            vectors (biases, norms) are never held.
    """

    def __init__(self, min_sparsity: float = 0.05):
        self.min_sparsity = min_sparsity
        self._zeros: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._zeros = []
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() >= 2:
                zeros = parameter == 0
                if self.min_sparsity <= zeros.float().mean().item() < 1:
                    self._zeros.append((parameter, zeros))
        if not self._zeros:
            logger.warning("KeepZerosCallback found no pruned matrix in this model: nothing is held at zero.")

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for parameter, zeros in self._zeros:
            parameter.masked_fill_(zeros, 0)

    def on_train_end(self, args, state, control, **kwargs):
        self._zeros = []  # one byte per weight
