"""What a server and a site say to each other: named groups of tensors, and scalars."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_mlopt.errors import InputError


Group = Mapping[str, torch.Tensor]
Scalar = int | float | str | bool

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, eq=False)
class Message:
    """
    Named groups of tensors plus scalars. Tensors rather than NumPy arrays, which have no bfloat16.

    Messages to several sites share their tensors: nobody may write into those of a message. Two messages are equal if
    they hold the same names, types, shapes and bits, in any order; so a NaN equals itself, and 0.0 differs from -0.0.

    Args:
        groups (`Mapping[str, Mapping[str, torch.Tensor]]`): Group name to parameter name to dense CPU tensor without
            gradient, of a type in `DTYPES`.
        scalars (`Mapping[str, int | float | str | bool]`, *optional*): Python numbers, texts and truth values.

    Raises:
        InputError: For anything else, with the name of what it is about.
    """

    groups: Mapping[str, Group]
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self):
        for group, tensors in self.groups.items():
            _require_name("group", group)
            for name, tensor in tensors.items():
                _require_name(f"tensor of group {group!r}", name)
                if problem := _unfit(tensor):
                    raise InputError(f"message: tensor {name!r} of group {group!r} {problem}")
        for name, value in self.scalars.items():
            _require_name("scalar", name)
            if type(value) not in (int, float, str, bool):
                raise InputError(
                    f"message: scalar {name!r} is a {type(value).__name__}; int, float, str or bool may be"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        mine, theirs = self._sorted(), other._sorted()
        if mine.header() != theirs.header():
            return False
        pairs = zip(mine._tensors(), theirs._tensors(), strict=True)
        return all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)

    __hash__ = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; names and scalars are not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def digest(self) -> str:
        """SHA-256 over everything, in hex; equal for equal messages, whatever process or order they come from."""
        ordered = self._sorted()
        digest = hashlib.sha256(ordered.header().encode())
        for tensor in ordered._tensors():
            digest.update(_bytes(tensor).numpy().data)
        return digest.hexdigest()

    def to_flat(self) -> tuple[str, list[np.ndarray]]:
        """
        What an engine without our types can carry, exactly.

        Returns:
            `tuple[str, list[numpy.ndarray]]`: A JSON header, and for each tensor its bytes, `[nbytes]`, uint8.
        """
        return self.header(), [_bytes(tensor).numpy().copy() for tensor in self._tensors()]

    @classmethod
    def from_flat(cls, header: str, arrays: Sequence[np.ndarray]) -> "Message":
        """
        The message that [`Message.to_flat`] took apart; it owns its memory.

        Raises:
            InputError: If header and arrays do not fit together.
        """
        remaining = iter(arrays)

        def tensor_of(group: str, name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
            return _from_bytes(next(remaining), dtype, shape)

        message = cls.from_header(header, tensor_of)
        if next(remaining, None) is not None:
            raise InputError("message: header and arrays do not fit together (there are more arrays than tensors)")
        return message

    @classmethod
    def from_header(
        cls, header: str, tensor_of: Callable[[str, str, torch.dtype, list[int]], torch.Tensor]
    ) -> "Message":
        """
        The message of a [`Message.header`], with the tensors that `tensor_of(group, name, dtype, shape)` returns; it
        is called in the order of the header.

        Raises:
            InputError: If the header is none, or a tensor is not as it says.
        """
        try:
            content = json.loads(header)
            groups = {group: {} for group in content["groups"]}
            for group, entries in content["groups"].items():
                for name, dtype, shape in entries:
                    tensor = tensor_of(group, name, DTYPES[dtype], shape)
                    if tensor.dtype != DTYPES[dtype] or list(tensor.shape) != shape:
                        raise ValueError(f"{name!r} is {tensor.dtype} in shape {list(tensor.shape)}")
                    groups[group][name] = tensor
            scalars = content["scalars"]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
            raise InputError(f"message: header and arrays do not fit together ({error})") from error
        return cls(groups, scalars)

    def header(self) -> str:
        """Names, types, shapes and scalars as JSON; all but the tensors' bits."""
        layout = {
            group: [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
            for group, tensors in self.groups.items()
        }
        return json.dumps({"groups": layout, "scalars": dict(self.scalars)})

    def _sorted(self) -> "Message":
        groups = {group: dict(sorted(tensors.items())) for group, tensors in sorted(self.groups.items())}
        return Message(groups, dict(sorted(self.scalars.items())))

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensors in self.groups.values() for tensor in tensors.values()]


def _require_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InputError(f"message: the name of a {what} must be a text that is not empty, got {name!r}")


def _unfit(tensor: object) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}; give a torch tensor"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.layout} on {tensor.device}; give a dense tensor on the CPU"
    if tensor.dtype not in DTYPES.values():
        return f"has dtype {tensor.dtype}; known are {', '.join(DTYPES)}"
    return "requires a gradient; detach it" if tensor.requires_grad else None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(array: np.ndarray, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if array.dtype != np.uint8 or array.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{array.size} numbers of {array.dtype} for {dtype} in shape {shape}")
    tensor = torch.empty(shape, dtype=dtype)
    _bytes(tensor).numpy()[:] = array.reshape(-1)
    return tensor
