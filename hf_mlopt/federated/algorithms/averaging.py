"""The mean of what sites send, and who is asked. The same in every process, whatever order replies come in."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from hf_mlopt.federated.algorithms.message import Group


def weighted_mean(groups: Iterable[Group], shares: Iterable[float]) -> dict[str, torch.Tensor]:
    """
    Σ p_k t_k for every tensor, added in the order given. Holds one group at a time.

    Args:
        groups (`Iterable[Group]`): The same names and shapes from every site.
        shares (`Iterable[float]`): p_k, one a site. A single site with p = 1 is returned bit for bit.

    Returns:
        `dict[str, torch.Tensor]`: float64.
    """
    mean = {}
    for group, share in zip(groups, shares, strict=True):
        for name, tensor in group.items():
            if name in mean:
                mean[name].add_(tensor.double(), alpha=share)
            else:  # not from 0: 0.0 + -0.0 would lose a sign
                mean[name] = tensor.double() * share
    return mean


def cast_like(values: Group, like: Group) -> dict[str, torch.Tensor]:
    """`values` in the dtypes of `like`; for integers, such as counts of batches, rounded."""
    cast = {}
    for name, value in values.items():
        dtype = like[name].dtype
        cast[name] = (value if dtype.is_floating_point else value.round()).to(dtype)
    return cast


def wide_zeros(like: Group) -> dict[str, torch.Tensor]:
    """Zeros for a server's memory, at least float32."""
    return {name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in like.items()}


def sample_shares(num_samples: Mapping[str, int], weighting: str) -> dict[str, float]:
    """p_k of every site, in the order of `num_samples`: n_k / Σ n for `samples`, 1 / K for `uniform`."""
    counts = num_samples if weighting == "samples" else dict.fromkeys(num_samples, 1)
    total = sum(counts.values())
    return {site: count / total for site, count in counts.items()}


def select_sites(sites: Sequence[str], num_selected: int, seed: int, round: int) -> list[str]:
    """
    A uniformly random choice without replacement, from a hash: no generator, so nothing to store, and the same in
    every process and version.

    Returns:
        `list[str]`: Sorted names.
    """
    ranked = sorted(sites, key=lambda site: _hash("select", seed, round, site))
    return sorted(ranked[:num_selected])


def site_seed(seed: int, round: int, site: str) -> int:
    """A seed below 2^31 of its own for every site and round."""
    return int.from_bytes(_hash("train", seed, round, site)[:4], "big") >> 1


def _hash(purpose: str, seed: int, round: int, site: str) -> bytes:
    return hashlib.sha256(f"{purpose}/{seed}/{round}/{site}".encode()).digest()
