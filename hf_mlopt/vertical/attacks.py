r"""
What a party can work out from what it is allowed to see. These attacks succeed where no budget, mask or noise stops
them; the documentation says where that is, and the tests hold it to that.

n rows, d features of the other parties together ("hidden"), T views, B rows a batch. p_i = z_i - own w_l^T x_i is the
hidden parties' part of the score of row i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import InputError


@dataclass(frozen=True, eq=False)
class GramView:
    """
    What an updating party saw of the scores of all its rows, between steps that it knows.

    Args:
        partial (`np.ndarray`): `[T + 1, n]`, p at each version of the hidden weights.
        batches (sequence of `np.ndarray`): T arrays of rows, those of each step.
        theta (sequence of `np.ndarray`): T arrays, the loss derivatives of those rows.
        learning_rate (`float`), l2 (`float`): Of the run.
    """

    partial: np.ndarray
    batches: Sequence[np.ndarray]
    theta: Sequence[np.ndarray]
    learning_rate: float
    l2: float = 0.0

    def __post_init__(self):
        steps = len(self.partial) - 1
        sizes = [len(batch) for batch in self.batches]
        if self.partial.ndim != 2 or steps < 1 or len(sizes) != steps or [len(t) for t in self.theta] != sizes:
            text = f"partial of shape {list(self.partial.shape)} with {len(sizes)} batches and {len(self.theta)} theta"
            raise InputError(f"{text}: T steps need T + 1 rows of partial, and a derivative for each row of a batch")


def gram_recovery(view: GramView) -> np.ndarray:
    r"""
    The Gram matrix of the hidden features, from p_i^{t+1} - (1 - \gamma\lambda) p_i^t =
    -(\gamma/B) \sum_{j \in J_t} \theta_j <x_j, x_i>: linear in the matrix, and solvable once T reaches n.

    Of the family of [2011.09290](https://huggingface.co/papers/2011.09290).

    Args:
        view ([`GramView`]): Every hidden party took the same batches.

    Returns:
        `np.ndarray`: `[n, n]`, symmetric; of least norm where T is below n.
    """
    steps, rows = len(view.partial) - 1, view.partial.shape[1]
    system = np.zeros((steps, rows))
    for t, (batch, theta) in enumerate(zip(view.batches, view.theta, strict=True)):
        np.add.at(system[t], batch, -view.learning_rate / len(batch) * np.asarray(theta))
    change = view.partial[1:] - (1 - view.learning_rate * view.l2) * view.partial[:-1]
    gram = np.linalg.lstsq(system, change, rcond=None)[0]
    return (gram + gram.T) / 2


def features_from_low_rank(
    partial: np.ndarray, num_hidden: int, known_rows: np.ndarray, known_features: np.ndarray
) -> np.ndarray:
    """
    Hidden features from partial scores at several versions of the weights, such as SVRG's anchors, without knowledge
    of batches: P = X W^T has the column space of X once T reaches d.

    Args:
        partial (`np.ndarray`): `[T, n]`.
        num_hidden (`int`): d.
        known_rows (`np.ndarray`): `[m]`, m at least d.
        known_features (`np.ndarray`): `[m, d]`.

    Returns:
        `np.ndarray`: `[n, d]`.

    Raises:
        InputError: If the known rows are not as many as their features.
    """
    if len(known_rows) != len(known_features):
        raise InputError(f"{len(known_rows)} known rows with {len(known_features)} rows of features")
    left, values, _ = np.linalg.svd(partial.T, full_matrices=False)
    rank = min(num_hidden, len(values))
    coordinates = left[:, :rank] * values[:rank]
    return coordinates @ np.linalg.lstsq(coordinates[known_rows], known_features, rcond=None)[0]


def labels_from_theta(theta: np.ndarray) -> np.ndarray:
    r"""
    Labels from loss derivatives. Logistic, `[B]`: sign(\theta) = -y, exactly. Multinomial, `[B, K]`: only the true
    class's entry p_k - 1 is negative.

    Returns:
        `np.ndarray`: -1 and 1, or the class of each row.
    """
    theta = np.asarray(theta)
    return np.where(theta < 0, 1.0, -1.0) if theta.ndim == 1 else np.argmin(theta, axis=1)


def theta_from_block_gradient(
    gradient: np.ndarray, features: np.ndarray, weights: np.ndarray | None = None, l2: float = 0.0
) -> np.ndarray:
    r"""
    The derivatives behind a party's own plain gradient, g = X_B^T \theta / B + \lambda w_l: exact if its rows are
    linearly independent, which B <= d_l allows, and a projection of them otherwise.

    Args:
        gradient (`np.ndarray`): `[d_l]` or `[d_l, K]`.
        features (`np.ndarray`): `[B, d_l]`, own.
        weights (`np.ndarray`, *optional*): Own, of the gradient's shape; needed with `l2`.
        l2 (`float`, *optional*): Of the run, 0 if the gradient is without it.

    Returns:
        `np.ndarray`: `[B]` or `[B, K]`.
    """
    if l2 and weights is None:
        raise InputError(f"l2={l2} without weights: its part of the gradient cannot be taken out")
    data = gradient - l2 * weights if l2 else gradient
    return len(features) * np.linalg.lstsq(np.asarray(features).T, data, rcond=None)[0]


def accumulated_theta(
    gradients: Sequence[np.ndarray], features: np.ndarray, batches: Sequence[np.ndarray]
) -> np.ndarray:
    r"""
    The same over several epochs of small steps: each row's derivative is taken as constant, and all gradients of all
    its batches are solved for at once. E epochs of differing batches give E d_l/B equations an unknown.

    Args:
        gradients (sequence of `np.ndarray`): `[d_l]` each, without the regulariser.
        features (`np.ndarray`): `[n, d_l]`, own.
        batches (sequence of `np.ndarray`): Rows of each.

    Returns:
        `np.ndarray`: `[n]`.
    """
    system = np.zeros((len(gradients) * features.shape[1], len(features)))
    for number, batch in enumerate(batches):
        rows = slice(number * features.shape[1], (number + 1) * features.shape[1])
        system[rows, batch] = features[batch].T / len(batch)
    return np.linalg.lstsq(system, np.concatenate(gradients), rcond=None)[0]
