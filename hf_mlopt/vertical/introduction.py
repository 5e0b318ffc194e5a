"""
What parties tell each other before they train: sizes, keys for masks, checkpoints; and, where labels are shared, the
labels.

Each key is signed by the key of the party's certificate, for this run: who relays it cannot put another in its place.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.credentials import Credentials, sign_public_key, verify_public_key
from hf_mlopt.vertical.transport.base import PeerLost, Transport


PREFIX = b"HFIN"
_FACTS, _LABELS, _END, _ALIVE = b"facts", b"labels", b"end", b"alive"


@dataclass(frozen=True)
class Facts:
    """
    What a party says of itself.

    Args:
        num_features (`int`): Columns, without a bias.
        num_rows (`int`): Aligned rows to train on.
        alignment (`str`): Digest of the common rows and their order.
        public_key (`str`): X25519, hexadecimal; empty without masks.
        checkpoints (`tuple[int, ...]`, *optional*): Steps of the checkpoints that it could go on from.
        certificate (`str`, *optional*), signature (`str`, *optional*): PEM, and of the key, hexadecimal.
        nonce (`str`, *optional*): Drawn anew for each start.
    """

    num_features: int
    num_rows: int
    alignment: str
    public_key: str
    checkpoints: tuple[int, ...] = ()
    certificate: str = ""
    signature: str = ""
    nonce: str = field(default_factory=lambda: os.urandom(16).hex())

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(self.__dict__).encode()

    @classmethod
    def from_bytes(cls, data: bytes, peer: str) -> "Facts":
        """Raises `InputError` for anything but what [`to_bytes`] gives."""
        try:
            facts = cls(**json.loads(data))
            numbers = (facts.num_features, facts.num_rows, *facts.checkpoints)
            texts = (facts.alignment, facts.public_key, facts.certificate, facts.signature, facts.nonce)
            is_good = all(type(number) is int and number >= 0 for number in numbers)
            if not is_good or not all(isinstance(text, str) for text in texts):
                raise TypeError("fields of other types")
            bytes.fromhex(facts.public_key + facts.signature)
        except (ValueError, TypeError) as error:
            raise InputError(f"party {peer!r} introduces itself in a way that is not understood: {error}") from error
        return facts


class Introduction:
    """
    The conversation around a training: facts at its beginning, labels, and an end that the label owner announces.

    Args:
        transport ([`Transport`]): Of frames with [`PREFIX`].
        credentials ([`Credentials`], *optional*): Own; without them keys are not signed.
        run (`str`): What signatures are for.
        timeout (`float`): Seconds a peer may take.
        patience (`float`): Seconds it may take before it has facts to tell.
        note (`Callable`, *optional*): `note(event, peer=..., ...)` for an audit log.
    """

    def __init__(
        self,
        transport: Transport,
        credentials: Credentials | None,
        run: str,
        timeout: float,
        patience: float,
        note: Callable[..., object] = lambda event, **fields: None,
    ):
        self.transport, self.credentials, self.run, self._note = transport, credentials, run, note
        self.timeout, self.patience = timeout, patience
        self._ended, self._has_facts = threading.Event(), threading.Event()
        self._own, self._labels, self._recipients = b"", None, ()

    def exchange(self, own: Facts, labels: np.ndarray | None, recipients: tuple[str, ...]) -> dict[str, Facts]:
        """
        Args:
            own ([`Facts`]): Unsigned.
            labels (`np.ndarray`, *optional*): To be given to the recipients who ask, at the label owner.
            recipients (`tuple[str, ...]`): Who may.

        Returns:
            `dict[str, Facts]`: Of the peers and this party.

        Raises:
            InputError: If rows or alignment differ, or a key is not signed by its party.
            PeerLost: If a peer is gone.
        """
        facts, signed = {self.transport.name: own}, own
        if self.credentials is not None:
            key = bytes.fromhex(own.public_key)
            signature = sign_public_key(self.credentials, key, run=self.run, epoch=0).hex()
            signed = Facts(**{**own.__dict__, "certificate": self._pem(), "signature": signature})
        self._own, self._labels, self._recipients = signed.to_bytes(), labels, recipients
        self._has_facts.set()
        asked = {peer: self._ask(peer, _FACTS, self.patience) for peer in self.transport.peers}
        for peer, reply in asked.items():
            facts[peer] = self._checked(peer, Facts.from_bytes(reply.result(), peer), own)
        return facts

    def listen(self):
        """Answers from now on; peers that ask for facts wait until there are some."""
        self.transport.serve(self._answer, lambda peer, frame: None)

    def labels(self, owner: str) -> np.ndarray:
        """The labels of the training rows, float64, from their owner."""
        return np.frombuffer(self._ask(owner, _LABELS).result(), "<f8")

    def part(self, owner: str):
        """The end: the label owner tells all others that nothing more will be asked, and they wait for that."""
        if self.transport.name != owner:
            self.wait_for(self._ended, owner)
            return
        for reply in [self._ask(peer, _END) for peer in self.transport.peers]:
            try:
                reply.result()
            except PeerLost:
                continue  # it has gone because of this very message, or is missed by no one any more

    def wait_for(self, event: threading.Event, peer: str):
        """Waits for an event that comes from a peer. Raises `PeerLost` if it is gone before."""
        while not event.wait(self.timeout / 4):
            try:
                self._ask(peer, _ALIVE).result()
            except PeerLost:
                if not event.is_set():
                    raise

    def _pem(self) -> str:
        return self.credentials.certificate.decode()

    def _ask(self, peer: str, what: bytes, timeout: float | None = None):
        return self.transport.request(peer, PREFIX + what, timeout or self.timeout)

    def _answer(self, peer: str, frame: bytes) -> bytes:
        what = frame[len(PREFIX) :]
        if what == _FACTS and self._has_facts.wait(self.patience):
            return self._own
        if what == _LABELS and self._labels is not None and peer in self._recipients:
            self._note("labels sent", peer=peer, rows=len(self._labels))
            return np.asarray(self._labels, "<f8").tobytes()
        if what == _END:
            self._ended.set()
            return b""
        if what == _ALIVE:
            return b""
        raise InputError(f"party {peer!r} may not ask {self.transport.name!r} for {what[:20]!r}")

    def _checked(self, peer: str, facts: Facts, own: Facts) -> Facts:
        for name in ("alignment", "num_rows"):
            here, there = getattr(own, name), getattr(facts, name)
            if here != there:
                here, there = (value[:16] if isinstance(value, str) else value for value in (here, there))
                text = f"{name}: {here!r} here, {there!r} at {peer!r}: other rows, or in another order"
                raise InputError(f"{text}; align all parties anew (alignment=ecdh), with one eval_share")
        if bool(facts.public_key) != bool(own.public_key):
            raise InputError(f"mask: party {peer!r} and this one disagree on masks; compare the arguments")
        if self.credentials is not None:
            signature, key = bytes.fromhex(facts.signature), bytes.fromhex(facts.public_key)
            pem = facts.certificate.encode()
            verify_public_key(pem, self.credentials.authority, peer, key, signature, run=self.run, epoch=0)
        return facts


def session_id(facts: dict[str, Facts]) -> bytes:
    """16 bytes that change with every start: parties that met in different ones do not take each other's frames."""
    parts = [f"{name}:{fact.public_key}:{fact.nonce}" for name, fact in sorted(facts.items())]
    return hashlib.sha256("/".join(parts).encode()).digest()[:16]
