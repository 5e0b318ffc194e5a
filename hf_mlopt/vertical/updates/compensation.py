"""Longer steps for blocks that are updated more rarely, bounded by the curvature of the block."""

import numpy as np

from hf_mlopt.vertical.updates.blocks import FeatureBlock


def block_smoothness(block: FeatureBlock, curvature: float, l2: float, iterations: int = 20) -> float:
    """
    Smoothness L_l of the objective in one block: `curvature · λ_max(X_lᵀ X_l / n) + λ`, by power iterations.

    The iterations approach λ_max from below. They touch own columns only, so nothing is sent.

    Args:
        block ([`FeatureBlock`]): Own columns.
        curvature (`float`): Largest second derivative of the loss in the score.
        l2 (`float`): λ.
        iterations (`int`, *optional*, defaults to 20): Passes over the block.

    Returns:
        `float`: L_l, above 0 where λ is.
    """
    vector = np.random.default_rng(0).normal(size=(block.num_features, 1))
    largest = 0.0
    for _ in range(iterations):
        norm = np.linalg.norm(vector)
        if norm == 0.0:
            return l2
        vector = block.transposed(block.scores(vector / norm)) / block.num_rows
        largest = float(np.linalg.norm(vector))
    return curvature * largest + l2


def compensated_rate(
    learning_rate: float, updates: int, most_updates: int, smoothness: float, c: float = 1.0
) -> float:
    """
    `min(γ · τ_l / τ_min, c / L_l)`, never below γ: the ratio of mean update periods is that of update counts reversed.

    Args:
        learning_rate (`float`): γ of a party that keeps up.
        updates (`int`): Own updates, the one about to be made among them.
        most_updates (`int`): Those of the party that has made most.
        smoothness (`float`): L_l of the own block.
        c (`float`, *optional*, defaults to 1.0): Bound of γ_l L_l; gradient descent on the block alone needs < 2.

    Returns:
        `float`: γ_l.
    """
    lengthened = learning_rate * max(1.0, most_updates / updates)
    return max(learning_rate, min(lengthened, c / smoothness))
