"""What parties need of a transport."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol


class PeerLost(RuntimeError):
    """
    A peer that is dead, silent for too long, or closed.

    Args:
        peer (`str`): Its name.
        reason (`str`): What happened.
    """

    def __init__(self, peer: str, reason: str):
        self.peer, self.reason = peer, reason
        super().__init__(f"party {peer!r} is lost: {reason}")


class Transport(Protocol):
    """
    Frames of one party to and from the others. Frames from one peer arrive in the order it sent them.

    Attributes:
        name (`str`): Own party.
        peers (`tuple[str, ...]`): The others, in roster order.
    """

    name: str
    peers: tuple[str, ...]

    def serve(self, on_request: Callable[[str, bytes], bytes], on_push: Callable[[str, bytes], None]) -> None:
        """Calls the functions with peer and frame from now on; frames of one peer one after another."""

    def request(self, peer: str, frame: bytes, timeout: float) -> "Future[bytes]":
        """The reply in future, or [`PeerLost`] in it, `timeout` seconds from now at the latest."""

    def push(self, peer: str, frame: bytes) -> None:
        """Sends a frame that no one answers. Raises [`PeerLost`] if the peer is known to be gone."""

    def close(self) -> None:
        """Ends the party; peers learn that it is gone."""
