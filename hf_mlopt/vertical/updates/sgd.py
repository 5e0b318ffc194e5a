"""AFSGD-VP: the plain block gradient of a batch."""

import numpy as np

from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import Loss
from hf_mlopt.vertical.updates.weights import LazyWeights, Update


class SGD:
    """
    Block SGD of [Privacy-Preserving Asynchronous Federated Learning Algorithms for Multi-Party Vertically
    Collaborative Learning](https://huggingface.co/papers/2008.06233): `g = X_Bᵀ θ(z_B) / B`.

    Args:
        block ([`FeatureBlock`]): Own columns.
        loss (`Loss`): See [`make_loss`].
        labels (`np.ndarray`): As `loss.check_labels` returns them.
    """

    name = "sgd"

    def __init__(self, block: FeatureBlock, loss: Loss, labels: np.ndarray):
        self.block, self.loss, self.labels = block, loss, labels

    def initial_weights(self) -> LazyWeights:
        """Zeros."""
        return LazyWeights(self.block.num_features, self.loss.words)

    def update(self, number: int, z: np.ndarray) -> Update:
        """
        Args:
            number (`int`): Of the batch.
            z (`np.ndarray`): Its scores over all parties, `[B, K]`.

        Returns:
            [`Update`]: For [`LazyWeights.step`].
        """
        batch = self.block.batches[number]
        theta = self.loss.theta(z, self.labels[batch.rows])
        return Update(batch.columns, batch.backward(theta) / len(batch.rows))

    def state_dict(self) -> dict:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict):
        """Nothing to take over."""
