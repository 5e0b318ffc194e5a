"""Parties as threads of one process, for simulation and tests."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from transformers.utils import logging

from hf_mlopt.vertical.transport.base import PeerLost


logger = logging.get_logger(__name__)


class InProcessHub:
    """
    Connects transports by name.

    Args:
        names (`tuple[str, ...]`): All parties, in roster order.
    """

    def __init__(self, names: tuple[str, ...]):
        self.transports = {name: InProcessTransport(name, self) for name in names}


class InProcessTransport:
    """[`Transport`] over queues; one thread a party serves what arrives."""

    def __init__(self, name: str, hub: InProcessHub):
        self.name, self._hub = name, hub
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: set[Future] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def peers(self) -> tuple[str, ...]:
        """The others, in roster order."""
        return tuple(name for name in self._hub.transports if name != self.name)

    def serve(self, on_request: Callable[[str, bytes], bytes], on_push: Callable[[str, bytes], None]) -> None:
        """See [`Transport.serve`]."""
        if self._thread is not None:
            raise RuntimeError(f"party {self.name!r} serves already")
        arguments = (on_request, on_push)
        self._thread = threading.Thread(target=self._loop, args=arguments, name=f"serve {self.name}", daemon=True)
        self._thread.start()

    def _loop(self, on_request, on_push):
        while (item := self._inbox.get()) is not None:
            peer, frame, reply = item
            try:
                if reply is None:
                    on_push(peer, frame)
                else:
                    _settle(reply, on_request(peer, frame))
            except Exception as error:  # a bad frame ends no party; its sender must not wait for an answer
                logger.warning(f"party {self.name!r} drops a frame of {peer!r}: {error}")
                if reply is not None:
                    _settle(reply, error=PeerLost(self.name, f"failed to answer: {error}"))

    def request(self, peer: str, frame: bytes, timeout: float) -> "Future[bytes]":
        """See [`Transport.request`]."""
        reply: Future[bytes] = Future()
        lost = PeerLost(peer, f"no answer within {timeout:g} s")
        timer = threading.Timer(timeout, _settle, (reply,), {"error": lost})
        timer.daemon = True
        reply.add_done_callback(lambda _: timer.cancel())
        timer.start()
        if not self._hub.transports[peer]._take((self.name, frame, reply)):
            _settle(reply, error=PeerLost(peer, "closed"))
        return reply

    def push(self, peer: str, frame: bytes) -> None:
        """See [`Transport.push`]."""
        if not self._hub.transports[peer]._take((self.name, frame, None)):
            raise PeerLost(peer, "closed")

    def _take(self, item) -> bool:
        with self._lock:
            if self._closed:
                return False
            if item[2] is not None:
                self._waiting.add(item[2])
                item[2].add_done_callback(self._waiting.discard)
            self._inbox.put(item)
            return True

    def close(self) -> None:
        """See [`Transport.close`]."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._waiting)
        self._inbox.put(None)
        for reply in waiting:
            _settle(reply, error=PeerLost(self.name, "closed"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _settle(reply: Future, result: bytes | None = None, error: Exception | None = None):
    """Answers once; a reply may come after its time is up or the party closed."""
    try:
        if error is None:
            reply.set_result(result)
        else:
            reply.set_exception(error)
    except Exception:  # concurrent.futures.InvalidStateError
        if not reply.done():
            raise
