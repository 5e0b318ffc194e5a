"""FedAvgM: the server takes the mean change of the sites as a gradient, with momentum."""

from collections.abc import Mapping

from hf_mlopt.federated.algorithms.averaging import cast_like, wide_zeros
from hf_mlopt.federated.algorithms.message import Group, Message
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm, require


class FedAvgM(ServerAlgorithm):
    """
    [Measuring the Effects of Non-Identical Data Distribution](https://huggingface.co/papers/1909.06335), as heavy
    ball: `m = μ m + Δ`, `w += α m` with `Δ = Σ p_k (w_k - w)`. Buffers are only averaged.

    Args:
        server_momentum (`float`, *optional*, defaults to 0.9): μ in [0, 1).
        server_lr (`float`, *optional*, defaults to 1.0): α, above 0. At μ = 0 and α = 1 this is [`FedAvg`] bit
            for bit.
        options: Those of [`ServerAlgorithm`].
    """

    name = "fedavgm"
    needs_only_mean = True

    def __init__(self, server_momentum: float = 0.9, server_lr: float = 1.0, **options):
        super().__init__(**options)
        require("server_momentum", server_momentum, 0 <= server_momentum < 1, "must be in [0, 1)")
        require("server_lr", server_lr, 0 < server_lr < float("inf"), "must be above 0")
        self.server_momentum, self.server_lr = server_momentum, server_lr

    def _memory(self, weights: Group) -> Groups:
        return {"momentum": wide_zeros(weights)}

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        weights, momenta = {}, {}
        for name, mean in self._mean(replies, shares, "weights").items():
            w, old = self.groups["weights"][name].double(), self.groups["momentum"][name].double()
            momenta[name] = self.server_momentum * old + (mean - w)
            # w + α m, from the mean: w + (mean - w) need not be the mean in floating point.
            weights[name] = mean
            if self.server_lr != 1:
                weights[name] = weights[name] + (self.server_lr - 1) * (mean - w)
            if self.server_momentum > 0:
                weights[name] = weights[name] + self.server_lr * self.server_momentum * old
        return {
            "weights": cast_like(weights, self.groups["weights"]),
            "momentum": cast_like(momenta, self.groups["momentum"]),
            **self._mean_buffers(replies, shares),
        }
