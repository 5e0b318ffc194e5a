"""Which model of a super model answers for a sample."""

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.server import require


GLOBAL = -1  # the index that stands for the global model


def route(probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    The inference rule of FedSM: the personal model of the most probable site, and the global model where the selector
    is not sure. It asks for no site, so it serves samples of sites that took no part in the training just as well.

    Args:
        probabilities (`torch.Tensor`): `[B, K]`, the selector's softmax; a row a sample, in sum 1. Not its logits.
        threshold (`float`): γ in [0, 1]. The probability must be above it: at 1 the global model always answers, at 0
            never.

    Returns:
        `torch.Tensor`: `[B]`, int64: index of the personal model, or `GLOBAL`.

    Raises:
        InputError: If the rows are no probabilities.
    """
    require("threshold", threshold, 0 <= threshold <= 1, "must be in [0, 1]")
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise InputError(f"probabilities: shape {list(probabilities.shape)}; [samples, sites] is needed, two sites up")
    sums = probabilities.double().sum(dim=1)
    if not ((probabilities >= 0).all() and ((sums - 1).abs() < 1e-3).all()):
        raise InputError("probabilities: rows must be at least 0 and sum to 1; give the softmax, not the logits")
    best, index = probabilities.max(dim=1)
    return torch.where(best > threshold, index, GLOBAL)
