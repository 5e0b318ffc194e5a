"""Where the time of a stage goes, and how full its queues are."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


KINDS = ("F", "R", "B", "step", "wait")


class Event(NamedTuple):
    """Something a stage did: from `start` to `end` (seconds of `time.monotonic`), with batch `batch`."""

    start: float
    end: float
    kind: str
    batch: int


class Telemetry:
    """
    Seconds per kind of work, means of queue occupancy and version lag, and the latest events for a timeline.

    F is a forward, R a repeated forward, B a backward, `wait` is for a neighbour. On an accelerator the first three
    are seconds until the work is queued, not until it is done.

    Args:
        events (`int`, *optional*, defaults to 10000): Events kept, the latest.
    """

    def __init__(self, events: int = 10_000):
        self.events: deque[Event] = deque(maxlen=events)
        self.seconds = Counter(dict.fromkeys(KINDS, 0.0))
        self.counts = Counter(dict.fromkeys(KINDS, 0))
        self.largest: Counter = Counter()
        self._sums: Counter = Counter()
        self._samples: Counter = Counter()

    @contextmanager
    def span(self, kind: str, batch: int) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self.events.append(Event(start, end, kind, batch))
            self.seconds[kind] += end - start
            self.counts[kind] += 1

    def sample(self, name: str, value: int) -> None:
        """Notes a size: `features`, `gradients` (messages in an input queue), `stash`, or `lag` (updates)."""
        self._sums[name] += value
        self._samples[name] += 1
        self.largest[name] = max(self.largest[name], value)

    def mean(self, name: str) -> float:
        return self._sums[name] / max(1, self._samples[name])

    def summary(self) -> dict[str, float]:
        """
        Returns:
            `dict[str, float]`: `seconds_F`, ... since the start, and the mean and largest value of each sampled size.
        """
        numbers = {f"seconds_{kind}": self.seconds[kind] for kind in KINDS}
        for name in self._samples:
            numbers |= {f"mean_{name}": self.mean(name), f"max_{name}": float(self.largest[name])}
        return numbers


def slow_stage(waits: list[float]) -> int | None:
    """
    The stage that all others wait for, if there is one: it hardly waits, and each of them for a third of its time.

    Args:
        waits (`list[float]`): Part of its time that each stage waited.
    """
    slowest = min(range(len(waits)), key=waits.__getitem__)
    others = [wait for k, wait in enumerate(waits) if k != slowest]
    return slowest if others and waits[slowest] < 0.1 and min(others) > 1 / 3 else None
