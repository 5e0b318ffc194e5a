"""The ends of a gRPC stream: the dialling party asks and pushes, the other one answers. All on one event loop."""

import asyncio
import concurrent.futures
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable

import grpc

from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.transport.envelope import (
    NONCE_BYTES,
    Channel,
    Envelope,
    Kind,
    MalformedFrame,
    differences,
    hello,
    read_hello,
    session_of,
)


MAX_WAITING = 4096  # frames of one peer that are not sent, or not served, yet
_BACKOFF = (0.05, 1.0)  # seconds to wait before dialling again, first and longest


class HandshakeRefused(PeerLost):
    """
    A party whose settings, roster or code version differ. It comes back as soon as they agree.

    Args:
        peer (`str`): The other party.
        differences (`list[str]`): Name and both values of every field that differs.
    """

    def __init__(self, peer: str, differences: list[str]):
        self.differences = differences
        super().__init__(peer, "refused at the handshake: " + "; ".join(differences))


class RequestFailed(PeerLost):
    """
    A party that is alive and would not answer this request. It counts as lost: a sum needs all parties.

    Args:
        peer (`str`): The other party.
        reason (`str`): In its words.
    """

    def __init__(self, peer: str, reason: str):
        self.words = reason
        super().__init__(peer, f"failed to answer: {reason}")


