"""FedSM: a global model, a personal one for every site, and a selector that tells which of them suits a sample."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.image_features import num_channels_of, num_image_features
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar
from hf_mlopt.federated.algorithms.selectors import LearnedSelector, MomentsSelector, NoSelector
from hf_mlopt.federated.algorithms.server import Groups, require
from hf_mlopt.federated.algorithms.soft_pull import mixture, soft_pull


logger = logging.get_logger(__name__)

# Of the common model to that of the personal one, in a message.
PERSONAL = {"weights": "personal", "buffers": "personal_buffers"}


class FedSMBase(FedAvg):
    """
    What the server does in either form of FedSM, [`FedSM`] and
    [`~hf_mlopt.federated.algorithms.fedsm_masked.MaskedFedSM`]: the global model is that of [`FedAvg`], the selector
    one of [`~hf_mlopt.federated.algorithms.selectors`]. A subclass says with `_own` what a site is sent of its own.

    The reply holds `weights` after local training from the global model, `personal` after as much from the personal
    model, with an optimizer of its own and no proximal term, the buffers of both, and what the selector asks for.

    Args:
        pull (`float`, *optional*, defaults to 0.7): λ of SoftPull in [0, 1].
        threshold (`float`, *optional*, defaults to 0.9): γ in [0, 1], for [`route`]; no part of the training.
        selector (`str`, *optional*, defaults to `"learned"`): `learned`, which takes its first weights as the group
            `selector` of `init`, `moments`, or `none`.
        buffers (`str`, *optional*, defaults to `"average"`): Buffers of the personal models are pulled as the weights
            are (`average`), or stay their site's (`local`).
        selector_steps (`int`, *optional*, defaults to 1): Of `learned`, full-batch steps a round.
        selector_lr (`float`, *optional*, defaults to 0.01): Of `learned`, Adam's learning rate.
        selector_weighting (`str`, *optional*, defaults to `"samples"`): Of `learned`, `samples` or `uniform`.
        num_features (`int`, *optional*, defaults to 23): Of `moments`, see [`num_image_features`].
        options: Those of [`ServerAlgorithm`].
    """

    def __init__(
        self,
        pull: float = 0.7,
        threshold: float = 0.9,
        selector: str = "learned",
        buffers: str = "average",
        selector_steps: int = 1,
        selector_lr: float = 0.01,
        selector_weighting: str = "samples",
        num_features: int = 23,
        **options,
    ):
        super().__init__(**options)
        require("pull", pull, 0 <= pull <= 1, "must be in [0, 1]")
        require("threshold", threshold, 0 <= threshold <= 1, "must be in [0, 1]")
        require("selector", selector, selector in ("learned", "moments", "none"), "must be learned, moments or none")
        require("buffers", buffers, buffers in ("average", "local"), "must be average or local")
        self.pull, self.threshold, self.buffers = pull, threshold, buffers
        if selector == "learned":
            self.selector = LearnedSelector(selector_steps, selector_lr, selector_weighting)
        else:
            self.selector = MomentsSelector(num_features) if selector == "moments" else NoSelector()
        fits = self.selector.needs_only_mean or not self.needs_only_mean
        hidden = "needs each site's statistics, which a masked sum hides; take learned or none"
        require("selector", selector, fits, hidden)
        self._selector_start: Group = {}

    @property
    def starts_with(self) -> tuple[str, ...]:
        """The first weights of a learned selector."""
        return ("selector",) if self.selector.takes_weights else ()

    @classmethod
    def options_for(cls, model: torch.nn.Module, args: Any) -> dict[str, Any]:
        """As [`ServerAlgorithm.options_for`]: the numbers that there are per image."""
        return {"num_features": num_image_features(num_channels_of(model) or 3)}

    def setup(self, sites: Sequence[str], init: Message, seed: int) -> None:
        """
        As [`ServerAlgorithm.setup`]; `init` further holds the group `selector` where the selector is learned.

        Raises:
            ConfigurationError: For a selector with one site only.
        """
        allowed = len(sites) >= 2 or self.selector.name == "none"
        require("selector", self.selector.name, allowed, "with one site there is nothing to select; use none")
        groups = dict(init.groups)
        self._selector_start = groups.pop("selector", {}) if self.selector.takes_weights else {}
        super().setup(sites, Message(groups, init.scalars), seed)
        if self.pull < 1 / len(self.sites) and len(self.sites) > 1:
            logger.warning(
                f"pull={self.pull}: below 1/{len(self.sites)} a personal model counts less for itself than any other "
                f"site's does; 1/{len(self.sites)} is the plain mean, 1 training alone"
            )

    def configure(self, round: int) -> dict[str, Message]:
        """As [`ServerAlgorithm.configure`], with the groups that are a site's own."""
        return {
            site: Message(
                {**message.groups, **self._own(site), **self.selector.sent(self.groups, site)}, message.scalars
            )
            for site, message in super().configure(round).items()
        }

    def template(self, site: str) -> Message:
        """As [`ServerAlgorithm.template`], with what the selector asks for."""
        message = super().template(site)
        return Message(
            {**message.groups, **self.selector.replied(self.groups, site)},
            {**message.scalars, **self.selector.replied_scalars(self.groups)},
        )

    def evaluation(self) -> dict[str, Message]:
        """As [`ServerAlgorithm.evaluation`], with the groups that are a site's own."""
        return {
            site: Message({**message.groups, **self._own(site)}, message.scalars)
            for site, message in super().evaluation().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        As [`ServerAlgorithm.load_state_dict`].

        Raises:
            InputError: Also where the state is that of another selector.
        """
        sites, start = self.sites, self._selector_start
        try:  # the layout depends on the roster and on the selector's weights
            self.sites = sites or self._roster(state["sites"])
            self._selector_start = start or state["groups"].get("selector", {})
            super().load_state_dict(state)
        except InputError:
            self.sites, self._selector_start = sites, start
            raise

    def _own(self, site: str) -> dict[str, Group]:
        """Groups of the message to a site that belong to its personal model."""
        raise NotImplementedError

    def _pulls(self) -> dict[str, float]:
        """λ for each group of the personal models."""
        pulls = {"personal": self.pull}
        if "buffers" in self.groups:
            pulls["personal_buffers"] = self.pull if self.buffers == "average" else 1.0
        return pulls

    def _layout(self, basis: Groups) -> Groups:
        return {**super()._layout(basis), **self.selector.memory(self.sites, self._selector_start)}

    def _scalars(self, site: str) -> dict[str, Scalar]:
        return {"label": self.sites.index(site), **self.selector.scalars(self.groups, site)}

    def _replied(self) -> Mapping[str, Group]:
        common = super()._replied()
        return {**common, **{PERSONAL[group]: tensors for group, tensors in common.items()}}

    def _refusal(self, site: str, reply: Message) -> str | None:
        return self.selector.refusal(self.groups, reply)

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        return {**super()._step(replies, shares), **self.selector.step(self.groups, replies, shares)}


class FedSM(FedSMBase):
    """
    [Closing the Generalization Gap of Cross-silo Federated Medical Image Segmentation](https://huggingface.co/papers/2203.10144).
    The global model is that of [`FedAvg`], the personal models follow [`soft_pull`], the selector one of
    [`~hf_mlopt.federated.algorithms.selectors`]; [`route`] is the rule of inference. All in one message a round.

    The message to a site holds `weights`, `buffers`, the `personal` model and `personal_buffers` of this site and no
    other, the scalar `label` (its index among the sites in order of name) and what the selector asks for. The
    personal model of a site that does not answer stays as it is. Options and replies are those of [`FedSMBase`].
    """

    name = "fedsm"
    needs_only_mean = False  # but of FedAvg's part

    def _own(self, site: str) -> dict[str, Group]:
        return {kind: self.groups[f"{kind}/{site}"] for kind in self._pulls()}

    def _layout(self, basis: Groups) -> Groups:
        personal = {f"{PERSONAL[group]}/{site}": tensors for group, tensors in basis.items() for site in self.sites}
        return {**super()._layout(basis), **personal}

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        after = super()._step(replies, shares)
        for kind, pull in self._pulls().items():
            for site, pulled in soft_pull(_GroupOf(replies, shares, kind), pull).items():
                after[f"{kind}/{site}"] = pulled
        return after


class _GroupOf(Mapping[str, Group]):
    """One group of the replies used, each read when it is asked for."""

    def __init__(self, replies: Mapping[str, Message], sites: Mapping[str, float], group: str):
        self.replies, self.sites, self.group = replies, list(sites), group

    def __getitem__(self, site: str) -> Group:
        return self.replies[site].groups[self.group]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def with_new_site(
    state: Mapping[str, Any],
    site: str,
    shares: Mapping[str, float],
    head: Sequence[str] = ("head.weight", "head.bias"),
) -> dict[str, Any]:
    """
    The state of a FedSM training with one more site, to load into a new [`FedSM`].

    Its personal model is the [`mixture`] of the others; the learned selector gets a row of zeros for it, and so do its
    moments. Labels go by the order of names, so the row lies where the name does and later labels move up.

    Args:
        state (`Mapping`): [`FedSM.state_dict`] of the training so far, between two rounds.
        site (`str`): Name of the new site.
        shares (`Mapping[str, float]`): Per old site the selector's mean probability over the new site's samples.
        head (`Sequence[str]`, *optional*): Weights of the selector with a row a site.

    Returns:
        `dict`: A new state; the old one is left as it is.

    Raises:
        ConfigurationError: If the name is taken, or the shares are none.
        InputError: If a weight of `head` has no row for every site, or the state holds no personal models.
    """
    if state["algorithm"] != FedSM.name:
        raise InputError(f"the state is that of {state['algorithm']!r}, which holds no personal models to be mixed")
    sites = list(state["sites"])
    require("site", site, site and site not in sites, f"needs a name that is not among {sites}")
    names, groups = sorted([*sites, site]), dict(state["groups"])
    for kind in ("personal", "personal_buffers"):
        if f"{kind}/{sites[0]}" in groups:
            groups[f"{kind}/{site}"] = mixture({old: groups[f"{kind}/{old}"] for old in sites}, shares)
    for group in ("selector", "selector_m", "selector_v"):
        if group in groups:
            rows = {name: _with_zero_row(groups[group], name, names.index(site), len(sites)) for name in head}
            groups[group] = {**groups[group], **rows}
    if f"selector_statistics/{sites[0]}" in groups:
        known = groups[f"selector_statistics/{sites[0]}"]
        groups[f"selector_statistics/{site}"] = {name: torch.zeros_like(tensor) for name, tensor in known.items()}
    return {**state, "sites": names, "groups": groups}


def _with_zero_row(weights: Group, name: str, index: int, num_rows: int) -> torch.Tensor:
    if name not in weights or weights[name].ndim == 0 or len(weights[name]) != num_rows:
        raise InputError(f"head: the selector has no weight {name!r} with {num_rows} rows, but {list(weights)}")
    before, after = weights[name][:index], weights[name][index:]
    return torch.cat([before, torch.zeros_like(weights[name][:1]), after])
