"""
Which rows the parties have in common, and in which order they take them.

Default is private set intersection by commuting exponents, after Meadows (1986) and [Huberman, Franklin, Hogg
(1999)](https://doi.org/10.1145/336992.337012), on P-256: each id is hashed to a point, both sides multiply it by their
secret, and equal ids give equal points. P-256 has prime order and every hash is a point of it, so a blinded id keeps
no trace of the id; on X25519 it would keep one bit, on the curve or on its twist. Points are known by their first
coordinate, which negation leaves alone.

With more than two parties the label party does this with each of the others, a star, and intersects. Who learns what:
- the label party: with each other party, which of *its own* rows that one has (pairwise intersections), and sizes;
- the others: which of their rows all parties have, and how many rows the label party has;
- ids that a party lacks stay hidden from it. Parties follow the protocol.

Rows are then sorted by a keyed hash of their ids, so that the common order is that of no one's table. The manifest
holds a digest and no ids.
"""

import hashlib
import hmac
import os
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum.keys import encode_parts, primitives


CHUNK = 4096  # ids a message, so that each is answered well within a timeout
WORD = 32  # bytes of a blinded id
DUPLICATES, METHODS = ("raise", "first", "drop"), ("ecdh", "hmac")
_HEADER = struct.Struct("<4sBI")
_MAGIC = b"HFAL"
_START, _BLIND, _OWN, _KEEP, _FINISH = range(5)
_LABEL = b"hf_mlopt/vertical/align/1"


@dataclass(frozen=True)
class AlignmentManifest:
    """
    What parties must have alike before they train.

    Args:
        rows (`int`): Common rows.
        digest (`str`): SHA-256 over the keyed hashes of the common ids in order, hexadecimal.
        method (`str`): `"ecdh"` or `"hmac"`.
    """

    rows: int
    digest: str
    method: str

    def to_dict(self) -> dict:
        """For a handshake or a file."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Alignment:
    """
    Args:
        rows (`np.ndarray`): `[n]`, int64: own rows in the common order.
        manifest ([`AlignmentManifest`]): The same at all parties.
    """

    rows: np.ndarray
    manifest: AlignmentManifest


class Blinding:
    """A party's secret exponent, drawn anew for each alignment."""

    def __init__(self):
        ec = primitives("asymmetric.ec")
        self._curve, self._ecdh = ec.SECP256R1(), ec.ECDH()
        self._decode = ec.EllipticCurvePublicKey.from_encoded_point
        self._key = ec.generate_private_key(self._curve)

    def hashed(self, ids: Sequence[bytes]) -> list[bytes]:
        """First coordinates of the points of the ids, hashed until one is on the curve, times the exponent."""
        words = []
        for identity in ids:
            counter = 0
            while True:
                digest = hashlib.sha256(encode_parts(_LABEL, counter.to_bytes(4, "big"), identity)).digest()
                try:
                    point = self._decode(self._curve, b"\x02" + digest)
                    break
                except ValueError:  # every second number is no coordinate of the curve
                    counter += 1
            words.append(self._key.exchange(self._ecdh, point))
        return words

    def blinded(self, words: Sequence[bytes]) -> list[bytes]:
        """
        The other party's points times the exponent.

        Raises:
            InputError: If one is not on the curve.
        """
        try:
            return [self._key.exchange(self._ecdh, self._decode(self._curve, b"\x02" + word)) for word in words]
        except ValueError as error:
            raise InputError(
                "a blinded id is not on the curve: the other party does not follow the protocol"
            ) from error


class KeyedHash:
    """
    Join by HMAC-SHA256 in place of exponents: faster by far, and the label party can try ids on what it is sent.

    Args:
        key (`bytes`): 32 bytes that both parties hold.
    """

    def __init__(self, key: bytes):
        self._key = key

    def hashed(self, ids: Sequence[bytes]) -> list[bytes]:
        """Keyed hashes of the ids."""
        return [hmac.digest(self._key, encode_parts(_LABEL, identity), "sha256") for identity in ids]

    def blinded(self, words: Sequence[bytes]) -> list[bytes]:
        """The words as they are."""
        return list(words)


