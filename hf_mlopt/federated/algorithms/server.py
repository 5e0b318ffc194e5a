"""The server's part of a round, common to all algorithms: whom to ask, what to use, what to keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms.averaging import cast_like, sample_shares, select_sites, site_seed, weighted_mean
from hf_mlopt.federated.algorithms.layout import clones, difference, kinds, shapes
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar
from hf_mlopt.federated.algorithms.replies import check_reply


Groups = dict[str, dict[str, torch.Tensor]]


class ServerAlgorithm:
    """
    `configure(round)` says what each site is sent, `aggregate(round, replies)` takes what came back. Rounds count from
    0, one after the other; neither knows how messages travel. A subclass gives `_step`, and where it needs them
    `_memory`, `_sent`, `_scalars`, `_replied` and `_refusal`.

    A site answers with the groups of `template(site)`, above all `weights` (its weights after local training, not the
    change: so the mean of one site is that site's weights bit for bit), and the scalars `round` and `num_samples`; one
    of this package also says `num_steps` and `lr_sum` of its local steps.
    Frozen parameters are left out of `init` by the caller, tied ones given once. Weights keep the dtype of `init`:
    give float32 where sites train in bfloat16, or small server steps are rounded away.

    Args:
        fraction (`float`, *optional*, defaults to 1.0): Share of the sites asked in each round, in (0, 1].
        min_sites (`int`, *optional*, defaults to 1): At least so many are asked, and must give a usable reply.
        weighting (`str`, *optional*, defaults to `"samples"`): `samples` (n_k / Σ n) or `uniform`.

    Raises:
        ConfigurationError: For an option out of its range.
    """

    name = ""
    # Whether sites start from the model that is evaluated, so that they can do so before they train.
    sends_model = True
    # Whether a round needs no more of the replies than the mean of their groups, as a sum under masks gives it.
    needs_only_mean = False
    # Why local steps have to be those of SGD, where they have to; and whether momentum and clipping falsify it.
    needs_sgd = ""
    needs_plain_sgd = False
    # Whether sites add to the gradients of a step.
    corrects_gradients = False
    # Whether a round may be taken back, without harm from what sites have kept of it.
    can_go_back = True
    # Groups of `init` that `setup` needs beside those of the model.
    starts_with: tuple[str, ...] = ()

    def __init__(self, fraction: float = 1.0, min_sites: int = 1, weighting: str = "samples"):
        require("fraction", fraction, 0 < fraction <= 1, "must be above 0 and at most 1")
        require("min_sites", min_sites, type(min_sites) is int and min_sites >= 1, "must be an int of at least 1")
        require("weighting", weighting, weighting in ("samples", "uniform"), "must be samples or uniform")
        self.fraction, self.min_sites, self.weighting = fraction, min_sites, weighting
        self.sites: list[str] = []
        self.seed = self.round = 0
        self.last_rounds: dict[str, int] = {}  # per site the round of its last reply that was used
        self.groups: Groups = {}

    @property
    def tuned(self) -> "ServerAlgorithm":
        """The algorithm that trains: itself, or within [`AutoFedRL`] the one whose hyper-parameters are tuned."""
        return self

    @classmethod
    def options_for(cls, model: torch.nn.Module, args: Any) -> dict[str, Any]:
        """
        Options that follow from what is trained, unless they are given.

        Args:
            model (`torch.nn.Module`): At the server.
            args (`FederatedTrainingArguments`): Of the local training above all.
        """
        return {}

    def setup(self, sites: Sequence[str], init: Message, seed: int) -> None:
        """
        Begins a training.

        Args:
            sites (`Sequence[str]`): The roster, in any order.
            init (`Message`): `weights`, floating point, and where there are `buffers`.
            seed (`int`): Of the choice of sites and of their local training.
        """
        self.sites = self._roster(sites)
        if not init.groups.get("weights") or not set(init.groups) <= {"weights", "buffers"}:
            raise InputError(f"init: groups {list(init.groups)}; weights are needed, and buffers may be given")
        for group, tensors in init.groups.items():
            for name, tensor in tensors.items():
                if group == "weights" and not tensor.is_floating_point():
                    raise InputError(f"init: weight {name!r} is {tensor.dtype}; only floating point can be averaged")
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise InputError(f"init: {name!r} of group {group!r} is not finite")
        self.seed, self.round, self.last_rounds = seed, 0, {}
        self.groups = self._layout({group: clones(tensors) for group, tensors in init.groups.items()})

    def configure(self, round: int) -> dict[str, Message]:
        """
        What each chosen site is sent in this round. Changes nothing, so it can be asked again.

        Returns:
            `dict[str, Message]`: Site to the groups of the algorithm, with the scalars `algorithm`, `round`, `seed`
            for the site's local training, and `state_round`: the round of the site's last reply that was used, -1
            before the first. What a site keeps for itself it takes as it was after that round.
        """
        self._require_round(round)
        sent = self._sent()
        return {site: Message(sent, {**self._address(site), **self._scalars(site)}) for site in self._selected()}

    def evaluation(self) -> dict[str, Message]:
        """What each site of the roster is sent to evaluate the model as it is now, with the scalars of `configure`."""
        return {
            site: Message(self._evaluated(), {**self._address(site), **self._scalars(site)}) for site in self.sites
        }

    def template(self, site: str) -> Message:
        """What the reply of a site must look like in this round; see [`check_reply`]."""
        return Message(self._replied(), {"round": self.round})

    def group_weighting(self) -> dict[str, str]:
        """
        Groups of a reply beside `weights` and `buffers` that need only be known in the mean, where they go into a
        masked sum, to the weights of the sites in it: `samples` or `uniform`.
        """
        return {}

    def aggregate(self, round: int, replies: Mapping[str, Message]) -> dict[str, Any]:
        """
        Ends the round. A reply that is no use is left out with its reason. Replies are looked at one after the other,
        so that a mapping may read each from a file when it is asked for.

        Returns:
            `dict`: `round`, `num_sites`, `num_samples`, `update_norm` (L2, of the weights), `absent` (sites asked
            without a reply) and `refused` (site to reason).

        Raises:
            RuntimeError: If fewer than `min_sites` replies are usable, or the new state would not be finite. The
                state is then as before, and the round can be repeated.
        """
        self._require_round(round)
        selected = self._selected()
        num_samples, refused = self._examined(replies, selected)
        absent = [site for site in selected if site not in {*num_samples, *refused}]
        if len(num_samples) < self.min_sites:
            reasons = {**refused, **dict.fromkeys(absent, "no reply")}
            raise RuntimeError(
                f"round {round}: {len(num_samples)} usable replies, {self.min_sites} are needed. "
                + "; ".join(f"{site}: {reason}" for site, reason in reasons.items())
            )
        after = self._step(replies, sample_shares(num_samples, self.weighting))
        return {
            **self._ended(after, list(num_samples), sum(num_samples.values())),
            "absent": absent,
            "refused": refused,
        }

    def aggregate_mean(self, round: int, mean: Message, sites: list[str], num_samples: int) -> dict[str, Any]:
        """
        [`aggregate`] where only the mean of the replies is known; for algorithms with `needs_only_mean`.

        Args:
            round (`int`): The next one.
            mean (`Message`): Σ p_k of the replies' groups and scalars, with the shares of `weighting`, or for a group
                in `group_weighting` of that; float64.
            sites (`list[str]`): Whose replies these were.
            num_samples (`int`): Of all of them together.

        Returns:
            `dict`: As [`aggregate`].

        Raises:
            RuntimeError: As [`aggregate`].
        """
        self._require_round(round)
        require("algorithm", self.name, self.needs_only_mean, "needs each reply by itself, not only their mean")
        selected = self._selected()
        if len(sites) < self.min_sites:
            raise RuntimeError(f"round {round}: {len(sites)} usable replies, {self.min_sites} are needed")
        if shapes(mean.groups) != shapes(self.template(self.sites[0]).groups):
            raise RuntimeError(f"round {round}: the mean does not look like a reply: {list(mean.groups)}")
        after = self._step({"mean": mean}, {"mean": 1.0})
        absent = [site for site in selected if site not in sites]
        return {**self._ended(after, sites, num_samples), "absent": absent, "refused": {}}

    def _ended(self, after: Groups, sites: list[str], num_samples: int) -> dict[str, Any]:
        """Takes over the new groups, if they are finite."""
        before, round = self.groups["weights"], self.round
        for group, tensors in after.items():
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise RuntimeError(
                        f"round {round}: {name!r} of {group!r} would not be finite; lower the learning rates"
                    )
        self.groups = {**self.groups, **after}
        self.last_rounds = {**self.last_rounds, **dict.fromkeys(sites, round)}
        self.round += 1
        changes = (after["weights"][name].double() - weight.double() for name, weight in before.items())
        return {
            "round": round,
            "num_sites": len(sites),
            "num_samples": num_samples,
            "update_norm": sum(float(change.square().sum()) for change in changes) ** 0.5,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on into the next round, as tensors of its own and plain containers."""
        return {
            "algorithm": self.name,
            "sites": list(self.sites),
            "seed": self.seed,
            "round": self.round,
            "last_rounds": dict(self.last_rounds),
            "groups": {group: clones(tensors) for group, tensors in self.groups.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Goes on from a state, exactly; with or without `setup` before.

        Raises:
            InputError: If it is that of another algorithm, or after `setup` of other sites or another model.
        """
        if state["algorithm"] != self.name:
            raise InputError(f"the state is that of {state['algorithm']!r}, not of {self.name!r}")
        sites = self._roster(state["sites"])
        if self.sites and sites != self.sites:
            raise InputError(f"the state is that of sites {sites}, not of {self.sites}; give the same roster")
        groups = {group: clones(tensors) for group, tensors in state["groups"].items()}
        basis = {group: tensors for group, tensors in groups.items() if group in ("weights", "buffers")}
        for expected in (self._layout(basis), self.groups):
            if expected and kinds(groups) != kinds(expected):
                raise InputError(f"the state does not fit {self.name} for this model: {difference(groups, expected)}")
        self.sites, self.groups = sites, groups
        self.seed, self.round, self.last_rounds = state["seed"], state["round"], dict(state["last_rounds"])

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        """The groups that this round changes, new tensors all; `shares` has the sites to use, in order of name."""
        raise NotImplementedError

    def _memory(self, weights: Group) -> Groups:
        """Further groups the server keeps, as they are at the start."""
        return {}

    def _address(self, site: str) -> dict[str, Scalar]:
        return {
            "algorithm": self.name,
            "round": self.round,
            "seed": site_seed(self.seed, self.round, site),
            "state_round": self.last_rounds.get(site, -1),
        }

    def _evaluated(self) -> Mapping[str, Group]:
        """The model to evaluate and save."""
        return {group: tensors for group, tensors in self.groups.items() if group in ("weights", "buffers")}

    def _sent(self) -> Mapping[str, Group]:
        """The groups of the message to a site."""
        return self._evaluated()

    def _scalars(self, site: str) -> dict[str, Scalar]:
        """Further scalars of the message to a site."""
        return {}

    def _replied(self) -> Mapping[str, Group]:
        """Groups that look like those of a reply."""
        return self._evaluated()

    def _refusal(self, site: str, reply: Message) -> str | None:
        """A further reason not to use a reply."""
        return None

    def _mean(self, replies: Mapping[str, Message], shares: dict[str, float], group: str) -> dict[str, torch.Tensor]:
        """The weighted mean of a group of the replies, float64."""
        return weighted_mean((replies[site].groups[group] for site in shares), shares.values())

    def _mean_buffers(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        if "buffers" not in self.groups:
            return {}
        return {"buffers": cast_like(self._mean(replies, shares, "buffers"), self.groups["buffers"])}

    def _layout(self, basis: Groups) -> Groups:
        return {**basis, **self._memory(basis["weights"])}

    def _roster(self, sites: Sequence[str]) -> list[str]:
        require("sites", sites, len(sites) > 0, "a training needs a site")
        for site in sites:
            require("sites", site, isinstance(site, str) and site, "a site needs a name, which is a text")
            require("sites", site, sites.count(site) == 1, "two sites have this name; names must differ")
        least = f"must be at most the number of sites, {len(sites)}"
        require("min_sites", self.min_sites, self.min_sites <= len(sites), least)
        return sorted(sites)

    def _selected(self) -> list[str]:
        num_selected = max(round(self.fraction * len(self.sites)), self.min_sites)
        return select_sites(self.sites, num_selected, self.seed, self.round)

    def _examined(self, replies: Mapping[str, Message], selected: list[str]) -> tuple[dict[str, int], dict[str, str]]:
        """The sites whose replies can be used with their numbers of samples, and the others with the reason."""
        num_samples, refused = {}, {}
        for site in sorted(replies):
            reply = replies[site]
            if reason := self._reason(site, reply, selected):
                refused[site] = reason
            else:
                num_samples[site] = reply.scalars["num_samples"]
        return num_samples, refused

    def _reason(self, site: str, reply: Message, selected: list[str]) -> str | None:
        if site not in self.sites:
            return f"is not on the roster {self.sites}"
        if site not in selected:
            return f"was not asked in round {self.round}"
        return check_reply(reply, self.template(site)) or self._refusal(site, reply)

    def _require_round(self, round: int) -> None:
        if not self.sites:
            raise RuntimeError("call setup or load_state_dict first")
        require("round", round, round == self.round, f"rounds follow each other; the next one is {self.round}")


def require(field: str, value: object, is_good: object, allowed: str) -> None:
    """Raises a `ConfigurationError` unless `is_good`."""
    if not is_good:
        raise ConfigurationError(field, value, allowed)
