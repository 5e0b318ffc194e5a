"""Adapters on a pruned model that change nothing where it is zero."""

from types import MethodType

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.training.callbacks import MIN_SPARSITY, sparsity_of


def mask_adapters(model: PeftModel) -> PeftModel:
    """
    Has the adapters of expert matrices (`target_parameters` of peft's `LoraConfig`) leave zeros as they are: what a
    token is multiplied by is W + (W != 0) * scaling * B A. Once is enough; a second call does nothing.

    Args:
        model ([`~peft.PeftModel`]): With adapters; changed in place.

    Returns:
        [`~peft.PeftModel`]: The same.

    Raises:
        InputError: If a pruned `nn.Linear` has an adapter, which adds to its output and cannot be masked.
    """
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            module.get_delta_weight = MethodType(_masked_delta, module)
        elif isinstance(module, LoraLayer) and sparsity_of(module.get_base_layer().weight) >= MIN_SPARSITY:
            raise InputError(
                f"lora: {name} is pruned, and an adapter of a linear layer fills its zeros; leave it out of "
                "target_modules, or name its weight in target_parameters"
            )
    for experts, wrapper in wrapped_experts(model).items():
        if not hasattr(wrapper, "zeros_hook"):
            wrapper.zeros_hook = experts.register_forward_pre_hook(_hold_zeros, prepend=True)
    return model


# peft has no place for a mask. While experts run, it makes `W + scaling * B A` of their parameters in a module that it
# registers as a torch parametrization, takes off again afterwards, and whose kind depends on version, number of
# adapters and dtype. A forward hook on that module, put there when the experts are called, masks what it gives and
# goes with it: nothing has to be undone after an exception or a recomputation, and the mask is read off the frozen
# weight, so that nothing has to be kept in step with it. It must come before anything that reads the weights, as peft
# has torch cache them for the duration of the call.
def _hold_zeros(experts: nn.Module, args) -> None:
    for parametrizations in getattr(experts, "parametrizations", {}).values():
        for made_by_peft in parametrizations:
            made_by_peft.register_forward_hook(_mask_update)


def _mask_update(_, weights: tuple[torch.Tensor], updated: torch.Tensor) -> torch.Tensor:
    return updated.masked_fill_(weights[0] == 0, 0)


def _masked_delta(wrapper: ParamWrapper, *args, **kwargs) -> torch.Tensor:
    delta = type(wrapper).get_delta_weight(wrapper, *args, **kwargs)
    return delta.masked_fill(wrapper.get_param() == 0, 0)


def wrapped_experts(model: nn.Module) -> dict[nn.Module, ParamWrapper]:
    """Fused experts, each with the outermost of the wrappers, one a parameter, that peft has put round them."""
    wrapped = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            wrapped.setdefault(module.get_base_layer(), module)
    return wrapped
