"""FedProx: sites are held near the model they started from."""

from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.message import Group, Scalar
from hf_mlopt.federated.algorithms.server import require


class FedProx(FedAvg):
    """
    [Federated Optimization in Heterogeneous Networks](https://huggingface.co/papers/1812.06127), Algorithm 2: sites
    minimise `F_k(w) + μ/2 ‖w - w_r‖²`; the server is that of [`FedAvg`]. The message says `proximal_mu`; the site
    corrects its gradients with [`fedprox_gradient`].

    Args:
        proximal_mu (`float`, *optional*, defaults to 0.01): μ, at least 0; 0 is FedAvg.
        options: Those of [`ServerAlgorithm`].
    """

    name = "fedprox"
    corrects_gradients = True

    def __init__(self, proximal_mu: float = 0.01, **options):
        super().__init__(**options)
        require("proximal_mu", proximal_mu, 0 <= proximal_mu < float("inf"), "must be at least 0")
        self.proximal_mu = proximal_mu

    def _scalars(self, site: str) -> dict[str, Scalar]:
        return {"proximal_mu": float(self.proximal_mu)}


def fedprox_gradient(grads: Group, weights: Group, global_weights: Group, mu: float) -> Group:
    """
    `g + μ (w - w_r)`: the gradient of the local loss plus the proximal term.

    Args:
        grads (`Group`): g; what has no gradient may be missing.
        weights (`Group`): w, where the site is.
        global_weights (`Group`): w_r, as sent.
        mu (`float`): μ; at 0 the gradients are returned as they are.

    Returns:
        `Group`: In the dtypes of `grads`.
    """
    if mu == 0:
        return grads
    return {name: g + mu * (weights[name] - global_weights[name]).to(g.dtype) for name, g in grads.items()}
