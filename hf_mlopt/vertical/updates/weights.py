r"""
Weights of one block in a form whose steps cost O(nnz).

SGD shrinks all of w, SVRG and SAGA also move it along a dense vector m each step, although a batch touches few
features. So w is kept as s·v - r·m with scalars s and r: a step w ← (1 - γλ) w - γ (g + m) is then
s' = (1 - γλ) s, r' = (1 - γλ) r + γ, v' = v - γ g / s', and where m itself changes by a sparse δ afterwards,
r'·δ / s' is added to v. Exact up to round-off.
"""

from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Update:
    """
    What one batch changes.

    Args:
        columns (`slice` or `np.ndarray`): Features that occur in the batch.
        gradient (`np.ndarray`): g on them, `[C, K]`, without m and the L2 term.
        drift_change (`np.ndarray`, *optional*): δ of m on them after the step, `[C, K]`.
    """

    columns: slice | np.ndarray
    gradient: np.ndarray
    drift_change: np.ndarray | None = None


class LazyWeights:
    """
    w = s·v - r·m of one block, `[d_l, K]`, float64; zeros to begin with.

    Args:
        num_features (`int`): d_l.
        words (`int`): K, scores a row.
    """

    _FOLD_BELOW, _FOLD_ABOVE = 0.5, 64.0  # of s and r: the two parts of the difference stay of the size of w

    def __init__(self, num_features: int, words: int):
        self.values = np.zeros((num_features, words))
        self.drift: np.ndarray | None = None
        self.scale, self.ramp = 1.0, 0.0

    @classmethod
    def of(cls, weights: np.ndarray) -> "LazyWeights":
        """Given ones, `[d_l, K]`."""
        made = cls(*weights.shape)
        made.values = np.array(weights, np.float64)
        return made

    def read(self, columns: slice | np.ndarray) -> np.ndarray:
        """A new array: w of some features, `[C, K]`."""
        weights = self.scale * self.values[columns]
        if self.drift is not None and self.ramp:
            weights -= self.ramp * self.drift[columns]
        return weights

    def set_drift(self, drift: np.ndarray):
        """Takes another m, `[d_l, K]`, from now on; w stays."""
        self._fold()
        self.drift = drift.copy()

    def step(self, update: Update, learning_rate: float, l2: float):
        """
        w ← (1 - γλ) w - γ (g + m), then m ← m + δ.

        Args:
            update ([`Update`]): g and δ.
            learning_rate (`float`): γ, with γλ below 1.
            l2 (`float`): λ.
        """
        shrink = 1.0 - learning_rate * l2
        if not 0.0 < shrink <= 1.0:
            raise ConfigurationError("learning_rate", learning_rate, f"times l2={l2:g} must lie in [0, 1)")
        self.scale *= shrink
        change = -learning_rate * update.gradient
        if self.drift is not None:
            self.ramp = shrink * self.ramp + learning_rate
            if update.drift_change is not None:
                change += self.ramp * update.drift_change
                self.drift[update.columns] += update.drift_change
        self.values[update.columns] += change / self.scale
        if self.scale < self._FOLD_BELOW or self.ramp > self._FOLD_ABOVE * learning_rate:
            self._fold()

    def _fold(self):
        self.values = self.read(slice(None))
        self.scale, self.ramp = 1.0, 0.0

    def state_dict(self) -> dict:
        """Arrays (copies) and scalars that continue bit for bit."""
        drift = None if self.drift is None else self.drift.copy()
        return {"values": self.values.copy(), "drift": drift, "scale": self.scale, "ramp": self.ramp}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self.values = np.array(state["values"], np.float64)
        self.drift = None if state["drift"] is None else np.array(state["drift"], np.float64)
        self.scale, self.ramp = float(state["scale"]), float(state["ramp"])
