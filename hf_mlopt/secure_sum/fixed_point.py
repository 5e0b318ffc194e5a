"""Real numbers as words of Z_2^64, in which masks are uniform and cancel exactly."""

import math
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import ConfigurationError


@dataclass(frozen=True)
class FixedPoint:
    """
    Fixed point in two's complement.

    Each share is rounded to a multiple of 2^-`fraction_bits`, so a decoded sum is off by at most
    `num_parties` · 2^-(`fraction_bits` + 1), plus the rounding of the sum itself to float64.

    Args:
        num_parties (`int`): How many shares are added, at least 1.
        fraction_bits (`int`, *optional*, defaults to 24): Binary digits after the point, 1 … 52.
    """

    num_parties: int
    fraction_bits: int = 24

    def __post_init__(self):
        for field, low, high in (("num_parties", 1, 2**32), ("fraction_bits", 1, 52)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigurationError(field, value, f"must be a whole number, {low} to {high}")

    @property
    def limit(self) -> float:
        """
        Largest absolute value of a share. `num_parties` shares of that size still fit the 63 bits of the sum, which
        would otherwise wrap around unnoticed. It is the largest such float64 and a multiple of 2^-`fraction_bits`, so
        comparing with it is exact and rounding never passes it.
        """
        words = (2**63 - 1) // self.num_parties
        largest = float(words)
        if largest > words:  # Python compares a float with an integer exactly
            largest = math.nextafter(largest, 0.0)
        return math.ldexp(largest, -self.fraction_bits)

    def encode(self, values, field: str = "values") -> np.ndarray:
        """
        Args:
            values (array): Real numbers of any shape.
            field (`str`, *optional*, defaults to `"values"`): What errors call them.

        Returns:
            `np.ndarray`: uint64, of the same shape, never sharing memory with `values`.

        Raises:
            ConfigurationError: If an entry is not a finite real number or exceeds [`limit`] in absolute value.
        """
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise ConfigurationError(field, str(array.dtype), "must be an array of real numbers")
        array = array.astype(np.float64)
        _refuse(field, array, ~np.isfinite(array), "must be finite; drop or repair the row or update it comes from")
        remedy = (
            f"must be at most {self.limit:g} in absolute value for {self.num_parties} parties and "
            f"{self.fraction_bits} fraction bits; scale or clip it, or take fewer fraction bits"
        )
        _refuse(field, array, np.abs(array) > self.limit, remedy)
        scaled = np.rint(np.ldexp(array, self.fraction_bits))
        return np.asarray(scaled, np.int64).view(np.uint64)

    def decode(self, words: np.ndarray) -> np.ndarray:
        """
        Args:
            words (`np.ndarray`): uint64, of any shape; a sum of at most `num_parties` encoded shares modulo 2^64.

        Returns:
            `np.ndarray`: float64, of the same shape.
        """
        return np.asarray(np.ldexp(words.view(np.int64).astype(np.float64), -self.fraction_bits))


def _refuse(field: str, array: np.ndarray, bad: np.ndarray, remedy: str):
    """Names the first bad entry by its place in the array."""
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ConfigurationError(f"{field}{list(place) if place else ''}", float(array[place]), remedy)
