"""Copies of groups of tensors, and what two sets of groups differ in."""

from collections.abc import Mapping

import torch

from hf_mlopt.federated.algorithms.message import Group


def clones(tensors: Group) -> dict[str, torch.Tensor]:
    """Copies that nothing else holds and no gradient flows through."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def shapes(groups: Mapping[str, Group]) -> dict[str, dict[str, tuple]]:
    """Group to name to shape."""
    return {group: {name: tuple(t.shape) for name, t in tensors.items()} for group, tensors in groups.items()}


def kinds(groups: Mapping[str, Group]) -> dict[str, dict[str, tuple]]:
    """Group to name to shape and dtype."""
    return {group: {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} for group, tensors in groups.items()}


def difference(groups: Mapping[str, Group], expected: Mapping[str, Group]) -> str:
    """The names, as `group/name`, of the tensors that only one side has or that differ in shape or dtype."""
    found, wanted = (
        {f"{group}/{name}": kind for group, tensors in kinds(some).items() for name, kind in tensors.items()}
        for some in (groups, expected)
    )
    return ", ".join(sorted(key for key in found | wanted if found.get(key) != wanted.get(key)))
