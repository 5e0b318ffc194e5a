"""What each algorithm adds to the local training of a site: to gradients, to steps, and to what the site keeps."""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from transformers import TrainerCallback

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import (
    ALGORITHMS,
    Message,
    ditto_gradient,
    domo_fused_step,
    fedprox_gradient,
    scaffold_gradient,
    scaffold_new_control,
)
from hf_mlopt.federated.algorithms.fedsm import PERSONAL
from hf_mlopt.federated.algorithms.message import Group, Scalar
from hf_mlopt.federated.algorithms.soft_pull import soft_pull_from_total
from hf_mlopt.federated.parameters import SharedParameters
from hf_mlopt.federated.selector_model import selector_reply


class SiteRule(TrainerCallback):
    """
    FedAvg, which adds nothing; the others derive from it. One is made for each message. As a callback it sees every
    step of the local training, and counts what the server has to know.

    Args:
        message (`Message`): What the server sent.
        state (`Message`, *optional*): What the site has kept.
        shared (`SharedParameters`): The model.
        images (`Iterable[torch.Tensor]`, *optional*): The site's images in batches, for the algorithm that looks at
            them beside the training.
    """

    keeps_state = False

    def __init__(
        self,
        message: Message,
        state: Message | None,
        shared: SharedParameters,
        images: Iterable[torch.Tensor] = (),
    ):
        self.message, self.state, self.shared, self.images = message, state, shared, images
        self.lr_sum, self.num_steps = 0.0, 0
        self.scalars: dict[str, Scalar] = {}  # further ones of the reply

    def load(self) -> None:
        """Has the model stand where local training starts."""
        self.shared.load(self.message)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # In `on_step_end` the rate is that of the next step already.
        self.lr = float(optimizer.param_groups[0]["lr"])
        self.lr_sum += self.lr
        self.num_steps += 1
        self._correct()

    def after(self, train: Callable[["SiteRule"], None]) -> tuple[dict[str, Group], Message | None]:
        """
        What the site answers and keeps after local training.

        Args:
            train (`Callable`): Trains the model as it stands once more, by another rule.
        """
        return self._ended(), None

    def _ended(self) -> dict[str, Group]:
        """Where the model stands; of half precision the sent value plus the change, which rounding is no part of."""
        groups = dict(self.shared.message(self.exchanged()).groups)
        weights = {}
        for name, end in groups["weights"].items():
            dtype, sent = self.shared.weights[name].dtype, self.message.groups["weights"][name]
            is_whole = torch.promote_types(dtype, torch.float32) == dtype
            weights[name] = end if is_whole else sent + (end - sent.to(dtype).to(sent.dtype))
        return {**groups, "weights": weights}

    def personal(self) -> Message | None:
        """The site's own model, where it has one beside that of the message."""
        return None

    def exchanged(self) -> dict[str, Group]:
        """What both the message and the answer hold of the model."""
        return {group: self.message.groups[group] for group in ("weights", "buffers") if group in self.message.groups}

    def _correct(self) -> None:
        """Changes the gradients of a step, before it is made."""

    @torch.no_grad()
    def _set_gradients(self, corrected: Callable[[Group], Group]) -> None:
        weights = self.shared.weights
        grads = {name: p.grad for name, p in weights.items() if p.grad is not None and name in self._start}
        for name, grad in corrected(grads).items():
            weights[name].grad.copy_(grad)

    @cached_property
    def _start(self) -> Group:
        return self._beside_weights(self.message.groups["weights"])

    def _beside_weights(self, group: Group) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.shared.weights[name].device) for name, tensor in group.items()}


class FedProxRule(SiteRule):
    """FedProx: `g + μ (w - w_r)`."""

    def _correct(self) -> None:
        mu = self.message.scalars["proximal_mu"]
        self._set_gradients(lambda grads: fedprox_gradient(grads, self.shared.weights, self._start, mu))


class ScaffoldRule(SiteRule):
    """SCAFFOLD: `g + c - c_k`; the site keeps c_k."""

    keeps_state = True

    @cached_property
    def own_control(self) -> Group:
        """c_k; zeros before the first round."""
        if self.state is not None:
            return self.state.groups["control"]
        return {name: torch.zeros_like(c) for name, c in self.message.groups["control"].items()}

    @cached_property
    def _controls(self) -> tuple[Group, Group]:
        return self._beside_weights(self.message.groups["control"]), self._beside_weights(self.own_control)

    def _correct(self) -> None:
        self._set_gradients(lambda grads: scaffold_gradient(grads, *self._controls))

    def after(self, train):
        groups, _ = super().after(train)
        new, change = scaffold_new_control(
            self.own_control,
            self.message.groups["control"],
            self.message.groups["weights"],
            groups["weights"],
            self.lr_sum,
        )
        return {**groups, "control_change": change}, Message({"control": new})


