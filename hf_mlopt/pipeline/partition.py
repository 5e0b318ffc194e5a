"""Which layers go to which block: cutting a model, measuring its layers, balancing the blocks, and merging them."""

import time
from collections.abc import Sequence
from itertools import accumulate
from statistics import median

import torch
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.adapters import TESTED, adapter_of, cut
from hf_mlopt.pipeline.adapters.base import Block
from hf_mlopt.pipeline.self_test import self_test, state_kept, vector_jacobian_products


def split(model: nn.Module, bounds: Sequence[int], moe_aux: str = "exact", tied: str = "owner_lagged") -> list[Block]:
    """
    Cuts a model of transformers into blocks, without tracing and without copying its tensors.

    A family that our tests do not cover first has to pass [`~hf_mlopt.pipeline.self_test.self_test`].

    Args:
        model (`PreTrainedModel`): A causal language model with the layout of Llama or GPT-2, or a ViT or ResNet for
            image classification. It is not changed; drop it to free what this process does not train.
        bounds (`Sequence[int]`): Index of the first layer of every block, then the number of layers: `[0, 2, 5]` for
            two blocks. A ResNet counts its residual layers over all stages.
        moe_aux (`str`, *optional*, defaults to `"exact"`): Of a mixture of experts whose configuration has
            `output_router_logits`. `"exact"` carries the sums that the loss needs through all blocks, `"block"` adds
            the loss of each block alone.
        tied (`str`, *optional*, defaults to `"owner_lagged"`): Of an embedding that is tied to the head.
            `"owner_lagged"`: the head owns the weight, the first block has a copy ([`hf_mlopt.pipeline.tied`]).
            `"untie"`: both are trained, and `block.config` has `tie_word_embeddings=False`.

    Returns:
        `list[Block]`: The blocks in order.

    Raises:
        ConfigurationError: If the model cannot be cut, or not there.
    """
    adapter = adapter_of(model, moe_aux)
    blocks = cut(adapter, bounds, tied)
    if model.config.model_type not in TESTED:
        self_test(model, bounds, moe_aux=moe_aux, tied=tied)
    return blocks


def num_layers(model: nn.Module) -> int:
    """Number of layers that a model can be cut into."""
    return len(adapter_of(model).layers)


def merged_state_dict(states: list[dict], tied: tuple[str, str] | None = None) -> dict[str, torch.Tensor]:
    """
    State dict of the model from those of its blocks.

    Args:
        states (`list[dict[str, torch.Tensor]]`): `block.state_dict()` of every block, in order.
        tied (`tuple[str, str]`, *optional*): `block.tied` of any of them; the owner's weight then replaces the copy.

    Returns:
        `dict[str, torch.Tensor]`: What `model.load_state_dict` takes.

    Raises:
        InputError: If two blocks have a tensor of one name.
    """
    merged = {}
    for number, state in enumerate(states):
        twice = sorted(merged.keys() & state.keys())
        if twice:
            raise InputError(f"block {number} and one before it both have {twice[0]}: give each block's state once")
        merged |= state
    if tied is not None:
        copy, owner = tied
        merged[copy] = merged[owner]
    return merged


def layer_costs(
    model: nn.Module, batch_shape: Sequence[int] | None = None, repeats: int = 3
) -> list[tuple[float, float]]:
    """
    Measures the model layer by layer, each in a block of its own.

    The embedding counts with the first layer, norm, head and loss with the last; mask and rotary embeddings, which
    every block makes, are in every figure.

    Args:
        model (`PreTrainedModel`): In the mode and precision that is to be trained; as before afterwards.
        batch_shape (`Sequence[int]`, *optional*): `(batch, sequence)`, or `(batch, channels, height, width)`.
        repeats (`int`, *optional*, defaults to 3): Medians are over so many passes, after one that does not count.

    Returns:
        `list[tuple[float, float]]`: Seconds of the forward and of the backward of every layer.

    Raises:
        ConfigurationError: If `repeats` is not positive, or the model cannot be cut.
    """
    if repeats < 1:
        raise ConfigurationError("repeats", repeats, "must be at least 1")
    adapter = adapter_of(model)
    device = next(model.parameters()).device
    times = []
    with state_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        batch = {name: x.to(device) for name, x in adapter.random_batch(batch_shape).items()}
        blocks = cut(adapter, range(len(adapter.layers) + 1))
        for _ in range(repeats + 1):
            times.append(_time_blocks(blocks, batch, device))
    return [tuple(median(values) for values in zip(*layer, strict=True)) for layer in zip(*times[1:], strict=True)]


def _time_blocks(blocks: list[Block], batch: dict, device: torch.device) -> list[tuple[float, float]]:
    boundary, times = (), []
    for block in blocks:
        leaves = tuple(x.detach().requires_grad_() for x in boundary)
        start = _now(device)
        outputs = block(leaves, batch)
        middle = _now(device)
        cotangents = None if block.is_last else tuple(torch.ones_like(x) for x in outputs)
        trained = tuple(parameter for parameter in block.parameters() if parameter.requires_grad)
        vector_jacobian_products(outputs, cotangents, (*leaves, *trained))
        times.append((middle - start, _now(device) - middle))
        boundary = outputs
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def balance(costs: Sequence[tuple[float, float]], stages: int, recompute: bool) -> list[int]:
    """
    Bounds that make the slowest stage fastest, by dynamic programming over layers.

    A stage costs `f + b`, and `f` once more where it repeats forwards, which the last stage never does.

    Args:
        costs (`Sequence[tuple[float, float]]`): Forward and backward of every layer, in any unit ([`layer_costs`]).
        stages (`int`): K.
        recompute (`bool`): Whether stages repeat their forwards.

    Returns:
        `list[int]`: Bounds for [`split`].

    Raises:
        ConfigurationError: If there are more stages than layers, or fewer than one.
    """
    layers = len(costs)
    _check_stages(stages, layers)
    inner = [0.0, *accumulate(f + b + f * recompute for f, b in costs)]
    last = [0.0, *accumulate(f + b for f, b in costs)]
    slowest, cuts = inner, []  # slowest[j]: of the first j layers on the stages so far
    for stage in range(1, stages):
        sums = last if stage == stages - 1 else inner
        best = [
            min(((max(slowest[i], sums[j] - sums[i]), i) for i in range(stage, j)), default=(float("inf"), 0))
            for j in range(layers + 1)
        ]
        slowest = [time for time, _ in best]
        cuts.append([i for _, i in best])
    bounds = [layers]
    for cut_before in reversed(cuts):
        bounds.append(cut_before[bounds[-1]])
    return [0, *reversed(bounds)]


def even(layers: int, stages: int) -> list[int]:
    """
    Bounds of blocks with equally many layers; the first ones have one more where it does not divide.

    Raises:
        ConfigurationError: If there are more stages than layers, or fewer than one.
    """
    _check_stages(stages, layers)
    size, more = divmod(layers, stages)
    return [stage * size + min(stage, more) for stage in range(stages + 1)]


def _check_stages(stages: int, layers: int) -> None:
    if not 1 <= stages <= layers:
        raise ConfigurationError("stages", stages, f"must lie between 1 and {layers}, the number of layers")
