"""FedYogi: FedAdam with a second moment that moves by steps of bounded size."""

import torch

from hf_mlopt.federated.algorithms.fedadam import FedAdam


class FedYogi(FedAdam):
    """
    [Adaptive Federated Optimization](https://huggingface.co/papers/2003.00295), Algorithm 2:
    `v = v - (1 - β₂) Δ² sign(v - Δ²)`, all else as [`FedAdam`].

    Args:
        server_lr (`float`, *optional*, defaults to 0.01): η, above 0.
        options: Those of [`FedAdam`].
    """

    name = "fedyogi"

    def __init__(self, server_lr: float = 0.01, **options):
        super().__init__(server_lr, **options)

    def second_moment(self, v: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The new v, of the shape of `delta`, float64."""
        return v - (1 - self.betas[1]) * delta**2 * torch.sign(v - delta**2)
