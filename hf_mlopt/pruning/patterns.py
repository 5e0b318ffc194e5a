"""
Patterns: from scores to the mask of weights to remove. Among equal scores the lower index is removed first.
"""

# `score` is [..., D]: the last dimension holds the inputs of one output row, the comparison group.

import numpy as np
import torch


_MAX_COMPARED = 16  # inputs of a group; comparing all pairs costs the square of it


def num_pruned(sparsity: float, width: int) -> int:
    """floor(p · d_in), with p as the decimal number the user wrote (0.29 · 100 is 29, not 28.999…)."""
    return int(sparsity * width + 1e-9)


def smallest_per_row(score: torch.Tensor, count: int) -> torch.Tensor:
    """
    True at exactly `count` smallest scores of every row, without a full sort.

    Args:
        score (`torch.Tensor`): `[..., input]`, finite.
        count (`int`): Weights to remove per row, 0 to input.

    Returns:
        `torch.Tensor`: bool, shaped as `score`.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, count)
    pruned = score <= threshold
    crowded = pruned.sum(dim=-1) > count
    if bool(crowded.any()):
        # Several scores of these rows equal the threshold: of those, only the first by index go.
        rows, at = score[crowded], threshold[crowded]
        below, tied = rows < at, rows == at
        room = count - below.sum(dim=-1, keepdim=True)
        pruned[crowded] = below | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= room))
    return pruned


def _kth_smallest(score: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th smallest value of each row, `[..., 1]`, by selection."""
    if score.device.type == "cpu":  # numpy selects five to ten times faster here than torch
        return torch.from_numpy(np.partition(score.numpy(), count - 1, axis=-1)[..., count - 1, None].copy())
    return torch.topk(score, count, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)


def smallest_per_group(score: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """
    True at all but the `kept` largest scores of every `group` consecutive inputs.

    Args:
        score (`torch.Tensor`): `[..., input]`, finite, input divisible by `group`.
        kept (`int`), group (`int`): N and M of the pattern N:M.

    Returns:
        `torch.Tensor`: bool, shaped as `score`.
    """
    grouped = score.unflatten(-1, (-1, group))
    if group > _MAX_COMPARED:
        return smallest_per_row(grouped, group - kept).flatten(-2)
    columns = grouped.unbind(dim=-1)
    # The rank of each score in its group by comparing pairs: for small groups cheaper than any sort.
    ranks = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for low in range(group):
        for high in range(low + 1, group):
            high_smaller = columns[high] < columns[low]  # a tie ranks the lower index first
            ranks[low] += high_smaller
            ranks[high] += ~high_smaller
    return torch.stack([rank < group - kept for rank in ranks], dim=-1).flatten(-2)


def select(score: torch.Tensor, sparsity: float | None, n_of_m: tuple[int, int] | None) -> torch.Tensor:
    """The weights to remove under an unstructured `sparsity` or an N:M pattern, as a bool mask like `score`."""
    if n_of_m is not None:
        return smallest_per_group(score, *n_of_m)
    return smallest_per_row(score, num_pruned(sparsity, score.shape[-1]))
