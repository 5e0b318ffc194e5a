"""Gaussian noise that nobody but the site can foresee or take off again."""

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import torch

from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.secure_sum.masks import keystream


_LABEL = b"hf_mlopt/federated/noise/1"
_SECRET = "noise.key"


def site_secret(folder: Path, noise_seed: int | None = None) -> bytes:
    """
    The key of a site's noise: 32 bytes of the operating system's generator, made once and kept where only the user
    can read it.

    Args:
        folder (`Path`): The site's own.
        noise_seed (`int`, *optional*): Makes the key instead, so that a test can repeat the noise. Whoever knows it
            can take the noise off.
    """
    if noise_seed is not None:
        return hashlib.sha256(f"{noise_seed}/{folder.name}".encode()).digest()
    path = folder / _SECRET
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(32))
        try:
            os.link(partial, path)  # which leaves a key alone that another process has made meanwhile
        except FileExistsError:
            pass
        partial.unlink()
    return path.read_bytes()


def noisy(change: Group, scale: float, secret: bytes, sent: Message) -> dict[str, torch.Tensor]:
    """
    Δ + N(0, scale²) in every entry.

    The noise is a function of the secret, of what was asked and of Δ. So a message that comes again, after a lost
    reply, gets the same noise; and two different Δ never share it, for their difference would then show through. A
    server that asks otherwise than the protocol says, by a bit of the model or another seed, gets fresh noise each
    time, and averages it out: ε holds for one that asks once a round.

    Args:
        change (`Group`): Δ, in units of the weights.
        scale (`float`): Standard deviation, in the same units.
        secret (`bytes`): From [`site_secret`].
        sent (`Message`): What the server sent.

    Returns:
        `dict[str, torch.Tensor]`: float64.
    """
    asked = Message(sent.groups, {name: sent.scalars[name] for name in ("round", "seed")})
    about = asked.digest() + Message({"change": change}).digest()
    names = sorted(change)
    key = hmac.digest(secret, _LABEL + about.encode(), "sha256")
    draws = gaussian(key, sum(change[name].numel() for name in names)).split([change[n].numel() for n in names])
    return {
        name: change[name].double() + scale * draw.view(change[name].shape)
        for name, draw in zip(names, draws, strict=True)
    }


def gaussian(key: bytes, size: int) -> torch.Tensor:
    """
    Normal numbers from the ChaCha20 keystream by the Box-Muller transform; those of torch and NumPy are no secret to
    who has seen some of them. In floating point, as everywhere: the lowest bits of noisy values may tell more than the
    theory of real numbers allows.

    Args:
        key (`bytes`): 32 bytes, used for these numbers only.
        size (`int`): How many.

    Returns:
        `torch.Tensor`: `[size]`, float64, mean 0 and variance 1.
    """
    numbers = np.empty(size + size % 2)
    start = 0
    for words in keystream(key, len(numbers)):
        radius_word, angle_word = np.split(words >> np.uint64(11), 2)
        radius = np.sqrt(-2.0 * np.log((radius_word + 1.0) * 2.0**-53))  # of (0, 1]
        angle = angle_word * (2.0 * np.pi * 2.0**-53)
        numbers[start : start + len(words)] = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
        start += len(words)
    return torch.from_numpy(numbers[:size])
