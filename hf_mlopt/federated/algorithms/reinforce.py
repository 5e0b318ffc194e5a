"""REINFORCE over a window of rounds, with rewards from validation losses."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_mlopt.federated.algorithms.message import Group


@dataclass(frozen=True)
class Action:
    """
    What was drawn in a round, and what came of it.

    Args:
        round (`int`): r.
        state (`dict[str, list[float]]`): The policy's state in that round.
        z (`list[float]`): The draw.
        losses (`dict[str, float]`): L_k of the sites used, of the model as it was before the action.
        weights (`dict[str, float]`): Of the sites in the mean of losses.
        cost (`float`): Of the round's local training, in steps.
        reward (`float`, *optional*): ρ_{r+1}, once the losses of the next round are known; `None` also where they
            give none.
    """

    round: int
    state: dict[str, list[float]]
    z: list[float]
    losses: dict[str, float]
    weights: dict[str, float]
    cost: float
    reward: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, exactly."""
        return asdict(self)


def mean_losses(before: Mapping[str, float], now: Mapping[str, float], weights: Mapping[str, float]) -> tuple:
    """
    L_{r-1} and L_r over the sites present in both rounds, or else a change of sites would look like progress.

    Args:
        before (`Mapping[str, float]`): L_k of round r-1.
        now (`Mapping[str, float]`): L_k of round r.
        weights (`Mapping[str, float]`): Weights of the sites of round r, in any unit.

    Returns:
        `tuple[float, float]`: NaN where no site is in both.
    """
    common = [site for site in sorted(now) if site in before]
    total = sum(weights[site] for site in common)
    if not common:
        return math.nan, math.nan
    return tuple(sum(weights[site] * losses[site] for site in common) / total for losses in (before, now))


def relative_improvement(loss_before: float, loss_now: float) -> float | None:
    """
    `ρ_r = 1 - L_r / L_{r-1}`, the reward [Auto-FedRL](https://huggingface.co/papers/2203.06338) gives the action of
    round r-1.

    Returns:
        `float`, *optional*: `None` unless both are finite and above 0.
    """
    if not all(math.isfinite(loss) and loss > 0 for loss in (loss_before, loss_now)):
        return None
    return 1 - loss_now / loss_before


def advantages(actions: Sequence[Action], cost_weight: float) -> list[float]:
    """`ρ_t - κ cost_t / median cost`, less the mean of these over the window."""
    median = statistics.median(action.cost for action in actions)
    rewards = [action.reward - (cost_weight * action.cost / median if cost_weight else 0) for action in actions]
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def policy_gradient(
    log_prob: Callable[[Group, Group, torch.Tensor], torch.Tensor],
    parameters: Group,
    actions: Sequence[Action],
    advantages: Sequence[float],
) -> dict[str, torch.Tensor]:
    """
    Gradient of `J = Σ_t log π(z_{t-1}) (ρ_t - ρ̄)`, the sum over the whole window, with log π taken again at the
    parameters given.

    Args:
        log_prob (`Callable`): log π of (parameters, state, z).
        parameters (`Group`): Of the policy, float64.
        actions (`Sequence[Action]`): The window.
        advantages (`Sequence[float]`): ρ_t - ρ̄ of each.

    Returns:
        `dict[str, torch.Tensor]`: To ascend.
    """
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
    objective = torch.zeros((), dtype=torch.float64)
    for action, advantage in zip(actions, advantages, strict=True):
        state = {name: torch.tensor(values, dtype=torch.float64) for name, values in action.state.items()}
        objective = objective + advantage * log_prob(leaves, state, torch.tensor(action.z, dtype=torch.float64))
    grads = torch.autograd.grad(objective, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))
