"""FedAdam: the server takes the mean change of the sites as a gradient for Adam."""

from collections.abc import Mapping

import torch

from hf_mlopt.federated.algorithms.averaging import cast_like, wide_zeros
from hf_mlopt.federated.algorithms.message import Group, Message
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm, require


class FedAdam(ServerAlgorithm):
    """
    [Adaptive Federated Optimization](https://huggingface.co/papers/2003.00295), Algorithm 2:
    `m = β₁ m + (1 - β₁) Δ`, `v = β₂ v + (1 - β₂) Δ²`, `w += η m / (√v + τ)` with `Δ = Σ p_k (w_k - w)`.

    v starts at 0 as in Flower; the paper asks for at least τ². Buffers are only averaged.

    Args:
        server_lr (`float`, *optional*, defaults to 0.1): η, above 0.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.99)`): β₁ and β₂ in [0, 1).
        tau (`float`, *optional*, defaults to 1e-3): τ, above 0, in units of a change of weights.
        bias_correction (`str`, *optional*, defaults to `"none"`): `none` as in the paper, or `flwr`, as Flower does:
            η times √(1 - β₂ᵗ) / (1 - β₁ᵗ) with t = 2 in the first round.
        options: Those of [`ServerAlgorithm`].
    """

    name = "fedadam"
    needs_only_mean = True

    def __init__(
        self,
        server_lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        bias_correction: str = "none",
        **options,
    ):
        super().__init__(**options)
        require("server_lr", server_lr, 0 < server_lr < float("inf"), "must be above 0")
        require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "must be two in [0, 1)")
        require("tau", tau, 0 < tau < float("inf"), "must be above 0")
        require("bias_correction", bias_correction, bias_correction in ("none", "flwr"), "must be none or flwr")
        self.server_lr, self.betas, self.tau, self.bias_correction = server_lr, tuple(betas), tau, bias_correction

    def second_moment(self, v: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The new v, of the shape of `delta`, float64."""
        return self.betas[1] * v + (1 - self.betas[1]) * delta**2

    def _memory(self, weights: Group) -> Groups:
        return {"momentum": wide_zeros(weights), "second_moment": wide_zeros(weights)}

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        beta1, beta2 = self.betas
        lr = self.server_lr
        if self.bias_correction == "flwr":
            lr *= (1 - beta2 ** (self.round + 2)) ** 0.5 / (1 - beta1 ** (self.round + 2))
        weights, momenta, second_moments = {}, {}, {}
        for name, mean in self._mean(replies, shares, "weights").items():
            w, m, v = (self.groups[group][name].double() for group in ("weights", "momentum", "second_moment"))
            delta = mean - w
            momenta[name] = beta1 * m + (1 - beta1) * delta
            second_moments[name] = self.second_moment(v, delta)
            weights[name] = w + lr * momenta[name] / (second_moments[name].sqrt() + self.tau)
        return {
            "weights": cast_like(weights, self.groups["weights"]),
            "momentum": cast_like(momenta, self.groups["momentum"]),
            "second_moment": cast_like(second_moments, self.groups["second_moment"]),
            **self._mean_buffers(replies, shares),
        }
