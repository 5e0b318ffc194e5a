"""Which rows form a batch and in which order batches come: the same in every party, from a shared seed."""

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np

from hf_mlopt.errors import ConfigurationError


class BatchSchedule:
    """
    Batches are contiguous ranges of one permutation of the rows, and each step uses one of them.

    One permutation serves the whole run, so a block is cut once and a party that lags by any number of epochs still
    finds every batch. The seed is public: it decides who sees what when, and masks nothing.

    Args:
        num_rows (`int`): Aligned rows n.
        batch_size (`int`): Rows of a batch; the last one may be shorter.
        seed (`int`): Shared by all parties.
        order (`str`, *optional*, defaults to `"reshuffled"`): `reshuffled` visits all batches each epoch in a new
            order. `drawn` draws each batch independently, which SAGA needs: in a reshuffled epoch the batches still to
            come have the oldest entries of the table, so its steps point on average back by what the epoch has gained,
            and the more so the slower a party is. `kept` leaves rows and batches in order, for predictions.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        order: Literal["reshuffled", "drawn", "kept"] = "reshuffled",
    ):
        for name, value in (("num_rows", num_rows), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(name, value, "must be at least 1")
        self.num_rows, self.batch_size, self.seed, self.order = num_rows, batch_size, seed, order
        self.num_batches = -(-num_rows // batch_size)
        self._rows = (
            np.arange(num_rows) if order == "kept" else np.argsort(_words(seed, "rows", 0, num_rows), kind="stable")
        )
        self._epoch = lru_cache(maxsize=4)(self._new_epoch)  # a fast and a slow party are in different ones

    def rows(self, batch: int) -> np.ndarray:
        """Row numbers of a batch, `[at most batch_size]`."""
        return self._rows[batch * self.batch_size : (batch + 1) * self.batch_size]

    def batch(self, position: int) -> int:
        """Number of the batch that step `position` (from 0, over all epochs) uses."""
        epoch, place = divmod(position, self.num_batches)
        return int(self._epoch(epoch)[place])

    def most_visits(self, num_steps: int) -> int:
        """How often the most frequent batch comes in the first steps."""
        return int(np.bincount([self.batch(position) for position in range(num_steps)]).max())

    def _new_epoch(self, epoch: int) -> np.ndarray:
        if self.order == "kept":
            return np.arange(self.num_batches)
        words = _words(self.seed, "batches", epoch, self.num_batches)
        return words % np.uint64(self.num_batches) if self.order == "drawn" else np.argsort(words, kind="stable")


def _words(seed: int, purpose: str, number: int, size: int) -> np.ndarray:
    """
    Uniform words for each purpose and number, `[size]`, uint64, the same on every machine: numpy keeps the raw stream
    of a bit generator between versions, but not what its `permutation` makes of it.
    """
    digest = hashlib.sha256(f"hf_mlopt/vertical/{purpose}/{number}/{seed}".encode()).digest()
    return np.random.Philox(int.from_bytes(digest, "little")).random_raw(size)
