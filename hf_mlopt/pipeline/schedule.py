"""
Who is how stale: the (p; m) vector of an asynchronous pipeline, its presets, and the versions it implies. No tensors.

Every stage takes local steps n = 0, 1, 2, ...: forward of batch n, then backward of batch n - m_k. The notation is
that of [Diversely Stale Parameters](https://huggingface.co/papers/1909.02625) (DSP).
"""

import bisect
import math
from dataclasses import dataclass, field

from hf_mlopt.errors import ConfigurationError


PRESETS = ("bp", "fr", "lag1", "dsp")
SYNCHRONOUS = ("gpipe", "1f1b")  # they flush at every update, and have no vector

# A sender holds a message until the receiver has a slot. Without this one more, as many batches travel as there are
# slots: all are always taken, and a long queue absorbs no jitter (event model, differences of 6, a third of the
# operations four times as long: 7.43 F a batch without it, 6.68 with it, 6.44 with any number).
SENDER_SLOTS = 1


@dataclass(frozen=True)
class Schedule:
    """
    The point DSP(p_0, ..., p_{K-1}; m_0, ..., m_{K-1}).

    Args:
        p (`tuple[int]`): Length of the queue of features from stage k to k + 1; the last is 0.
        m (`tuple[int]`): Batches in flight at stage k: the index of the batch in forward minus that in backward.

    Raises:
        ConfigurationError: If m increases from one stage to the next (every such pair deadlocks), its last value is
            not 0, or a queue of features is longer than the batches that travel between its two stages.
    """

    p: tuple[int, ...]
    m: tuple[int, ...]

    def __post_init__(self):
        if len(self.p) != len(self.m) or not self.m:
            raise ConfigurationError("mode", self.text, "p and m need one value for each stage")
        if self.m[-1] != 0 or self.p[-1] != 0:
            raise ConfigurationError("mode", self.text, "the last stage owns the loss: its p and m must be 0")
        for k, (before, after) in enumerate(zip(self.m, self.m[1:], strict=False)):
            if before < after:
                remedy = f"m must not increase: stage {k} has {before}, stage {k + 1} has {after}"
                raise ConfigurationError("mode", self.text, remedy)
            if not 0 <= self.p[k] <= before - after:
                remedy = f"p of stage {k} must be from 0 to m_{k} - m_{k + 1} = {before - after}"
                raise ConfigurationError("mode", self.text, remedy)

    @property
    def text(self) -> str:
        """As [`parse`] reads it."""
        return "dsp:" + ";".join(",".join(map(str, values)) for values in (self.p, self.m))

    @property
    def stages(self) -> int:
        return len(self.m)

    @property
    def q(self) -> tuple[int, ...]:
        """Length of the queue of gradients from stage k + 1 to k; the last is 0."""
        return tuple(m - after - p for m, after, p in zip(self.m, (*self.m[1:], 0), self.p, strict=True))

    def feature_capacity(self, k: int) -> int:
        """Slots at the receiver of the channel from stage k to k + 1; the sender has [`SENDER_SLOTS`] more."""
        return max(1, self.p[k])

    def gradient_capacity(self, k: int) -> int:
        """Slots at the receiver from stage k + 1 to k; with the features' they make at least m_k - m_{k+1}."""
        return max(1, self.q[k])

    def forward_version(self, k: int, n: int, updates: "Updates") -> int:
        """Updates that block k has behind it when it forwards batch n."""
        return updates.before(max(updates.drained(n), n - self.m[k]))

    def staleness(self, k: int, n: int, updates: "Updates") -> int:
        """s_k(n): updates between forward and backward of batch n at block k, at most ceil(m_k / update_every)."""
        return updates.before(n) - self.forward_version(k, n, updates)


