"""Times things against each other, so that a machine that is slow for a while is slow for all of them."""

import math
import statistics
import time
from collections.abc import Callable

import torch


_BLOCK_SECONDS = 0.02  # shorter calls are timed several at once: clock, synchronisation and scheduler would blur them
_COMPARISON_SECONDS = 20.0
_LEAST_ROUNDS = 6


def time_in_rounds(functions: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """
    Times functions in turn, after a warm-up, so that every round gives one ratio for each pair of them.

    Args:
        functions (`dict[str, Callable]`): By name.
        device (`torch.device`): Where they run.
        repeats (`int`): Rounds, at least 6; where they take long, those after the sixth are left out.

    Returns:
        `dict[str, list[float]]`: Seconds a call, one value a round.
    """
    seconds = {name: [] for name in functions}
    # As many calls for all: on a busy machine a block that is shorter is interrupted less often.
    calls = max(1, round(_BLOCK_SECONDS / statistics.median(_warm_up(call, device) for call in functions.values())))
    start = time.perf_counter()
    for done in range(repeats):
        if done >= _LEAST_ROUNDS and time.perf_counter() - start > _COMPARISON_SECONDS:
            break
        # Forwards and backwards, so that nobody always runs in the wake of the same neighbour.
        for name in list(functions)[:: 1 if done % 2 == 0 else -1]:
            seconds[name].append(_seconds(functions[name], device, calls))
    return seconds


def _warm_up(function: Callable, device: torch.device) -> float:
    """Seconds of one call; the first ones also allocate and pick kernels."""
    once = _seconds(function, device, 1)
    return once if once > 1 else min(_seconds(function, device, 1) for _ in range(5))


def _seconds(function: Callable, device: torch.device, calls: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """
    The median of `over / under` over rounds, and an interval, `low` to `high`, that holds the true one at 95 %.

    The interval is that of the sign test: it assumes nothing about the noise but that rounds are independent.
    """
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    count = len(ratios)
    # The chance that at most k of the rounds fall below the true median.
    tails = [sum(math.comb(count, j) for j in range(k + 1)) / 2**count for k in range(count // 2)]
    skipped = max(0, sum(tail <= 0.025 for tail in tails) - 1)
    return {"median": statistics.median(ratios), "low": ratios[skipped], "high": ratios[-1 - skipped]}
