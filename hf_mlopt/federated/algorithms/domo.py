"""DOMO and its family: a momentum of the server that is fused into what the sites do."""

import math
from collections.abc import Mapping

import torch

from hf_mlopt.federated.algorithms.averaging import cast_like, wide_zeros
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm, require


class FederatedDOMO(ServerAlgorithm):
    r"""
    [Coordinating Momenta for Cross-silo Federated Learning](https://huggingface.co/papers/2102.03970), the rule of
    [`~hf_mlopt.optimizers.DOMO`] with the server apart from the sites, S the mean sum of a round's learning rates:

    ```
    y = x - β S' m                              # fusion at the start, S' of the round before; else y = x
    m = μ_s m + (y - Σ p_k x_k) / S             # fusion at each step: y - Σ p_k x_k - β S m; unit param: not over S
    x = x - α S m                               # unit param: α, and β above, without S
    ```

    The message holds `weights` (y), `buffers`, and the scalars `fusion`, `fusion_at`, `local_state`; with fusion at
    each step also `server_momentum` (m), which the site applies by [`domo_fused_step`]. The reply adds the scalar
    `lr_sum`; all parameters of a site share one learning rate. With `local_state="average"` both hold
    `local_momentum`, the momentum of the sites' SGD. The model to evaluate is `groups["weights"]`, x.

    Args:
        server_momentum (`float`, *optional*, defaults to 0.9): μ_s in [0, 1).
        server_lr (`float`, *optional*, defaults to 1.0): α, above 0.
        fusion (`float`, *optional*): β, at least 0; α μ_s where absent, which makes stable learning rates smaller than
            at 0.3 to 0.6. With μ_s = β = 0 and α = 1 this is [`FedAvg`] bit for bit.
        fusion_at (`str`, *optional*, defaults to `"start"`): `start` of the round (DOMO) or every local `step`
            (DOMO-S).
        local_state (`str`, *optional*, defaults to `"reset"`): What a site's optimizer begins a round with: `reset`,
            `keep`, or the `average` of the sites' momenta.
        server_unit (`str`, *optional*, defaults to `"grad"`): Unit of m, `grad` or `param`.
        options: Those of [`ServerAlgorithm`].
    """

    name = "domo"

    def __init__(
        self,
        server_momentum: float = 0.9,
        server_lr: float = 1.0,
        fusion: float | None = None,
        fusion_at: str = "start",
        local_state: str = "reset",
        server_unit: str = "grad",
        **options,
    ):
        super().__init__(**options)
        fusion = server_lr * server_momentum if fusion is None else fusion
        require("server_momentum", server_momentum, 0 <= server_momentum < 1, "must be in [0, 1)")
        require("server_lr", server_lr, 0 < server_lr < float("inf"), "must be above 0")
        require("fusion", fusion, 0 <= fusion < float("inf"), "must be at least 0")
        require("fusion_at", fusion_at, fusion_at in ("start", "step"), "must be start or step")
        known = local_state in ("reset", "keep", "average")
        require("local_state", local_state, known, "must be reset, keep or average")
        require("server_unit", server_unit, server_unit in ("grad", "param"), "must be grad or param")
        is_gradient = fusion_at == "start" or server_unit == "grad"
        require("server_unit", server_unit, is_gradient, "must be grad where local steps take the momentum")
        self.server_momentum, self.server_lr, self.fusion = server_momentum, server_lr, fusion
        self.fusion_at, self.local_state, self.server_unit = fusion_at, local_state, server_unit

    @property
    def sends_model(self) -> bool:
        """Not where the start of a round is moved along the server's momentum."""
        return self.fusion_at == "step" or self.fusion == 0

    @property
    def needs_only_mean(self) -> bool:
        """Not where the sites' momenta are averaged as well."""
        return self.local_state != "average"

    def _memory(self, weights: Group) -> Groups:
        memory = {"server_momentum": wide_zeros(weights), "lr_sum": {"last": torch.zeros((), dtype=torch.float64)}}
        if self.local_state == "average":
            memory["local_momentum"] = wide_zeros(weights)
        return memory

    def _sent(self) -> Mapping[str, Group]:
        sent = {**super()._sent(), "weights": self._start()}
        if self.fusion_at == "step":
            sent["server_momentum"] = self.groups["server_momentum"]
        if self.local_state == "average":
            sent["local_momentum"] = self.groups["local_momentum"]
        return sent

    def _scalars(self, site: str) -> dict[str, Scalar]:
        return {"fusion": float(self.fusion), "fusion_at": self.fusion_at, "local_state": self.local_state}

    def _replied(self) -> Mapping[str, Group]:
        averaged = ("local_momentum",) if self.local_state == "average" else ()
        return {**super()._replied(), **{group: self.groups[group] for group in averaged}}

    def _refusal(self, site: str, reply: Message) -> str | None:
        lr_sum = reply.scalars.get("lr_sum")
        if type(lr_sum) is float and 0 <= lr_sum < math.inf:
            return None
        return f"lr_sum={lr_sum!r}; a float of at least 0 is needed"

    def _start(self) -> dict[str, torch.Tensor]:
        """y, what the sites start from; always with the same bits."""
        if self.sends_model:
            return self.groups["weights"]
        scale = self.fusion * (float(self.groups["lr_sum"]["last"]) if self.server_unit == "grad" else 1.0)
        momenta = self.groups["server_momentum"]
        starts = {name: x.double() - scale * momenta[name].double() for name, x in self.groups["weights"].items()}
        return cast_like(starts, self.groups["weights"])

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        lr_sum = sum(share * replies[site].scalars["lr_sum"] for site, share in shares.items())
        averaged = self._mean_buffers(replies, shares)
        if self.local_state == "average":
            momenta = self._mean(replies, shares, "local_momentum")
            averaged["local_momentum"] = cast_like(momenta, self.groups["local_momentum"])
        if lr_sum == 0:  # no step was taken, or each with a learning rate of 0
            return {"weights": self.groups["weights"], **averaged}
        return {**self._server_step(self._mean(replies, shares, "weights"), lr_sum), **averaged}

    def _server_step(self, means: Group, lr_sum: float) -> Groups:
        scale = lr_sum if self.server_unit == "grad" else 1.0
        weights, momenta, starts = {}, {}, self._start()
        for name, mean in means.items():
            x, y, m = (
                some[name].double() for some in (self.groups["weights"], starts, self.groups["server_momentum"])
            )
            if self.fusion_at == "step" and self.fusion > 0:
                mean = mean + self.fusion * lr_sum * m  # without what the fusion did
            momenta[name] = self.server_momentum * m + (y - mean) / scale
            # x - α S m⁺, from the mean: x - (x - mean) need not be the mean in floating point.
            weights[name] = mean
            if self.server_lr != 1:
                weights[name] = weights[name] + (1 - self.server_lr) * (y - mean)
            if starts is not self.groups["weights"]:
                weights[name] = weights[name] + (x - y)
            if self.server_momentum > 0:
                weights[name] = weights[name] - self.server_lr * scale * self.server_momentum * m
        return {
            "weights": cast_like(weights, self.groups["weights"]),
            "server_momentum": cast_like(momenta, self.groups["server_momentum"]),
            "lr_sum": {"last": torch.tensor(lr_sum, dtype=torch.float64)},
        }


def domo_fused_step(weights: Group, server_momentum: Group, lr: float, fusion: float) -> dict[str, torch.Tensor]:
    """
    DOMO-S: what a local step adds after the optimizer's own, `x - β η m`.

    Args:
        weights (`Group`): x, after the step.
        server_momentum (`Group`): m, as sent.
        lr (`float`): η of this step.
        fusion (`float`): β, as sent.

    Returns:
        `dict[str, torch.Tensor]`: In the dtypes of `weights`.
    """
    return {name: (x - lr * fusion * server_momentum[name]).to(x.dtype) for name, x in weights.items()}