def prepare_ids(ids: Sequence, duplicates: str = "raise") -> tuple[list[bytes], np.ndarray]:
    """
    Ids as bytes, each once. Whole numbers count as their decimal text, and text is brought to Unicode's form C.

    Args:
        ids (sequence): Text or whole numbers, one a row.
        duplicates (`str`, *optional*, defaults to `"raise"`): `"first"` keeps the first row of an id that occurs more
            than once, `"drop"` none of them.

    Returns:
        `tuple`: The ids, and the rows they stand in (`[m]`, int64).

    Raises:
        ConfigurationError: If `duplicates` is unknown.
        InputError: If an id is missing or of another type, or occurs twice and `duplicates` is `"raise"`.
    """
    if duplicates not in DUPLICATES:
        raise ConfigurationError("duplicates", duplicates, f"must be one of {list(DUPLICATES)}")
    places: dict[bytes, list[int]] = {}
    for row, identity in enumerate(ids):
        places.setdefault(_id_bytes(identity, row), []).append(row)
    repeated = [(identity, rows) for identity, rows in places.items() if len(rows) > 1]
    if repeated and duplicates == "raise":
        text = f"{len(repeated)} ids occur more than once, the first in rows {repeated[0][1][:2]}"
        raise InputError(f"{text}: repair the table, or choose duplicates='first' or 'drop'")
    if duplicates == "drop":
        places = {identity: rows for identity, rows in places.items() if len(rows) == 1}
    return list(places), np.array([rows[0] for rows in places.values()], np.int64)


def ordered(ids: Sequence[bytes], rows: np.ndarray, key: bytes, method: str = "ecdh") -> Alignment:
    """
    The common order of the common ids: by HMAC-SHA256 under a key that the parties alone know.

    Args:
        ids (sequence of `bytes`): The common ids, in any order.
        rows (`np.ndarray`): Own rows of them.
        key (`bytes`): 32 bytes.
        method (`str`, *optional*, defaults to `"ecdh"`): For the manifest.
    """
    keyed = [hmac.digest(key, encode_parts(_LABEL, b"order", identity), "sha256") for identity in ids]
    order = sorted(range(len(keyed)), key=keyed.__getitem__)
    digest = hashlib.sha256(b"".join(keyed[place] for place in order)).hexdigest()
    return Alignment(rows[order], AlignmentManifest(len(order), digest, method))