@dataclass
class Updates:
    """
    u(n), the number of updates whose batches all come before batch n.

    A group of batches makes an update. Groups end every `update_every` batches, at the end of every period, and at
    drain points, so that the last group of an epoch may be smaller.

    Args:
        update_every (`int`): Batches of an update.
        period (`int`, *optional*): Batches of an epoch; without it groups run across epochs.
        drains (`list[int]`, *optional*): Batches before which the pipeline was empty, ascending.
    """

    update_every: int = 1
    period: int | None = None
    drains: list[int] = field(default_factory=list)

    def __post_init__(self):
        if self.update_every < 1:
            raise ConfigurationError("update_every", self.update_every, "must be at least 1")
        if self.period is not None and self.period < 1:
            raise ConfigurationError("period", self.period, "must be at least 1 batch")
        self._extra = [n for n in self.drains if not self._is_regular(n)]

    def add_drain(self, n: int) -> None:
        """All batches before n are done everywhere; the group they end in is closed."""
        if n == self.drained(n):
            return
        if not self._is_regular(n):
            self._extra.append(n)
        self.drains.append(n)

    def before(self, n: int) -> int:
        """u(n)."""
        epochs, rest = divmod(n, self.period) if self.period else (0, n)
        regular = epochs * math.ceil((self.period or 0) / self.update_every) + rest // self.update_every
        return regular + bisect.bisect_right(self._extra, n)

    def drained(self, n: int) -> int:
        """D(n): the last drain point that is at most n; 0 at the start."""
        position = bisect.bisect_right(self.drains, n)
        return self.drains[position - 1] if position else 0

    def group(self, n: int, end: int) -> tuple[int, int]:
        """
        Args:
            n (`int`): A batch.
            end (`int`): Number of batches after which the feed ends.

        Returns:
            `tuple[int, int]`: First batch of its group, and the one after its last.
        """
        rest = n % self.period if self.period else n
        first = n - rest % self.update_every
        last = min(first + self.update_every, end)
        if self.period:
            last = min(last, n - rest + self.period)
        return max(first, self.drained(n)), last

    def _is_regular(self, n: int) -> bool:
        rest = n % self.period if self.period else n
        return rest % self.update_every == 0


def parse(mode: str, stages: int) -> Schedule:
    """
    Args:
        mode (`str`): `bp` (no staleness), `fr` and `lag1` (m_k = K - 1 - k; one point of this engine), `dsp`
            (m_k = 2 (K - 1 - k)), or a vector: `dsp:4,2,0` or with the queues of features `dsp:1,1,0;4,2,0`.
        stages (`int`): K.

    Returns:
        [`Schedule`]

    Raises:
        ConfigurationError: If the mode is unknown, or its vector is malformed, of another length, or deadlocks.
    """
    if stages < 1:
        raise ConfigurationError("stages", stages, "must be at least 1")
    steps = {"bp": 0, "fr": 1, "lag1": 1, "dsp": 2}
    if mode in steps:
        m = tuple(steps[mode] * (stages - 1 - k) for k in range(stages))
        return Schedule(tuple(0 for _ in m) if mode == "fr" else _split(m), m)
    if not mode.startswith("dsp:"):
        known = ", ".join((*PRESETS, *SYNCHRONOUS))
        raise ConfigurationError("mode", mode, f"must be one of auto, {known}, or a vector such as dsp:4,2,0")
    try:
        vectors = [tuple(int(value) for value in part.split(",")) for part in mode[len("dsp:") :].split(";")]
    except ValueError:
        raise ConfigurationError("mode", mode, "a vector is numbers, as in dsp:4,2,0 or dsp:1,1,0;4,2,0") from None
    if len(vectors) > 2 or any(len(vector) != stages for vector in vectors):
        raise ConfigurationError("mode", mode, f"needs one value for each of {stages} stages, as in dsp:p;m or dsp:m")
    try:
        return Schedule(*vectors) if len(vectors) == 2 else Schedule(_split(vectors[0]), vectors[0])
    except ConfigurationError as error:  # as it was given
        raise ConfigurationError("mode", mode, str(error).partition(": ")[2]) from None


def choose(
    forward: list[float],
    backward: list[float],
    recompute: list[float],
    latency: float | list[float] = 0.0,
    jitter: float | list[float] = 0.0,
) -> Schedule:
    """
    The least staleness without a bubble: m_k - m_{k+1} = 1 + ceil((2 c + jitter) / τ), τ the slowest stage's step.

    Args:
        forward, backward (`list[float]`): Seconds of each stage.
        recompute (`list[float]`): Seconds of the forward that is repeated; 0 where the graph is kept, and at the
            last stage.
        latency (`float` or `list[float]`, *optional*): One-way seconds c between stage k and k + 1.
        jitter (`float` or `list[float]`, *optional*): Seconds by which a step of either stage may be late.

    Returns:
        [`Schedule`]
    """
    stages = len(forward)
    tau = max(f + b + r for f, b, r in zip(forward, backward, recompute, strict=True))
    if not (math.isfinite(tau) and tau > 0):
        raise ConfigurationError("mode", "auto", f"the slowest stage takes {tau} s: nothing was measured")
    per_hop = [value if isinstance(value, list) else [value] * (stages - 1) for value in (latency, jitter)]
    m = [0]
    for c, late in reversed(list(zip(*per_hop, strict=True))):
        m.append(m[-1] + 1 + math.ceil((2 * c + late) / tau))
    return Schedule(_split(tuple(m[::-1])), tuple(m[::-1]))


def _split(m: tuple[int, ...]) -> tuple[int, ...]:
    """p that shares the batches between two stages among both queues, as in (2, 2, 0; 6, 3, 0)."""
    return tuple((before - after + 1) // 2 for before, after in zip(m, (*m[1:], 0), strict=True))
