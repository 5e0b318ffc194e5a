"""
What a pipeline would take: a discrete-event model of every mode, and the memory of a stage.

A stage does its operations in a fixed order. F waits for the features and B for the gradient of its batch, which take
`latency` after they were sent; sending waits while all slots of the channel are taken. R, a repeated forward, waits
for nothing. The times of computation are given; nothing else costs any.
"""

from collections.abc import Callable

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.schedule import SENDER_SLOTS, SYNCHRONOUS, Schedule, parse


Operation = tuple[str, int]  # kind (F, R or B) and batch
Slowdown = Callable[[int, str, int], float]


def time_per_batch(
    mode: str | Schedule,
    forward: list[float],
    backward: list[float],
    *,
    recompute: list[float] | None = None,
    latency: float = 0.0,
    micro_batches: int = 8,
    slowdown: Slowdown | None = None,
    num_batches: int = 1024,
) -> float:
    """
    Args:
        mode (`str` or [`Schedule`]): As [`parse`] takes it, or `gpipe` or `1f1b`.
        forward, backward (`list[float]`): Seconds of each stage for a batch.
        recompute (`list[float]`, *optional*): Seconds of each stage's repeated forward; by default none is repeated.
            Stages without batches in flight, such as the last, repeat none.
        latency (`float`, *optional*, defaults to 0.0): Seconds from a stage to its neighbour.
        micro_batches (`int`, *optional*, defaults to 8): Batches between two flushes of `gpipe` and `1f1b`.
        slowdown (`Callable`, *optional*): Factor of an operation, from stage, kind and batch.
        num_batches (`int`, *optional*, defaults to 1024): Batches to average over, filling and emptying included.

    Returns:
        `float`: Seconds for each batch.

    Raises:
        ConfigurationError: If the schedule deadlocks or is for another number of stages.
    """
    stages = len(forward)
    seconds = {"F": forward, "R": recompute or [0.0] * stages, "B": backward}
    schedule = None
    if mode in SYNCHRONOUS:
        make = _gpipe if mode == "gpipe" else _one_forward_one_backward
        orders = [make(stages, k, micro_batches, num_batches) for k in range(stages)]
    else:
        schedule = mode if isinstance(mode, Schedule) else parse(mode, stages)
        if schedule.stages != stages:
            raise ConfigurationError("stages", stages, f"the schedule is for {schedule.stages}")
        orders = [_stale(m, num_batches, repeats=m > 0 and recompute is not None) for m in schedule.m]
    slow = slowdown or (lambda stage, kind, batch: 1.0)
    return _makespan(orders, lambda k, kind, n: seconds[kind][k] * slow(k, kind, n), latency, schedule) / num_batches


def memory(
    mode: str | Schedule,
    k: int,
    *,
    stages: int,
    weights: float,
    boundary_in: float,
    boundary_out: float,
    graph: float,
    optimizer_factor: float = 2.0,
    recompute: bool = True,
    predict: bool = False,
    micro_batches: int = 8,
) -> float:
    """
    Bytes at stage k while it trains.

    Args:
        mode (`str` or [`Schedule`]): As in [`time_per_batch`]; also `pipedream`: the lag of `lag1` with a copy of the
            weights and a graph for each batch in flight.
        k, stages (`int`): The stage, and the number of stages.
        weights (`float`): Bytes of the block's parameters, P.
        boundary_in, boundary_out (`float`): Bytes of the tensors that enter and leave it for a batch; 0 at the ends.
        graph (`float`): Bytes that autograd keeps for a batch, G.
        optimizer_factor (`float`, *optional*, defaults to 2.0): State of the optimizer over P: 0 for SGD, 1 with
            momentum, 2 for Adam.
        recompute (`bool`, *optional*, defaults to `True`): Keep inputs; otherwise graphs.
        predict (`bool`, *optional*, defaults to `False`): Adds the last update, and the predicted weights.
        micro_batches (`int`, *optional*, defaults to 8): Batches between two flushes.

    Returns:
        `float`: Bytes.
    """
    trained = weights * (2 + optimizer_factor)  # weights and gradients
    if mode == "gpipe":
        return trained + micro_batches * (boundary_in + graph)
    if mode == "1f1b":
        return trained + min(micro_batches, stages - k) * (boundary_in + graph)
    schedule = mode if isinstance(mode, Schedule) else parse("lag1" if mode == "pipedream" else mode, stages)
    in_flight = schedule.m[k] + 1
    if mode == "pipedream":
        return trained + schedule.m[k] * weights + in_flight * (boundary_in + graph)
    queues = (schedule.p[k - 1] * boundary_in if k > 0 else 0) + schedule.q[k] * boundary_out
    predicted = 2 * weights if predict and schedule.m[k] > 0 else 0
    graphs = 1 if recompute else in_flight
    return trained + in_flight * boundary_in + graphs * graph + queues + predicted


