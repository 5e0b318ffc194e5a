"""The side of a party that asks: the scores of a batch over all parties."""

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace

import numpy as np

from hf_mlopt.vertical.aggregate import sum_request
from hf_mlopt.vertical.inbox import check_reply
from hf_mlopt.vertical.messages import Frame, FrameError, Kind, Purpose, parse_frame
from hf_mlopt.vertical.responder import Responder
from hf_mlopt.vertical.transport.base import PeerLost, Transport


@dataclass(eq=False)
class PendingSum:
    """
    A sum that was asked for.

    Args:
        asked ([`Frame`]): The request.
        replies (`dict[str, Future | None]`): Answers by peer; `None` where the peer sends its share unasked.
    """

    asked: Frame
    replies: dict[str, Future | None]

    @property
    def is_ready(self) -> bool:
        """Whether all answers to requests are there."""
        return all(reply is None or reply.done() for reply in self.replies.values())


@dataclass(frozen=True, eq=False)
class Sum:
    """
    Args:
        z (`np.ndarray`): Scores, float64, `[B, K]`.
        versions (`dict[str, int]`): Of each peer's weights that went into it; own ones are the newest.
    """

    z: np.ndarray
    versions: dict[str, int]


class SumCollector:
    """
    Asks all peers for shares and adds them to the own one.

    Args:
        responder ([`Responder`]): Own party's, for the own share and the masks.
        transport ([`Transport`]): To the peers.
        timeout (`float`): Seconds a peer may take.
    """

    def __init__(self, responder: Responder, transport: Transport, timeout: float):
        self.responder, self.transport, self.timeout = responder, transport, timeout
        self.peers = transport.peers
        self.seconds_waiting = 0.0
        self._next_round = dict.fromkeys((Purpose.AGAIN, Purpose.ANCHOR, Purpose.PREDICT), 0)

    def ask(
        self,
        purpose: Purpose,
        batch: int,
        *,
        round_id: int | None = None,
        mark: int = 0,
        dataset: int = 0,
        pushing: frozenset[str] = frozenset(),
    ) -> PendingSum:
        """
        Args:
            purpose ([`Purpose`]), batch (`int`): What is wanted.
            round_id (`int`, *optional*): Position in the schedule, in training; other purposes are numbered here.
            mark (`int`, *optional*, defaults to 0): Number of the anchor.
            dataset (`int`, *optional*, defaults to 0): Whose rows.
            pushing (`frozenset[str]`, *optional*, defaults to none): Peers that send their shares unasked.

        Returns:
            [`PendingSum`]: For [`collect`].
        """
        if round_id is None:
            round_id = self._next_round[purpose]
            self._next_round[purpose] += 1
        version = self.responder.store.version
        asked = Frame(Kind.ASK, purpose, self.responder.run, round_id, version, batch, mark, dataset)
        data, request = asked.to_bytes(), self.transport.request
        replies = {peer: None if peer in pushing else request(peer, data, self.timeout) for peer in self.peers}
        return PendingSum(asked, replies)

    def collect(self, pending: PendingSum) -> Sum:
        """
        Waits for all shares.

        Returns:
            [`Sum`]: Of all parties, the own share being made now.

        Raises:
            PeerLost: If a peer does not answer in time.
            LeakBudgetExceeded, InputError: If a peer refuses.
        """
        start, frames = time.monotonic(), {}
        try:
            for peer, reply in pending.replies.items():
                frames[peer] = self._receive(peer, pending.asked, reply)
        finally:
            self.seconds_waiting += time.monotonic() - start
        return self.add(pending.asked, frames)

    def add(self, asked: Frame, frames: dict[str, Frame]) -> Sum:
        """The sum of the peers' shares and the own one."""
        name = self.responder.name
        request = sum_request(name, asked.purpose, asked.dataset, asked.round_id, asked.batch, asked.mark)
        shares = {peer: frame.values for peer, frame in frames.items()}
        shares[name] = self.responder.share(name, asked).values
        for peer, values in shares.items():
            if values.shape != shares[name].shape or values.dtype != shares[name].dtype:
                text = f"share of {peer!r} is {values.dtype} {list(values.shape)}, own is {shares[name].dtype} "
                raise FrameError(f"{text}{list(shares[name].shape)}; compare mask, batch_size and num_labels")
        z = self.responder.sharing.combine(shares, request)
        return Sum(z, {peer: frame.version for peer, frame in frames.items()})

    def scores(self, dataset: int) -> np.ndarray:
        """z of all rows of a data set at the current weights, `[rows, K]`."""
        parts, block = [], self.responder.datasets[dataset]
        for number in range(len(block.batches)):
            parts.append(self.collect(self.ask(Purpose.PREDICT, number, dataset=dataset)).z)
        z = np.concatenate(parts)
        z[np.concatenate([batch.rows for batch in block.batches])] = z.copy()
        return z

    def _receive(self, peer: str, asked: Frame, reply: Future | None) -> Frame:
        if reply is None:
            frame = self.responder.inbox.take(peer, asked.purpose, asked.round_id, self.timeout)
        else:
            try:
                frame = parse_frame(reply.result(2 * self.timeout), self.responder.run)
            except FutureTimeout:  # the transport should have said so long ago
                raise PeerLost(peer, f"no answer within {2 * self.timeout:g} s") from None
        check_reply(peer, frame)
        expected = replace(asked, kind=Kind.SHARE)
        for field in ("kind", "purpose", "round_id", "batch", "mark", "dataset"):
            if getattr(frame, field) != getattr(expected, field):
                text = f"answer of {peer!r} has {field}={getattr(frame, field)}, asked was {getattr(expected, field)}"
                raise FrameError(f"{text}; drop the peer")
        self.responder.inbox.saw(peer, frame.version)
        return frame

    def state_dict(self) -> dict:
        """High-water mark of own request numbers."""
        return {"next_round": {purpose.name: number for purpose, number in self._next_round.items()}}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave, so that no number is used for other content."""
        self._next_round = {Purpose[name]: int(number) for name, number in state["next_round"].items()}
