"""The learning half of Auto-FedRL: what a policy draws in a round, and how it improves by what came of it."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_mlopt.federated.algorithms.adam import adam_step
from hf_mlopt.federated.algorithms.policies import POLICIES, Policy, build_policy
from hf_mlopt.federated.algorithms.reinforce import (
    Action,
    advantages,
    mean_losses,
    policy_gradient,
    relative_improvement,
)
from hf_mlopt.federated.algorithms.search_space import HyperParameters, SearchSpace
from hf_mlopt.federated.algorithms.server import Groups, require


class PolicyLearner:
    """
    A policy with its optimizer and its window of rounds. `tensors` and `actions` are all its state.

    Args:
        space (`SearchSpace`): What is searched.
        policy (`str`): Name of the policy.
        window (`int`): Z, at least 2.
        hyper_lr (`float`): Of Adam, above 0.
        hyper_betas (`tuple[float, float]`): Of Adam.
        cost_weight (`float`): κ, at least 0.
    """

    def __init__(
        self,
        space: SearchSpace,
        policy: str,
        window: int,
        hyper_lr: float,
        hyper_betas: tuple[float, float],
        cost_weight: float,
    ):
        require("policy", policy, policy in POLICIES, f"must be one of {', '.join(POLICIES)}")
        require("window", window, type(window) is int and window >= 2, "must be an int of at least 2; one has no mean")
        require("hyper_lr", hyper_lr, 0 < hyper_lr < math.inf, "must be above 0")
        is_pair = len(hyper_betas) == 2 and all(0 <= beta < 1 for beta in hyper_betas)
        require("hyper_betas", hyper_betas, is_pair, "must be two numbers in [0, 1)")
        require("cost_weight", cost_weight, 0 <= cost_weight < math.inf, "must be at least 0")
        self.space, self.policy_name, self.window = space, policy, window
        self.hyper_lr, self.hyper_betas, self.cost_weight = hyper_lr, tuple(hyper_betas), cost_weight
        self.sites: list[str] = []
        self.seed = 0
        self.tensors: Groups = {}  # parameters, Adam's m, v and step, and the policy's state
        self.actions: list[Action] = []

    def setup(self, sites: Sequence[str], seed: int) -> None:
        """Begins with a policy that knows nothing."""
        self.sites, self.seed, self.actions = list(sites), seed, []
        policy = self._policy()
        parameters = policy.parameters(self._generator("init"))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        step = {"n": torch.zeros((), dtype=torch.int64)}
        self.tensors = {"policy": parameters, "policy_m": zeros, "policy_v": zeros, "policy_step": step}
        self.tensors["policy_state"] = policy.state()

    def restore(self, sites: Sequence[str], seed: int, tensors: Groups, actions: Sequence[Action]) -> None:
        """Goes on from `tensors` and `actions` as another learner had them."""
        self.sites, self.seed, self.actions = list(sites), seed, list(actions)
        self.tensors = {"policy_state": {}, **tensors}  # most policies have none

    def draw(self, round: int) -> tuple[torch.Tensor, HyperParameters]:
        """z `[d]` and what it stands for; in one round always the same."""
        policy = self._policy()
        z = policy.sample(self.tensors["policy"], self.tensors["policy_state"], self._generator(round))
        if policy.is_discrete:
            return z, self.space.hyper_parameters_of_levels(z, self.sites)
        return z, self.space.hyper_parameters(z, self.sites)

    def state_in_plain_numbers(self) -> dict[str, list[float]]:
        """The policy's state, for an [`Action`]."""
        return {name: tensor.tolist() for name, tensor in self.tensors["policy_state"].items()}

    def compare(self, action: Action) -> tuple[float, float]:
        """L_{r-1} and L_r; NaN where the last round's action is unknown or no site was in both."""
        if not self.actions or self.actions[-1].round != action.round - 1:
            return math.nan, math.nan
        return mean_losses(self.actions[-1].losses, action.losses, action.weights)

    def learn(self, action: Action) -> tuple[float | None, bool]:
        """
        Rewards the action before this one, improves the policy by the rewards of rounds (r - Z, r], and takes this
        action in.

        Returns:
            `tuple`: ρ_r, or `None` where the losses give none, and whether the policy was changed: it is not before
            there are two rewards, nor by rewards that are all equal.

        Raises:
            RuntimeError: If the policy would not be finite.
        """
        reward = relative_improvement(*self.compare(action))
        next_state = self._policy().next_state(self.tensors["policy"], self.tensors["policy_state"])
        is_updated = False
        if reward is not None:
            self.actions[-1] = replace(self.actions[-1], reward=reward)
            is_updated = self._update(action.round)
        self.tensors = {**self.tensors, "policy_state": next_state}
        self.actions = [*self.actions, action][-self.window - 1 :]
        return reward, is_updated

    def _policy(self) -> Policy:
        num_levels = [len(some) for some in self.space.levels(self.sites)]
        return build_policy(self.policy_name, num_levels, self.space.mean_bound, self.space.first_std)

    def _generator(self, purpose: object) -> torch.Generator:
        """One of its own for every round: nothing to store, and a round asked again draws the same."""
        digest = hashlib.sha256(f"policy/{self.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def _update(self, round: int) -> bool:
        recent = [a for a in self.actions if a.reward is not None and a.round + 1 > round - self.window]
        signed = advantages(recent, self.cost_weight)
        if not any(signed):  # Adam would go on by its momentum
            return False
        policy, learned = self._policy(), self.tensors

        def log_prob(parameters, state, z):
            return policy.log_prob(parameters, state, z) - (0 if policy.is_discrete else self.space.log_det(z))

        gradient = policy_gradient(log_prob, learned["policy"], recent, signed)
        descent = {name: -grad for name, grad in gradient.items()}
        step = learned["policy_step"]["n"] + 1
        moments = learned["policy_m"], learned["policy_v"]
        lr = self.hyper_lr * policy.lr_scale
        parameters, m, v = adam_step(learned["policy"], descent, *moments, int(step), lr, betas=self.hyper_betas)
        if not all(tensor.isfinite().all() for tensor in parameters.values()):
            raise RuntimeError(f"round {round}: the policy would not be finite; lower hyper_lr")
        changed = {"policy": policy.project(parameters), "policy_m": m, "policy_v": v, "policy_step": {"n": step}}
        self.tensors = {**learned, **changed}
        return True
