"""
Uniform numbers that are a function of (key, position): nothing to save, the same on every device, resumable.

SplitMix64, Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators* (OOPSLA 2014), Fig. 17: word i of a
stream is mix(state + (i + 1) γ). A word gives four numbers of 16 bits. Sixteen bits move a rounding probability by at
most 2⁻¹⁷, less than float32 arithmetic on the values does.
"""

from dataclasses import dataclass

import torch

from hf_mlopt.communication.quantizers.memory import Memory, namespace, native


_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def stream(key: tuple[int, ...]) -> int:
    """
    The 64-bit state a key stands for, each part mixed in turn.

    Args:
        key (`tuple[int, ...]`): For example (seed, step, bucket, phase, rank).
    """
    state = 0
    for part in key:
        state = ((state + _GAMMA) ^ part) & _MASK
        for shift, factor in _MIX:
            state = ((state ^ (state >> shift)) * factor) & _MASK
    return state


def uniform(state: int, start: int, count: int, memory: Memory):
    """
    Numbers `start` … `start + count - 1` of a stream: odd multiples of 2⁻¹⁷ inside (0, 1).

    Returns:
        `[count]`, float32, in the native array of `memory`; valid until the next call with the same memory.
    """
    first, stop = start // 4, -(-(start + count) // 4)
    words = memory.tensor("words", (stop - first,), torch.int64)
    torch.arange(first + 1, stop + 1, out=words)
    word, high = native(words), native(memory.tensor("high bits", (stop - first,), torch.int64))
    xp = namespace(word)
    # Two's complement makes signed arithmetic the same as unsigned, but for the shift, which is masked to be logical.
    word *= _signed(_GAMMA)
    word += _signed(state)
    for shift, factor in _MIX:
        xp.bitwise_right_shift(word, shift, out=high)
        high &= (1 << (64 - shift)) - 1
        word ^= high
        if factor != 1:
            word *= _signed(factor)
    number = native(memory.tensor("uniform", (count,), torch.float32))
    number[:] = native(words.view(torch.int16))[start - 4 * first :][:count]
    number *= 2.0**-16
    number += 0.5 + 2.0**-17
    return number


@dataclass(frozen=True)
class Draw:
    """The numbers of a stream from a position on, and the memory to work in."""

    state: int
    position: int
    memory: Memory

    def uniform(self, offset: int, shape: tuple[int, ...]):
        """As [`uniform`], from `position + offset` on, in a shape."""
        count = 1
        for size in shape:
            count *= size
        return uniform(self.state, self.position + offset, count, self.memory).reshape(shape)