def _stale(m: int, num_batches: int, repeats: bool) -> list[Operation]:
    order: list[Operation] = []
    for step in range(num_batches + m):
        if step < num_batches:
            order.append(("F", step))
        if step >= m:
            order += [("R", step - m)] * repeats + [("B", step - m)]
    return order


def _gpipe(stages: int, k: int, micro_batches: int, num_batches: int) -> list[Operation]:
    order: list[Operation] = []
    for first in range(0, num_batches, micro_batches):
        flush = range(first, min(first + micro_batches, num_batches))
        order += [("F", n) for n in flush] + [("B", n) for n in flush]
    return order


def _one_forward_one_backward(stages: int, k: int, micro_batches: int, num_batches: int) -> list[Operation]:
    order: list[Operation] = []
    for first in range(0, num_batches, micro_batches):
        size = min(micro_batches, num_batches - first)
        warm_up = min(stages - 1 - k, size)
        order += [("F", first + n) for n in range(warm_up)]
        for n in range(size - warm_up):
            order += [("F", first + warm_up + n), ("B", first + n)]
        order += [("B", first + n) for n in range(size - warm_up, size)]
    return order


def _makespan(orders: list[list[Operation]], seconds, latency: float, schedule: Schedule | None) -> float:
    """Advances every stage as far as what it waits for is known, until all are done."""
    stages = len(orders)
    clock, position, is_computed = [0.0] * stages, [0] * stages, [False] * stages
    # When each batch was sent by a stage, and when it was taken from the one before (F) or after (B).
    sent = {kind: [{} for _ in orders] for kind in "FB"}
    taken = {kind: [{} for _ in orders] for kind in "FB"}

    def advance(k: int) -> bool:
        kind, n = orders[k][position[k]]
        if kind == "R":
            clock[k] += seconds(k, kind, n)
            return True
        source, target = (k - 1, k + 1) if kind == "F" else (k + 1, k - 1)
        if not is_computed[k]:
            start = clock[k]
            if 0 <= source < stages:
                if n not in sent[kind][source]:
                    return False
                start = max(start, sent[kind][source].pop(n) + latency)
            taken[kind][k][n] = start
            clock[k] = start + seconds(k, kind, n)
            is_computed[k] = True
        if 0 <= target < stages:
            if schedule is not None:
                slots = schedule.feature_capacity(k) if kind == "F" else schedule.gradient_capacity(target)
                slots += SENDER_SLOTS
                # A stage's backwards begin with the first batch, and all batches go the same way.
                if n >= slots:
                    if n - slots not in taken[kind][target]:
                        return False
                    clock[k] = max(clock[k], taken[kind][target].pop(n - slots))
            sent[kind][k][n] = clock[k]
        is_computed[k] = False
        return True

    while any(position[k] < len(orders[k]) for k in range(stages)):
        has_moved = False
        for k in range(stages):
            while position[k] < len(orders[k]) and advance(k):
                position[k] += 1
                has_moved = True
        if not has_moved:
            raise ConfigurationError("mode", schedule and schedule.text, "deadlocks: the channels are too small")
    return max(clock)