async def first_to_end(*coroutines: Awaitable):
    """Runs them together until one returns or raises, cancels the rest, and raises what that one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class Link:
    """
    The dialling end: connects, shakes hands, and does so again whenever the connection breaks.

    A request on its way when the connection breaks fails, since no one knows whether it was served; one not sent yet
    waits for the next connection until its time is up.

    Args:
        peer (`str`): The other party.
        method (`str`): Path of the stream.
        dial (callable): Opens a channel to it.
        greeting (`dict`): Own `party`, `roster` and `settings`.
        limit (`int`): Largest frame, bytes.
        timeout (`float`): Silence after which the other party counts as lost, seconds.
    """

    def __init__(self, peer: str, method: str, dial: Callable, greeting: dict, limit: int, timeout: float):
        self.peer, self._method, self._dial = peer, method, dial
        self._greeting, self._limit, self._timeout = greeting, limit, timeout
        self.refusal: HandshakeRefused | None = None
        self.down_since: float | None = None  # on the loop's clock; None while connected
        self.reason = "no connection yet"
        self.connected = asyncio.Event()
        self._waiting: deque[tuple[Kind, int, bytes]] = deque()
        self._wake = asyncio.Event()
        self._pending: dict[int, tuple[concurrent.futures.Future, asyncio.TimerHandle]] = {}
        self._sent: set[int] = set()
        self._number = 0
        self._heard = 0.0

    @property
    def num_waiting(self) -> int:
        """Frames not sent yet."""
        return len(self._waiting)

    def ask(self, frame: bytes, timeout: float, future: concurrent.futures.Future):
        """Sends a request as soon as there is a connection; the future gets the answer, or `PeerLost` in time."""
        self._number += 1
        number = self._number
        expiry = asyncio.get_running_loop().call_later(timeout, self._expire, number, timeout)
        self._pending[number] = (future, expiry)
        if self.refusal:
            self._settle(number, error=self.refusal)
        else:
            self.put(Kind.REQUEST, frame, number)

    def put(self, kind: Kind, frame: bytes = b"", number: int = 0):
        """Queues a frame."""
        self._waiting.append((kind, number, frame))
        self._wake.set()

    def refuse(self, fields: list[str]):
        """Fails what waits for this party, whose settings differ, until a handshake succeeds."""
        self.refusal = HandshakeRefused(self.peer, fields)
        for number in list(self._pending):
            self._settle(number, error=self.refusal)

    def fail(self, reason: str, *, unsent: bool):
        """Fails the requests on their way and, if asked, those not sent yet."""
        self.reason = reason
        for number in list(self._pending):
            if unsent or number in self._sent:
                self._settle(number, error=PeerLost(self.peer, reason))

    async def run(self):
        """Keeps the connection until it is cancelled."""
        loop = asyncio.get_running_loop()
        pause = _BACKOFF[0]
        self.down_since = loop.time()
        while True:
            try:
                await self._connection()
                reason = "closed its connection"
            except grpc.aio.AioRpcError as error:
                reason = f"connection lost: {error.code().name} {error.details()}"
                if "handshake failed" in reason:
                    reason += "; one of the two certificates is foreign, expired or another party's: compare them"
            except (MalformedFrame, TimeoutError) as error:
                reason = f"connection closed: {error}"
            if self.connected.is_set():
                self.connected.clear()
                self.down_since, pause = loop.time(), _BACKOFF[0]
            self.fail(reason, unsent=False)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _BACKOFF[1])

    async def _connection(self):
        channel = self._dial()
        try:
            call = channel.stream_stream(self._method)()
            try:
                async with asyncio.timeout(self._timeout):
                    session = await self._shake_hands(call)
            except TimeoutError as error:
                raise TimeoutError(f"no handshake within {self._timeout:g} s") from error
            if session is None:
                return
            self.refusal, self.down_since = None, None
            self.connected.set()
            self._heard = asyncio.get_running_loop().time()
            await first_to_end(self._write(call, session), self._read(call, session), self._watch())
        finally:
            await channel.close()

    async def _shake_hands(self, call) -> int | None:
        nonce = os.urandom(NONCE_BYTES)
        await call.write(Channel(self._limit).pack(Kind.HELLO, hello(**self._greeting, nonce=nonce)))
        data = await call.read()
        if data is grpc.aio.EOF:
            code, details = await call.code(), await call.details()
            raise MalformedFrame(f"no handshake: {code.name} {details}")
        envelope = Channel(self._limit).unpack(data)
        if envelope.kind is Kind.REFUSED:
            self.refuse(_swapped(envelope.frame, self._greeting))
            return None
        if envelope.kind is not Kind.HELLO:
            raise MalformedFrame("no hello")
        other = read_hello(envelope.frame)
        fields = differences(self._greeting, other)
        if other["party"] != self.peer or fields:
            self.refuse(fields or [f"party: {self.peer!r} expected, {other['party']!r} there"])
            return None
        return session_of(nonce, other["nonce"])

    async def _write(self, call, session: int):
        channel = Channel(self._limit, session)
        while True:
            while self._waiting:
                kind, number, frame = self._waiting.popleft()
                if kind is Kind.REQUEST:
                    if number not in self._pending:
                        continue  # it was refused meanwhile
                    self._sent.add(number)
                await call.write(channel.pack(kind, frame, number))
            self._wake.clear()
            await self._wake.wait()

    async def _read(self, call, session: int):
        channel = Channel(self._limit, session)
        while (data := await call.read()) is not grpc.aio.EOF:
            self._heard = asyncio.get_running_loop().time()
            envelope = channel.unpack(data)
            if envelope.kind is Kind.ANSWER:
                self._settle(envelope.number, answer=envelope.frame)
            elif envelope.kind is Kind.FAILED:
                reason = envelope.frame.decode(errors="replace")
                self._settle(envelope.number, error=RequestFailed(self.peer, reason))
            elif envelope.kind is not Kind.PONG:
                raise MalformedFrame(f"{envelope.kind.name} from an answering party")
        details = await call.details()
        if details:
            raise MalformedFrame(details)

    async def _watch(self):
        loop = asyncio.get_running_loop()
        while True:
            self.put(Kind.PING)
            await asyncio.sleep(self._timeout / 4)
            if loop.time() - self._heard > self._timeout:
                raise TimeoutError(f"silent for {self._timeout:g} s")

    def _expire(self, number: int, timeout: float):
        sent = number in self._sent
        if not sent:
            self._waiting = deque(item for item in self._waiting if item[:2] != (Kind.REQUEST, number))
        state = "no answer" if sent else f"no connection ({self.reason})"
        self._settle(number, error=PeerLost(self.peer, f"{state} within {timeout:g} s"))

    def _settle(self, number: int, answer: bytes = b"", error: Exception | None = None):
        future, expiry = self._pending.pop(number, (None, None))
        self._sent.discard(number)
        if future is None:
            return  # answered after its time was up
        expiry.cancel()
        if future.set_running_or_notify_cancel():
            future.set_exception(error) if error else future.set_result(answer)


class Session:
    """
    The answering end of one connection, past its handshake.

    Frames are served one after the other, in the order in which they came, and off the event loop; heartbeats are
    answered at once, so a party that computes for long does not look dead.

    Args:
        context (`grpc.aio.ServicerContext`): The stream.
        limit (`int`): Largest frame, bytes.
        session (`int`): From the handshake.
        timeout (`float`): Silence after which the connection is closed, seconds.
        answer (callable): `await answer(frame)` gives the bytes of an answer, or raises.
        accept (callable): `await accept(frame)` takes a pushed frame.
    """

    def __init__(self, context, limit: int, session: int, timeout: float, answer: Callable, accept: Callable):
        self._context, self._timeout, self._answer, self._accept = context, timeout, answer, accept
        self._limit, self._incoming, self._outgoing = limit, Channel(limit, session), Channel(limit, session)
        self._queue: asyncio.Queue[Envelope] = asyncio.Queue(MAX_WAITING)
        self._writing = asyncio.Lock()
        self._heard = 0.0

    async def run(self):
        """
        Raises:
            MalformedFrame: If the other party sent what no honest one does.
            TimeoutError: If it fell silent.
        """
        self._heard = asyncio.get_running_loop().time()
        await first_to_end(self._read(), self._serve(), self._watch())

    async def _send(self, kind: Kind, frame: bytes = b"", number: int = 0):
        async with self._writing:  # the order of the sequence numbers is that on the wire
            await self._context.write(self._outgoing.pack(kind, frame, number))

    async def _read(self):
        while (data := await self._context.read()) is not grpc.aio.EOF:
            self._heard = asyncio.get_running_loop().time()
            envelope = self._incoming.unpack(data)
            if envelope.kind is Kind.PING:
                await self._send(Kind.PONG)
            elif envelope.kind not in (Kind.REQUEST, Kind.PUSH):
                raise MalformedFrame(f"{envelope.kind.name} from an asking party")
            elif self._queue.full():
                raise MalformedFrame(f"more than {MAX_WAITING} frames at a time")
            else:
                self._queue.put_nowait(envelope)

    async def _serve(self):
        while True:
            envelope = await self._queue.get()
            if envelope.kind is Kind.PUSH:
                await self._accept(envelope.frame)
                continue
            try:
                kind, frame = Kind.ANSWER, await self._answer(envelope.frame)
            except RequestFailed as error:
                kind, frame = Kind.FAILED, error.words.encode()
            await self._send(kind, frame, envelope.number)

    async def _watch(self):
        loop = asyncio.get_running_loop()
        while loop.time() - self._heard <= self._timeout:
            await asyncio.sleep(self._timeout / 4)
        raise TimeoutError(f"silent for {self._timeout:g} s")


def _swapped(frame: bytes, own: dict) -> list[str]:
    """The other end sends its hello with its refusal; the differences are said from this end."""
    try:
        return differences(own, read_hello(frame)) or ["party: not in the other's roster"]
    except MalformedFrame:
        return json.dumps(frame.decode(errors="replace")[:200]).splitlines()
