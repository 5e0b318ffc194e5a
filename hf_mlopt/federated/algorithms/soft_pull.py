"""SoftPull: personal models that are drawn towards one another."""

from collections.abc import Iterable, Mapping

import torch

from hf_mlopt.federated.algorithms.averaging import cast_like, weighted_mean
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.algorithms.server import require


def soft_pull(ends: Mapping[str, Group], pull: float) -> dict[str, dict[str, torch.Tensor]]:
    r"""
    `w_k = λ ŵ_k + b Σ_{j≠k} ŵ_j` with `b = (1-λ)/(K-1)`, SoftPull of
    [Closing the Generalization Gap of Cross-silo Federated Medical Image Segmentation](https://huggingface.co/papers/2203.10144).

    The weights are doubly stochastic: the mean of the models stays, and what parts them shrinks by `|λ - b|`. All
    sites count alike, whatever their samples.

    Args:
        ends (`Mapping[str, Group]`): ŵ_k, the models after local training, of the K sites that answered. Each is read
            twice, one at a time.
        pull (`float`): λ, the weight of the own model: 1 is training alone, 1/K the plain mean.

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: w_k in the dtypes given, integers rounded; a single site keeps its
            own model.
    """
    total = soft_pull_total(ends[site] for site in ends)
    return {site: soft_pull_from_total(ends[site], total, pull, len(ends)) for site in ends}


def soft_pull_total(ends: Iterable[Group]) -> dict[str, torch.Tensor]:
    """Σ_j ŵ_j, float64: all that SoftPull needs of others, so one masked sum of the sites can replace it."""
    ends = iter(ends)
    first = next(ends)
    total = weighted_mean([first], [1.0])
    for end in ends:
        for name, tensor in end.items():
            total[name].add_(tensor.double())
    return total


def soft_pull_from_total(own: Group, total: Group, pull: float, num_sites: int) -> dict[str, torch.Tensor]:
    """
    `w_k = (λ-b) ŵ_k + b Σ_j ŵ_j`, [`soft_pull`] by who holds one model and the sum; a site itself in the masked form.

    Args:
        own (`Group`): ŵ_k.
        total (`Group`): Σ_j ŵ_j, the own model included.
        pull (`float`): λ in [0, 1].
        num_sites (`int`): K, the models in the sum.

    Returns:
        `dict[str, torch.Tensor]`: In the dtypes of `own`.
    """
    require("pull", pull, 0 <= pull <= 1, "must be in [0, 1]")
    if num_sites == 1 or pull == 1:  # nobody pulls: bit for bit
        return dict(own)
    b = (1 - pull) / (num_sites - 1)
    pulled = {name: (pull - b) * end.double() + b * total[name].double() for name, end in own.items()}
    return cast_like(pulled, own)


def mixture(models: Mapping[str, Group], shares: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """
    Σ_k q_k w_k, a model for a site that joins during the training.

    Args:
        models (`Mapping[str, Group]`): w_k, the personal models.
        shares (`Mapping[str, float]`): q_k, of every model, in sum 1: the selector's probabilities, mean over the new
            site's samples.

    Returns:
        `dict[str, torch.Tensor]`: In the dtypes of the models.
    """
    sites = sorted(models)
    is_distribution = sorted(shares) == sites and abs(sum(shares.values()) - 1) < 1e-4
    require("shares", dict(shares), is_distribution, f"must name the sites {sites} and sum to 1")
    mean = weighted_mean((models[site] for site in sites), (shares[site] for site in sites))
    return cast_like(mean, models[sites[0]])
