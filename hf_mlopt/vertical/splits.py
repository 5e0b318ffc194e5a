"""Which columns each party holds, in experiments that split one table."""

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
    if not isinstance(num_parties, int) or not 1 <= num_parties <= num_features:
        raise ConfigurationError("num_parties", num_parties, f"must be 1 to the number of columns, {num_features}")
    return np.array_split(np.arange(num_features), num_parties)
