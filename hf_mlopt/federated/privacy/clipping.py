"""The change that a site has made to the weights, and a bound on its size."""

import torch

from hf_mlopt.federated.algorithms.message import Group


def change(start: Group, end: Group) -> dict[str, torch.Tensor]:
    """Δ = end - start, float64."""
    return {name: end[name].double() - start[name].double() for name in end}


def changed(start: Group, change: Group) -> dict[str, torch.Tensor]:
    """start + Δ, in the dtypes of `start`."""
    return {name: (start[name].double() + delta.double()).to(start[name].dtype) for name, delta in change.items()}


def norm(change: Group) -> float:
    """‖Δ‖₂ over all tensors together."""
    return sum(float(delta.double().square().sum()) for delta in change.values()) ** 0.5


def clipped(change: Group, largest: float) -> dict[str, torch.Tensor]:
    """
    Δ · min(1, C / ‖Δ‖₂), with the norm over all tensors together, as in [Learning Differentially Private Recurrent
    Language Models](https://huggingface.co/papers/1710.06963), "flat clipping".

    Args:
        change (`Group`): Δ, in units of the weights.
        largest (`float`): C, above 0.

    Returns:
        `dict[str, torch.Tensor]`: float64; a Δ that is small enough bit for bit. One that is not finite stays so, for
        the server to refuse it.
    """
    size = norm(change)
    scale = 1.0 if size <= largest else largest / size
    return {name: delta.double() * scale for name, delta in change.items()}
