"""Training on an event clock: any number of parties in one thread, with the step times one likes, and no luck."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.secure_sum import FixedPoint
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.updater import ALGORITHMS
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.compensation import block_smoothness, compensated_rate
from hf_mlopt.vertical.updates.losses import make_loss


@dataclass(frozen=True)
class Point:
    """
    The state of a run at one time.

    Args:
        seconds (`float`): On the event clock.
        updates (`tuple[int, ...]`): Made so far, by party.
        objective (`float`): f of the weights all parties have at that time, in nats per row for classifiers.
    """

    seconds: float
    updates: tuple[int, ...]
    objective: float


class _Block:
    """One party on the clock."""

    def __init__(self, optimizer, arguments: VerticalArguments):
        self.optimizer, self.weights = optimizer, optimizer.initial_weights()
        self.updates = self.since_anchor = 0
        self.smoothness = block_smoothness(optimizer.block, optimizer.loss.curvature, arguments.l2)
        self.read: tuple[int, np.ndarray, int] | None = None  # batch, z, all updates so far


class EventClock:
    """
    Parties that take fixed times for a step, from the sum they read to the weights they write. Messages take no time,
    masks optionally their rounding. The anchors of SVRG come at once, since training never waits for them.

    Args:
        arguments ([`VerticalArguments`]): Algorithm, loss, mode, rates. `num_epochs`, masks and budget are not used.
        blocks (`Sequence[FeatureBlock]`): Columns by party, all with one schedule; every party updates.
        labels (array): `[n]`.
        step_seconds (`Sequence[float]`): Time of a step, by party.
        fixed_point (`bool`, *optional*, defaults to `False`): Whether shares are rounded as masked ones are.
    """

    def __init__(
        self,
        arguments: VerticalArguments,
        blocks: Sequence[FeatureBlock],
        labels,
        step_seconds: Sequence[float],
        fixed_point: bool = False,
    ):
        if len(step_seconds) != len(blocks) or not all(seconds > 0 for seconds in step_seconds):
            raise InputError(f"step_seconds={list(step_seconds)}: must be {len(blocks)} times above 0, one a party")
        self.arguments, self.step_seconds = arguments, list(step_seconds)
        self.loss = make_loss(arguments.loss, arguments.num_labels)
        self.labels, self.schedule = self.loss.check_labels(labels), blocks[0].schedule
        kind = ALGORITHMS[arguments.algorithm]
        self.parties = [_Block(kind(block, self.loss, self.labels), arguments) for block in blocks]
        self._code = FixedPoint(len(blocks), arguments.fixed_point_bits) if fixed_point else None
        self.seconds, self._all_updates = 0.0, 0
        self.staleness: Counter[int] = Counter()
        self.events: list[tuple[str, int]] = []  # ("read" or "write", party), in order
        self._queue: list[tuple[float, int]] = []  # (time of the write, party)

    def run(self, is_enough: Callable[[Point], bool], every: int) -> list[Point]:
        """
        Args:
            is_enough (`Callable[[Point], bool]`): Ends the run.
            every (`int`): Updates, all parties together, between two points.

        Returns:
            `list[Point]`: The first at the start of this call.
        """
        points, next_point = [self.point()], self._all_updates + every
        while not is_enough(points[-1]):
            if self.arguments.mode == "sync":
                self._sync_round()
            else:
                self._next_event()
            if self._all_updates >= next_point:
                points.append(self.point())
                next_point += every
        return points

    def point(self) -> Point:
        """The state now."""
        z = sum(party.optimizer.block.scores(party.weights.read(slice(None))) for party in self.parties)
        penalty = sum(float(np.sum(party.weights.read(slice(None)) ** 2)) for party in self.parties)
        objective = float(np.mean(self.loss.values(z, self.labels))) + self.arguments.l2 / 2 * penalty
        return Point(self.seconds, tuple(party.updates for party in self.parties), objective)

    def weights(self) -> list[np.ndarray]:
        """Blocks, `[d_l, K]`, by party."""
        return [party.weights.read(slice(None)) for party in self.parties]

    def _sync_round(self):
        for number in range(len(self.parties)):
            self._read(number)
        self.seconds += max(self.step_seconds)
        for number in range(len(self.parties)):
            self._write(number)
        due = [number for number in range(len(self.parties)) if self._anchor_is_due(number)]
        for z in [self._scores_at_rest()] if due else []:
            for number in due:
                self._set_anchor(number, z)

    def _next_event(self):
        if not self._queue:
            for number, seconds in enumerate(self.step_seconds):
                self._read(number)
                heapq.heappush(self._queue, (self.seconds + seconds, number))
        self.seconds, number = heapq.heappop(self._queue)
        self._write(number)
        if self._anchor_is_due(number):
            self._set_anchor(number, self._scores_at_rest())
        self._read(number)
        heapq.heappush(self._queue, (self.seconds + self.step_seconds[number], number))

    def _read(self, number: int):
        party = self.parties[number]
        batch = self.schedule.batch(party.updates)
        shares = []
        for other in self.parties:
            part = other.optimizer.block.batches[batch]
            shares.append(self._rounded(part.forward(other.weights.read(part.columns))))
        party.read = (batch, sum(shares), self._all_updates)
        self.events.append(("read", number))

    def _write(self, number: int):
        party = self.parties[number]
        batch, z, updates_before = party.read
        rate = self.arguments.learning_rate
        if self.arguments.delay_compensation:
            most = max(other.updates for other in self.parties)
            rate = compensated_rate(rate, party.updates + 1, most, party.smoothness)
        party.weights.step(party.optimizer.update(batch, z), rate, self.arguments.l2)
        self.staleness[self._all_updates - updates_before] += 1
        party.updates += 1
        party.since_anchor += 1
        self._all_updates += 1
        self.events.append(("write", number))

    def _anchor_is_due(self, number: int) -> bool:
        is_svrg = self.arguments.algorithm == "svrg"
        return is_svrg and self.parties[number].since_anchor >= self.schedule.num_batches

    def _scores_at_rest(self) -> np.ndarray:
        return sum(
            self._rounded(party.optimizer.block.scores(party.weights.read(slice(None)))) for party in self.parties
        )

    def _set_anchor(self, number: int, z: np.ndarray):
        party = self.parties[number]
        party.weights.set_drift(party.optimizer.set_anchor(z))
        party.since_anchor = 0

    def _rounded(self, scores: np.ndarray) -> np.ndarray:
        return scores if self._code is None else self._code.decode(self._code.encode(scores, "scores"))
