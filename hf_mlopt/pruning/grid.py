"""The sparsities that experts may get under `allocation="load"`. Arithmetic alone, without torch."""

import math
from collections.abc import Iterable

from hf_mlopt.errors import ConfigurationError


MAX_SPARSITY = 0.95
_MAX_DEVIATION = 0.15
_STEP = 0.025  # of the grid, at most, where the widths allow it


def sparsity_grid(sparsity: float, widths: Iterable[int]) -> list[float]:
    r"""
    The sparsities an expert may get: equally spaced around `sparsity`, at most 0.15 from it, in [0, 0.95].

    Steps are multiples of 1 / gcd(widths). So floor(p · d_in) grows by the same whole number at every step in every
    matrix, and one expert's step up pays exactly for another's step down.

    Args:
        sparsity (`float`): What the experts have on average; one of the points.
        widths (`Iterable[int]`): Input widths of the matrices of an expert.

    Raises:
        ConfigurationError: If there is no point on one of the sides: the widths have no useful common divisor, or
            `sparsity` is close to 0 or 0.95.
    """
    divisor = math.gcd(*widths)
    step = max(1, int(_STEP * divisor)) / divisor
    below = int(min(_MAX_DEVIATION, sparsity) / step + 1e-9)
    above = int(min(_MAX_DEVIATION, MAX_SPARSITY - sparsity) / step + 1e-9)
    if below < 1 or above < 1:
        low, high = max(0.0, sparsity - _MAX_DEVIATION), min(MAX_SPARSITY, sparsity + _MAX_DEVIATION)
        raise ConfigurationError(
            "allocation",
            "load",
            f"has no choice: around sparsity={sparsity:g} the experts can move in steps of {step:.3g} only (common to "
            f"rows of {', '.join(map(str, sorted(widths)))} inputs), within {low:.3g} and {high:.3g}; use uniform",
        )
    return [min(max(sparsity + place * step, 0.0), MAX_SPARSITY) for place in range(-below, above + 1)]
