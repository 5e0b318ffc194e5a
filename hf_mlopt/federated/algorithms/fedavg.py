"""FedAvg: the mean of the sites' weights."""

from collections.abc import Mapping

from hf_mlopt.federated.algorithms.averaging import cast_like
from hf_mlopt.federated.algorithms.message import Message
from hf_mlopt.federated.algorithms.server import Groups, ServerAlgorithm


class FedAvg(ServerAlgorithm):
    """
    [Communication-Efficient Learning of Deep Networks from Decentralized Data](https://huggingface.co/papers/1602.05629),
    Algorithm 1: `w = Σ p_k w_k`. Options are those of [`ServerAlgorithm`].

    Floating-point buffers are averaged with the same weights, integer ones too and then rounded.
    """

    name = "fedavg"
    needs_only_mean = True

    def _step(self, replies: Mapping[str, Message], shares: dict[str, float]) -> Groups:
        weights = cast_like(self._mean(replies, shares, "weights"), self.groups["weights"])
        return {"weights": weights, **self._mean_buffers(replies, shares)}
