"""What an optimizer keeps per parameter, as groups of a message."""

from collections.abc import Mapping

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms.message import Group


_PREFIX = "optimizer."


def optimizer_groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, Group]:
    """
    Copies of an optimizer's state, one group `optimizer.KEY` for each key.

    Args:
        optimizer (`torch.optim.Optimizer`): After its steps.
        parameters (`Mapping[str, torch.Tensor]`): Name to parameter.

    Raises:
        ConfigurationError: If it keeps something else than tensors.
    """
    groups = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                kind = type(optimizer).__name__
                remedy = f"{kind} keeps {key!r} as {type(value).__name__}; only tensors can be kept: take reset"
                raise ConfigurationError("optimizer_state", "keep", remedy)
            groups.setdefault(_PREFIX + key, {})[name] = value.detach().to("cpu", copy=True)
    return groups


def load_optimizer_groups(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], groups: Mapping[str, Group]
) -> None:
    """
    Has an optimizer that has made no step yet go on from what [`optimizer_groups`] took.

    Args:
        optimizer (`torch.optim.Optimizer`): Freshly made.
        parameters (`Mapping[str, torch.Tensor]`): Name to parameter.
        groups (`Mapping[str, Group]`): Those of another name are left alone.
    """
    on_device = any(one.get("fused") or one.get("capturable") for one in optimizer.param_groups)
    for group, tensors in groups.items():
        if group.startswith(_PREFIX):
            for name, tensor in tensors.items():
                parameter = parameters[name]
                # Counts of steps are where torch makes them: on the CPU, unless the step is one kernel.
                is_beside = tensor.dim() > 0 or on_device
                value = tensor.to(parameter.device, copy=True) if is_beside else tensor.clone()
                optimizer.state[parameter][group.removeprefix(_PREFIX)] = value
