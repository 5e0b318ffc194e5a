"""How much of a calibration set stands in an evaluation text, from a small sketch that fits into a report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    import torch

WIDTH = 32  # tokens in a shingle: long enough that two unrelated texts share none
SIZE = 1024  # hashes in a sketch: standard error of the share at most 0.016
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses no bit modulo 2^64


def sketch(token_ids: "torch.Tensor | Sequence", width: int = WIDTH, size: int = SIZE) -> list[int]:
    """
    The `size` smallest hashes of all runs of `width` tokens: an unbiased sample of the distinct ones.

    The hash depends on the tokens alone, so two machines, or two windows that meet the same text at different
    offsets, sample the same runs.

    Args:
        token_ids (`torch.Tensor` or nested sequence): `[tokens]` or `[samples, length]`; no run crosses a row.
        width (`int`, *optional*, defaults to 32): Tokens in a run.
        size (`int`, *optional*, defaults to 1024): Largest number of hashes kept.

    Returns:
        `list[int]`: Ascending, each below 2^53 and so exact in JSON; empty if the rows are shorter than `width`.
    """
    import numpy as np

    return np.unique(_hashes(token_ids, width))[:size].tolist()


def overlap(calibration: Sequence[int], token_ids: "torch.Tensor | Sequence", width: int = WIDTH) -> float:
    """
    Share of the calibration set that stands word for word in `token_ids`, estimated from its sketch.

    Args:
        calibration (`Sequence[int]`): What [`sketch`] returned, with the same tokenizer and `width`.
        token_ids (`torch.Tensor` or nested sequence): The evaluation text, `[tokens]` or `[samples, length]`.
        width (`int`, *optional*, defaults to 32): Tokens in a run.

    Returns:
        `float`: In [0, 1]; 0 for an empty sketch.
    """
    import numpy as np

    if not calibration:
        return 0.0
    return float(np.isin(np.asarray(calibration, dtype=np.uint64), _hashes(token_ids, width)).mean())


def _hashes(token_ids: "torch.Tensor | Sequence", width: int) -> "np.ndarray":
    """53-bit hash of every run of `width` tokens: a polynomial in `_BASE` modulo 2^64, mixed as in splitmix64."""
    import numpy as np

    tokens = np.atleast_2d(np.asarray(token_ids)).astype(np.uint64)
    runs = max(tokens.shape[1] - width + 1, 0)
    hashes = np.zeros((tokens.shape[0], runs), dtype=np.uint64)
    for offset in range(width if runs else 0):
        hashes = hashes * np.uint64(_BASE) + tokens[:, offset : offset + runs]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return ((hashes ^ (hashes >> np.uint64(31))) >> np.uint64(11)).ravel()
