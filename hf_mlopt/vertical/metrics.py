"""Metrics of scores at the label owner, and of a party's training."""

import numpy as np
from scipy.special import expit, softmax
from sklearn import metrics

from hf_mlopt.vertical.updater import Updater
from hf_mlopt.vertical.updates.losses import Loss


def predictions(loss: Loss, z: np.ndarray) -> np.ndarray:
    """
    Args:
        loss (`Loss`): Of the model.
        z (`np.ndarray`): Scores, `[rows, K]`.

    Returns:
        `np.ndarray`: Probability of +1, `[rows]`; of each class, `[rows, K]`; or the value of ridge, `[rows]`.
    """
    if loss.name == "logistic":
        return expit(z[:, 0])
    return z[:, 0] if loss.name == "ridge" else softmax(z, axis=1)


def training_speed(updater: Updater, seconds: float) -> dict[str, float]:
    """
    Args:
        updater ([`Updater`]): Of a party that has trained.
        seconds (`float`): How long.

    Returns:
        `dict[str, float]`: `updates`, `updates_per_second`, `share_waiting` (of its time), `mean_staleness` and
            `max_staleness` (updates by others between a step's read and its write), `dropped_sums`.
    """
    ages, updates = updater.overlap, sum(updater.overlap.values())
    return {
        "updates": updates,
        "updates_per_second": updates / seconds,
        "share_waiting": updater.collector.seconds_waiting / seconds,
        "mean_staleness": sum(age * count for age, count in ages.items()) / max(1, updates),
        "max_staleness": max(ages, default=0),
        "dropped_sums": updater.drops,
    }


def score_metrics(loss: Loss, z: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Args:
        loss (`Loss`): Of the model.
        z (`np.ndarray`): Scores, `[rows, K]`.
        labels (`np.ndarray`): As `loss.check_labels` returns them.

    Returns:
        `dict[str, float]`: `accuracy`, `log_loss` (nats) and, for two classes that both occur, `auc`; `rmse` and `r2`
            for ridge.
    """
    guess = predictions(loss, z)
    if loss.name == "ridge":
        return {"rmse": metrics.root_mean_squared_error(labels, guess), "r2": metrics.r2_score(labels, guess)}
    found = {"log_loss": float(np.mean(loss.values(z, labels)))}
    if loss.name == "multinomial":
        return found | {"accuracy": metrics.accuracy_score(labels, guess.argmax(1))}
    found["accuracy"] = metrics.accuracy_score(labels, np.where(z[:, 0] > 0, 1.0, -1.0))
    if len(np.unique(labels)) == 2:
        found["auc"] = metrics.roc_auc_score(labels, z[:, 0])
    return found
