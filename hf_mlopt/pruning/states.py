"""The hidden states that travel from decoder layer to decoder layer, and the arguments each layer is called with."""

# B batch   S sequence   H hidden

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.moe.observation import SeenEnough


class States(list):
    """
    The input of the current layer for every batch, `[batch, length, hidden]`; the sweep replaces each by what it has
    become. `~streaming.states.DiskStates` does the same on disk.
    """

    def advance(self) -> None:
        """All of them are the input of the next layer now."""

    def forget_earlier(self) -> None:
        """Nobody will go back to an earlier layer."""

    def close(self) -> None:
        """They are not read again."""


class LayerCalls:
    """
    Calls one decoder layer at a time as the model would.

    The keyword arguments of a layer (masks, rotary embeddings) depend on the shape of the batch only, as batches hold
    no padding, and may differ from layer to layer, for example between full and sliding attention.
    """

    def __init__(self):
        self._arguments: dict[tuple[int, ...], list[tuple[tuple, dict]]] = {}

    def record(self, shape: torch.Size, calls: list[tuple[tuple, dict]]) -> None:
        self._arguments[tuple(shape)] = calls

    def knows(self, shape: torch.Size) -> bool:
        return tuple(shape) in self._arguments

    def __call__(self, index: int, layer: nn.Module, states_BSH: torch.Tensor) -> torch.Tensor:
        """Output of decoder layer `index` for `states_BSH`."""
        args, kwargs = self._arguments[tuple(states_BSH.shape[:2])][index]
        args, kwargs = _to(args, states_BSH.device), _to(kwargs, states_BSH.device)
        output = layer(states_BSH, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def embed(
    model: nn.Module, layers: nn.ModuleList, batches: list[torch.Tensor], device: torch.device, calls: LayerCalls
) -> Iterator[torch.Tensor]:
    """
    Embeds batches one after the other and records how the model calls its decoder layers.

    Args:
        model (`nn.Module`): The model, in evaluation mode; the decoder layers need no weights.
        layers (`nn.ModuleList`): Its decoder layers.
        batches (`list[torch.Tensor]`): Token ids, `[batch, length]`.
        device (`torch.device`): Where the states go.
        calls (`LayerCalls`): Is told the arguments of every layer for every shape of batch.

    Returns:
        `Iterator[torch.Tensor]`: The input of the first layer for each batch, `[batch, length, hidden]`.
    """
    home = model.get_input_embeddings().weight.device
    for batch in batches:
        # Some models scale or normalise the embedding before the first layer, so the model itself embeds.
        if calls.knows(batch.shape):
            recorded = _record(model, layers, batch.to(home), only_first=True)
        else:
            recorded = _record(model, layers, batch.to(home))
            _refuse_content(recorded, _record(model, layers, batch.flip(-1).to(home)), model)
            calls.record(batch.shape, [(args, kwargs) for _, args, kwargs in recorded])
        yield recorded[0][0].to(device)


def _refuse_content(recorded, of_other_tokens, model) -> None:
    """Raises where a layer is given more than hidden states and what follows from the shape of the batch."""
    for index, ((_, args, kwargs), (_, other_args, other_kwargs)) in enumerate(
        zip(recorded, of_other_tokens, strict=True)
    ):
        named = [*kwargs.items(), *((f"argument {place + 1}", value) for place, value in enumerate(args))]
        others = [*other_kwargs.values(), *other_args]
        for (name, value), other in zip(named, others, strict=True):
            if isinstance(value, dict) or not _same(value, other):
                raise InputError(
                    f"decoder layer {index} of {type(model).__name__} is given {name!r}, which carries content from "
                    "elsewhere in the model; running such a model layer by layer is not supported."
                )


def _same(value, other) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(value, other)
    if isinstance(value, (tuple, list)):
        return len(value) == len(other) and all(map(_same, value, other))
    # Caches and the like are made anew for each call: what counts is that they are of one kind.
    return type(value) is type(other) and (not isinstance(value, (int, float, str, bool)) or value == other)


@torch.no_grad()
def _record(model, layers, batch, only_first=False) -> list[tuple[torch.Tensor, tuple, dict]]:
    """What every decoder layer is called with, the layers themselves being passed over."""
    for as_tuple in (False, True):  # remote code may take the first element of what a layer returns
        recorded = []

        def recorder(as_tuple=as_tuple, recorded=recorded) -> Callable:
            def forward(hidden_BSH, *args, **kwargs):
                recorded.append((hidden_BSH, args, kwargs))
                if only_first:
                    raise SeenEnough
                return (hidden_BSH,) if as_tuple else hidden_BSH

            return forward

        try:
            with _shadowed(layers, recorder()):
                model.base_model(input_ids=batch, use_cache=False)
        except SeenEnough:
            return recorded
        except (ValueError, TypeError, IndexError, AttributeError):
            continue  # the model expects something else of a layer
        if len(recorded) == len(layers) and all(hidden.shape == recorded[0][0].shape for hidden, _, _ in recorded):
            return recorded
    raise InputError(f"{type(model).__name__} does not call its {len(layers)} decoder layers one after the other.")


@contextmanager
def _shadowed(layers: nn.ModuleList, forward: Callable) -> Iterator[None]:
    """Puts `forward` in the place of that of every layer, and back what stood there (the class's, or a patch)."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, patch in zip(layers, before, strict=True):
            if patch is None:
                del layer.forward
            else:
                layer.forward = patch


def _to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return {key: _to(item, device) for key, item in value.items()} if isinstance(value, dict) else value
