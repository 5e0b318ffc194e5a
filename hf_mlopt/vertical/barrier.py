"""Training in step: one batch for all, and no step before all shares of the last weights are there."""

from collections.abc import Callable

from hf_mlopt.vertical.messages import Frame, Kind, Purpose
from hf_mlopt.vertical.sums import Sum
from hf_mlopt.vertical.updater import Updater


class SyncUpdater(Updater):
    """
    Every updater pushes its share of a batch to all others as soon as its weights have the right version, and makes a
    step when it has all of theirs. The shares themselves are the barrier; results are those of one machine.
    """

    def run(self, after_step: Callable[[Updater], None] | None = None):
        """See [`Updater.run`]."""
        num_batches = self.schedule.num_batches
        while self.position < self.num_steps:
            epoch, place = divmod(self.position, num_batches)
            if self.anchors is not None and place == 0 and epoch > self.anchors.number:
                self._take_anchor(epoch)
            batch = self.schedule.batch(self.position)
            self.step(batch, self._common_sum(Purpose.TRAIN, self.position, batch))
            self.staleness[0] += 1
            if after_step is not None:
                after_step(self)

    def _age(self, total: Sum) -> int:
        return 0  # others go on to the next step only with this one's share

    def _take_anchor(self, number: int):
        block, num_batches = self.optimizer.block, self.schedule.num_batches
        z = self.optimizer.theta.copy()  # of the right shape; every row is overwritten
        for batch in range(num_batches):
            total = self._common_sum(Purpose.ANCHOR, number * num_batches + batch, batch, number)
            z[block.batches[batch].rows] = total.z
        self.store.set_drift(self.optimizer.set_anchor(z))
        self.anchors.number = number

    def _common_sum(self, purpose: Purpose, round_id: int, batch: int, mark: int = 0) -> Sum:
        """The sum that all updaters need now, each collecting its own, or one of them for all."""
        name, others = self.responder.name, frozenset(self.holders) - {self.responder.name}
        collectors = self.holders
        if self.arguments.share_aggregates:  # in turns, so that no one carries the load alone
            collectors = (self.holders[round_id % len(self.holders)],)
        asked = Frame(Kind.ASK, purpose, self.responder.run, round_id, batch=batch, mark=mark)
        for requester in collectors:
            if requester != name:
                self.collector.transport.push(requester, self.responder.share(requester, asked).to_bytes())
        if name not in collectors:
            frame = self.inbox.take(collectors[0], purpose, round_id, self.arguments.timeout)
            return Sum(frame.values, {})
        pending = self.collector.ask(purpose, batch, round_id=round_id, mark=mark, pushing=others)
        total = self.collector.collect(pending)
        if self.arguments.share_aggregates:
            data = Frame(
                Kind.SUM, purpose, self.responder.run, round_id, self.store.version, batch, mark, values=total.z
            )
            for peer in others:
                self.collector.transport.push(peer, data.to_bytes())
        return total
