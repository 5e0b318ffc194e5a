"""The momentum of the sites' SGD where the server averages it (`local_state="average"` of the DOMO family)."""

from collections.abc import Mapping

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Group


_GROUP, _KEY = "local_momentum", "momentum_buffer"


def load_local_momentum(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], message: Message
) -> None:
    """Has an optimizer begin with the momentum of the message, if it holds one."""
    for name, momentum in message.groups.get(_GROUP, {}).items():
        parameter = parameters[name]
        optimizer.state[parameter][_KEY] = momentum.to(parameter.device, parameter.dtype, copy=True)


def local_momentum(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], message: Message
) -> dict[str, Group]:
    """
    The group of the reply, in the dtypes of the message; none where the message has none.

    Raises:
        ConfigurationError: If the optimizer has no momentum.
    """
    sent = message.groups.get(_GROUP)
    if sent is None:
        return {}
    if not any(group.get("momentum") for group in optimizer.param_groups):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise ConfigurationError("mlopt_optim", kind, "has no momentum to average; take sgd with a momentum")
    momenta = {}
    for name, like in sent.items():  # a parameter that no step has used has none
        momentum = optimizer.state.get(parameters[name], {}).get(_KEY)
        zeros = torch.zeros_like(like)
        momenta[name] = zeros if momentum is None else momentum.detach().to("cpu", like.dtype, copy=True)
    return {_GROUP: momenta}
