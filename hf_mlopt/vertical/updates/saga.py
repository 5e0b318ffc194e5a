"""AFSAGA-VP with one scalar per row in place of a gradient per row."""

import numpy as np

from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import Loss
from hf_mlopt.vertical.updates.weights import LazyWeights, Update


class SAGA:
    """
    Block SAGA of [2008.06233](https://huggingface.co/papers/2008.06233):
    `v = X_Bᵀ (θ_B - t_B) / B + a_l + λ w_l`, then `a_l += X_Bᵀ (θ_B - t_B) / n` and `t_B ← θ_B`.

    The gradient of a row is θ_i x_i, so the table keeps θ_i (K words), n·K in place of n·d_l numbers. It starts at
    θ(0), the scores of zero weights. A batch never holds a row twice.

    Args:
        block ([`FeatureBlock`]): Own columns.
        loss (`Loss`): See [`make_loss`].
        labels (`np.ndarray`): As `loss.check_labels` returns them.
    """

    name = "saga"

    def __init__(self, block: FeatureBlock, loss: Loss, labels: np.ndarray):
        self.block, self.loss, self.labels = block, loss, labels
        self.table = loss.theta(np.zeros((block.num_rows, loss.words)), labels)  # t, [n, K]

    def initial_weights(self) -> LazyWeights:
        """Zeros, with a_l of the first table as drift."""
        weights = LazyWeights(self.block.num_features, self.loss.words)
        weights.set_drift(self.block.transposed(self.table) / self.block.num_rows)
        return weights

    def update(self, number: int, z: np.ndarray) -> Update:
        """As [`SGD.update`]; also moves the table, so each update must be applied."""
        batch = self.block.batches[number]
        theta = self.loss.theta(z, self.labels[batch.rows])
        back = batch.backward(theta - self.table[batch.rows])
        self.table[batch.rows] = theta
        return Update(batch.columns, back / len(batch.rows), back / self.block.num_rows)

    def state_dict(self) -> dict:
        """The table t; a_l is the drift of the weights."""
        return {"table": self.table.copy()}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self.table = np.array(state["table"], np.float64)
