"""An optimizer that lets another one take the steps, and does something of its own before or after."""

import inspect
from typing import Any

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.optimizers.two_points import AT_LEAST_0, TwoPointOptimizer, require_each


class OptimizerOverBase(TwoPointOptimizer):
    """
    Both share the same groups, so that schedules and late groups reach either; the state of `base` lies within this
    one's, under `base`, so that one state dict holds all.

    Args:
        params (iterable): Parameters or groups of them.
        own (`dict`): Options of the outer optimizer.
        base (`str` or `type`): A `torch.optim.Optimizer`, or the name of one in `torch.optim`.
        base_args (`dict`): Its keywords.
    """

    def __init__(
        self, params, own: dict[str, Any], base: str | type[torch.optim.Optimizer], base_args: dict[str, Any]
    ):
        base = find_optimizer(base)
        if issubclass(base, TwoPointOptimizer):
            remedy = "trains and evaluates at points of its own, as what is around it does; take one of torch.optim"
            raise ConfigurationError("base", base.__name__, remedy)
        require_each({name: (base_args[name], AT_LEAST_0) for name in ("lr", "weight_decay")})
        shared = {name: base_args[name] for name in ("lr", "weight_decay")}
        super().__init__(params, {**own, **shared, "view": "train"})
        if base_args["weight_decay"] == 0 and "weight_decay" not in inspect.signature(base).parameters:
            base_args = {name: value for name, value in base_args.items() if name != "weight_decay"}
        try:
            self.base = base(self.param_groups, **base_args)
        except TypeError as error:
            raise ConfigurationError("base_args", base_args, f"{base.__name__} does not take them: {error}") from None
        self.base.param_groups = self.param_groups
        self.defaults = {**self.base.defaults, **self.defaults}

    def step_base(self) -> None:
        """One step of the base on the gradients as they are."""
        self.base.step()
        for parameter, state in self.base.state.items():
            self.state[parameter]["base"] = state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch has replaced both groups and state; the base follows.
        states = {parameter: own["base"] for parameter, own in self.state.items() if "base" in own}
        self.base.state.clear()
        self.base.state.update(states)
        self.base.__setstate__({"state": self.base.state, "param_groups": self.param_groups})


def find_optimizer(base: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """
    The class that a name stands for.

    Raises:
        ConfigurationError: If it is no optimizer of `torch.optim`, with those that are.
    """
    found = getattr(torch.optim, base, None) if isinstance(base, str) else base
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        names = (name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type))
        known = [name for name in names if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)]
        raise ConfigurationError("base", base, f"must be an optimizer class or one of {', '.join(known)}")
    return found


def merge_base_args(base_args: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
    """
    Keywords of a base: those given for it, and those that are options of the outer optimizer.

    Raises:
        ConfigurationError: If one is given in both places.
    """
    for name, value in (base_args or {}).items():
        if name in own:
            raise ConfigurationError(f"base_args.{name}", value, f"is an option of its own: {name}")
    return {**(base_args or {}), **own}
