"""The server's part of FedSM's model selectors; all are asked the same questions."""

from collections.abc import Mapping, Sequence

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.averaging import cast_like, weighted_mean, wide_zeros
from hf_mlopt.federated.algorithms.image_features import empty_statistics
from hf_mlopt.federated.algorithms.layout import clones
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar
from hf_mlopt.federated.algorithms.server import Groups, require


class NoSelector:
    """Answers every question with nothing: for one site, or where a selector is trained afterwards."""

    name = "none"
    takes_weights = False  # whether `init` holds a group `selector`
    needs_only_mean = True  # of the replies, as a sum under masks gives it
    weighting = "samples"

    def memory(self, sites: Sequence[str], start: Group) -> Groups:
        """Groups the server keeps, as at the beginning; `start` are the selector's first weights."""
        return {}

    def sent(self, groups: Mapping[str, Group], site: str) -> Groups:
        """Groups of the message to a site, `groups` being all that the server keeps."""
        return {}

    def scalars(self, groups: Mapping[str, Group], site: str) -> dict[str, Scalar]:
        """Scalars of that message."""
        return {}

    def replied(self, groups: Mapping[str, Group], site: str) -> Groups:
        """Groups that look like those of the reply."""
        return {}

    def replied_scalars(self, groups: Mapping[str, Group]) -> dict[str, Scalar]:
        """Scalars that the reply must hold with these values."""
        return {}

    def refusal(self, groups: Mapping[str, Group], reply: Message) -> str | None:
        """A further reason not to use a reply of the right form."""
        return None

    def step(self, groups: Mapping[str, Group], replies: Mapping[str, Message], shares: Mapping[str, float]) -> Groups:
        """The groups that a round changes."""
        return {}


class LearnedSelector(NoSelector):
    """
    The paper's classifier of sites. Every site has one label only, so a step of its own optimizer would drive the
    selector to answer that label whatever it sees. Therefore Adam's moments m and v are averaged and travel as the
    weights do, and the site builds its optimizer from the message ([`adam_step`]), never from one it had.

    The message holds `selector`, after the first round `selector_m` and `selector_v`, and the scalars `selector_step`
    (s, Adam steps so far), `selector_steps` (those of this round) and `selector_lr`. The reply holds the three groups
    and s after its steps.

    Args:
        steps (`int`): Full-batch steps a round, at least 1.
        lr (`float`): Adam's learning rate, above 0.
        weighting (`str`): Weights of the sites: `samples`, or `uniform`, which favours no label.
    """

    name = "learned"
    takes_weights = True

    def __init__(self, steps: int, lr: float, weighting: str):
        require("selector_steps", steps, type(steps) is int and steps >= 1, "must be an int of at least 1")
        require("selector_lr", lr, 0 < lr < float("inf"), "must be above 0")
        allowed = weighting in ("samples", "uniform")
        require("selector_weighting", weighting, allowed, "must be samples or uniform")
        self.steps, self.lr, self.weighting = steps, lr, weighting

    def memory(self, sites: Sequence[str], start: Group) -> Groups:
        if not start or not all(weight.is_floating_point() for weight in start.values()):
            raise InputError("init: the learned selector needs a group 'selector' of floating-point weights")
        return {
            "selector": clones(start),
            "selector_m": wide_zeros(start),
            "selector_v": wide_zeros(start),
            "selector_step": {"s": torch.zeros((), dtype=torch.int64)},
        }

    def sent(self, groups: Mapping[str, Group], site: str) -> Groups:
        names = ("selector", "selector_m", "selector_v") if _steps_so_far(groups) else ("selector",)
        return {name: groups[name] for name in names}

    def scalars(self, groups: Mapping[str, Group], site: str) -> dict[str, Scalar]:
        return {
            "selector_step": _steps_so_far(groups),
            "selector_steps": self.steps,
            "selector_lr": float(self.lr),
        }

    def replied(self, groups: Mapping[str, Group], site: str) -> Groups:
        return {name: groups[name] for name in ("selector", "selector_m", "selector_v")}

    def replied_scalars(self, groups: Mapping[str, Group]) -> dict[str, Scalar]:
        return {"selector_step": _steps_so_far(groups) + self.steps}

    def refusal(self, groups: Mapping[str, Group], reply: Message) -> str | None:
        for name, moment in reply.groups["selector_v"].items():
            if (moment < 0).any():
                return f"'selector_v', {name!r}: negative, which no mean of squares is"
        return None

    def step(self, groups: Mapping[str, Group], replies: Mapping[str, Message], shares: Mapping[str, float]) -> Groups:
        if self.weighting == "uniform":
            shares = dict.fromkeys(shares, 1 / len(shares))
        means = {
            name: weighted_mean((replies[site].groups[name] for site in shares), shares.values())
            for name in ("selector", "selector_m", "selector_v")
        }
        return {
            **{name: cast_like(mean, groups[name]) for name, mean in means.items()},
            "selector_step": {"s": groups["selector_step"]["s"] + self.steps},
        }


class MomentsSelector(NoSelector):
    """
    No training: every site once sends [`feature_statistics`] of its images as the group `selector_statistics`, when
    the scalar `needs_statistics` says that the server does not have them; [`Discriminant`] does the rest.

    Args:
        num_features (`int`): F, the numbers per image.
    """

    name = "moments"
    needs_only_mean = False

    def __init__(self, num_features: int):
        allowed = type(num_features) is int and num_features >= 1
        require("num_features", num_features, allowed, "must be an int of at least 1")
        self.num_features = num_features

    def memory(self, sites: Sequence[str], start: Group) -> Groups:
        return {_statistics(site): empty_statistics(self.num_features) for site in sites}

    def scalars(self, groups: Mapping[str, Group], site: str) -> dict[str, Scalar]:
        return {"needs_statistics": self._needs(groups, site)}

    def replied(self, groups: Mapping[str, Group], site: str) -> Groups:
        return {"selector_statistics": groups[_statistics(site)]} if self._needs(groups, site) else {}

    def refusal(self, groups: Mapping[str, Group], reply: Message) -> str | None:
        statistics = reply.groups.get("selector_statistics")
        if statistics is not None and not statistics["count"] > 0:
            return f"'selector_statistics', 'count': {float(statistics['count'])}; an image is needed"
        return None

    def step(self, groups: Mapping[str, Group], replies: Mapping[str, Message], shares: Mapping[str, float]) -> Groups:
        new = [site for site in shares if self._needs(groups, site)]
        return {_statistics(site): dict(replies[site].groups["selector_statistics"]) for site in new}

    def statistics(self, groups: Mapping[str, Group], sites: Sequence[str]) -> list[Group]:
        """What [`Discriminant`] takes, in the order of labels."""
        return [groups[_statistics(site)] for site in sites]

    def _needs(self, groups: Mapping[str, Group], site: str) -> bool:
        return not groups[_statistics(site)]["count"] > 0


def _steps_so_far(groups: Mapping[str, Group]) -> int:
    return int(groups["selector_step"]["s"])


def _statistics(site: str) -> str:
    return f"selector_statistics/{site}"
