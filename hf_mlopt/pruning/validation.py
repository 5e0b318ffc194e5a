"""Everything that can be refused before the first forward pass. Works on a model without weights (meta device)."""

import torch
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import MoELayer, decoder_layers, moe_layers
from hf_mlopt.moe.switching import delegate_name
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.grid import sparsity_grid
from hf_mlopt.pruning.patterns import num_pruned
from hf_mlopt.pruning.removal import refuse_removal
from hf_mlopt.pruning.targets import expert_targets, linear_layers


def validate(model: nn.Module, config: PruningConfig) -> list[MoELayer]:
    """
    Checks that `config` can be carried out on `model`.

    Returns:
        `list[MoELayer]`: The mixture-of-experts layers.

    Raises:
        InputError: For a dense model, an unknown layout of experts, a quantized checkpoint, or a pattern that does
            not fit the input width of a tensor (which is named).
    """
    layers = moe_layers(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("the checkpoint is quantized (quantization_config); prune the unquantized weights.")
    for name, width, dtype in _widths(model, layers, config):
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise InputError(f"{name} is stored as {dtype}; prune the unquantized weights.")
        if config.n_of_m is not None and width % config.n_of_m[1]:
            raise ConfigurationError(
                "pattern", config.pattern, f"{config.n_of_m[1]} does not divide the input width {width} of {name}"
            )
        if config.sparsity and num_pruned(config.sparsity, width) == 0:
            raise ConfigurationError(
                "sparsity", config.sparsity, f"removes nothing from rows of {width} inputs in {name}"
            )
    for layer in layers:
        if layer.is_fused:
            delegate_name(layer)
        if config.allocation == "load":
            sparsity_grid(config.sparsity, {target.weight_EOD.shape[-1] for target in expert_targets(layer)})
    if config.drop_experts:
        refuse_removal(model, layers, config.drop_experts)
    return layers


def check_finite_weights(model: nn.Module) -> None:
    """Raises `InputError` naming the first parameter that holds NaN or Inf."""
    for name, parameter in model.named_parameters():
        require_finite(name, parameter)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raises `InputError` naming the tensor if it holds NaN or Inf."""
    if weight.is_floating_point() and not is_finite(weight):
        raise InputError(f"{name} holds NaN or Inf; the checkpoint is damaged or was converted wrongly.")


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor is free of NaN and Inf."""
    if value.numel() == 0:
        return True
    smallest, largest = value.aminmax()  # NaN wins over any number; makes no copy, as a sum in float32 would
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


def _widths(model: nn.Module, layers: list[MoELayer], config: PruningConfig):
    for layer in layers:
        for target in expert_targets(layer):
            yield target.name, target.weight_EOD.shape[-1], target.weight_EOD.dtype
    if config.scope == "all-linear":
        prefix, decoders = decoder_layers(model, layers)
        by_index = {layer.index: layer for layer in layers}
        for index, decoder in enumerate(decoders):
            for name, linear in linear_layers(decoder, f"{prefix}.{index}", by_index.get(index)).items():
                yield f"{name}.weight", linear.in_features, linear.weight.dtype
