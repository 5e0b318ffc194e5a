"""Auto-FedRL: a policy that tunes the hyper-parameters of a federated training while it runs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.averaging import cast_like
from hf_mlopt.federated.algorithms.layout import clones
from hf_mlopt.federated.algorithms.message import Message, Scalar
from hf_mlopt.federated.algorithms.policy_learner import PolicyLearner
from hf_mlopt.federated.algorithms.reinforce import Action, mean_losses
from hf_mlopt.federated.algorithms.search_space import HyperParameters, SearchSpace
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm, require


logger = logging.get_logger(__name__)

_OWN = "auto_fedrl/"  # groups of a state that are not the inner algorithm's


class AutoFedRL:
    """
    [Auto-FedRL: Federated Hyperparameter Optimization for Multi-institutional Medical Image Segmentation](https://huggingface.co/papers/2203.06338),
    around any algorithm. In every round a policy draws the hyper-parameters; how much lower the validation loss of the
    next round is rewards the draw, and REINFORCE over a window of rounds improves the policy. The interface is that of
    [`ServerAlgorithm`]; the scalar `algorithm` of a message is that of the inner one, which sites follow.

    Messages further hold those of the scalars `learning_rate` and `local_epochs` or `local_steps` that are searched,
    and `evaluate`, which is true. The reply holds the scalar `eval_loss`: L_k, on data held out at the site, of the
    model as it was sent, **before** training; and, where it can, `num_steps`, the local steps taken. Aggregation
    weights take the place of `num_samples` at the inner algorithm; the server's learning rate is a factor of what the
    inner step does to `weights`.

    Where the released code differs from the paper this follows the paper: the objective is summed over the window.

    Args:
        inner (`ServerAlgorithm`): The algorithm to tune.
        space (`SearchSpace`, *optional*): What is searched; all ranges of [`SearchSpace`] where absent.
        policy (`str`, *optional*, defaults to `"gaussian"`): `gaussian`, `cholesky`, `mlp` or `categorical`.
        window (`int`, *optional*, defaults to 5): Z, rounds the policy learns from.
        hyper_lr (`float`, *optional*, defaults to 0.01): Of the policy's Adam.
        hyper_betas (`tuple[float, float]`, *optional*, defaults to `(0.7, 0.7)`): Of the policy's Adam.
        cost_weight (`float`, *optional*, defaults to 0.0): κ: from each reward κ times the round's cost over the
            window's median cost is taken. The cost is the mean of `num_steps`, or else the epochs or steps searched.
        guard (`float`, *optional*): Above 1: where the loss grows by more than this factor, model and policy go back
            to what they were before the draw that did it.
        loss_weighting (`str`, *optional*, defaults to `"samples"`): Of the sites in the mean loss, `samples` (the
            scalar `num_evaluated` where all give it, or else `num_samples`) or `uniform`.

    Raises:
        ConfigurationError: For an option out of its range.
    """

    name = "auto_fedrl"
    needs_only_mean = False

    def __init__(
        self,
        inner: ServerAlgorithm,
        space: SearchSpace | None = None,
        policy: str = "gaussian",
        window: int = 5,
        hyper_lr: float = 0.01,
        hyper_betas: tuple[float, float] = (0.7, 0.7),
        cost_weight: float = 0.0,
        guard: float | None = None,
        loss_weighting: str = "samples",
    ):
        space = space or SearchSpace()
        self.learner = PolicyLearner(space, policy, window, hyper_lr, hyper_betas, cost_weight)
        require("guard", guard, guard is None or 1 < guard < float("inf"), "must be above 1, or null for none")
        known = loss_weighting in ("samples", "uniform")
        require("loss_weighting", loss_weighting, known, "must be samples or uniform")
        is_weighted = space.aggregation_weights is None or inner.weighting == "samples"
        require("weighting", inner.weighting, is_weighted, "must be samples where aggregation_weights are searched")
        can_return = guard is None or inner.can_go_back
        require("guard", guard, can_return, f"must be null for {inner.name}, whose sites cannot take a round back")
        self.inner, self.guard, self.loss_weighting = inner, guard, loss_weighting
        self.trace: list[dict[str, Any]] = []  # a row a round and site: what held there, and its loss and reward
        self._before: Groups = {}  # with a guard, model and policy as they were before the last round

    tuned = property(lambda self: self.inner)
    sites = property(lambda self: self.inner.sites)
    seed = property(lambda self: self.inner.seed)
    round = property(lambda self: self.inner.round)
    groups = property(lambda self: self.inner.groups)
    last_rounds = property(lambda self: self.inner.last_rounds)
    sends_model = property(lambda self: self.inner.sends_model)
    starts_with = property(lambda self: self.inner.starts_with)
    fraction = property(lambda self: self.inner.fraction)
    min_sites = property(lambda self: self.inner.min_sites)

    def setup(self, sites: Sequence[str], init: Message, seed: int) -> None:
        """As [`ServerAlgorithm.setup`]."""
        self.inner.setup(sites, init, seed)
        self.learner.setup(self.inner.sites, seed)
        self.trace, self._before = [], {}

    def configure(self, round: int) -> dict[str, Message]:
        """As [`ServerAlgorithm.configure`], with the scalars of this round's draw. Always the same draw in a round."""
        messages = self.inner.configure(round)
        _, values = self.learner.draw(self.round)
        names = ("learning_rate", "local_epochs", "local_steps")
        scalars: dict[str, Scalar] = {name: getattr(values, name) for name in names if getattr(values, name)}
        scalars["evaluate"] = True
        return {site: Message(sent.groups, {**sent.scalars, **scalars}) for site, sent in messages.items()}

    def evaluation(self) -> dict[str, Message]:
        """As [`ServerAlgorithm.evaluation`]."""
        return self.inner.evaluation()

    def template(self, site: str) -> Message:
        """As [`ServerAlgorithm.template`]; further a reply holds `eval_loss`, a float."""
        return self.inner.template(site)

    def aggregate(self, round: int, replies: Mapping[str, Message]) -> dict[str, Any]:
        """
        As [`ServerAlgorithm.aggregate`]; then the policy learns.

        Returns:
            `dict`: That of the inner algorithm, the values that held, `eval_loss` (L_r, of the model as it was sent),
            `reward` (ρ_r, of the draw before), `policy_updated` and `reverted`.
        """
        z, values = self.learner.draw(self.round)
        scalars = {site: replies[site].scalars for site in sorted(replies) if isinstance(replies[site], Message)}
        mute = [site for site, some in scalars.items() if type(some.get("eval_loss")) is not float]
        heard = [site for site in sorted(replies) if site not in mute]
        if mute and len(heard) < self.inner.min_sites:
            raise RuntimeError(f"round {round}: no eval_loss, a float, from {mute}; give these sites validation data")
        before = {**self.inner.groups, **self.learner.tensors}
        metrics = self.inner.aggregate(round, _WithShares(replies, heard, values.shares))
        self._scale_step(before["weights"], values.server_lr, metrics)
        used = [site for site in heard if site not in metrics["refused"]]
        metrics["num_samples"] = sum(scalars[site]["num_samples"] for site in used)
        metrics["refused"] = {**metrics["refused"], **dict.fromkeys(mute, "no eval_loss, which is a float")}
        metrics["absent"] = [site for site in metrics["absent"] if site not in mute]
        self._record(values, scalars, used, metrics)
        names = ("learning_rate", "local_epochs", "local_steps", "server_lr")
        held = {name: getattr(values, name) for name in names if getattr(values, name) is not None}
        action = self._action(round, z, values, {site: scalars[site] for site in used})
        return {**metrics, **held, **self._learn(action, before)}

    def state_dict(self) -> dict[str, Any]:
        """As [`ServerAlgorithm.state_dict`], tensors among `groups` and all else in plain containers."""
        state = self.inner.state_dict()
        kept = {f"{_OWN}{name}": group for name, group in self.learner.tensors.items()}
        kept |= {f"{_OWN}before/{name}": group for name, group in self._before.items()}
        # Empty groups are left out: storage may drop them, and a state must come back as it was.
        copies = {name: clones(group) for name, group in kept.items() if group}
        return {
            **state,
            "algorithm": self.name,
            "groups": {**state["groups"], **copies},
            "inner": state["algorithm"],
            "space": self._description(),
            "actions": [action.to_dict() for action in self.learner.actions],
            "trace": [dict(row) for row in self.trace],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        As [`ServerAlgorithm.load_state_dict`].

        Raises:
            InputError: Also where the state is that of another space or policy.
        """
        if state["algorithm"] != self.name:
            raise InputError(f"the state is that of {state['algorithm']!r}, not of {self.name!r}")
        here, there = self._description(), state["space"]
        if others := [
            f"{name}={there.get(name)} (here {here[name]})" for name in here if there.get(name) != here[name]
        ]:
            raise InputError(f"the state is that of a search with {', '.join(others)}; give the same, or begin anew")
        own = {name: group for name, group in state["groups"].items() if name.startswith(_OWN)}
        inner = {name: group for name, group in state["groups"].items() if name not in own}
        self.inner.load_state_dict({**state, "algorithm": state["inner"], "groups": inner})
        tensors = {name.removeprefix(_OWN): clones(group) for name, group in own.items()}
        learned = {name: group for name, group in tensors.items() if not name.startswith("before/")}
        self._before = {n.removeprefix("before/"): group for n, group in tensors.items() if n not in learned}
        actions = [Action(**action) for action in state["actions"]]
        self.learner.restore(self.inner.sites, self.inner.seed, learned, actions)
        self.trace = [dict(row) for row in state["trace"]]

    def _description(self) -> dict[str, Any]:
        return {**self.learner.space.describe(), "policy": self.learner.policy_name}

    def _scale_step(self, before: Mapping[str, torch.Tensor], factor: float | None, metrics: dict[str, Any]) -> None:
        if factor is None or factor == 1:
            return
        after = self.inner.groups["weights"]
        scaled = {name: w.double() + factor * (after[name].double() - w.double()) for name, w in before.items()}
        self.inner.groups = {**self.inner.groups, "weights": cast_like(scaled, after)}
        metrics["update_norm"] *= factor

    def _action(
        self, round: int, z: torch.Tensor, values: HyperParameters, scalars: Mapping[str, Mapping[str, Scalar]]
    ) -> Action:
        steps = [some.get("num_steps") for some in scalars.values()]
        if all(type(taken) is int and taken > 0 for taken in steps):
            cost = sum(steps) / len(steps)
        else:
            cost = float(values.local_epochs or values.local_steps or 1)
        counted = all(type(n := some.get("num_evaluated")) is int and n > 0 for some in scalars.values())
        number = "num_evaluated" if counted else "num_samples"
        by_samples = self.loss_weighting == "samples"
        return Action(
            round=round,
            state=self.learner.state_in_plain_numbers(),
            z=z.tolist(),
            losses={site: some["eval_loss"] for site, some in scalars.items()},
            weights={site: float(some[number]) if by_samples else 1.0 for site, some in scalars.items()},
            cost=cost,
        )

    def _learn(self, action: Action, before: Groups) -> dict[str, Any]:
        """Lets the policy learn, or goes back; `before` is what held before this round."""
        loss = mean_losses(action.losses, action.losses, action.weights)[1]
        loss_before, loss_now = self.learner.compare(action)
        if self.guard is not None and loss_before > 0 and not loss_now <= self.guard * loss_before:
            self._go_back(action.round, loss_before, loss_now)
            return {"eval_loss": loss, "reward": None, "policy_updated": False, "reverted": True}
        is_first = math.isnan(loss_before) and math.isnan(loss_now)
        reward, is_updated = self.learner.learn(action)
        if reward is None and not is_first:
            logger.warning(f"round {action.round}: losses {loss_before} and {loss_now} give the policy no reward")
        for row in self.trace:
            if row["round"] == action.round - 1:
                row["reward"] = reward
        self._before = before if self.guard is not None else {}
        return {"eval_loss": loss, "reward": reward, "policy_updated": is_updated, "reverted": False}

    def _go_back(self, round: int, loss_before: float, loss_now: float) -> None:
        logger.warning(
            f"round {round}: the loss went from {loss_before:.4g} to {loss_now:.4g}, beyond guard={self.guard}; model "
            f"and policy are again those before round {round - 1}"
        )
        state = self.inner.state_dict()
        model = {name: group for name, group in self._before.items() if name in state["groups"]}
        self.inner.load_state_dict({**state, "groups": model})
        learned = {name: group for name, group in self._before.items() if name not in model}
        self.learner.restore(self.sites, self.seed, learned, self.learner.actions)

    def _record(
        self, values: HyperParameters, scalars: Mapping[str, Mapping], used: Sequence[str], metrics: dict[str, Any]
    ) -> None:
        shares = values.shares and {site: values.shares[site] for site in used}
        for site in sorted({*used, *metrics["absent"], *metrics["refused"]} & set(self.sites)):
            reply = scalars[site] if site in used else {}
            self.trace.append(
                {
                    "round": metrics["round"],
                    "site": site,
                    "learning_rate": values.learning_rate,
                    "local_epochs": values.local_epochs,
                    "local_steps": values.local_steps,
                    "server_lr": values.server_lr,
                    "aggregation_weight": shares and shares.get(site, 0.0) / sum(shares.values()),
                    "eval_loss": reply.get("eval_loss"),
                    "num_steps": reply.get("num_steps"),
                    "reward": None,
                }
            )


class _WithShares(Mapping[str, Message]):
    """Replies of some sites, with their numbers of samples replaced by shares where there are."""

    def __init__(self, replies: Mapping[str, Message], sites: Sequence[str], shares: Mapping[str, float] | None):
        self.replies, self.sites, self.shares = replies, sites, shares

    def __getitem__(self, site: str) -> Message:
        reply = self.replies[site]
        if self.shares is None or site not in self.shares or not isinstance(reply, Message):
            return reply
        num_samples = reply.scalars.get("num_samples")
        if type(num_samples) is not int or num_samples <= 0:
            return reply  # for the inner algorithm to refuse
        counts = round(self.shares[site] * 2**52)  # exact, and shares of counts are again shares
        return Message(reply.groups, {**reply.scalars, "num_samples": counts})

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)
