"""Frames that peers push, until the updater wants them, and the newest versions seen of each."""

import threading
import time
from collections.abc import Iterable

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.budget import LeakBudgetExceeded
from hf_mlopt.vertical.messages import Frame, FrameError, Kind, Purpose
from hf_mlopt.vertical.transport.base import PeerLost


class Inbox:
    """
    Args:
        peers (`tuple[str, ...]`): The other parties.
        size (`int`): Most frames kept for a peer; more is a fault of the peer.
    """

    def __init__(self, peers: tuple[str, ...], size: int):
        self._frames: dict[str, dict[tuple[Purpose, int], Frame]] = {peer: {} for peer in peers}
        self._size, self._changed = size, threading.Condition()
        self.versions = dict.fromkeys(peers, 0)
        self._done: set[str] = set()
        self._failed: set[str] = set()

    def saw(self, peer: str, version: int):
        """Notes a version of a peer's weights."""
        with self._changed:
            self.versions[peer] = max(self.versions[peer], version)

    def put(self, peer: str, frame: Frame):
        """Keeps a pushed frame. Raises `FrameError` if it is a second one, or one too many."""
        with self._changed:
            self.versions[peer] = max(self.versions[peer], frame.version)
            if frame.kind in (Kind.DONE, Kind.FAILED):
                (self._done if frame.kind is Kind.DONE else self._failed).add(peer)
            else:
                frames, key = self._frames[peer], (frame.purpose, frame.round_id)
                if key in frames or len(frames) >= self._size:
                    raise FrameError(f"{frame.kind.name} {key} by {peer!r} is a second one or one too many; drop it")
                frames[key] = frame
            self._changed.notify_all()

    def take(self, peer: str, purpose: Purpose, round_id: int, timeout: float) -> Frame:
        """
        Waits for a frame and removes it.

        Raises:
            PeerLost: If it does not come in time, or the peer has failed.
            InputError: If the peer has refused.
        """
        deadline, key = time.monotonic() + timeout, (purpose, round_id)
        with self._changed:
            while key not in self._frames[peer]:
                self._check_alive((peer,))
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerLost(peer, f"no share of {purpose.name} {round_id} within {timeout:g} s")
                self._changed.wait(left)
            return check_reply(peer, self._frames[peer].pop(key))

    def wait_until_done(self, peers: tuple[str, ...], silence: float):
        """
        Waits until each of `peers` has said that it is done.

        Raises:
            PeerLost: If one of them has failed, or for `silence` seconds nothing new came from it.
        """
        with self._changed:
            while waiting := [peer for peer in peers if peer not in self._done]:
                before = dict(self.versions)
                is_over = lambda peers=waiting: self._done.issuperset(peers) or self._failed  # noqa: E731
                self._changed.wait_for(is_over, silence)
                self._check_alive(waiting)
                for peer in waiting:
                    if peer not in self._done and self.versions[peer] == before[peer]:
                        raise PeerLost(peer, f"no progress within {silence:g} s")

    @property
    def is_anyone_done(self) -> bool:
        """Whether a peer has made its last step."""
        return bool(self._done)

    def _check_alive(self, peers: Iterable[str]):
        for peer in peers:
            if peer in self._failed:
                raise PeerLost(peer, "it has failed and said so")


def check_reply(peer: str, frame: Frame) -> Frame:
    """Returns a SHARE or SUM, and raises what a refusal tells."""
    if frame.kind is not Kind.REFUSED:
        return frame
    name, _, text = frame.text.partition(": ")
    kind = LeakBudgetExceeded if name == LeakBudgetExceeded.__name__ else InputError
    raise kind(f"party {peer!r} refuses: {text}")
