"""Messages between torch's stages, which have one size: tensors go flat, padded to the largest of a group."""

import torch
from torch.nn.functional import pad

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.stage import Tensors


Boundary = tuple[tuple[torch.Size, torch.dtype], ...]  # shape and type of the tensors between two stages


class Unpack(torch.autograd.Function):
    """Tensors of a boundary out of flat messages. Where one of them gets no gradient, zeros are sent back."""

    @staticmethod
    def forward(ctx, shapes: list[torch.Size], *messages: torch.Tensor) -> Tensors:
        ctx.sizes = [message.numel() for message in messages]
        return tuple(x[: shape.numel()].view(shape) for shape, x in zip(shapes, messages, strict=True))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        return None, *(flat_message(gradient, size) for gradient, size in zip(gradients, ctx.sizes, strict=True))


def flat_message(x: torch.Tensor, numel: int) -> torch.Tensor:
    """A message of `numel` numbers that begins with those of `x`."""
    return pad(x.reshape(-1), (0, numel - x.numel()))


def described(tensors: Tensors) -> Boundary:
    return tuple((x.shape, x.dtype) for x in tensors)


def message_sizes(mode: str, boundaries: tuple[Boundary, ...]) -> list[tuple[int, torch.dtype]]:
    """Numbers in each message of a group, and their type."""
    types = [[dtype for _, dtype in boundary] for boundary in boundaries]
    if any(others != types[0] for others in types):
        raise ConfigurationError("mode", mode, f"batches of a group give tensors of unlike types, {types}: use lag1")
    return [(max(b[i][0].numel() for b in boundaries), dtype) for i, dtype in enumerate(types[0])]


def example_messages(sizes: list[tuple[int, torch.dtype]]) -> Tensors:
    return tuple(torch.empty(numel, dtype=dtype, device="meta", requires_grad=True) for numel, dtype in sizes)
