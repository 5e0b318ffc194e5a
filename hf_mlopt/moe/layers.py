"""
Finds the mixture-of-experts layers of a model and gives their weights one view, whatever the family's layout.

Layouts are recognised by structure (instance attributes and shapes), never by class name: maps keyed by class name
went stale with every release of transformers.
"""

# E experts   H hidden   I expert intermediate   O output features   D input features

import re
from dataclasses import dataclass

import torch
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.moe.names import EXPERT_COUNT_KEYS, TOP_K_KEYS


_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """
    One mixture-of-experts layer of a model.

    Args:
        index (`int`): Index of the decoder layer it stands in.
        name (`str`): Qualified name of the experts module, e.g. `"model.layers.0.mlp.experts"`.
        block (`nn.Module`): The module that holds router, experts and shared experts.
        experts (`nn.Module`): Fused experts (3-D parameters) or a `ModuleList` of experts.
        router (`nn.Module`): Chooses the experts; never pruned.
        num_experts (`int`): Routed experts.
        top_k (`int`): Experts a token is sent to.
        projections (`dict[str, str]`): Projection name to the tensor it reads: `"hidden"` (the block's input) or
            `"intermediate"` (the activation inside the expert).
    """

    index: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    num_experts: int
    top_k: int
    projections: dict[str, str]

    @property
    def is_fused(self) -> bool:
        return not isinstance(self.experts, nn.ModuleList)

    def weight(self, expert: int, projection: str) -> torch.Tensor:
        """The matrix of one expert as a view, `[output, input]`, whatever way the family stores it."""
        if self.is_fused:
            return self.stacked(projection)[expert]
        return getattr(self.experts[expert], projection).weight.data

    def stacked(self, projection: str) -> torch.Tensor:
        """The matrices of all experts of a fused layer as a view, `[experts, output, input]`."""
        if not self.is_fused:
            raise InputError(f"{self.name}: experts in a ModuleList have no stacked view, use weight(expert, name).")
        weight_EOD = getattr(self.experts, projection).data
        return weight_EOD.transpose(-1, -2) if self.experts.is_transposed else weight_EOD

    def matrices(self, projection: str) -> tuple[slice, ...]:
        """The output rows of each matrix of a projection: gate and up are stored as one, joined or interleaved."""
        if projection != "gate_up_proj":
            return (slice(None),)
        if not self.experts.is_concatenated:
            return slice(0, None, 2), slice(1, None, 2)
        half = self.stacked(projection).shape[1] // 2
        return slice(0, half), slice(half, None)

    def input_size(self, source: str) -> int:
        """Width of `"hidden"` or `"intermediate"`."""
        projection = next(name for name, reads in self.projections.items() if reads == source)
        return self.weight(0, projection).shape[-1]


