"""Sums of the parties' shares of one batch, z_B = Σ_l X_B w_l, with and without masks."""

import struct
from typing import Protocol

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.secure_sum import MaskedSum, MaskedVector, Party, Request
from hf_mlopt.vertical.messages import Purpose


def sum_request(requester: str, purpose: Purpose, dataset: int, round_id: int, batch: int, mark: int) -> Request:
    """
    The sum that masks are bound to.

    Args:
        requester (`str`): Who gets the sum.
        purpose ([`Purpose`]), dataset (`int`), round_id (`int`), batch (`int`), mark (`int`): As in the frame.

    Returns:
        [`Request`]: With a channel for each requester, purpose and data set, and the content as context.
    """
    return Request(round_id, f"{requester}/{purpose.name}/{dataset}", struct.pack("<II", batch, mark))


class Sharing(Protocol):
    """How a party turns its scores into words, and words of all parties into the sum."""

    dtype: np.dtype

    def share(self, scores: np.ndarray, request: Request) -> np.ndarray:
        """Words of one party for one request, `[rows, K]`, of `dtype`."""

    def combine(self, shares: dict[str, np.ndarray], request: Request) -> np.ndarray:
        """The sum over all parties, float64, `[rows, K]`."""


class PlainSharing:
    """
    No mask: whoever asks sees each share.

    Args:
        names (`tuple[str, ...]`): All parties; sums run in this order, so that they are the same everywhere.
    """

    dtype = np.dtype(np.float64)

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def share(self, scores: np.ndarray, request: Request) -> np.ndarray:
        """The scores themselves."""
        return scores

    def combine(self, shares: dict[str, np.ndarray], request: Request) -> np.ndarray:
        """See [`Sharing.combine`]; parties that were excluded are left out."""
        total = np.zeros_like(next(iter(shares.values())))
        for name in self.names:
            if name in shares:
                total += shares[name]
        return total


class PairwiseSharing:
    """
    Fixed point in Z_2^64 under masks that cancel over all parties; see [`secure_sum.Party`].

    Args:
        party ([`secure_sum.Party`]): Own keys, with the roster joined.
    """

    dtype = np.dtype(np.uint64)

    def __init__(self, party: Party):
        if party.roster is None:
            raise InputError(f"party {party.name!r} has not joined a roster: call join first")
        self.party, self.roster = party, party.roster

    def share(self, scores: np.ndarray, request: Request) -> np.ndarray:
        """See [`Sharing.share`]; raises `InputError` for a request that was answered before."""
        return self.party.mask(scores, request, "scores").words

    def combine(self, shares: dict[str, np.ndarray], request: Request) -> np.ndarray:
        """See [`Sharing.combine`]; raises `IncompleteRound` if a party is missing."""
        total = MaskedSum(self.roster, request)
        for name, words in shares.items():
            total.add(MaskedVector(name, self.roster.digest, request, words))
        return total.result()
