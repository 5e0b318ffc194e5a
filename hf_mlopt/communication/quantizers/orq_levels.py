"""
Levels that minimise the variance of stochastic rounding, for many blocks at once.

The optimality condition is that of [Optimal Gradient Quantization Condition for Communication-Efficient Distributed
Training](https://huggingface.co/papers/2002.11082); solving it exactly on sorted or binned entries, and the condition
for free end points, are ours.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hf_mlopt.communication.quantizers.memory import Memory, native
from hf_mlopt.communication.quantizers.rounding import safe_divisor


# N blocks   M points of a block, ascending   L levels   K levels solved together   B bins

_RESOLUTION = 1 << 24  # offsets within a block in integers, so that sums do not depend on their order


@dataclass(frozen=True)
class Points:
    """
    The entries of each block in ascending order, or bins of them, with running totals.

    Args:
        values_NM (`torch.Tensor`): Ascending; of a bin, its mean.
        sums (`torch.Tensor`): `[N, M + 1]`, float64, sum of all entries before a point.
        counts (`torch.Tensor`, *optional*): `[N, M + 1]`, float64, their number; `None` where each point is one entry.
        ends_N2 (`torch.Tensor`): Smallest and largest entry.
    """

    values_NM: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor | None
    ends_N2: torch.Tensor

    @property
    def num_points(self) -> int:
        return self.values_NM.shape[1]

    def value(self, position_NK: torch.Tensor) -> torch.Tensor:
        return self.values_NM.gather(1, position_NK).double()

    def sum_before(self, position_NK: torch.Tensor) -> torch.Tensor:
        return self.sums.gather(1, position_NK)

    def count_before(self, position_NK: torch.Tensor) -> torch.Tensor:
        return position_NK.double() if self.counts is None else self.counts.gather(1, position_NK)

    def holding(self, rank_NK: torch.Tensor) -> torch.Tensor:
        """Position of the point that holds the entry of this rank, counted from 0."""
        if self.counts is None:
            return rank_NK.long().clamp_(0, self.num_points - 1)
        position_NK = torch.searchsorted(self.counts[:, 1:].contiguous(), rank_NK.contiguous(), right=True)
        return position_NK.clamp_(max=self.num_points - 1)


def sorted_points(rows_ND: torch.Tensor, memory: Memory) -> Points:
    """Every entry a point: exact levels. The points live in `memory`."""
    padded = memory.tensor("sorted", (len(rows_ND), rows_ND.shape[1] + 1), torch.float32)
    padded[:, 0], values_NM = 0, padded[:, 1:]
    values_NM.copy_(rows_ND)
    if isinstance(native(values_NM), np.ndarray):  # its vectorised sort is several times quicker
        native(values_NM).sort(axis=1)
    else:
        values_NM.copy_(values_NM.sort(dim=1).values)
    sums = memory.like("sums", padded, torch.float64)
    torch.cumsum(padded, dim=1, dtype=torch.float64, out=sums)
    return Points(values_NM, sums, None, values_NM[:, [0, -1]])


def binned_points(rows_ND: torch.Tensor, memory: Memory, bins: int = 256) -> Points:
    """
    Entries summed up in equal bins between the block's smallest and largest: O(D) instead of a sort. Levels are then
    means of bins, within a bin's width of the exact ones.
    """
    (low_N1, high_N1), blocks = torch.aminmax(rows_ND, dim=1, keepdim=True), len(rows_ND)
    width_N1 = high_N1 - low_N1
    offset_ND = torch.sub(rows_ND, low_N1, out=memory.like("offsets", rows_ND))
    offset_ND.div_(safe_divisor(width_N1)).mul_(_RESOLUTION).floor_()
    bin_ND = memory.like("bins", rows_ND, torch.int64)
    bin_ND.copy_(torch.mul(offset_ND, bins / _RESOLUTION, out=memory.like("magnitude", rows_ND))).clamp_(max=bins - 1)
    bin_ND += torch.arange(0, blocks * bins, bins, device=rows_ND.device)[:, None]
    size = blocks * bins
    where, what = native(bin_ND.view(-1)), native(offset_ND.view(-1))
    if isinstance(where, np.ndarray):
        count_NB = torch.from_numpy(np.bincount(where, minlength=size).astype(np.float64)).view(blocks, bins)
        offset_NB = torch.from_numpy(np.bincount(where, what, minlength=size)).view(blocks, bins)
    else:
        zeros = torch.zeros(size, dtype=torch.float64, device=rows_ND.device)
        count_NB = zeros.index_add(0, where, torch.ones_like(what, dtype=torch.float64)).view(blocks, bins)
        offset_NB = zeros.index_add(0, where, what.double()).view(blocks, bins)
    middle_B = (torch.arange(bins, dtype=torch.float64, device=rows_ND.device) + 0.5) * (_RESOLUTION / bins)
    mean_NB = torch.where(count_NB > 0, offset_NB / count_NB.clamp(min=1), middle_B)
    low_N1, unit_N1 = low_N1.double(), width_N1.double() / _RESOLUTION
    zero_N1 = torch.zeros_like(low_N1)
    counts = torch.cat((zero_N1, count_NB.cumsum(dim=1)), dim=1)
    sums = torch.cat((zero_N1, (offset_NB * unit_N1 + count_NB * low_N1).cumsum(dim=1)), dim=1)
    return Points(low_N1 + mean_NB * unit_N1, sums, counts, torch.cat((low_N1, high_N1.double()), dim=1))


@dataclass
class Levels:
    """
    Levels of every block under construction, and where each lies among the points.

    Level k holds the points `first … stop - 1` themselves: one where it is a data point, none where it is not.
    """

    value_NL: torch.Tensor
    first_NL: torch.Tensor
    stop_NL: torch.Tensor

    def solve(self, points: Points, which: slice, apart: int) -> None:
        """Sets the levels `which` by the count rule, each from those `apart` before and behind it."""
        below = slice(which.start - apart, which.stop - apart, which.step)
        above = slice(which.start + apart, which.stop + apart, which.step)
        self.value_NL[:, which], self.first_NL[:, which], self.stop_NL[:, which] = count_rule(
            points,
            self.value_NL[:, below],
            self.first_NL[:, below],
            self.value_NL[:, above],
            self.stop_NL[:, above],
        )

    def free_ends(self, points: Points) -> None:
        """
        Sets the first and the last level by the end rule: together, as both have levels within them to start from, or
        one after the other where there are only these two.
        """
        inner = [1, -2]
        for sides in ((1, 0),) if self.value_NL.shape[1] > 2 else ((1,), (0,)):
            border_N2 = torch.stack((self.stop_NL[:, 1], self.first_NL[:, -2]), dim=1)
            value_N2, position_N2 = end_rule(points, self.value_NL[:, inner], border_N2)
            for side in sides:
                self.value_NL[:, -side] = value_N2[:, side]
                self.first_NL[:, -side], self.stop_NL[:, -side] = position_N2[:, side], position_N2[:, side] + 1


def count_rule(points: Points, low_NK, first_NK, high_NK, stop_NK):
    r"""
    The best level between two others: with m entries in [low, high] of sum S,

        n_R = (S - m low) / (high - low)

    of them lie right of it, which makes it one of the entries. Its error is convex in it, so this is the optimum.

    Args:
        points (`Points`): Entries of every block.
        low_NK, high_NK (`torch.Tensor`): The neighbours, float64.
        first_NK, stop_NK (`torch.Tensor`): Points between them, from `first` up to but without `stop`. Whether points
            equal to a neighbour are among them makes no difference to the level.

    Returns:
        `tuple`: the level, and the points it holds as (first, stop).
    """
    before_NK = points.count_before(first_NK)
    count_NK = points.count_before(stop_NK) - before_NK
    sum_NK = points.sum_before(stop_NK) - points.sum_before(first_NK)
    width_NK = high_NK - low_NK
    right_NK = torch.where(width_NK > 0, (sum_NK - count_NK * low_NK) / width_NK.clamp(min=1e-300), 0.0)
    rank_NK = before_NK + (count_NK - 1 - right_NK.floor()).clamp(min=0).minimum((count_NK - 1).clamp(min=0))
    position_NK = points.holding(rank_NK)
    empty_NK = count_NK <= 0
    value_NK = torch.where(empty_NK, (low_NK + high_NK) / 2, points.value(position_NK))
    value_NK = value_NK.maximum(low_NK).minimum(high_NK)  # sums of entries far from zero round
    first_NK = torch.where(empty_NK, first_NK, position_NK)
    return value_NK, first_NK, torch.where(empty_NK, first_NK, position_NK + 1)


def end_rule(points: Points, inner_N2: torch.Tensor, border_N2: torch.Tensor):
    r"""
    The best first and last level, next to given ones, where entries beyond them saturate. For the last, b_s,

        2 \sum_{v > b_s} (v - b_s) = \sum_{b_{s-1} \le v \le b_s} (v - b_{s-1})

    and its mirror image for the first. The left side falls with b_s and the right side grows: bisection finds the two
    entries that b_s lies between, where the equation is linear.

    Args:
        points (`Points`): Entries of every block.
        inner_N2 (`torch.Tensor`): The levels next to the ends, float64.
        border_N2 (`torch.Tensor`): The point behind the last one that the left of them holds, and the first point
            that the right one holds.

    Returns:
        `tuple`: the two ends, and the position of the last point inside each.
    """
    last = points.num_points - 1
    device = border_N2.device
    outward_2, edge_2 = torch.tensor([-1, 1], device=device), torch.tensor([0, 1], device=device)
    beyond_2 = (last + 1) * edge_2.expand(len(border_N2), -1)
    all_count_N2, all_sum_N2 = points.count_before(beyond_2), points.sum_before(beyond_2)
    border_count_N2, border_sum_N2 = points.count_before(border_N2), points.sum_before(border_N2)

    def outside_and_inside(position_N2):
        """Number and sum of entries beyond a point, and the sum of those inside relative to `inner`; left negated."""
        count_N2, sum_N2 = points.count_before(position_N2 + edge_2), points.sum_before(position_N2 + edge_2)
        inside_N2 = (sum_N2 - border_sum_N2) - (count_N2 - border_count_N2) * inner_N2
        return all_count_N2 - count_N2, all_sum_N2 - sum_N2, inside_N2

    start_N2 = (border_N2 - 1 + edge_2).clamp(0, last)
    near_N2 = torch.zeros_like(start_N2)  # steps outward from `start`; the end is at least this far out,
    far_N2 = (last * edge_2 - start_N2) * outward_2 + 1  # and not as far as this
    for _ in range(last.bit_length() + 1):
        middle_N2 = (near_N2 + far_N2) // 2
        position_N2 = start_N2 + outward_2 * middle_N2
        count_N2, sum_N2, inside_N2 = outside_and_inside(position_N2)
        is_inside_N2 = 2 * (sum_N2 - count_N2 * points.value(position_N2)) >= inside_N2
        near_N2 = torch.where(is_inside_N2, middle_N2, near_N2)
        far_N2 = torch.where(is_inside_N2, far_N2, middle_N2)
    position_N2 = start_N2 + outward_2 * near_N2
    count_N2, sum_N2, inside_N2 = outside_and_inside(position_N2)
    value_N2 = (sum_N2 - inside_N2 / 2) / torch.where(count_N2 == 0, 1.0, count_N2)
    here_N2, next_N2 = points.value(position_N2), points.value((position_N2 + outward_2).clamp(0, last))
    value_N2 = value_N2.maximum(here_N2.minimum(next_N2)).minimum(here_N2.maximum(next_N2))
    return torch.where(count_N2 == 0, points.ends_N2.double(), value_N2), position_N2


def orq_levels(
    points: Points,
    num_levels: int,
    *,
    ends_N2: torch.Tensor | None = None,
    optimal_ends: bool = False,
    sweeps: int = 2,
) -> torch.Tensor:
    """
    The levels of ORQ: bisection of the range by the count rule, then sweeps that set each level from its neighbours.
    Levels of odd and even number do not depend on their own kind, so each kind is set in one batched step.

    Args:
        points (`Points`): From [`sorted_points`] or [`binned_points`].
        num_levels (`int`): 2^K + 1, or 2 (ends only).
        ends_N2 (`torch.Tensor`, *optional*): First and last level; the smallest and largest entry by default.
        optimal_ends (`bool`): Let the sweeps move the ends too, by the end rule, from `ends_N2`. For more than two
            levels the default is the start that tails of any weight suit.
        sweeps (`int`): Sweeps after the bisection; 2 are enough with fixed ends, 5 with free ones.

    Returns:
        `torch.Tensor`: `[blocks, num_levels]`, float32, ascending.
    """
    blocks, device = len(points.values_NM), points.values_NM.device
    levels = Levels(
        torch.zeros(blocks, num_levels, dtype=torch.float64, device=device),
        *torch.zeros(2, blocks, num_levels, dtype=torch.int64, device=device),
    )
    if ends_N2 is None:
        levels.value_NL[:, [0, -1]] = points.ends_N2.double()
        levels.stop_NL[:, -1] = points.num_points
    else:
        levels.value_NL[:, [0, -1]] = ends_N2.double()
        values_NM, ends_N2 = points.values_NM.contiguous(), ends_N2.to(points.values_NM.dtype)
        levels.first_NL[:, :1] = torch.searchsorted(values_NM, ends_N2[:, :1].contiguous())
        levels.stop_NL[:, -1:] = torch.searchsorted(values_NM, ends_N2[:, 1:].contiguous(), right=True)
    apart = (num_levels - 1) // 2
    while apart:
        levels.solve(points, slice(apart, num_levels - 1, 2 * apart), apart)
        apart //= 2
    for _ in range(sweeps):
        if optimal_ends:
            levels.free_ends(points)
        for first in (2, 1):
            if first < num_levels - 1:
                levels.solve(points, slice(first, num_levels - 1, 2), 1)
    return levels.value_NL.float()
