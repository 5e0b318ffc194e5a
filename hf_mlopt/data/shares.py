"""Who holds which examples: splits of a labelled data set among silos whose data differ."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError


if TYPE_CHECKING:
    import numpy as np


def label_sorted_shares(
    labels: "np.ndarray | Sequence[int]", num_shares: int, similarity: float, seed: int
) -> list["np.ndarray"]:
    """
    Deals a part of the examples at random and the rest in the order of their labels, as
    [SCAFFOLD](https://huggingface.co/papers/1910.06378), section 7, does with "s % similarity".

    Args:
        labels (`np.ndarray` or `Sequence[int]`): `[examples]`.
        num_shares (`int`): Number of silos.
        similarity (`float`): Part of the examples that is dealt at random: 1 is i.i.d., 0 gives each silo a run of the
            sorted labels.
        seed (`int`): Decides which examples are dealt at random, and the order of those with one label.

    Returns:
        `list[np.ndarray]`: Ascending indices, int64, a share each; sizes differ by at most one.

    Raises:
        ConfigurationError: If there are more shares than examples, or a value is out of range.
    """
    import numpy as np

    labels = _checked(labels, num_shares, seed)
    if not 0 <= similarity <= 1:
        raise ConfigurationError("similarity", similarity, "must be from 0 (sorted by label) to 1 (i.i.d.)")
    order = np.random.default_rng(seed).permutation(len(labels))
    alike, rest = np.split(order, [round(similarity * len(labels))])
    rest = rest[np.argsort(labels[rest], kind="stable")]
    # The larger pieces come first in one and last in the other, so that the sizes even out.
    pieces = zip(np.array_split(alike, num_shares)[::-1], np.array_split(rest, num_shares), strict=True)
    return [np.sort(np.concatenate(pair)) for pair in pieces]


def dirichlet_shares(
    labels: "np.ndarray | Sequence[int]", num_shares: int, alpha: float, seed: int
) -> list["np.ndarray"]:
    """
    Divides each class by proportions drawn from a symmetric Dirichlet distribution over the silos, the
    "distribution-based label imbalance" of [NIID-Bench](https://huggingface.co/papers/2102.02079).

    It draws again until all silos have enough, which need not end; here each empty silo takes one example from the
    largest.

    Args:
        labels (`np.ndarray` or `Sequence[int]`): `[examples]`.
        num_shares (`int`): Number of silos.
        alpha (`float`): Concentration; the smaller, the fewer silos hold a class. Their sizes differ as well.
        seed (`int`): Decides the proportions and which examples go where.

    Returns:
        `list[np.ndarray]`: Ascending indices, int64, a share each; none is empty.

    Raises:
        ConfigurationError: If there are more shares than examples, or a value is out of range.
    """
    import numpy as np

    labels = _checked(labels, num_shares, seed)
    if not 0 < alpha < math.inf:
        raise ConfigurationError("alpha", alpha, "must be above 0 and finite")
    rng = np.random.default_rng(seed)
    pieces = [[] for _ in range(num_shares)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_shares, alpha)))[:-1]
        for share, piece in zip(pieces, np.split(members, np.rint(ends * len(members)).astype(int)), strict=True):
            share.append(piece)
    shares = [np.concatenate(share) for share in pieces]
    for index in range(num_shares):
        if len(shares[index]) == 0:
            largest = max(range(num_shares), key=lambda other: len(shares[other]))
            shares[index], shares[largest] = shares[largest][-1:], shares[largest][:-1]
    return [np.sort(share) for share in shares]


def _checked(labels: "np.ndarray | Sequence[int]", num_shares: int, seed: int) -> "np.ndarray":
    import numpy as np

    labels = np.asarray(labels)
    if not 1 <= num_shares <= len(labels):
        raise ConfigurationError("num_shares", num_shares, f"must be from 1 to the number of examples, {len(labels)}")
    if seed < 0:
        raise ConfigurationError("seed", seed, "must be at least 0")
    return labels