class AlignmentResponder:
    """
    A party without the label role: answers the label party's messages. Give [`answer`] to a transport.

    Args:
        ids (sequence): Own, one a row.
        label_party (`str`): The only party that may ask.
        duplicates (`str`, *optional*, defaults to `"raise"`): See [`prepare_ids`].
        method (`str`, *optional*, defaults to `"ecdh"`): `"hmac"` only with `accept_dictionary_attack`.
        labels (array, *optional*): Own label column, if there is one, to be compared with the label party's.
        accept_dictionary_attack (`bool`, *optional*): That the label party can try ids on all this party sends.

    Attributes:
        result ([`Alignment`]): Once all messages came; `None` before.
    """

    def __init__(
        self,
        ids: Sequence,
        label_party: str,
        duplicates: str = "raise",
        method: str = "ecdh",
        labels=None,
        *,
        accept_dictionary_attack: bool = False,
    ):
        _check_method(method, accept_dictionary_attack)
        ids, rows = prepare_ids(ids, duplicates)
        shuffled = _shuffled(len(ids))
        self._ids, self._rows = [ids[place] for place in shuffled], rows[shuffled]
        self._label_party, self._method, self._labels = label_party, method, labels
        self._blinding: Blinding | KeyedHash | None = None
        self._kept: list[int] = []
        self.result: Alignment | None = None

    def answer(self, peer: str, frame: bytes) -> bytes:
        """
        Raises:
            InputError: If the message is malformed, out of turn, or not of the label party.
        """
        if peer != self._label_party:
            raise InputError(f"{peer!r} asks for an alignment, expected {self._label_party!r}: compare the rosters")
        kind, number, content = _unpack(frame)
        if kind == _START:
            if len(content) != WORD + len(self._method) or content[WORD:].decode("ascii", "replace") != self._method:
                raise InputError(f"method={self._method!r} here, another at {peer!r}: agree on one")
            self._blinding = Blinding() if self._method == "ecdh" else KeyedHash(content[:WORD])
            self._kept, self.result = [], None
            return _pack(_START, len(self._ids))
        if self._blinding is None:
            raise InputError("an alignment message before the first one: start again")
        if kind == _BLIND:
            return _pack(_BLIND, number, b"".join(self._blinding.blinded(_words(content))))
        if kind == _OWN:
            part = self._ids[number * CHUNK : (number + 1) * CHUNK]
            return _pack(_OWN, number, b"".join(self._blinding.hashed(part)))
        if kind == _KEEP:
            self._kept += [int(place) for place in np.frombuffer(content, "<u4")]
            return _pack(_KEEP, number)
        return self._finish(content)

    def _finish(self, content: bytes) -> bytes:
        kept = self._kept
        if len(content) != WORD or len(set(kept)) != len(kept) or not all(place < len(self._ids) for place in kept):
            raise InputError("the label party keeps rows that do not exist, or one twice: start again")
        ids = [self._ids[place] for place in kept]
        self.result = ordered(ids, self._rows[kept], content, self._method)
        self._blinding = None  # its exponent is of no use any more
        labels = label_digest(self._labels, self.result.rows, content) if self._labels is not None else bytes(WORD)
        return _pack(_FINISH, 0, bytes.fromhex(self.result.manifest.digest) + labels)


