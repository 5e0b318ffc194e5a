"""SCAFFOLD: sites correct their gradients by what they know of everybody's."""

from collections.abc import Mapping

import torch

from hf_mlopt.federated.algorithms.averaging import cast_like, wide_zeros
from hf_mlopt.federated.algorithms.message import Group, Message
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm, require


class Scaffold(ServerAlgorithm):
    """
    [SCAFFOLD: Stochastic Controlled Averaging for Federated Learning](https://huggingface.co/papers/1910.06378),
    Algorithm 1 with option II: `w += α Σ p_k (w_k - w)` and `c += (1/K) Σ (c_k⁺ - c_k)` over the sites that answered,
    K being the size of the roster. The paper has equal p_k (`weighting="uniform"`).

    The message holds `weights`, `buffers` and `control` (c); the reply has `control_change` (c_k⁺ - c_k) in place of
    c. A site keeps c_k as it was after the round `state_round` of the message, or the server's c would no longer be
    their mean. Local steps must be plain SGD, or the change over the learning rates is no mean gradient; the caller
    sees to it.

    Args:
        server_lr (`float`, *optional*, defaults to 1.0): α, above 0.
        options: Those of [`ServerAlgorithm`].
    """

    name = "scaffold"
    needs_sgd = "takes the change of the weights over the learning rates for a mean gradient"
    needs_plain_sgd = corrects_gradients = True
    can_go_back = False  # the controls of its sites

    def __init__(self, server_lr: float = 1.0, **options):
        super().__init__(**options)
        require("server_lr", server_lr, 0 < server_lr < float("inf"), "must be above 0")
        self.server_lr = server_lr

    def _memory(self, weights: Group) -> Groups:
        return {"control": wide_zeros(weights)}

    def _sent(self) -> Mapping[str, Group]:
        return self.groups

    def _replied(self) -> Mapping[str, Group]:
        return {**super()._replied(), "control_change": self.groups["control"]}

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        weights = self._mean(replies, shares, "weights")
        if self.server_lr != 1:  # w + α (mean - w), from the mean: at α = 1 that of FedAvg bit for bit
            for name, mean in weights.items():
                weights[name] = mean + (self.server_lr - 1) * (mean - self.groups["weights"][name].double())
        changes = self._mean(replies, dict.fromkeys(shares, 1 / len(self.sites)), "control_change")
        control = {name: self.groups["control"][name].double() + change for name, change in changes.items()}
        return {
            "weights": cast_like(weights, self.groups["weights"]),
            "control": cast_like(control, self.groups["control"]),
            **self._mean_buffers(replies, shares),
        }


def scaffold_gradient(grads: Group, control: Group, own_control: Group) -> Group:
    """
    `g + c - c_k`, the corrected gradient of a local step.

    Args:
        grads (`Group`): g; what has no gradient may be missing.
        control (`Group`): c, as sent.
        own_control (`Group`): c_k.

    Returns:
        `Group`: In the dtypes of `grads`.
    """
    return {name: g + (control[name] - own_control[name]).to(g.dtype) for name, g in grads.items()}


def scaffold_new_control(
    own_control: Group, control: Group, start: Group, end: Group, lr_sum: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    `c_k⁺ = c_k - c + (w_start - w_end) / S`, option II; S replaces the paper's K η, so that a schedule may run.

    Args:
        own_control (`Group`): c_k, in gradient units.
        control (`Group`): c.
        start (`Group`): Weights as sent.
        end (`Group`): Weights after the local steps.
        lr_sum (`float`): S, the sum of the learning rates of the steps, above 0.

    Returns:
        `tuple`: c_k⁺, and c_k⁺ - c_k for the reply, in the dtypes of `control`.

    Raises:
        ConfigurationError: If `lr_sum` is not above 0.
    """
    require("lr_sum", lr_sum, 0 < lr_sum < float("inf"), "must be above 0: SCAFFOLD needs a local step that moves")
    new = {
        name: own_control[name].double() - c.double() + (start[name].double() - end[name].double()) / lr_sum
        for name, c in control.items()
    }
    new = cast_like(new, control)
    return new, {name: c_k - own_control[name] for name, c_k in new.items()}
