r"""
The sum over a fixed roster under masks that cancel in pairs, after [Practical Secure Aggregation for Federated
Learning on User-Held Data](https://huggingface.co/papers/1611.04482), without its recovery of drop-outs.

Party l of q sends c_l = enc(x_l) + \sum_{j>l} PRG_lj - \sum_{j<l} PRG_lj mod 2^64. All c_l together give the sum;
fewer give nothing, since every pair shares one keystream. Limits:

- Who holds the sum and colludes with all other parties but one learns that one's vector, as with any sum.
- Parties follow the protocol, and public keys arrive over an authenticated channel. Norms cannot be checked.
- A party that drops out makes its round void: no mask is ever disclosed to repair it. To go on without it, make a
  roster of the rest with a higher epoch and mask *new* vectors: had the missing vector only been late, the two sums
  over the same vectors would differ by exactly that one.
"""

import threading
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.secure_sum.keys import new_private_key, pair_key, public_key, request_key
from hf_mlopt.secure_sum.masks import add_mask
from hf_mlopt.secure_sum.roster import Request, Roster


class IncompleteRound(InputError):
    """
    A sum without the vectors of all parties, which is void.

    Args:
        request ([`Request`]): The sum.
        missing (`list[str]`): Parties whose vectors did not come.
    """

    def __init__(self, request: Request, missing: list[str]):
        self.request, self.missing = request, missing
        super().__init__(
            f"{request} is void, vectors are missing from {missing}: wait for them, or go on with new vectors and a "
            "roster of the remaining parties with a higher epoch"
        )


@dataclass(frozen=True, eq=False)
class MaskedVector:
    """
    What a party sends.

    Args:
        party (`str`): Its name.
        roster (`bytes`): Digest of the roster it masked for.
        request ([`Request`]): The sum.
        words (`np.ndarray`): uint64, of any shape, uniform for whoever lacks a key of this party.
    """

    party: str
    roster: bytes
    request: Request
    words: np.ndarray


class Party:
    """
    One party: its key, the keys it shares with the others, and the rounds it has answered.

    Give each start of the program a new `Party` and the parties a new roster where that is possible. [`resume`] keeps
    the key over a restart.

    Args:
        name (`str`): As in the roster.
    """

    def __init__(self, name: str):
        self.name = name
        self._private_key = new_private_key()
        self._start()

    def _start(self):
        self.public_key = public_key(self._private_key)
        self.roster: Roster | None = None
        self._pair_keys: dict[str, bytes] = {}
        self._answered: dict[str, int] = {}
        self._lock = threading.Lock()  # a responder and an updater may ask at once

    @classmethod
    def resume(cls, name: str, state: dict) -> "Party":
        """
        The party that [`state_dict`] came from. It must still join its roster.

        Args:
            name (`str`): As in the roster.
            state (`dict`): The newest state. With an older one rounds could be masked twice with one keystream, which
                discloses the difference of the two vectors.
        """
        party = cls.__new__(cls)
        party.name, party._private_key = name, bytes.fromhex(state["private_key"])
        party._start()
        party._answered = dict(state["answered"])
        return party

    def state_dict(self) -> dict:
        """
        Private key (hexadecimal) and the last round of each channel: a secret, to be stored as safely as the data.
        Save it after [`mask`] and before the vector is sent, so that no restart can answer the round again.
        """
        with self._lock:
            return {"private_key": self._private_key.hex(), "answered": dict(self._answered)}

    def join(self, roster: Roster):
        """
        Agrees on a key with every other party of the roster, in place of the roster before.

        Raises:
            InputError: If the roster lacks this party or gives it another key, or does not follow in epoch upon the
                roster before.
        """
        keys = dict(roster.members)
        if self.name not in keys:
            raise InputError(f"party {self.name!r} is not in the roster {list(keys)}: have it added there")
        if keys[self.name] != self.public_key:
            raise InputError(
                f"the roster gives party {self.name!r} the public key {keys[self.name].hex()}, its own is "
                f"{self.public_key.hex()}: make a roster with the new key"
            )
        before = self.roster
        if before is not None and before.run == roster.run and roster != before and roster.epoch <= before.epoch:
            text = f"epoch={roster.epoch}: a changed roster of run {roster.run!r} needs an epoch above {before.epoch}"
            raise InputError(text)
        pair_keys = {}
        for other, key in keys.items():
            if other != self.name:
                pair = (min(self.name, other), max(self.name, other))
                pair_keys[other] = pair_key(self._private_key, key, run=roster.run, epoch=roster.epoch, pair=pair)
        with self._lock:
            self.roster, self._pair_keys = roster, pair_keys

    def mask(self, values, request: Request, field: str = "values") -> MaskedVector:
        """
        Args:
            values (array): Own vector, real numbers of any shape.
            request ([`Request`]): The sum, above all earlier ones of its channel. Values that are refused leave it
                open; whatever was masked closes it, with every roster.
            field (`str`, *optional*, defaults to `"values"`): What errors call the values.

        Returns:
            [`MaskedVector`]: Words of the same shape.

        Raises:
            ConfigurationError: If a value is not finite or out of range.
            InputError: If no roster was joined, or the round is not above the last one answered.
        """
        with self._lock:
            if self.roster is None:
                raise InputError(f"party {self.name!r} has not joined a roster: call join first")
            roster, pair_keys = self.roster, self._pair_keys
            words = roster.fixed_point.encode(values, field)
            last = self._answered.get(request.channel, -1)
            if request.round_id <= last:
                raise InputError(
                    f"round_id={request.round_id} of channel {request.channel!r}: {self.name!r} has answered up to "
                    f"{last}, and a mask used twice discloses the difference of two vectors; ask for a higher round"
                )
            self._answered[request.channel] = request.round_id
        flat = words.reshape(-1)
        for other, key in pair_keys.items():
            one_time = request_key(key, roster.digest, request.to_bytes())
            add_mask(flat, one_time, negative=other < self.name)
        return MaskedVector(self.name, roster.digest, request, flat.reshape(words.shape))


