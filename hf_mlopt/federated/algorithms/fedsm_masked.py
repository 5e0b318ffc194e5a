"""FedSM for a server that learns sums alone: the personal models stay at their sites."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.fedsm import PERSONAL, FedSMBase
from hf_mlopt.federated.algorithms.layout import clones
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar
from hf_mlopt.federated.algorithms.server import Groups


_NUM_SITES = "personal_sites"


class MaskedFedSM(FedSMBase):
    r"""
    [`~hf_mlopt.federated.algorithms.fedsm.FedSM`] by the mean of the replies. SoftPull is
    `w_k = (λ-b) ŵ_k + b Σ_j ŵ_j`, so a site that keeps its ŵ_k needs of the others one sum, the same for all, and
    pulls at the start of its next round. The models are those of the open form, but for the fixed point of masks.

    The message to a site holds in `personal` and `personal_buffers` no model but the mean of those of the round in
    which it has last answered, or what all begin with, and the scalars `num_pulled` (K, the sites in that mean),
    `pull_personal` and `pull_personal_buffers` (λ). A mean is kept until no site has to be pulled with it, so of a
    site that was absent the model is what the open form would hold. The selector is `learned` or `none`.

    Personal models move little in a round: a sum with a site less the next one without it is near the site's model.
    With `min_sites` all sites, there is no such difference.
    """

    name = "fedsm-masked"
    needs_only_mean = True

    def setup(self, sites: Sequence[str], init: Message, seed: int) -> None:
        """As [`FedSMBase.setup`]."""
        super().setup(sites, init, seed)
        first = {kind: _wide(self.groups[of], self.groups[of]) for of, kind in PERSONAL.items() if of in self.groups}
        self._means: dict[int, Groups] = {-1: {**first, _NUM_SITES: {"K": torch.tensor(1)}}}

    def group_weighting(self) -> dict[str, str]:
        """As [`ServerAlgorithm.group_weighting`]: personal models count alike, whatever their samples."""
        of_selector = "uniform" if self.selector.weighting == "uniform" else self.weighting
        selector = self.selector.replied(self.groups, self.sites[0])
        return {**dict.fromkeys(self._pulls(), "uniform"), **dict.fromkeys(selector, of_selector)}

    def state_dict(self) -> dict[str, Any]:
        """As [`ServerAlgorithm.state_dict`], with the means that are still needed."""
        state = super().state_dict()
        means = {
            f"{kind}/{round}": clones(group) for round, mean in self._means.items() for kind, group in mean.items()
        }
        return {**state, "groups": {**state["groups"], **means}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        As [`FedSMBase.load_state_dict`].

        Raises:
            InputError: Also where a mean is missing.
        """
        if state["algorithm"] != self.name:
            super().load_state_dict(state)  # which refuses it
        means, rest = {}, {}
        for group, tensors in state["groups"].items():
            kind, _, round = group.partition("/")
            if round:
                means.setdefault(int(round), {})[kind] = clones(tensors)
            else:
                rest[group] = tensors
        needed = {state["last_rounds"].get(site, -1) for site in state["sites"]}
        if set(means) != needed:
            raise InputError(f"the state has the personal means of rounds {sorted(means)}, not of {sorted(needed)}")
        super().load_state_dict({**state, "groups": rest})
        self._means = means

    def _own(self, site: str) -> dict[str, Group]:
        return {kind: self._mean_of(site)[kind] for kind in self._pulls()}

    def _mean_of(self, site: str) -> Groups:
        return self._means[self.last_rounds.get(site, -1)]

    def _scalars(self, site: str) -> dict[str, Scalar]:
        pulls = {f"pull_{kind}": float(pull) for kind, pull in self._pulls().items()}
        return {**super()._scalars(site), **pulls, "num_pulled": int(self._mean_of(site)[_NUM_SITES]["K"])}

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        alike = dict.fromkeys(shares, 1 / len(shares))
        means = {
            kind: _wide(self._mean(replies, alike, kind), self.groups[of])
            for of, kind in PERSONAL.items()
            if of in self.groups
        }
        return {**super()._step(replies, shares), **means}

    def _ended(self, after: Groups, sites: list[str], num_samples: int) -> dict[str, Any]:
        round, metrics = self.round, super()._ended(after, sites, num_samples)
        mean = {kind: self.groups.pop(kind) for kind in self._pulls()}
        means = {**self._means, round: {**mean, _NUM_SITES: {"K": torch.tensor(len(sites))}}}
        needed = {self.last_rounds.get(site, -1) for site in self.sites}
        self._means = {round: mean for round, mean in means.items() if round in needed}
        return metrics


def _wide(values: Group, like: Group) -> dict[str, torch.Tensor]:
    """As a mean travels: in the type of the model, at least float32; that of counts, which is no count, float64."""
    cast = {}
    for name, value in values.items():
        dtype = like[name].dtype
        cast[name] = value.to(torch.promote_types(dtype, torch.float32 if dtype.is_floating_point else torch.float64))
    return cast
