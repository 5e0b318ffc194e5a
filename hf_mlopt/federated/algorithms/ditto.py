"""Ditto: next to the common model, every site trains one of its own that is held near it."""

from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.fedprox import fedprox_gradient
from hf_mlopt.federated.algorithms.message import Group, Scalar
from hf_mlopt.federated.algorithms.server import require


class Ditto(FedAvg):
    """
    [Ditto: Fair and Robust Federated Learning Through Personalization](https://huggingface.co/papers/2012.04221),
    Algorithm 1. The common model is trained as in [`FedAvg`]. The personal one, which never leaves its site, follows
    [`ditto_gradient`] with the `ditto_lambda` of the message.

    Args:
        ditto_lambda (`float`, *optional*, defaults to 0.1): λ, at least 0; at 0 the personal model is trained alone.
        options: Those of [`ServerAlgorithm`].
    """

    name = "ditto"
    corrects_gradients = True

    def __init__(self, ditto_lambda: float = 0.1, **options):
        super().__init__(**options)
        require("ditto_lambda", ditto_lambda, 0 <= ditto_lambda < float("inf"), "must be at least 0")
        self.ditto_lambda = ditto_lambda

    def _scalars(self, site: str) -> dict[str, Scalar]:
        return {"ditto_lambda": float(self.ditto_lambda)}


def ditto_gradient(grads: Group, personal: Group, global_weights: Group, lmbda: float) -> Group:
    """
    `g(v) + λ (v - w_r)`: the gradient for the personal model v, Equation 1.

    Args:
        grads (`Group`): g, taken at the personal model.
        personal (`Group`): v.
        global_weights (`Group`): w_r, the common model as sent at the start of the round.
        lmbda (`float`): λ.

    Returns:
        `Group`: In the dtypes of `grads`.
    """
    return fedprox_gradient(grads, personal, global_weights, lmbda)
