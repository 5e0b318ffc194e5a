"""Loss and gradients of the blocks against those of the whole model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.evaluation.undisturbed import undisturbed
from hf_mlopt.pipeline.adapters import adapter_of, cut
from hf_mlopt.pipeline.adapters.base import Batch, Block, Tensors
from hf_mlopt.pipeline.tied import embedding_and_head


def self_test(
    model: nn.Module,
    bounds: Sequence[int],
    batch: Batch | None = None,
    *,
    moe_aux: str = "exact",
    tied: str = "owner_lagged",
) -> None:
    """
    Compares a split model with the whole one: one batch, dropout off, batch normalization as in training.

    Equal means bit for bit on the CPU where nothing is summed in another order, and within rounding for a tied
    embedding, for a load-balancing loss that blocks carry, and on a GPU. The model is as before afterwards: gradients,
    buffers, modes, configuration and random numbers.

    Args:
        model (`PreTrainedModel`): The whole model.
        bounds (`Sequence[int]`): See [`hf_mlopt.pipeline.partition.split`].
        batch (`dict`, *optional*): Inputs and labels; random and padded by default.
        moe_aux (`str`, *optional*, defaults to `"exact"`): Of the split. With `"block"` the loss is another one by
            design, and the comparison leaves it out.
        tied (`str`, *optional*, defaults to `"owner_lagged"`): Of the split.

    Raises:
        ConfigurationError: If the loss or a gradient differs; the message names the first parameter that does.
    """
    with undisturbed(model), state_kept(model), _router_loss_left_out(model, moe_aux == "block"):
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.train()
        adapter = adapter_of(model, moe_aux)
        device = next(model.parameters()).device
        batch = adapter.random_batch() if batch is None else dict(batch)
        batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        blocks = cut(adapter, bounds, tied)
        # The reference is the one block of the uncut model: it divides by `num_items_in_batch` where transformers'
        # ResNet would not.
        loss, gradients = loss_and_gradients(cut(adapter, [0, len(adapter.layers)]), batch)
        try:
            split_loss, split_gradients = loss_and_gradients(blocks, batch)
        except Exception as error:
            raise _refused(model, f"its blocks fail with {type(error).__name__}: {error}") from error
    _, head = embedding_and_head(model)
    if head is not None and len(blocks) > 1:
        names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
        embedding = f"{names[id(model.get_input_embeddings())]}.weight"
        if embedding in split_gradients:
            split_gradients[embedding] = split_gradients[embedding] + split_gradients.pop(f"{names[id(head)]}.weight")
    is_exact = device.type == "cpu" and head is None and not adapter.carries_loss
    _compare(model, {"the loss": loss, **gradients}, {"the loss": split_loss, **split_gradients}, is_exact)


def loss_and_gradients(blocks: list[Block], batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    One pass through all blocks and back as stages make it: tensors are detached at every cut.

    Args:
        blocks (`list[Block]`): All blocks of a model.
        batch (`dict`): The batch.

    Returns:
        `tuple`: The detached loss, and the gradient of every trained parameter by name, zeros where there is none.
            `.grad` is left alone.
    """
    boundary, passes = (), []
    for block in blocks:
        leaves = tuple(x.detach().requires_grad_() for x in boundary)
        boundary = block(leaves, batch)
        passes.append((block, leaves, boundary))
    loss, gradients, cotangents = boundary[0].detach(), {}, None
    for block, leaves, outputs in reversed(passes):
        trained = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
        results = vector_jacobian_products(outputs, cotangents, (*leaves, *trained.values()))
        cotangents = results[: len(leaves)]
        gradients |= zip(trained, results[len(leaves) :], strict=True)
    return loss, gradients


def vector_jacobian_products(outputs: Tensors, cotangents: Tensors | None, inputs: Tensors) -> Tensors:
    """Gradients of inputs for the cotangents of a block's outputs (`None`: of its loss); zeros where there is none."""
    if cotangents is None:
        pairs = [(outputs[0], torch.ones_like(outputs[0]))]
    else:
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(x) for x in inputs)
    results = torch.autograd.grad([o for o, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True)
    return tuple(torch.zeros_like(x) if r is None else r for x, r in zip(inputs, results, strict=True))


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """
    On leaving, buffers have their values of before, and the configuration its kind of problem.

    A pass in training mode moves running statistics, and a loss of transformers writes down what its labels look like.
    """
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    problem_type = model.config.problem_type
    try:
        yield
    finally:
        buffers = dict(model.named_buffers())
        for name, value in values.items():
            buffers[name].copy_(value)
        model.config.problem_type = problem_type


@contextmanager
def _router_loss_left_out(model: nn.Module, leave_out: bool) -> Iterator[None]:
    before = getattr(model.config, "output_router_logits", None)
    if leave_out and before:
        model.config.output_router_logits = False
    try:
        yield
    finally:
        if leave_out and before:
            model.config.output_router_logits = before


def _compare(model: nn.Module, whole: dict, split: dict, is_exact: bool) -> None:
    missing = sorted(whole.keys() ^ split.keys())
    if missing:
        raise _refused(model, f"{missing[0]} is in the model or in its blocks, but not in both")
    largest = max((float(x.abs().max()) for name, x in whole.items() if name != "the loss" and x.numel()), default=0.0)
    for name, expected in whole.items():
        got = split[name]
        if torch.equal(got, expected):
            continue
        difference = float((got.float() - expected.float()).abs().max())
        rounding = max(1e-5, 8 * torch.finfo(expected.dtype).eps)
        # A gradient that is zero but for rounding, as of a key's bias, is measured by the largest of the model.
        allowed = rounding * float(expected.abs().max()) + (0.1 * rounding * largest if name != "the loss" else 0.0)
        if is_exact or not difference <= allowed:
            kind = name if name == "the loss" else f"the gradient of {name}"
            raise _refused(model, f"{kind} differs from that of the whole model by up to {difference:.3g}")


def _refused(model: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(
        "model",
        getattr(model.config, "model_type", type(model).__name__),
        f"{type(model).__name__} cannot be cut into a pipeline: {reason}; train it without one",
    )
