"""AFSVRG-VP: batch gradients corrected by those at an anchor."""

import numpy as np

from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import Loss
from hf_mlopt.vertical.updates.weights import LazyWeights, Update


class SVRG:
    """
    Block SVRG of [2008.06233](https://huggingface.co/papers/2008.06233):
    `v = X_Bᵀ (θ(z_B) - θ(z^s_B)) / B + μ_l + λ w_l` with `μ_l = X_lᵀ θ(z^s) / n`, the L2 term at the current weights.

    The first anchor is w = 0, whose scores are zero without asking anyone.

    Args:
        block ([`FeatureBlock`]): Own columns.
        loss (`Loss`): See [`make_loss`].
        labels (`np.ndarray`): As `loss.check_labels` returns them.
    """

    name = "svrg"

    def __init__(self, block: FeatureBlock, loss: Loss, labels: np.ndarray):
        self.block, self.loss, self.labels = block, loss, labels
        self.theta = loss.theta(np.zeros((block.num_rows, loss.words)), labels)  # at the anchor, [n, K]

    def initial_weights(self) -> LazyWeights:
        """Zeros, with μ_l of the first anchor as drift."""
        weights = LazyWeights(self.block.num_features, self.loss.words)
        weights.set_drift(self._mean_gradient())
        return weights

    def set_anchor(self, z: np.ndarray) -> np.ndarray:
        """
        Args:
            z (`np.ndarray`): Scores z^s of all rows at the new anchor, `[n, K]`.

        Returns:
            `np.ndarray`: μ_l, `[d_l, K]`, for [`LazyWeights.set_drift`].
        """
        self.theta = self.loss.theta(z, self.labels)
        return self._mean_gradient()

    def _mean_gradient(self) -> np.ndarray:
        return self.block.transposed(self.theta) / self.block.num_rows

    def update(self, number: int, z: np.ndarray) -> Update:
        """As [`SGD.update`]."""
        batch = self.block.batches[number]
        theta = self.loss.theta(z, self.labels[batch.rows])
        return Update(batch.columns, batch.backward(theta - self.theta[batch.rows]) / len(batch.rows))

    def state_dict(self) -> dict:
        """θ at the anchor."""
        return {"theta": self.theta.copy()}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self.theta = np.array(state["theta"], np.float64)