class MaskedSum:
    """
    The sum of one request, collected by anyone, in any order; one vector of memory whatever the number of parties.

    Args:
        roster ([`Roster`]): The parties, all of them.
        request ([`Request`]): The sum.
    """

    def __init__(self, roster: Roster, request: Request):
        self.roster, self.request = roster, request
        self.missing = list(roster.names)
        self._words: np.ndarray | None = None

    def add(self, vector: MaskedVector):
        """
        Args:
            vector ([`MaskedVector`]): Of a party that has not sent one yet. One that is refused leaves the
                sum as it was.

        Raises:
            InputError: If it is of an unknown party, of one already counted, of another roster or request, or of
                another shape or type than those before.
        """
        origin = f"masked vector of {vector.party!r} for {self.request}"
        if vector.party not in self.roster.names:
            raise InputError(f"{origin}: not in the roster {list(self.roster.names)}; drop it")
        if vector.party not in self.missing:
            raise InputError(f"{origin}: a second one; drop it")
        if vector.roster != self.roster.digest:
            text = f"made for roster {vector.roster.hex()[:16]}, expected {self.roster.digest.hex()[:16]}"
            raise InputError(f"{origin}: {text}; the masks would not cancel, compare run, members, epoch, bits")
        if vector.request != self.request:
            raise InputError(f"{origin}: made for {vector.request}; the masks would not cancel, ask for this one")
        words = vector.words
        if not isinstance(words, np.ndarray) or words.dtype != np.uint64:
            raise InputError(f"{origin}: words are {getattr(words, 'dtype', type(words))}, expected a uint64 array")
        if self._words is None:
            self._words = np.zeros(words.shape, np.uint64)
        if words.shape != self._words.shape:
            text = f"shape {list(words.shape)}, others sent {list(self._words.shape)}"
            raise InputError(f"{origin}: {text}; all parties must send the same entries")
        self._words += words
        self.missing.remove(vector.party)

    def result(self) -> np.ndarray:
        """
        Returns:
            `np.ndarray`: The sum, float64, of the vectors' shape.

        Raises:
            IncompleteRound: If vectors are missing.
        """
        if self.missing:
            raise IncompleteRound(self.request, list(self.missing))
        return self.roster.fixed_point.decode(self._words)