def align(
    transport,
    ids: Sequence,
    duplicates: str = "raise",
    method: str = "ecdh",
    labels=None,
    *,
    timeout: float = 60.0,
    accept_dictionary_attack: bool = False,
) -> Alignment:
    """
    The label party's side, over any `Transport` whose peers serve an [`AlignmentResponder`].

    Args:
        transport (`Transport`): Of the label party.
        ids, duplicates, method, labels, accept_dictionary_attack: As in [`AlignmentResponder`].
        timeout (`float`, *optional*, defaults to 60): Seconds for each message of up to 4,096 ids.

    Raises:
        ConfigurationError, InputError: If a field is unusable, ids repeat, no row is common to all, or another party
            has a label column with other values.
        PeerLost: If a party is gone.
    """
    _check_method(method, accept_dictionary_attack)
    identities, rows = prepare_ids(ids, duplicates)
    common, places = set(range(len(identities))), {}
    for peer in transport.peers:
        places[peer] = _intersect(transport, peer, identities, method, timeout)
        common &= places[peer].keys()
        if not common:
            raise InputError(f"no row is common to all parties up to {peer!r}: compare the id columns")
    key = os.urandom(WORD)
    kept = sorted(common)
    aligned = ordered([identities[place] for place in kept], rows[kept], key, method)
    own_labels = label_digest(labels, aligned.rows, key) if labels is not None else None
    for peer in transport.peers:
        # In the peer's own shuffled order: the order of this party's table is not told.
        words = np.array(sorted(places[peer][place] for place in kept), "<u4")
        for number in range(0, len(words), CHUNK):
            _ask(transport, peer, _KEEP, number // CHUNK, words[number : number + CHUNK].tobytes(), timeout)
        content = _ask(transport, peer, _FINISH, 0, key, timeout)[1]
        if content[:WORD].hex() != aligned.manifest.digest:
            raise InputError(f"party {peer!r} arrives at other rows: it does not follow the protocol, start again")
        if own_labels is not None and content[WORD:] not in (bytes(WORD), own_labels):
            raise InputError(f"party {peer!r} has a label column with other values than this one: drop one of the two")
    return aligned


def label_digest(labels, rows: np.ndarray, key: bytes) -> bytes:
    """Keyed hash of the labels of the common rows, for parties that both have a label column."""
    values = np.asarray(labels, np.float64)[rows] + 0.0  # -0.0 is 0.0
    return hmac.digest(key, encode_parts(_LABEL, b"labels", values.astype("<f8").tobytes()), "sha256")


def _intersect(transport, peer: str, ids: list[bytes], method: str, timeout: float) -> dict[int, int]:
    """Own places whose ids the peer has, to their places in the peer's shuffled list."""
    key = os.urandom(WORD) if method == "hmac" else bytes(WORD)
    size, _ = _ask(transport, peer, _START, 0, key + method.encode(), timeout)
    blinding = Blinding() if method == "ecdh" else KeyedHash(key)
    twice: dict[bytes, int] = {}
    shuffled = _shuffled(len(ids))
    for number, part in enumerate(_chunks(shuffled)):
        if method == "ecdh":
            words = blinding.hashed([ids[place] for place in part])
            answered = _words(_ask(transport, peer, _BLIND, number, b"".join(words), timeout)[1])
        else:  # the peer has no use for this party's hashes
            answered = blinding.hashed([ids[place] for place in part])
        if len(answered) != len(part):
            raise InputError(f"party {peer!r} returned {len(answered)} of {len(part)} ids: start again")
        twice.update(zip(answered, part, strict=True))
    found = {}
    for number in range(-(-size // CHUNK)):
        own = _words(_ask(transport, peer, _OWN, number, b"", timeout)[1])
        for offset, word in enumerate(blinding.blinded(own)):
            if word in twice:
                found[twice[word]] = number * CHUNK + offset
    return found


def _ask(transport, peer: str, kind: int, number: int, content: bytes, timeout: float) -> tuple[int, bytes]:
    """The number and the content of the answer, which must be of the same kind."""
    frame = transport.request(peer, _pack(kind, number, content), timeout).result()
    answered, number, content = _unpack(frame)
    if answered != kind:
        raise InputError(f"party {peer!r} answers out of turn: start again")
    return number, content


def _pack(kind: int, number: int, content: bytes = b"") -> bytes:
    return _HEADER.pack(_MAGIC, kind, number) + content


def _unpack(frame: bytes) -> tuple[int, int, bytes]:
    if len(frame) < _HEADER.size:
        raise InputError("an alignment message shorter than its header: compare the versions of the parties")
    magic, kind, number = _HEADER.unpack_from(frame)
    content = frame[_HEADER.size :]
    unit = {_BLIND: WORD, _OWN: WORD, _KEEP: 4}.get(kind, 1)
    if magic != _MAGIC or kind > _FINISH or len(content) % unit or len(content) > CHUNK * WORD:
        raise InputError("a malformed alignment message: compare the versions of the parties")
    return kind, number, content


def _words(content: bytes) -> list[bytes]:
    return [content[start : start + WORD] for start in range(0, len(content), WORD)]


def _chunks(places: np.ndarray) -> Iterator[list[int]]:
    for start in range(0, len(places), CHUNK):
        yield places[start : start + CHUNK].tolist()


def _shuffled(size: int) -> np.ndarray:
    """A permutation that no one can foresee: the order of random 64-bit words."""
    return np.argsort(np.frombuffer(os.urandom(8 * size), "<u8"), kind="stable")


def _id_bytes(identity, row: int) -> bytes:
    if isinstance(identity, str | bytes) and identity:
        return identity if isinstance(identity, bytes) else unicodedata.normalize("NFC", identity).encode()
    if isinstance(identity, int | np.integer) and not isinstance(identity, bool):
        return str(int(identity)).encode()
    raise InputError(f"row {row} has the id {identity!r}: ids are text or whole numbers, and none is missing")


def _check_method(method: str, accept_dictionary_attack: bool):
    if method not in METHODS:
        raise ConfigurationError("method", method, f"must be one of {list(METHODS)}")
    if method == "hmac":
        if not accept_dictionary_attack:
            remedy = "lets the label party try ids on what it is sent; set accept_dictionary_attack, or take 'ecdh'"
            raise ConfigurationError("method", method, remedy)
        warnings.warn("method='hmac': the label party can find ids of rows it lacks by trying them", stacklevel=3)
