"""
Training the blocks of parties without labels: the label owner sends them what makes a gradient. See [`backward`] for
what each mode tells.

Owner and party keep SAGA's state between them: the owner a table t of the derivatives each party has, beginning at
zero, the party a_l. So only differences θ_B - t_B travel, and a party that is still busy with a batch misses the next
ones without harm. A checkpoint needs both of one moment: the owner waits until no one is busy, has the others write
their states, and then writes its own.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.backward import PaillierOwner, PaillierParty, noise_for, noisy_theta, sensitivity_of
from hf_mlopt.vertical.messages import Frame, Kind, Purpose, parse_frame
from hf_mlopt.vertical.store import WeightStore
from hf_mlopt.vertical.transport.base import Transport
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import Loss
from hf_mlopt.vertical.updates.weights import Update


MODES = ("plain", "dp", "he")


@dataclass(eq=False)
class _Sent:
    """What one party is busy with: an answer on its way, and what to do with it."""

    reply: Future
    then: Callable[[Frame], "_Sent | None"]


class BackwardOwner:
    """
    The label owner's side.

    Args:
        arguments ([`VerticalArguments`]): Checked.
        loss (`Loss`), labels (`np.ndarray`): Its own.
        block ([`FeatureBlock`]): For batches and their rows.
        transport ([`Transport`]): To the others.
        run (`bytes`): Of all frames.
    """

    def __init__(
        self,
        arguments: VerticalArguments,
        loss: Loss,
        labels: np.ndarray,
        block: FeatureBlock,
        transport: Transport,
        run: bytes,
    ):
        self.arguments, self.loss, self.labels, self.block = arguments, loss, labels, block
        self.transport, self.run = transport, run
        shape = (block.num_rows if arguments.algorithm == "saga" else 0, loss.words)
        self._tables = {peer: np.zeros(shape) for peer in transport.peers}
        self._busy: dict[str, _Sent | None] = dict.fromkeys(transport.peers)
        self._paillier = PaillierOwner() if arguments.backward == "he" else None
        self.noise = 0.0
        if arguments.backward == "dp":
            visits = block.schedule.most_visits(arguments.num_steps(block.num_rows))
            sensitivity = sensitivity_of(arguments.loss, arguments.dp_clip)
            self.noise = noise_for(arguments.dp_epsilon, arguments.dp_delta, visits, sensitivity)

    def start(self):
        """Sends the public key, in mode `he`, and waits until all have it."""
        if self._paillier is None:
            return
        for peer in self.transport.peers:
            frame = self._frame(Kind.KEY, 0, 0, _bytes(self._paillier.public_key))
            self._receive(peer, self._request(peer, frame))

    def send(self, position: int, batch: int, z: np.ndarray):
        """
        Lets the others make a step with a batch, in sync mode to its end.

        Args:
            position (`int`): Of the owner's step.
            batch (`int`): Number of the batch.
            z (`np.ndarray`): Its scores, `[B, K]`.
        """
        rows = self.block.batches[batch].rows
        theta = self.loss.theta(z, self.labels[rows])
        if self.arguments.backward == "dp":
            theta = noisy_theta(theta, self.noise, self.arguments.dp_clip)
        for peer, sent in self._busy.items():
            if self._advance(peer, sent, wait=False):
                self._busy[peer] = self._begin(peer, position, batch, theta)
        if self.arguments.mode == "sync":
            self.finish()

    def finish(self):
        """Waits until no party is busy."""
        for peer in self._busy:
            while not self._advance(peer, self._busy[peer], wait=True):
                pass

    def save(self, position: int):
        """
        Has all others write their states, none being busy. Call it before the owner's own state is written.

        Args:
            position (`int`): Steps that the owner has made.
        """
        self.finish()
        frame = Frame(Kind.SAVE, Purpose.TRAIN, self.run, position)
        for peer, reply in [(peer, self._request(peer, frame)) for peer in self._busy]:
            self._receive(peer, reply)

    def state_dict(self) -> dict:
        """The tables t. Keys are new at each start."""
        return {"tables": {peer: table.copy() for peer, table in self._tables.items()}}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self._tables = {peer: np.array(table, np.float64) for peer, table in state["tables"].items()}

    def _begin(self, peer: str, position: int, batch: int, theta: np.ndarray) -> _Sent:
        rows, values = self.block.batches[batch].rows, theta
        if self.arguments.algorithm == "saga":
            values = theta - self._tables[peer][rows]
            self._tables[peer][rows] = theta
        if self._paillier is None:
            frame = self._frame(Kind.THETA, position, batch, values)
            return _Sent(self._request(peer, frame), lambda answer: None)
        frame = self._frame(Kind.CIPHER, position, batch, _bytes(self._paillier.encrypt(values)))

        def decrypt(answer: Frame) -> _Sent:
            plain = self._paillier.decrypt(answer.values.tobytes())
            frame = self._frame(Kind.PLAIN, position, batch, _bytes(plain))
            return _Sent(self._request(peer, frame), lambda answer: None)

        return _Sent(self._request(peer, frame), decrypt)

    def _advance(self, peer: str, sent: _Sent | None, *, wait: bool) -> bool:
        """Whether the party is free, after taking what has come."""
        while sent is not None and (wait or sent.reply.done()):
            sent = sent.then(self._receive(peer, sent.reply))
            self._busy[peer] = sent
        return sent is None

    def _receive(self, peer: str, reply: Future) -> Frame:
        frame = parse_frame(reply.result(2 * self.arguments.timeout), self.run)
        if frame.kind is Kind.REFUSED:
            raise InputError(f"party {peer!r} refuses: {frame.text}")
        return frame

    def _request(self, peer: str, frame: Frame) -> Future:
        return self.transport.request(peer, frame.to_bytes(), self.arguments.timeout)

    def _frame(self, kind: Kind, position: int, batch: int, values: np.ndarray) -> Frame:
        return Frame(kind, Purpose.TRAIN, self.run, position, batch=batch, values=values)


class BackwardParty:
    """
    The side of a party without labels.

    Args:
        arguments ([`VerticalArguments`]): Checked.
        owner (`str`): The only party that may send.
        block ([`FeatureBlock`]), store ([`WeightStore`]): Own.
        run (`bytes`): Of all frames.
    """

    KINDS = (Kind.KEY, Kind.THETA, Kind.CIPHER, Kind.PLAIN, Kind.SAVE)

    def __init__(
        self, arguments: VerticalArguments, owner: str, block: FeatureBlock, store: WeightStore, run: bytes, words: int
    ):
        self.arguments, self.owner, self.block, self.store = arguments, owner, block, store
        self.run, self.words = run, words
        self._paillier: PaillierParty | None = None
        self._masks: tuple[int, int, list[int]] | None = None  # position, batch, r
        self._last = -1
        self.save: Callable[[int], None] = lambda position: None  # set by whoever writes checkpoints

    def answer(self, peer: str, frame: Frame) -> Frame:
        """
        Takes derivatives, or a step of their encrypted form, and makes the update.

        Raises:
            InputError: If the peer is not the label owner, or the frame is out of turn or of another size.
        """
        if peer != self.owner:
            raise InputError(f"{peer!r} has no labels, and nothing to send to this block")
        if frame.kind is Kind.KEY:
            if self._paillier is not None:
                raise InputError("a second key in one run: start again")
            self._paillier = PaillierParty(frame.values.tobytes())
            return self._receipt(frame)
        if frame.kind is Kind.SAVE:
            if self._masks is not None:
                raise InputError("a state cannot be written in the middle of a batch: start again")
            self.save(frame.round_id)
            return self._receipt(frame)
        if frame.batch >= len(self.block.batches):
            raise InputError(f"batch {frame.batch} is unknown; compare rows and batch_size")
        batch = self.block.batches[frame.batch]
        if frame.kind is Kind.PLAIN:
            return self._unmask(frame, batch)
        if frame.round_id <= self._last:
            raise InputError(f"position {frame.round_id} after {self._last}: sent before")
        self._last = frame.round_id
        if (frame.kind is Kind.CIPHER) != (self.arguments.backward == "he"):
            raise InputError(f"backward={self.arguments.backward!r} here, a frame of another mode; compare them")
        if frame.kind is Kind.CIPHER:
            if self._paillier is None:
                raise InputError("encrypted derivatives before a key: start again")
            reply, masks = self._paillier.multiply(frame.values.tobytes(), batch.features)
            self._masks = (frame.round_id, frame.batch, masks)
            return self._receipt(frame, _bytes(reply))
        if frame.values.shape != (len(batch.rows), self.words) or frame.values.dtype != np.float64:
            raise InputError(f"derivatives of shape {list(frame.values.shape)} for {len(batch.rows)} rows; compare")
        self._step(batch, batch.backward(frame.values) / len(batch.rows))
        return self._receipt(frame)

    def state_dict(self) -> dict:
        """The last position; a_l is the drift of the weights."""
        return {"last": self._last}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self._last = int(state["last"])

    def _unmask(self, frame: Frame, batch) -> Frame:
        if self._masks is None or self._masks[:2] != (frame.round_id, frame.batch):
            raise InputError("decrypted sums that were not asked for: start again")
        masks, self._masks = self._masks[2], None
        flat = self._paillier.unmask(frame.values.tobytes(), masks, len(batch.rows))
        self._step(batch, flat.reshape(-1, self.words))
        return self._receipt(frame)

    def _step(self, batch, gradient: np.ndarray):
        drift = gradient * (len(batch.rows) / self.block.num_rows) if self.arguments.algorithm == "saga" else None
        self.store.commit(Update(batch.columns, gradient, drift), self.arguments.learning_rate, self.arguments.l2)

    def _receipt(self, frame: Frame, values: np.ndarray | None = None) -> Frame:
        empty = np.zeros((0, 0))
        place = (frame.purpose, self.run, frame.round_id, self.store.version, frame.batch)
        return Frame(Kind.RECEIPT, *place, values=empty if values is None else values)


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)[:, None]
