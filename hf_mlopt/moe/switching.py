"""Which experts implementation a model runs, and putting another one in its place for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.errors import InputError
from hf_mlopt.moe.layers import MoELayer


# An eager body hides the input of `down_proj`, so an eager model is observed through batched_mm.
_DELEGATES = {"grouped_mm": "grouped_mm", "batched_mm": "batched_mm", "eager": "batched_mm"}


def delegate_name(layer: MoELayer) -> str:
    """The registered implementation that an observed layer runs on."""
    active = layer.experts.config._experts_implementation
    if active not in _DELEGATES:
        raise InputError(
            f"{layer.name}: experts implementation {active!r} cannot be observed; call "
            'model.set_experts_implementation("grouped_mm") first.'
        )
    return _DELEGATES[active]


@contextmanager
def switched(modules: list[nn.Module], function: Callable) -> Iterator[None]:
    """Runs the given experts through `function`, by name through the registry, and restores what was there."""
    configs = {id(module.config): module.config for module in modules}.values()
    before = [(config, config._experts_implementation) for config in configs]
    name = f"hf_mlopt_observe_{id(function)}"
    ALL_EXPERTS_FUNCTIONS[name] = function
    try:
        for config in configs:
            config._experts_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
        del ALL_EXPERTS_FUNCTIONS[name]
