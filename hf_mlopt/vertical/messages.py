"""
Frames between parties: a header of fixed size, then raw little-endian words. Nothing is unpickled, sizes are checked
before anything is read.
"""

import enum
import struct
from dataclasses import dataclass, field

import numpy as np

from hf_mlopt.errors import InputError


class FrameError(InputError):
    """Bytes that are no frame of this run. Drop them, and the connection they came over."""


class Kind(enum.IntEnum):
    """What a frame is."""

    ASK = 1  # for the share of a batch
    SHARE = 2  # the answer, or sent ahead
    AHEAD = 3  # the sender is at this position; shares up to `mark` beyond it may be sent without asking
    SUM = 4  # scores that one label holder passes on to the others
    REFUSED = 5  # in place of a share; the payload is the reason in UTF-8
    DONE = 6  # the sender will ask for nothing more
    FAILED = 7  # the sender ends, and its share will never come
    CLIMB = 8  # words of some parties on their way up a tree
    KEY = 9  # of the label owner, for encrypted derivatives
    THETA = 10  # derivatives of a batch, for a party without labels
    CIPHER = 11  # the same, encrypted
    PLAIN = 12  # masked gradient, decrypted
    RECEIPT = 13  # the answer to one of these four, and to the next
    SAVE = 14  # by the label owner: write the state of this position now, it is about to write its own


class Purpose(enum.IntEnum):
    """What a sum is for. Each purpose has its own request numbers."""

    TRAIN = 1  # the round is the position in the schedule
    AGAIN = 2  # a batch whose sum was too old, or lost
    ANCHOR = 3  # scores of the pinned weights of SVRG
    PREDICT = 4  # scores of the current weights


_HEADER = struct.Struct("<4sBBBB16sBQQIIII")
_MAGIC = b"hfv1"
_DTYPES = {0: None, 1: np.dtype("<u8"), 2: np.dtype("<f8"), 3: np.dtype("u1")}
_CODES = {np.dtype(np.uint64): 1, np.dtype(np.float64): 2, np.dtype(np.uint8): 3}
_WITH_WORDS = (Kind.SHARE, Kind.SUM, Kind.CLIMB, Kind.KEY, Kind.THETA, Kind.CIPHER, Kind.PLAIN, Kind.RECEIPT)
HEADER_BYTES = _HEADER.size
MAX_PAYLOAD = 1 << 26  # bytes; a batch of a million rows has eight


@dataclass(frozen=True, eq=False)
class Frame:
    """
    One message.

    Args:
        kind ([`Kind`]), purpose ([`Purpose`]): What it is.
        run (`bytes`): 16 bytes that all frames of a run share; of the roster, the arguments and the code version.
        round_id (`int`): Number of the sum in the requester's channel for the purpose.
        version (`int`, *optional*, defaults to 0): Of the sender's weights: those a share was made with, else newest.
        batch (`int`, *optional*, defaults to 0): Which rows.
        mark (`int`, *optional*, defaults to 0): Number of the anchor whose weights are meant; see also [`Kind`].
        dataset (`int`, *optional*, defaults to 0): 0 are the training rows.
        values (`np.ndarray`, *optional*): `[rows, K]`, uint64 when masked, float64, or bytes.
        text (`str`, *optional*, defaults to `""`): Reason of a refusal.
        route (`int`, *optional*, defaults to 0): Of words that climb: twice the number of the party that gets the
            sum, plus 1 in the tree of the masks.
    """

    kind: Kind
    purpose: Purpose
    run: bytes
    round_id: int
    version: int = 0
    batch: int = 0
    mark: int = 0
    dataset: int = 0
    values: np.ndarray | None = field(default=None, repr=False)
    text: str = ""
    route: int = 0

    def to_bytes(self) -> bytes:
        """The frame as sent."""
        code, shape, payload = 0, (0, 0), self.text.encode()
        if self.values is not None:
            code = _CODES[self.values.dtype]
            shape, payload = self.values.shape, np.ascontiguousarray(self.values, _DTYPES[code]).tobytes()
        elif payload:
            shape = (len(payload), 1)
        head = (_MAGIC, self.kind, self.purpose, code, self.dataset, self.run, self.route, self.round_id, self.version)
        return _HEADER.pack(*head, self.batch, self.mark, *shape) + payload


def parse_frame(data: bytes, run: bytes) -> Frame:
    """
    Args:
        data (`bytes`): As received.
        run (`bytes`): 16 bytes of the own run.

    Returns:
        [`Frame`]: Its values are a copy.

    Raises:
        FrameError: If it is malformed, too long, or of another run.
    """
    if len(data) < HEADER_BYTES:
        raise FrameError(f"frame of {len(data)} bytes: a header has {HEADER_BYTES}; drop it")
    magic, kind, purpose, code, dataset, sender_run, route, *numbers = _HEADER.unpack_from(data)
    round_id, version, batch, mark, rows, words = numbers
    if magic != _MAGIC:
        raise FrameError(f"frame starts with {magic!r}, not {_MAGIC!r}: another program or version; drop it")
    if sender_run != run:
        raise FrameError(
            f"frame of run {sender_run.hex()}, own run is {run.hex()}: rosters, arguments or code differ; compare them"
        )
    try:
        kind, purpose, dtype = Kind(kind), Purpose(purpose), _DTYPES[code]
    except (ValueError, KeyError):
        raise FrameError(f"frame has unknown codes {kind}, {purpose}, {code}; drop it") from None
    size = rows * words * (dtype.itemsize if dtype else 1)
    if size > MAX_PAYLOAD or len(data) != HEADER_BYTES + size:
        text = f"frame of {len(data)} bytes announces a payload of {size}, of at most {MAX_PAYLOAD}; drop it"
        raise FrameError(text)
    values, text = None, ""
    if dtype:
        values = np.frombuffer(data, dtype, offset=HEADER_BYTES).reshape(rows, words).copy()
    elif size:
        text = data[HEADER_BYTES:].decode("utf-8", "replace")
    if (dtype is not None) != (kind in _WITH_WORDS):
        raise FrameError(f"frame of kind {kind.name} {'with' if dtype else 'without'} words; drop it")
    return Frame(kind, purpose, sender_run, round_id, version, batch, mark, dataset, values, text, route)
