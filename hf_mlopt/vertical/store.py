"""The weights of one block between their updater and those who ask for scores."""

import threading

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.updates.blocks import Batch
from hf_mlopt.vertical.updates.weights import LazyWeights, Update


class WeightStore:
    """
    Versioned weights. Readers get copies of what a batch needs, so they wait for an assignment of O(nnz) at most and
    never for training.

    Args:
        weights ([`LazyWeights`]): Version 0.
    """

    KEPT_PINS = 2  # a slower party may still be summing the anchor before the newest

    def __init__(self, weights: LazyWeights):
        self._weights, self._lock = weights, threading.Lock()
        self.version = 0
        self._pins: dict[int, tuple[int, np.ndarray]] = {}  # anchor number: version, weights

    def read(self, batch: Batch) -> tuple[int, np.ndarray]:
        """Version and weights of the features of a batch, `[C, K]`."""
        with self._lock:
            return self.version, self._weights.read(batch.columns)

    def read_all(self) -> np.ndarray:
        """A copy of the weights, `[d_l, K]`."""
        with self._lock:
            return self._weights.read(slice(None))

    def commit(self, update: Update, learning_rate: float, l2: float) -> int:
        """Applies an update and returns the new version."""
        with self._lock:
            self._weights.step(update, learning_rate, l2)
            self.version += 1
            return self.version

    def set_drift(self, drift: np.ndarray):
        """Takes another dense part of the gradient; the weights, hence the version, stay."""
        with self._lock:
            self._weights.set_drift(drift)

    @property
    def newest_pin(self) -> int:
        """Number of the newest anchor, 0 for the first, w = 0."""
        with self._lock:
            return max(self._pins, default=0)

    def pinned(self, number: int, batch: Batch) -> tuple[int, np.ndarray]:
        """
        Weights of anchor `number`, copied at the first sight of that number: whoever names a new anchor marks it for
        everyone, and training goes on meanwhile.

        Args:
            number (`int`): From 1.
            batch ([`Batch`]): Whose features are wanted.

        Returns:
            `tuple`: Version, and weights `[C, K]`.

        Raises:
            InputError: If newer anchors have displaced it.
        """
        with self._lock:
            if number > max(self._pins, default=0):
                self._pins[number] = (self.version, self._weights.read(slice(None)))
                for old in sorted(self._pins)[: -self.KEPT_PINS]:
                    del self._pins[old]
            if number not in self._pins:
                raise InputError(f"anchor {number} is gone, the newest is {max(self._pins)}: ask for that")
            version, weights = self._pins[number]
        return version, weights[batch.columns]  # pinned weights never change

    def state_dict(self) -> dict:
        """Weights, version and pins."""
        with self._lock:
            pins = {str(number): {"version": version, "weights": w} for number, (version, w) in self._pins.items()}
            return {"weights": self._weights.state_dict(), "version": self.version, "pins": pins}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        with self._lock:
            self._weights.load_state_dict(state["weights"])
            self.version = int(state["version"])
            self._pins = {int(number): (pin["version"], pin["weights"]) for number, pin in state["pins"].items()}
