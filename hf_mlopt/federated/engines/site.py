"""A site behind bytes: what an engine hands to an application, and takes from it, where messages come from outside."""

import math
from typing import Any

import numpy as np
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.application import Blobs
from hf_mlopt.federated.engines.base import answered


class Site:
    """
    An application at one site, behind headers and bytes.

    Args:
        application (`Application`): Module with `answer_factory`, see [`Application`].
        run_config (`dict`), node_config (`dict`): For its factory.
    """

    def __init__(self, application: Any, run_config: dict, node_config: dict):
        self.name, self._answer = application.answer_factory(run_config, node_config)

    def answered(self, header: str, blobs: Blobs) -> tuple[str, Blobs]:
        """The answer to a message, or what went wrong; both as [`pack`] has them."""
        return pack(answered(self._answer, self.name, unpack(header, blobs)))


def pack(message: Message) -> tuple[str, Blobs]:
    """
    A message as its header and, for each group that has any, the bytes of its tensors, `[nbytes]`, uint8.
    """
    header, arrays = message.to_flat()
    remaining, blobs = iter(arrays), {}
    for group, tensors in message.groups.items():
        pieces = [next(remaining) for _ in tensors]
        if any(piece.size for piece in pieces):
            blobs[group] = np.concatenate(pieces)
    return header, blobs


def unpack(header: str, blobs: Blobs) -> Message:
    """
    The message that [`pack`] took apart, bit for bit; it owns its memory.

    Raises:
        InputError: If header and bytes do not fit together.
    """
    ends = dict.fromkeys(blobs, 0)

    def tensor_of(group: str, name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        start, ends[group] = ends[group], ends[group] + num_bytes
        return torch.from_numpy(blobs[group][start : ends[group]].copy()).view(dtype).reshape(shape)

    message = Message.from_header(header, tensor_of)
    if any(ends[group] != blob.size for group, blob in blobs.items()):
        raise InputError("message: header and arrays do not fit together (there are more bytes than tensors)")
    return message
