"""One transport for several conversations of a program, told apart by the first four bytes of a frame."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.transport.base import Transport


PREFIX_BYTES = 4


class SharedTransport:
    """
    Serves once and hands each frame to the conversation it belongs to. Frames of a peer that is ahead wait until this
    party joins that conversation; heartbeats go on meanwhile.

    Args:
        transport ([`Transport`]): Not served yet.
        prefixes (iterable of `bytes`): First four bytes of the frames of each conversation.
        patience (`float`): Seconds a peer's frame may wait for a conversation to begin here.
    """

    def __init__(self, transport: Transport, prefixes: Iterable[bytes], patience: float):
        self.transport, self.patience = transport, patience
        self._handlers: dict[bytes, tuple[Callable, Callable] | None] = dict.fromkeys(prefixes)
        self._changed, self._closed = threading.Condition(), False

    def start(self):
        """Connects; conversations may begin."""
        self.transport.serve(
            lambda peer, frame: self._handler(frame)[0](peer, frame),
            lambda peer, frame: self._handler(frame)[1](peer, frame),
        )

    def conversation(self, prefix: bytes) -> "Conversation":
        """The [`Transport`] of one conversation."""
        return Conversation(self, prefix)

    def _handler(self, frame: bytes) -> tuple[Callable, Callable]:
        prefix = bytes(frame[:PREFIX_BYTES])
        if prefix not in self._handlers:
            raise InputError(f"a frame that starts with {prefix!r} is of another program or version; drop it")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._handlers[prefix], self.patience)
            handlers = self._handlers[prefix]
        if handlers is None or self._closed:
            raise InputError(f"this party is not ready for {prefix!r}; start it again")
        return handlers

    def join(self, prefix: bytes, handlers: tuple[Callable, Callable]):
        """Takes part in a conversation from now on."""
        with self._changed:
            if self._handlers[prefix] is not None:
                raise RuntimeError(f"conversation {prefix!r} is served already")
            self._handlers[prefix] = handlers
            self._changed.notify_all()

    def close(self):
        """Ends all conversations."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.transport.close()


class Conversation:
    """
    [`Transport`] for the frames of one prefix; closing it closes them all.

    Args:
        shared ([`SharedTransport`]), prefix (`bytes`): See there.
    """

    def __init__(self, shared: SharedTransport, prefix: bytes):
        self._shared, self._prefix = shared, prefix
        self.name, self.peers = shared.transport.name, shared.transport.peers

    def serve(self, on_request: Callable[[str, bytes], bytes], on_push: Callable[[str, bytes], None]) -> None:
        """See [`Transport.serve`]."""
        self._shared.join(self._prefix, (on_request, on_push))

    def request(self, peer: str, frame: bytes, timeout: float) -> "Future[bytes]":
        """See [`Transport.request`]."""
        return self._shared.transport.request(peer, frame, timeout)

    def push(self, peer: str, frame: bytes) -> None:
        """See [`Transport.push`]."""
        self._shared.transport.push(peer, frame)

    def close(self) -> None:
        """See [`Transport.close`]."""
        self._shared.close()
