"""
Step-ahead: gradients are taken where the unsent part would lead, [Step-Ahead Error Feedback for Distributed Training
with Compressed Gradient](https://huggingface.co/papers/2008.05823), in the space of gradients.

The authors keep the error in units of an update; a hook sees gradients. An error e that is sent late moves the
weights by P e in all, where P is what the optimizer makes of a gradient in the end: lr for SGD, lr / (1 - momentum)
with momentum, lr / (√v + eps) for Adam, with e in v. So the shift is α P e (our
derivation; with plain lr it does not help under momentum).
"""

from collections.abc import Callable

import torch
from transformers.utils import logging

from hf_mlopt.communication.residuals import Residuals


logger = logging.get_logger(__name__)

Preconditioner = Callable[[torch.Tensor, dict, dict], torch.Tensor | float | None]


def reach(unsent: torch.Tensor, group: dict, state: dict) -> torch.Tensor | float | None:
    """
    P, by which a gradient that is sent late moves a parameter in the end.

    Adam counts a late gradient in v as well, so that it moves nothing far. Without it in v, P of an entry that has
    hardly been sent before would be lr / eps. RSGD holds a part of every step back, but gives all of it out in the
    end; so P of RSGD is that of its base.

    Args:
        unsent (`torch.Tensor`): e, in the shape of the parameter.
        group (`dict`): Its group of options in the optimizer.
        state (`dict`): Its state in the optimizer.

    Returns:
        `torch.Tensor` or `float`: None for an optimizer that is not known.
    """
    lr = -group["lr"] if group.get("maximize") else group["lr"]
    state = state.get("base", state)  # of an optimizer around another, such as RSGDWrapper
    if "betas" in group:
        if not state:
            return 0.0  # the first step has not been taken
        if "exp_avg_sq" not in state:
            return None
        beta = group["betas"][1]
        v = beta * state["exp_avg_sq"].float() + (1 - beta) * unsent.square()
        corrected = 1 - beta ** (float(state["step"]) + 1)
        return lr / ((v / corrected).sqrt() + group["eps"])
    if "momentum" in group and {"dampening", "residual"} & group.keys():  # SGD, RSGD; others have a scale of their own
        return lr * (1 - group.get("dampening", 0)) / (1 - group["momentum"])
    return None


class StepAhead:
    """
    Moves parameters to x - α P e and back to exactly x.

    Args:
        parameters (`dict[str, torch.nn.Parameter]`): By name.
        optimizer (`torch.optim.Optimizer`): Whose steps the shift anticipates.
        residuals (`Residuals`): e.
        coefficient (`float`): α.
        preconditioner (`Callable`, *optional*, defaults to [`reach`]): Gives P.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        residuals: Residuals,
        coefficient: float,
        preconditioner: Preconditioner = reach,
    ):
        self.parameters, self.optimizer, self.residuals = parameters, optimizer, residuals
        self.coefficient, self.preconditioner = coefficient, preconditioner
        self._clean: dict[str, torch.Tensor] | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the parameters are shifted."""
        return self._clean is not None

    @torch.no_grad()
    def go(self) -> None:
        """Shifts, unless that is done already."""
        if self.is_ahead or self.coefficient == 0:
            return
        self._clean = {}
        groups = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.parameters.items():
            unsent, group = self.residuals.get(name), groups.get(id(parameter))
            if unsent is None or group is None:
                continue
            unsent = unsent.to(parameter.device).view(parameter.shape)
            scale = self.preconditioner(unsent, group, self.optimizer.state.get(parameter, {}))
            if scale is None:
                kind = type(self.optimizer).__name__
                logger.warning_once(f"step-ahead does not know how far {kind} moves: error feedback is classic there.")
                continue
            # A copy, as adding the shift again would round otherwise on every rank and the replicas would part.
            self._clean[name] = parameter.detach().clone()
            parameter.sub_(unsent * scale, alpha=self.coefficient)

    @torch.no_grad()
    def back(self) -> None:
        """Restores, bit by bit."""
        for name, clean in (self._clean or {}).items():
            self.parameters[name].copy_(clean)
        self._clean = None
