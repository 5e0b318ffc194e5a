"""Which columns each party holds, in experiments that split one table."""

from collections.abc import Sequence

import numpy as np

from hf_mlopt.errors import ConfigurationError


def split_contiguous(num_features: int, num_parties: int) -> list[np.ndarray]:
    """
    Columns of each party in their order: floor(d/q) each, one more for the first d mod q.

    Args:
        num_features (`int`), num_parties (`int`): d and q.

    Returns:
        `list[np.ndarray]`: int64, one array a party.

    Raises:
        ConfigurationError: If there are not as many columns as parties.
    """
    _check_split(num_features, num_parties)
    return np.array_split(np.arange(num_features), num_parties)


def split_random(num_features: int, num_parties: int, seed: int) -> list[np.ndarray]:
    """As [`split_contiguous`], of columns shuffled by a seed; each party's are sorted."""
    _check_split(num_features, num_parties)
    shuffled = np.random.default_rng(seed).permutation(num_features)
    return [np.sort(part) for part in np.array_split(shuffled, num_parties)]


def split_by_importance(importance: Sequence[float], num_parties: int) -> list[np.ndarray]:
    """
    The most uneven split: the first party has the most important columns, the last the least.

    Args:
        importance (sequence of `float`): `[d]`, such as absolute weights of a fit on all columns.
        num_parties (`int`): q.

    Returns:
        `list[np.ndarray]`: int64, one array a party, sorted.

    Raises:
        ConfigurationError: If an importance is not finite, or there are not as many columns as parties.
    """
    importance = np.asarray(importance, np.float64)
    _check_split(len(importance), num_parties)
    if not np.isfinite(importance).all():
        raise ConfigurationError("importance", float(importance[~np.isfinite(importance)][0]), "must be finite")
    order = np.argsort(-importance, kind="stable")
    return [np.sort(part) for part in np.array_split(order, num_parties)]


def _check_split(num_features: int, num_parties: int):
    if not isinstance(num_parties, int) or not 1 <= num_parties <= num_features:
        raise ConfigurationError("num_parties", num_parties, f"must be 1 to the number of columns, {num_features}")
