"""
Codes of a small alphabet in bytes: eight bits, five trits, four of four, three of six, or two of sixteen in each byte.

The layout is planar: with n bytes, byte j holds codes j, n + j, 2n + j, … as the digits of a number, least significant
first. All reads and writes are then contiguous, and no length needs padding beyond the last plane.
"""

import torch

from hf_mlopt.errors import ConfigurationError


# (base, digits): base ** digits <= 256. Nine levels travel as base 16, since base 9 would not fit a third digit.
_FORMATS = ((2, 8), (3, 5), (4, 4), (6, 3), (16, 2), (256, 1))


def native(tensor: torch.Tensor):
    """
    A CPU tensor as the numpy array that shares its memory, any other tensor as it is. Integer arithmetic and
    comparisons are 2 to 10 times quicker in numpy; code written with operators runs on both.
    """
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def digits_per_byte(alphabet: int) -> tuple[int, int]:
    """
    Base and number of codes a byte holds.

    Raises:
        ConfigurationError: If `alphabet` is outside 2 … 256.
    """
    if not 2 <= alphabet <= 256:
        raise ConfigurationError("alphabet", alphabet, "must be between 2 and 256, the codes that fit a byte")
    return next(pair for pair in _FORMATS if alphabet <= pair[0])


def packed_bytes(count: int, alphabet: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count // digits_per_byte(alphabet)[1])


def pack(codes: torch.Tensor, alphabet: int) -> torch.Tensor:
    """
    Args:
        codes (`torch.Tensor`): `[count]`, uint8, each below `alphabet`; a larger one would spill into its neighbours.
        alphabet (`int`): Number of different codes, 2 … 256.

    Returns:
        `torch.Tensor`: `[packed_bytes(count, alphabet)]`, uint8, on the same device.
    """
    base, digits = digits_per_byte(alphabet)
    if digits == 1:
        return codes.clone()
    packed = torch.zeros(packed_bytes(len(codes), alphabet), dtype=torch.uint8, device=codes.device)
    source, target, size = native(codes), native(packed), len(packed)
    for digit in reversed(range(digits)):
        plane = source[digit * size : (digit + 1) * size]
        target *= base
        target[: len(plane)] += plane
    return packed


def unpack(packed: torch.Tensor, alphabet: int, count: int) -> torch.Tensor:
    """
    The inverse of [`pack`].

    Args:
        packed (`torch.Tensor`): `[packed_bytes(count, alphabet)]`, uint8.
        alphabet (`int`): As given to [`pack`].
        count (`int`): Number of codes.

    Returns:
        `torch.Tensor`: `[count]`, uint8.

    Raises:
        ConfigurationError: If `packed` has another length.
    """
    base, digits = digits_per_byte(alphabet)
    if len(packed) != packed_bytes(count, alphabet):
        allowed = f"{count} codes of {alphabet} take {packed_bytes(count, alphabet)} bytes"
        raise ConfigurationError("packed bytes", len(packed), allowed)
    if digits == 1:
        return packed.clone()
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    rest, target, size = native(packed), native(codes), len(packed)
    for digit in range(digits):
        plane = target[digit * size : (digit + 1) * size]
        quotient = rest // base
        plane[:] = (rest - quotient * base)[: len(plane)]
        rest = quotient
    return codes