def text_config(model: nn.Module):
    """The configuration of the decoder, also inside a multimodal model; None for a bare module."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config_value(config, keys) -> int | None:
    for holder in (config, getattr(config, "ffn_config", None)):
        for key in keys:
            value = getattr(holder, key, None)
            if isinstance(value, int):
                return value
    return None


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """
    The mixture-of-experts layers of a model, in the order of its decoder layers.

    Args:
        model (`nn.Module`): Any causal language model; may live on the meta device.

    Raises:
        InputError: If the model holds no mixture of experts, or one whose layout is not understood (the message names
            the module).
    """
    config = text_config(model)
    modules = dict(model.named_modules())
    layers, unknown = [], []
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0], model)
        if _is_fused(module):
            layers.append(_fused_layer(name, module, parent, config))
        elif _is_module_list(module, parent):
            layers.append(_module_list_layer(name, module, parent, config))
        elif _looks_like_experts(module, config):
            unknown.append(name)
    model_type = getattr(config, "model_type", type(model).__name__)
    if unknown:
        module = modules[unknown[0]]
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        raise InputError(
            f"{unknown[0]} ({type(module).__name__}, model type {model_type!r}): unknown layout of experts "
            f"{shapes}. Understood are transformers' fused experts (@use_experts_implementation) and a ModuleList of "
            "experts with a linear router."
        )
    if not layers:
        if (_config_value(config, EXPERT_COUNT_KEYS) or 0) > 1:
            named = next((name for name in modules if "expert" in name.rpartition(".")[2]), "no module named experts")
            raise InputError(
                f"model type {model_type!r} has {_config_value(config, EXPERT_COUNT_KEYS)} experts in a layout "
                f"that is not understood ({named}); understood are transformers' fused experts and a ModuleList of "
                "experts."
            )
        raise InputError(
            f"model type {model_type!r} is a dense model, with no experts in it; give a mixture of experts."
        )
    _refuse_ambiguous(layers)
    return sorted(layers, key=lambda layer: layer.index)


def _refuse_ambiguous(layers: list[MoELayer]) -> None:
    first = layers[0]
    seen = {}
    for layer in layers:
        twin = seen.setdefault(layer.index, layer)
        if twin is not layer:
            raise InputError(f"{layer.name} and {twin.name} stand in one decoder layer; that is not understood.")
        if _layer_prefix(layer.name) != _layer_prefix(first.name):
            raise InputError(f"{first.name} and {layer.name} stand in different stacks; that is not understood.")


def decoder_layers(model: nn.Module, layers: list[MoELayer]) -> tuple[str, nn.ModuleList]:
    """The decoder layers that hold the given mixtures of experts, and their qualified name, e.g. `"model.layers"`."""
    prefix = _layer_prefix(layers[0].name)
    return prefix, model.get_submodule(prefix)


def _layer_prefix(name: str) -> str:
    return re.match(r"(.*?)\.\d+\.", name).group(1)


def _layer_index(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise InputError(f"{name}: experts outside a list of decoder layers are not understood.")
    return int(found.group(1))


def _is_fused(module: nn.Module) -> bool:
    described = all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return described and all(getattr(getattr(module, key, None), "ndim", 0) == 3 for key in (up, "down_proj"))


def _fused_layer(name: str, module: nn.Module, parent: nn.Module, config) -> MoELayer:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return MoELayer(
        index=_layer_index(name),
        name=name,
        block=parent,
        experts=module,
        router=_router(name, parent),
        num_experts=module.down_proj.shape[0],
        top_k=_config_value(config, TOP_K_KEYS),
        projections={up: "hidden", "down_proj": "intermediate"},
    )


def _router(name: str, parent: nn.Module) -> nn.Module:
    for key in _ROUTER_NAMES:
        if isinstance(getattr(parent, key, None), nn.Module):
            return getattr(parent, key)
    raise InputError(f"{name}: no router named {' or '.join(_ROUTER_NAMES)} beside the experts.")


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {key: child for key, child in module.named_children() if isinstance(child, nn.Linear)}


def _is_module_list(module: nn.Module, parent: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    router = next((getattr(parent, key) for key in _ROUTER_NAMES if hasattr(parent, key)), None)
    routed = isinstance(router, nn.Linear) and router.out_features == len(module)
    return routed and all(len(_linears(expert)) in (2, 3) for expert in module)


def _module_list_layer(name: str, module: nn.ModuleList, parent: nn.Module, config) -> MoELayer:
    linears = _linears(module[0])
    hidden = parent.gate.in_features if hasattr(parent, "gate") else parent.router.in_features
    # The down projection writes the hidden size; where expert and hidden width agree, only its name tells.
    down = [key for key, linear in linears.items() if linear.out_features == hidden]
    down = down if len(down) == 1 else [key for key in linears if key in ("w2", "down_proj", "wo", "fc2")]
    if len(down) != 1:
        raise InputError(f"{name}: cannot tell the down projection among {sorted(linears)}.")
    return MoELayer(
        index=_layer_index(name),
        name=name,
        block=parent,
        experts=module,
        router=_router(name, parent),
        num_experts=len(module),
        top_k=_config_value(config, TOP_K_KEYS),
        projections={key: "intermediate" if key == down[0] else "hidden" for key in linears},
    )


def _looks_like_experts(module: nn.Module, config) -> bool:
    """A stack of matrices, one an expert, in a module nobody above recognised."""
    count = _config_value(config, EXPERT_COUNT_KEYS)
    return bool(count) and any(
        parameter.ndim == 3 and parameter.shape[0] == count and min(parameter.shape[1:]) > 1
        for parameter in module.parameters(recurse=False)
    )
