"""Losses of generalised linear models as functions of the scores z = X w, the only thing parties share."""

import numpy as np
from scipy.special import expit, logsumexp

from hf_mlopt.errors import ConfigurationError, InputError


class Logistic:
    """`log(1 + exp(-y z))`, labels -1 and +1."""

    name, words, curvature = "logistic", 1, 0.25

    def check_labels(self, labels) -> np.ndarray:
        """
        Args:
            labels (array): `[rows]`, each -1 or +1.

        Returns:
            `np.ndarray`: `[rows]`, float64.

        Raises:
            InputError: If a label is neither.
        """
        return _refuse_labels(_column(labels), lambda y: np.abs(y) == 1, "-1 or +1; recode 0/1 as 2 * y - 1")

    def values(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Loss per row in nats, `[rows]`, from scores `[rows, 1]`."""
        return np.logaddexp(0.0, -labels * z[:, 0])

    def theta(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Derivative of the loss in the score, `-y σ(-y z)`, `[rows, 1]`."""
        return (-labels * expit(-labels * z[:, 0]))[:, None]


class Ridge:
    """`(z - y)² / 2`, real labels."""

    name, words, curvature = "ridge", 1, 1.0

    def check_labels(self, labels) -> np.ndarray:
        """As [`Logistic.check_labels`]; labels must be finite."""
        return _column(labels)

    def values(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Loss per row, `[rows]`, from scores `[rows, 1]`."""
        return 0.5 * (z[:, 0] - labels) ** 2

    def theta(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """`z - y`, `[rows, 1]`."""
        return z - labels[:, None]


class Multinomial:
    """
    `-log softmax_y(z)`, labels 0 … K - 1.

    Args:
        num_labels (`int`): K, at least 2.
    """

    name, curvature = "multinomial", 0.5  # diag(p) - p pᵀ has no eigenvalue above 1/2

    def __init__(self, num_labels: int):
        if num_labels < 2:
            raise ConfigurationError("num_labels", num_labels, "must be at least 2")
        self.words = num_labels

    def check_labels(self, labels) -> np.ndarray:
        """As [`Logistic.check_labels`]; labels are whole numbers below K; int64."""
        top = self.words - 1
        known = lambda y: (y >= 0) & (y <= top) & (y == np.floor(y))  # noqa: E731
        return _refuse_labels(_column(labels), known, f"a whole number, 0 to {top}; see num_labels").astype(np.int64)

    def values(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Loss per row in nats, `[rows]`, from scores `[rows, K]`."""
        return logsumexp(z, axis=1) - z[np.arange(len(z)), labels]

    def theta(self, z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """`softmax(z) - onehot(y)`, `[rows, K]`."""
        theta = np.exp(z - logsumexp(z, axis=1, keepdims=True))
        theta[np.arange(len(z)), labels] -= 1.0
        return theta


Loss = Logistic | Ridge | Multinomial


def make_loss(name: str, num_labels: int = 2) -> Loss:
    """
    Args:
        name (`str`): `"logistic"`, `"ridge"` or `"multinomial"`.
        num_labels (`int`, *optional*, defaults to 2): Classes of the multinomial loss.

    Returns:
        `Loss`: With `words` scores a row and `curvature`, the largest second derivative in z.

    Raises:
        ConfigurationError: If the name is unknown.
    """
    if name == "multinomial":
        return Multinomial(num_labels)
    for kind in (Logistic, Ridge):
        if kind.name == name:
            return kind()
    raise ConfigurationError("loss", name, "must be one of logistic, ridge, multinomial")


def _column(labels) -> np.ndarray:
    labels = np.asarray(labels, np.float64)
    if labels.ndim != 1:
        raise InputError(f"labels: shape {list(labels.shape)}, must be one label a row")
    return _refuse_labels(labels, np.isfinite, "finite; drop or repair the row")


def _refuse_labels(labels: np.ndarray, is_good, allowed: str) -> np.ndarray:
    bad = np.flatnonzero(~is_good(labels))
    if len(bad):
        raise InputError(f"labels[{bad[0]}]={labels[bad[0]]:g}: must be {allowed}")
    return labels
