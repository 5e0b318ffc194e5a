"""A block of a model: a shell of shallow copies that shares the model's own modules and has stand-ins for the rest."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError


Tensors = tuple[torch.Tensor, ...]
Batch = dict[str, torch.Tensor | int | None]


class PassThrough(nn.Module):
    """Stands where a block lacks a layer, an embedding, a norm or a head: returns its first argument."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return hidden_states


class Block(nn.Module):
    """
    Some consecutive layers of a model; the first block has the embedding as well, the last the head and the loss.

    Names of parameters and buffers are those of the model. Blocks share its modules and copy no tensor (but a tied
    embedding, see [`hf_mlopt.pipeline.tied`]): once the model and the other blocks are dropped, so is their memory.

    Args:
        shell (`PreTrainedModel`): The model with stand-ins for what is not in this block.
        is_first, is_last (`bool`): Whether it takes inputs of the model, and returns the loss.

    Attributes:
        tied (`tuple[str, str]`, *optional*): Name of the copy of a tied weight in the first block, and of its owner in
            the last one; the same at every block. `None` where nothing is tied across blocks.
    """

    def __init__(self, shell: nn.Module, is_first: bool, is_last: bool):
        super().__init__()
        self._modules = shell._modules  # so that names have no prefix
        object.__setattr__(self, "shell", shell)  # not a child: its children are ours
        self.is_first, self.is_last = is_first, is_last
        self.training = shell.training
        self.tied: tuple[str, str] | None = None

    @property
    def config(self):
        """The configuration to save with the merged state dict."""
        return self.shell.config

    def train(self, mode: bool = True) -> "Block":
        self.shell.training = mode
        return super().train(mode)

    def forward(self, boundary: Tensors, batch: Batch) -> Tensors:
        """
        Args:
            boundary (`tuple[torch.Tensor]`): What the block before returned; empty at the first.
            batch (`dict`): The batch, the same at every block: `input_ids` or `pixel_values`, `attention_mask`,
                `labels`, `num_items_in_batch`, ...

        Returns:
            `tuple[torch.Tensor]`: What the next block takes, hidden states first; at the last `(loss, logits)`, where
            the loss is a mean over the batch, or a sum divided by `num_items_in_batch` if that is given.

        Raises:
            InputError: If a tensor that this block needs is missing.
        """
        raise NotImplementedError

    def of_batch(self, batch: Batch, name: str) -> torch.Tensor:
        if batch.get(name) is None:
            given = sorted(key for key, value in batch.items() if value is not None)
            raise InputError(f"{name} is missing: this block of the pipeline needs it, and the batch has {given}")
        return batch[name]

    def from_before(self, boundary: Tensors, number: int) -> Tensors:
        if len(boundary) != (0 if self.is_first else number):
            raise InputError(
                f"{len(boundary)} tensors came from the block before, and {0 if self.is_first else number} are "
                "expected: every block must come from one split of one model"
            )
        return boundary


class Adapter:
    """
    What is known of one family: where its layers are, and what only the first and only the last block has.

    Args:
        model (`PreTrainedModel`): The model to cut; never changed.

    Attributes:
        layers (`list[str]`): Qualified names of the layers, in order.
        inputs, outputs (`dict[str, nn.Module]`): Qualified names of what stands before and after the layers, with what
            replaces it in blocks that do not have it.
    """

    layers: list[str]
    inputs: dict[str, nn.Module]
    outputs: dict[str, nn.Module]

    def __init__(self, model: nn.Module):
        self.model = model

    def block(self, shell: nn.Module, start: int, stop: int) -> Block:
        """The block of layers `start` to `stop` around its shell."""
        raise NotImplementedError

    @property
    def carries_loss(self) -> bool:
        """Whether part of the loss is summed over blocks."""
        return False

    def check_cut(self, index: int) -> None:
        """Raises [`ConfigurationError`] if the model must not be cut before layer `index`."""

    def random_batch(self, shape: Sequence[int] | None = None) -> Batch:
        """A batch of `shape` (a small one by default) on the CPU, padded where the family knows padding."""
        raise NotImplementedError

    def cut(self, bounds: Sequence[int]) -> list[Block]:
        """
        Args:
            bounds (`Sequence[int]`): Index of the first layer of every block, then the number of layers.

        Returns:
            `list[Block]`: The blocks in order.

        Raises:
            ConfigurationError: If the bounds do not rise from 0 to the number of layers, or lie where the model must
                not be cut.
        """
        bounds = list(bounds)
        self._check_bounds(bounds)
        blocks = []
        for start, stop in pairwise(bounds):
            absent = {name: PassThrough() for name in (*self.layers[:start], *self.layers[stop:])}
            if start > 0:
                absent |= self.inputs
            if stop < len(self.layers):
                absent |= self.outputs
            blocks.append(self.block(_shell(self.model, absent), start, stop))
        return blocks

    def _check_bounds(self, bounds: list) -> None:
        whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
        if not whole or bounds[:1] != [0] or bounds[-1:] != [len(self.layers)] or len(bounds) < 2:
            rising = False
        else:
            rising = all(first < second for first, second in pairwise(bounds))
        if not rising:
            raise ConfigurationError(
                "bounds", bounds, f"must be whole numbers that rise from 0 to {len(self.layers)}, the number of layers"
            )
        for bound in bounds[1:-1]:
            self.check_cut(bound)


def _shell(module: nn.Module | None, absent: dict[str, nn.Module], prefix: str = "") -> nn.Module | None:
    """A module with stand-ins for some descendants: shallow copies along their paths, the originals elsewhere."""
    if prefix in absent:
        return absent[prefix]
    below = f"{prefix}." if prefix else ""
    if not any(name.startswith(below) for name in absent):
        return module
    shell = copy.copy(module)
    shell._modules = {name: _shell(child, absent, below + name) for name, child in module._modules.items()}
    return shell
