"""The side of a party that trains: asks for sums, makes steps, publishes versions."""

import time
from collections import Counter, deque
from collections.abc import Callable

from transformers.utils import logging

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical.anchor import AnchorKeeper
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.gradients import BackwardOwner
from hf_mlopt.vertical.messages import Frame, Kind, Purpose
from hf_mlopt.vertical.sums import PendingSum, Sum, SumCollector
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.updates.compensation import block_smoothness, compensated_rate
from hf_mlopt.vertical.updates.saga import SAGA
from hf_mlopt.vertical.updates.sgd import SGD
from hf_mlopt.vertical.updates.svrg import SVRG


logger = logging.get_logger(__name__)

ALGORITHMS = {kind.name: kind for kind in (SGD, SVRG, SAGA)}


class Updater:
    """
    Trains one block without waiting for slower parties.

    Keeps `inflight` sums on the way, makes a step with each as it comes, in the order of the schedule, and publishes
    the next version of its weights.

    Args:
        arguments ([`VerticalArguments`]): Checked against the roster.
        optimizer (`SGD`, `SVRG` or `SAGA`): Of the own block.
        collector ([`SumCollector`]): Asks for sums.
        holders (`tuple[str, ...]`): All parties that update, this one among them.
        compute (`Callable[[], None]`, *optional*): Called between the sum and the step; a simulation sleeps in it.
    """

    MAX_DROPS = 20  # in a row, of one batch

    def __init__(
        self,
        arguments: VerticalArguments,
        optimizer: SGD | SVRG | SAGA,
        collector: SumCollector,
        holders: tuple[str, ...],
        compute: Callable[[], None] | None = None,
    ):
        self.arguments, self.optimizer, self.collector, self.holders = arguments, optimizer, collector, holders
        self.responder, self.inbox = collector.responder, collector.responder.inbox
        self.store, self.schedule = self.responder.store, optimizer.block.schedule
        self.num_steps = arguments.num_steps(self.schedule.num_rows)
        self.compute = compute or (lambda: None)
        self.position = 0  # steps made; also the round of the next sum
        self.staleness: Counter[int] = Counter()  # updates by others, as far as known, when a step begins
        self.overlap: Counter[int] = Counter()  # and when it is written: the paper's delay
        self.losses: deque[float] = deque(maxlen=self.schedule.num_batches)  # of the last batches, before their steps
        self.drops = 0
        self.backward: BackwardOwner | None = None  # set where others train without labels
        self.anchors = None
        if optimizer.name == "svrg":
            self.anchors = AnchorKeeper(collector, optimizer.block, optimizer.loss.words)
        self.smoothness = block_smoothness(optimizer.block, optimizer.loss.curvature, arguments.l2)

    def run(self, after_step: Callable[["Updater"], None] | None = None):
        """
        Makes the steps that are left.

        Args:
            after_step (`Callable`, *optional*): Called with the updater after each step; may save its state.
        """
        pending: deque[PendingSum] = deque()
        next_position = self.position
        ahead = self.arguments.push_ahead
        pushing = frozenset(self.collector.peers) if ahead else frozenset()
        while self.position < self.num_steps and not self._is_over():
            if ahead:
                self._allow_ahead(min(ahead, self.num_steps - 1 - self.position))
            while len(pending) < self.arguments.inflight and next_position < self.num_steps:
                batch = self.schedule.batch(next_position)
                pending.append(self.collector.ask(Purpose.TRAIN, batch, round_id=next_position, pushing=pushing))
                next_position += 1
            oldest = pending.popleft()
            self.step(oldest.asked.batch, self._fresh_sum(oldest))
            if self.anchors is not None:
                z = self.anchors.after_step()
                if z is not None:
                    self.store.set_drift(self.optimizer.set_anchor(z))
            if after_step is not None:
                after_step(self)

    def _is_over(self) -> bool:
        return self.arguments.finish == "first" and self.inbox.is_anyone_done

    def _allow_ahead(self, ahead: int):
        version = self.store.version
        data = Frame(Kind.AHEAD, Purpose.TRAIN, self.responder.run, self.position, version, mark=ahead).to_bytes()
        for peer in self.collector.peers:
            try:
                self.collector.transport.push(peer, data)
            except PeerLost:
                if self.arguments.on_dropout == "abort":
                    raise  # else its share will be missed, and asked for again

    def _fresh_sum(self, pending: PendingSum) -> Sum:
        """The sum, asked for again while it is too old; with `on_dropout`, also where a peer was lost."""
        batch, bound, drops = pending.asked.batch, self.arguments.max_staleness, 0
        while drops < self.MAX_DROPS:
            try:
                total = self.collector.collect(pending)
            except PeerLost as lost:
                self._after_loss(lost)
            else:
                age = self._age(total)
                if bound is None or age <= bound:
                    self.staleness[age] += 1
                    return total
                drops += 1
                self.drops += 1
            pending = self.collector.ask(Purpose.AGAIN, batch)
        text = (
            f"{self.MAX_DROPS} sums of one batch in a row were older; allow more, or give fewer inflight, push_ahead"
        )
        raise ConfigurationError("max_staleness", bound, text)

    def _age(self, total: Sum) -> int:
        """Updates by others, as far as known here, since their shares were made."""
        return sum(self.inbox.versions[peer] - version for peer, version in total.versions.items())

    def _after_loss(self, lost: PeerLost):
        if self.arguments.on_dropout == "abort":
            raise lost
        if self.arguments.on_dropout == "exclude":
            logger.warning(f"{lost}; training goes on without its scores")
            self.collector.peers = tuple(peer for peer in self.collector.peers if peer != lost.peer)
            return
        logger.warning(f"{lost}; waiting for it")
        time.sleep(min(1.0, self.arguments.timeout))

    def step(self, batch: int, total: Sum):
        """One update of the block from the scores of a batch."""
        self.compute()
        self.overlap[self._age(total)] += 1
        optimizer = self.optimizer
        labels = optimizer.labels[optimizer.block.batches[batch].rows]
        self.losses.append(float(optimizer.loss.values(total.z, labels).mean()))
        rate = self.learning_rate()
        self.store.commit(self.optimizer.update(batch, total.z), rate, self.arguments.l2)
        if self.backward is not None:
            self.backward.send(self.position, batch, total.z)
        self.position += 1

    def learning_rate(self) -> float:
        """γ, longer where this party has made fewer updates than others."""
        rate = self.arguments.learning_rate
        if not self.arguments.delay_compensation:
            return rate
        most = max((self.inbox.versions[name] for name in self.holders if name in self.inbox.versions), default=0)
        return compensated_rate(rate, self.store.version + 1, most, self.smoothness)

    def state_dict(self) -> dict:
        """What training goes on from; bit for bit in sync mode."""
        return {
            "position": self.position,
            "optimizer": self.optimizer.state_dict(),
            "anchors": self.anchors.state_dict() if self.anchors is not None else {},
            "versions": dict(self.inbox.versions),
            "collector": self.collector.state_dict(),
            "backward": self.backward.state_dict() if self.backward is not None else {},
        }

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self.position = int(state["position"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.anchors is not None:
            self.anchors.load_state_dict(state["anchors"])
        for peer, version in state["versions"].items():
            self.inbox.saw(peer, int(version))
        self.collector.load_state_dict(state["collector"])
        if self.backward is not None:
            self.backward.load_state_dict(state["backward"])