class DittoRule(SiteRule):
    """Ditto: beside the common model one of the site's own, trained towards the common one as it was sent."""

    keeps_state = True

    def after(self, train):
        groups, _ = super().after(train)
        self.shared.load(self.message, self.personal())
        train(_DittoPersonalRule(self.message, None, self.shared))
        personal = self.shared.message()
        return groups, Message(personal.groups)

    def personal(self) -> Message:
        """The site's own model; before its first round the common one."""
        return self.state or self.message


class _DittoPersonalRule(SiteRule):
    def _correct(self) -> None:
        lmbda = self.message.scalars["ditto_lambda"]
        self._set_gradients(lambda grads: ditto_gradient(grads, self.shared.weights, self._start, lmbda))


class FedSMRule(SiteRule):
    """
    FedSM: beside the common model the site's personal one, which the server keeps, trained alike and by an optimizer
    of its own; and the site's part of the model selector.
    """

    def after(self, train):
        groups, _ = super().after(train)
        self.shared.load(self.personal())
        train(SiteRule(self.message, None, self.shared))
        own = self.shared.message(self.personal().groups).groups
        personal = {"personal" if group == "weights" else f"personal_{group}": own[group] for group in own}
        selector, self.scalars = selector_reply(self.message, self.images)
        return {**groups, **personal, **selector}, None

    def personal(self) -> Message:
        groups = self.message.groups
        return Message({group: groups[kind] for group, kind in PERSONAL.items() if kind in groups})


class MaskedFedSMRule(FedSMRule):
    """
    FedSM under masks: the site keeps its personal model ŵ_k, and pulls it with the mean of the round that it is of. So
    one that was absent goes on from where it was.
    """

    keeps_state = True

    def after(self, train):
        groups, _ = super().after(train)
        return groups, Message({kind: groups[kind] for kind in PERSONAL.values() if kind in groups})

    def personal(self) -> Message:
        return self._pulled

    @cached_property
    def _pulled(self) -> Message:
        mean, scalars = super().personal(), self.message.scalars
        if self.state is None:  # what all begin with
            return mean
        pulled, number = {}, scalars["num_pulled"]
        for group, values in mean.groups.items():
            total = {name: value.double() * number for name, value in values.items()}
            own, pull = self.state.groups[PERSONAL[group]], scalars[f"pull_{PERSONAL[group]}"]
            pulled[group] = soft_pull_from_total(own, total, pull, number)
        return Message(pulled)


class FedBNRule(SiteRule):
    """FedBN: what the messages leave out, above all the normalization layers, is the site's own."""

    keeps_state = True

    def load(self) -> None:
        self.shared.load(self.message, *([self.state] if self.state else []))

    def after(self, train):
        groups, _ = super().after(train)
        own = {
            group: [name for name in tensors if name not in self.message.groups.get(group, ())]
            for group, tensors in self.shared.tensors().items()
        }
        return groups, self.shared.message(own)


class DOMORule(SiteRule):
    """DOMO-S: every local step goes along the server's momentum as well; DOMO's fusion is the server's."""

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.message.scalars["fusion_at"] == "step":
            weights = {name: self.shared.weights[name] for name in self._momenta}
            for name, value in domo_fused_step(
                weights, self._momenta, self.lr, self.message.scalars["fusion"]
            ).items():
                weights[name].copy_(value)

    @cached_property
    def _momenta(self) -> Group:
        return self._beside_weights(self.message.groups["server_momentum"])


SITE_RULES = {
    **dict.fromkeys(ALGORITHMS, SiteRule),  # unless it has a part at the site:
    "fedprox": FedProxRule,
    "scaffold": ScaffoldRule,
    "ditto": DittoRule,
    "fedbn": FedBNRule,
    "fedsm": FedSMRule,
    "fedsm-masked": MaskedFedSMRule,
    "domo": DOMORule,
}


def site_rule(message: Message) -> type[SiteRule]:
    """
    The rule for a message.

    Raises:
        InputError: If this version does not know the server's algorithm.
    """
    name = message.scalars.get("algorithm")
    if name not in SITE_RULES:
        raise InputError(f"algorithm={name!r}: this site knows {', '.join(SITE_RULES)}; install the server's version")
    return SITE_RULES[name]
