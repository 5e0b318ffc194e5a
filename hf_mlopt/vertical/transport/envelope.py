"""
What a frame travels in: a fixed header, then the frame as it is. No pickle, no code from the wire.

Little-endian, 28 bytes: magic, kind, session, sequence, number. The session is drawn anew for every connection and the
sequence rises by one a frame in each direction, so a frame of an earlier connection, a repeated, a dropped and a moved
one are all refused: the replay window is one frame wide, since streams keep their order.
"""

import enum
import hashlib
import json
import struct
from dataclasses import dataclass


_HEADER = struct.Struct("<3sBQQQ")
HEADER_BYTES = _HEADER.size
NONCE_BYTES = 16
_MAGIC = b"HFV"
_ABSENT = "absent"


class Kind(enum.IntEnum):
    """What a frame is; a number on the wire."""

    HELLO = 1
    REFUSED = 2  # the other end's settings differ, or it does not know the party
    REQUEST = 3
    ANSWER = 4
    FAILED = 5  # the answer to a request that the other end would not serve
    PUSH = 6
    PING = 7
    PONG = 8


class MalformedFrame(ValueError):
    """A frame that no honest peer sends; the connection is closed. The message holds no bytes of it."""


@dataclass(frozen=True)
class Envelope:
    """
    Args:
        kind ([`Kind`]): What it is.
        number (`int`): Of the request that is asked or answered; zero elsewhere.
        frame (`bytes`): The content.
    """

    kind: Kind
    number: int
    frame: bytes


class Channel:
    """
    One direction of one connection. Sender and receiver each keep one.

    Args:
        limit (`int`): Largest frame, bytes.
        session (`int`): Zero until the handshake has agreed on one.
    """

    def __init__(self, limit: int, session: int = 0):
        self.limit, self.session, self.sequence = limit, session, 0

    def pack(self, kind: Kind, frame: bytes = b"", number: int = 0) -> bytes:
        """The next envelope as bytes."""
        header = _HEADER.pack(_MAGIC, kind, self.session, self.sequence, number)
        self.sequence += 1
        return header + frame

    def unpack(self, data: bytes) -> Envelope:
        """
        Raises:
            MalformedFrame: If it is too short or too long, of an unknown kind, or not the next one of this session.
        """
        if len(data) < HEADER_BYTES:
            raise MalformedFrame(f"{len(data)} bytes, shorter than a header")
        if len(data) > HEADER_BYTES + self.limit:
            raise MalformedFrame(f"{len(data)} bytes, over the limit of {self.limit}")
        magic, kind, session, sequence, number = _HEADER.unpack_from(data)
        if magic != _MAGIC or kind not in Kind.__members__.values():
            raise MalformedFrame("unknown magic or kind")
        if session != self.session:
            raise MalformedFrame("replayed: of another session")
        if sequence != self.sequence:
            order = "replayed" if sequence < self.sequence else "out of order"
            raise MalformedFrame(f"{order}: sequence {sequence}, expected {self.sequence}")
        self.sequence += 1
        return Envelope(Kind(kind), number, data[HEADER_BYTES:])


def hello(party: str, roster: str, settings: dict, nonce: bytes) -> bytes:
    """
    The first frame of either end, JSON.

    Args:
        party (`str`): Own name, which the certificate must carry as well.
        roster (`str`): Digest of the roster, hexadecimal.
        settings (`dict`): What all parties must have alike, names to JSON values.
        nonce (`bytes`): 16 fresh random bytes.
    """
    content = {"party": party, "roster": roster, "settings": settings, "nonce": nonce.hex()}
    return json.dumps(content, sort_keys=True, allow_nan=False).encode()


def read_hello(frame: bytes) -> dict:
    """
    Returns:
        `dict`: `party`, `roster`, `settings`, and `nonce` as bytes.

    Raises:
        MalformedFrame: If it is not the form of [`hello`].
    """
    try:
        content = json.loads(frame)
        nonce = bytes.fromhex(content["nonce"])
        kinds = (("party", str), ("roster", str), ("settings", dict))
        if not all(isinstance(content[name], kind) for name, kind in kinds) or len(nonce) != NONCE_BYTES:
            raise MalformedFrame("a hello with fields of other types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, MalformedFrame):
            raise
        raise MalformedFrame("no hello") from error
    return {**content, "nonce": nonce}


def differences(own: dict, other: dict) -> list[str]:
    """
    Names and values of the settings in which two hellos differ, roster first.

    Args:
        own (`dict`), other (`dict`): From [`read_hello`].

    Returns:
        `list[str]`: Such as `"batch_size: 256 here, 128 there"`.
    """
    pairs = [("roster", own["roster"][:16], other["roster"][:16])] if own["roster"] != other["roster"] else []
    mine, theirs = own["settings"], other["settings"]
    for name in sorted({*mine, *theirs}):
        here, there = mine.get(name, _ABSENT), theirs.get(name, _ABSENT)
        if json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):
            pairs.append((name, here, there))
    return [f"{name}: {here!r} here, {there!r} there" for name, here, there in pairs]


def session_of(first: bytes, second: bytes) -> int:
    """The session that two nonces give, dialling party's first; 64 bits, so that none comes back by chance."""
    return int.from_bytes(hashlib.sha256(b"hf_mlopt/vertical/session" + first + second).digest()[:8], "little")
