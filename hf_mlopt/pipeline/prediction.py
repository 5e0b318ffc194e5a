"""Weights expected some updates ahead, for the forward pass only."""

from typing import Literal

import torch
from torch import nn


class Prediction:
    r"""
    Forwards with the weights that the backward of the same batch is expected to see.

    With s updates to come and the last update Δ = w - w_prev: `momentum` takes ŵ = w + Δ β (1 - β^s) / (1 - β), which
    is what momentum SGD still has to make of Δ (the form with Δ is ours, and needs no access to the optimizer's
    buffers); `adam` takes ŵ = w + s Δ. Where the step is not finite, or its norm is above `limit` times that of the
    weights, w itself is used.

    Args:
        block (`nn.Module`): Its trainable parameters are predicted.
        optimizer (`torch.optim.Optimizer`): Whose groups hold β: `momentum`, or the first of `betas`.
        kind (`str`): `momentum` or `adam`.
        limit (`float`): Largest step allowed, relative to the norm of the weights.
    """

    def __init__(
        self, block: nn.Module, optimizer: torch.optim.Optimizer, kind: Literal["momentum", "adam"], limit: float
    ):
        self.kind, self.limit, self.fallbacks = kind, limit, 0
        self._named = {name: p for name, p in block.named_parameters() if p.requires_grad}
        self._updates = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._named.items()}
        self._has_moved = False
        self._optimizer = optimizer

    @torch.no_grad()
    def before_step(self) -> None:
        """To be called before each step of the optimizer; the copy becomes the update in [`after_step`]."""
        for name, parameter in self._named.items():
            self._updates[name].copy_(parameter)

    @torch.no_grad()
    def after_step(self) -> None:
        for name, parameter in self._named.items():
            self._updates[name].neg_().add_(parameter)
        self._has_moved = True

    def weights(self, ahead: int) -> dict[str, torch.Tensor] | None:
        """
        Args:
            ahead (`int`): Updates between the forward and the backward, s.

        Returns:
            `dict[str, torch.Tensor]`: New tensors by name (the graph leads back to the parameters where gradients are
            on); None where the weights are to be used as they are.
        """
        if ahead == 0 or not self._has_moved:
            return None
        factors = self._factors(ahead)
        if not self._is_allowed(factors):
            self.fallbacks += 1
            return None
        return {name: p + factors[name] * self._updates[name] for name, p in self._named.items()}

    def state_dict(self) -> dict:
        return {"updates": dict(self._updates), "has_moved": self._has_moved, "fallbacks": self.fallbacks}

    def load_state_dict(self, state: dict) -> None:
        for name, update in self._updates.items():
            update.copy_(state["updates"][name])
        self._has_moved, self.fallbacks = state["has_moved"], state["fallbacks"]

    def _factors(self, ahead: int) -> dict[str, float]:
        if self.kind == "adam":
            return dict.fromkeys(self._named, float(ahead))
        betas = {}
        for group in self._optimizer.param_groups:
            beta = group["momentum"] if "momentum" in group else group.get("betas", (0.0,))[0]
            factor = beta * (1 - beta**ahead) / (1 - beta) if beta < 1 else float(ahead)
            betas.update((id(parameter), factor) for parameter in group["params"])
        return {name: betas.get(id(parameter), 0.0) for name, parameter in self._named.items()}

    @torch.no_grad()
    def _is_allowed(self, factors: dict[str, float]) -> bool:
        if not self._named:
            return False
        steps = torch._foreach_norm(list(self._updates.values()))
        step = sum((factors[name] * norm.double()) ** 2 for name, norm in zip(factors, steps, strict=True))
        weight = sum(norm.double() ** 2 for norm in torch._foreach_norm(list(self._named.values())))
        return bool(step <= self.limit**2 * weight)  # false for NaN as well
