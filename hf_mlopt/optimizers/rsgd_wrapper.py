"""RSGD around any optimizer: the step that it proposes takes the place of lr times momentum."""

from collections.abc import Callable
from typing import Any

import torch

from hf_mlopt.optimizers.over_base import OptimizerOverBase, merge_base_args
from hf_mlopt.optimizers.rsgd import after_step, prepare_residual, require_residual, shift
from hf_mlopt.optimizers.two_points import evaluate_closure, wide


class RSGDWrapper(OptimizerOverBase):
    """
    Holds back part of every step of another optimizer: D = e + the step that `base` proposes at w, then as [`RSGD`].
    The abstract of v2 names Adam among its bases; **the rule is our reconstruction**, as there.

    Weight decay and everything else that `base` does are part of its step. One more copy of the parameters exists
    during `step()`.

    Args:
        params (iterable): Parameters or groups of them.
        lr (`float`): Learning rate of `base`.
        base (`str` or `type`, *optional*, defaults to `"AdamW"`): A `torch.optim.Optimizer`, or the name of one in
            `torch.optim`.
        base_args (`dict`, *optional*): Further keywords of it.
        residual (`float`, *optional*, defaults to 0.9): ρ, as in [`RSGD`].
        detach (`float`, *optional*, defaults to 0.3): λ, as in [`RSGD`].
        weight_decay (`float`, *optional*, defaults to 0.0): Of `base`.
        period (`int`, *optional*, defaults to 1): As in [`RSGD`].
        reset_period (`int`, *optional*, defaults to 0): As in [`RSGD`].
        eval_point (`str`, *optional*, defaults to `"x"`): As in [`RSGD`].

    Raises:
        ConfigurationError: A `ValueError` that names an option out of its range, or a base that is none.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor,
        base: str | type[torch.optim.Optimizer] = "AdamW",
        base_args: dict[str, Any] | None = None,
        residual: float = 0.9,
        detach: float = 0.3,
        weight_decay: float = 0.0,
        *,
        period: int = 1,
        reset_period: int = 0,
        eval_point: str = "x",
    ):
        require_residual(residual, detach, period, reset_period, eval_point)
        own = {
            "residual": residual,
            "detach": detach,
            "period": period,
            "reset_period": reset_period,
            "eval_point": eval_point,
            "local_step": 0,
        }
        shared = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, own, base, merge_base_args(base_args, shared))

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        One update of w.

        Raises:
            RuntimeError: At the evaluation point, or for a sparse gradient.
        """
        self._require_training_point("step()")
        loss = evaluate_closure(closure)
        trained = [self._trained(group) for group in self.param_groups]
        before = [[parameter.to(wide(parameter.dtype), copy=True) for parameter in group] for group in trained]
        self.step_base()
        for group, parameters, starts in zip(self.param_groups, trained, before, strict=True):
            for parameter, start in zip(parameters, starts, strict=True):
                prepare_residual(self.state[parameter], parameter, group, scale=1.0)
                _hold_back(parameter, start.sub_(parameter), self.state[parameter], group)
            after_step(self.state, group, [parameter for parameter in group["params"] if parameter in self.state])
        return loss

    def _to_evaluation_point(self, group: dict[str, Any]) -> None:
        shift(self.state, group, sign=1)

    def _to_training_point(self, group: dict[str, Any]) -> None:
        shift(self.state, group, sign=-1)


def _hold_back(w: torch.Tensor, proposed: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """e ← ρ (e + proposed), w ← w + (1-λ) (e_new - e_old); `w` has taken the whole step already."""
    if group["period"] > 1 and "pending" in state:
        state["pending"].add_(proposed)
    elif "residual" in state:
        e, rho = state["residual"], group["residual"]
        difference = proposed.mul_(rho).sub_(e, alpha=1 - rho)
        e.add_(difference)
        w.add_(difference, alpha=1 - group["detach"])
