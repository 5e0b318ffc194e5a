"""What RSGD and DOMO share: parameters that stand at one point while training and at another while evaluating."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hf_mlopt.errors import ConfigurationError


class TwoPointOptimizer(torch.optim.Optimizer):
    """
    An optimizer whose `eval()` moves the parameters to the point to be evaluated and saved, and whose `train()` moves
    them back. Every group remembers in `view` where its parameters stand, so a checkpoint knows it as well.

    A subclass gives `_to_evaluation_point(group)` and `_to_training_point(group)`.
    """

    def __init__(self, params, defaults: dict[str, Any]):
        self._before_switch: OrderedDict[int, Callable[[], None]] = OrderedDict()
        super().__init__(params, defaults)

    def register_switch_pre_hook(self, hook: Callable[[], None]) -> RemovableHandle:
        """
        Has something called before `eval()` or `train()` moves the parameters, so that whoever holds them elsewhere
        for the time of a backward pass can bring them back first.

        Args:
            hook (`Callable`): Called without arguments.

        Returns:
            `RemovableHandle`: Its `remove()` ends it.
        """
        handle = RemovableHandle(self._before_switch)
        self._before_switch[handle.id] = hook
        return handle

    def eval(self) -> None:
        """Moves the parameters to the evaluation point; does nothing if they are there."""
        self._switch("eval", self._to_evaluation_point)

    def train(self) -> None:
        """Moves the parameters to the training point; does nothing if they are there."""
        self._switch("train", self._to_training_point)

    @torch.no_grad()
    def _switch(self, view: str, move: Callable[[dict[str, Any]], None]) -> None:
        if all(group["view"] == view for group in self.param_groups):
            return
        for hook in self._before_switch.values():
            hook()
        for group in self.param_groups:
            if group["view"] != view:
                move(group)
                group["view"] = view

    def _require_training_point(self, method: str) -> None:
        if any(group["view"] != "train" for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.{method} at the evaluation point; call optimizer.train() before the forward "
                "pass, so that the gradient belongs to the training point"
            )

    def _trained(self, group: dict[str, Any]) -> list[torch.nn.Parameter]:
        """Parameters with a gradient; refuses sparse ones, as the state is dense anyway."""
        found = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in found:
            if parameter.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; use an embedding with sparse=False"
                )
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("view", self.param_groups[0]["view"] if self.param_groups else "train")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but a state keeps the dtype it was saved in: torch casts it to that of its parameter."""
        super().load_state_dict(state_dict)
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, parameter in zip(saved_group["params"], group["params"], strict=True):
                if index in state_dict["state"]:
                    _restore_dtypes(self.state[parameter], state_dict["state"][index])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_before_switch", OrderedDict())  # as torch does with hooks of its own
        for group in self.param_groups:  # a state dict of before an option existed
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _restore_dtypes(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, dict):
            _restore_dtypes(loaded[name], value)
        elif isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
            loaded[name] = value.to(device=loaded[name].device, dtype=value.dtype, copy=True)


def evaluate_closure(closure: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
    """The loss of a closure, called once and with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state of a parameter: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def zeros_of(parameter: torch.Tensor) -> torch.Tensor:
    """A state that begins at zero, at least float32."""
    return torch.zeros_like(parameter, dtype=wide(parameter.dtype), memory_format=torch.preserve_format)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A view of complex numbers as pairs of real ones; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def add_scaled(
    targets: list[torch.Tensor], values: list[torch.Tensor], lr: float | torch.Tensor, factor: float
) -> None:
    """targets += lr * factor * values, in place."""
    if isinstance(lr, torch.Tensor):  # as a number it would have to be fetched from its device
        torch._foreach_add_(targets, torch._foreach_mul(values, lr * factor))
    else:
        torch._foreach_add_(targets, values, alpha=lr * factor)


def require(name: str, value: object, allowed: str, is_fine: bool) -> None:
    """Raises [`ConfigurationError`] (a `ValueError`) unless a hyper-parameter is in its range."""
    if not is_fine:
        raise ConfigurationError(name, value, allowed)


def require_each(options: dict[str, tuple[object, str]]) -> None:
    """
    Checks hyper-parameters against the ranges of the field.

    Args:
        options (`dict`): Name to its value and range, a key of `_RANGES`.
    """
    for name, (value, allowed) in options.items():
        require(name, value, f"must be {allowed}", _RANGES[allowed](value))


def require_choice(name: str, value: object, choices: Iterator[str]) -> None:
    """Raises [`ConfigurationError`] with the choices unless `value` is one of them."""
    choices = list(choices)
    require(name, value, f"must be one of {', '.join(choices)}", value in choices)


AT_LEAST_0 = "a number of at least 0"
ABOVE_0 = "a number above 0"
BELOW_1 = "at least 0 and below 1"
UP_TO_1 = "between 0 and 1"
COUNT_FROM_0 = "a whole number of at least 0"
COUNT_FROM_1 = "a whole number of at least 1"

_INFINITY = float("inf")
_RANGES = {
    AT_LEAST_0: lambda value: 0 <= value < _INFINITY,
    ABOVE_0: lambda value: 0 < value < _INFINITY,
    BELOW_1: lambda value: 0 <= value < 1,
    UP_TO_1: lambda value: 0 <= value <= 1,
    COUNT_FROM_0: lambda value: value >= 0 and value % 1 == 0,
    COUNT_FROM_1: lambda value: value >= 1 and value % 1 == 0,
}
