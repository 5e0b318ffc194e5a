"""What noise is worth, as ε for a δ, and what it is not."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_mlopt.errors import InputError


def require_accountant() -> None:
    """
    Raises:
        InputError: If opacus is not installed.
    """
    _rdp()


def epsilon(noise_multiplier: float, num_releases: int, delta: float) -> float:
    r"""
    ε of (ε, δ)-differential privacy of a whole site towards whoever sees its updates: the server, and in a masked sum
    whoever sees the sum. By Rényi divergence (opacus): an upper bound.

    Neighbours are a site's data and *any other data* at that site, for that it takes part is no secret. Two clipped
    updates are up to 2 C apart, so noise of z C counts as z / 2. Accounts that compare with an absent site halve the
    distance and show a smaller ε. Choosing sites at random gains nothing here: the choice follows from a seed that the
    server knows.

    Args:
        noise_multiplier (`float`): z, the standard deviation of the noise over the clipping bound C.
        num_releases (`int`): How many updates of the site have left it.
        delta (`float`): δ in (0, 1).

    Returns:
        `float`: Infinite without noise, 0 without a release.

    Raises:
        InputError: If opacus is not installed.
    """
    if num_releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    rdp = _rdp()
    orders = (1 + np.logspace(-4, 5, 500)).tolist()
    divergence = rdp.compute_rdp(q=1.0, noise_multiplier=noise_multiplier / 2, steps=num_releases, orders=orders)
    found, _ = rdp.get_privacy_spent(orders=orders, rdp=divergence, delta=delta)
    return float(found)


def num_releases(history: Sequence[dict[str, Any]]) -> int:
    """
    How many updates have left the site that was asked most often. Who failed counts as well: its update may have been
    on its way.

    Args:
        history (`Sequence[dict]`): Rows of rounds.
    """
    counts: dict[str, int] = {}
    for row in history:
        for site in {*row["sites"], *row["absent"]}:
            counts[site] = counts.get(site, 0) + row.get("attempts", 1)
    return max(counts.values(), default=0)


def noise_to_signal(noise_multiplier: float, num_weights: int, num_sites: int) -> float:
    """
    The expected norm of the noise in the mean of equal sites over the largest norm that a mean of clipped updates has:
    z √(d / K).
    """
    return noise_multiplier * math.sqrt(num_weights / num_sites)


def _rdp():
    try:
        from opacus.accountants.analysis import rdp
    except ImportError as error:
        raise InputError(
            "noise_multiplier needs the accountant of opacus: pip install 'hf-mlopt[privacy]', or 'opacus>=1.5'"
        ) from error
    return rdp
