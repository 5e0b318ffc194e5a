"""The scores of all rows at the pinned weights of SVRG, summed while training goes on."""

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.messages import Purpose
from hf_mlopt.vertical.sums import PendingSum, SumCollector
from hf_mlopt.vertical.updates.blocks import FeatureBlock


class AnchorSum:
    """
    z^s of all rows, batch by batch. Asking for the first one marks anchor s: each party pins its weights when it first
    sees the number, so every row is summed from the same blocks, whatever training does meanwhile.

    Args:
        collector ([`SumCollector`]): Asks.
        block ([`FeatureBlock`]): Own columns of the training rows.
        number (`int`): s, from 1.
        words (`int`): K.
        inflight (`int`): Batches asked for at a time.
    """

    def __init__(self, collector: SumCollector, block: FeatureBlock, number: int, words: int, inflight: int = 4):
        self.collector, self.block, self.number, self.inflight = collector, block, number, inflight
        self.z = np.empty((block.num_rows, words))
        self._pending: list[PendingSum] = []
        self._asked = self._summed = 0

    def advance(self) -> np.ndarray | None:
        """
        Takes what has come, asks for more, and waits for nothing.

        Returns:
            `np.ndarray`: z^s, `[n, K]`, once all batches are there.

        Raises:
            InputError: If newer anchors displaced this one at some party; begin with the newest.
        """
        while self._pending and self._pending[0].is_ready:
            pending = self._pending.pop(0)
            batch = self.block.batches[pending.asked.batch]
            self.z[batch.rows] = self.collector.collect(pending).z
            self._summed += 1
        while len(self._pending) < self.inflight and self._asked < len(self.block.batches):
            self._pending.append(self.collector.ask(Purpose.ANCHOR, self._asked, mark=self.number))
            self._asked += 1
        return self.z if self._summed == len(self.block.batches) else None


class AnchorKeeper:
    """
    Decides when an updater takes a new anchor: after each pass over the rows, the newest number that others have
    named or else the next one.

    Args:
        collector ([`SumCollector`]), block ([`FeatureBlock`]), words (`int`): As in [`AnchorSum`].
    """

    def __init__(self, collector: SumCollector, block: FeatureBlock, words: int):
        self.collector, self.block, self.words = collector, block, words
        self.number = 0  # of the anchor in use
        self.steps = 0  # made with it
        self._sum: AnchorSum | None = None

    def after_step(self) -> np.ndarray | None:
        """Returns z^s when a new anchor is complete, else goes on with it."""
        self.steps += 1
        if self.steps < len(self.block.batches):
            return None
        if self._sum is None:
            self._begin()
        try:
            z = self._sum.advance()
        except InputError:
            if self.collector.responder.store.newest_pin <= self._sum.number:
                raise  # the refusal has another reason
            self._begin()
            return None
        if z is not None:
            self.number, self.steps, self._sum = self._sum.number, 0, None
        return z

    def _begin(self):
        number = max(self.collector.responder.store.newest_pin, self.number + 1)
        self._sum = AnchorSum(self.collector, self.block, number, self.words)

    def state_dict(self) -> dict:
        """A sum under way is begun again after a restart."""
        return {"number": self.number, "steps": self.steps}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self.number, self.steps, self._sum = int(state["number"]), int(state["steps"]), None
