"""Masks: the ChaCha20 keystream (RFC 8439) read as words of Z_2^64."""

from collections.abc import Iterator

import numpy as np

from hf_mlopt.secure_sum.keys import primitives


CHUNK = 1 << 17  # words held at a time, 1 MiB


def keystream(key: bytes, size: int) -> Iterator[np.ndarray]:
    """
    Uniform words, in chunks, so that a mask takes no memory beside the vector it is added to.

    Nonce and block counter start at zero: a key belongs to one request (see [`keys.request_key`]) and its counter
    runs through the vector. The counter has 2^32 blocks, 256 GiB, before it would repeat.

    Args:
        key (`bytes`): 32 bytes, used for this vector only.
        size (`int`): Number of words.

    Yields:
        `np.ndarray`: uint64, little-endian, `[CHUNK]`, the last one shorter.
    """
    ciphers = primitives("ciphers")
    encryptor = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros = bytes(8 * min(size, CHUNK))
    for start in range(0, size, CHUNK):
        yield np.frombuffer(encryptor.update(zeros[: 8 * (size - start)]), dtype="<u8")


def add_mask(words: np.ndarray, key: bytes, *, negative: bool):
    """
    Adds the keystream of `key` to a vector in place, or subtracts it, modulo 2^64.

    Args:
        words (`np.ndarray`): `[size]`, uint64.
        key (`bytes`): 32 bytes, used for this vector only.
        negative (`bool`): The second party of a pair subtracts what the first one adds.
    """
    operation = np.subtract if negative else np.add
    for number, chunk in enumerate(keystream(key, len(words))):
        part = words[number * CHUNK : (number + 1) * CHUNK]
        operation(part, chunk, out=part)
