"""
Parties on different machines: gRPC streams with mutual TLS, one stream in each direction of each pair.

A peer is whom its certificate names, checked at both ends: the dialling party takes only a certificate that names the
party it dials, the answering one only a name of its roster. Settings that all parties must have alike are compared at
the handshake. TLS is negotiated between two gRPC ends, which gives version 1.3.
"""

import asyncio
import concurrent.futures
import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping

import grpc

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.credentials import Credentials, party_names
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.transport.envelope import (
    HEADER_BYTES,
    NONCE_BYTES,
    Channel,
    Kind,
    MalformedFrame,
    differences,
    hello,
    read_hello,
    session_of,
)
from hf_mlopt.vertical.transport.grpc_link import MAX_WAITING, Link, RequestFailed, Session


logger = logging.getLogger(__name__)

_METHOD = "/hf_mlopt.vertical/converse"
_STOP_SECONDS = 2.0
_SLACK = 65536  # bytes above the limit that still reach the check which audits them; gRPC ends the stream beyond


class GrpcTransport:
    """
    Implements `Transport` for one party. Threads may share it; callbacks of its futures run on its event loop and must
    not wait for another future of it.

    Args:
        party (`str`): Own name.
        addresses (mapping of `str` to `str`): `host:port` of every party, in roster order, own one included.
        roster (`str`): Digest of the roster, hexadecimal.
        credentials ([`~credentials.Credentials`], *optional*): Own. Absent only with `plaintext`.
        settings (`dict`, *optional*): What all parties must have alike (JSON values): hyper-parameters,
            code version.
        listen (`str`, *optional*): `host:port` to bind, where it differs from the own address; port 0 takes any.
        timeout (`float`, *optional*, defaults to 30): Seconds of silence after which a peer counts as lost.
        max_frame_bytes (`int`, *optional*, defaults to 64 MiB): Largest frame sent or taken.
        plaintext (`bool`, *optional*): Speak without TLS and believe every name. Loopback addresses only.
        audit (callable, *optional*): `audit(event, peer=..., detail=...)` for connections, refusals, bad frames.

    Raises:
        ConfigurationError: If a field is out of range, or plaintext would leave the machine.
    """

    def __init__(
        self,
        party: str,
        addresses: Mapping[str, str],
        roster: str,
        credentials: Credentials | None = None,
        settings: dict | None = None,
        *,
        listen: str | None = None,
        timeout: float = 30.0,
        max_frame_bytes: int = 64 << 20,
        plaintext: bool = False,
        audit: Callable[..., object] | None = None,
    ):
        _check(party, addresses, credentials, listen, timeout, max_frame_bytes, plaintext)
        self.name, self.peers = party, tuple(name for name in addresses if name != party)
        self.port: int | None = None
        self.timeout, self.max_frame_bytes = float(timeout), max_frame_bytes
        self._addresses, self._listen = dict(addresses), listen or addresses[party]
        self._credentials = credentials
        self._greeting = {"party": party, "roster": roster, "settings": settings or {}}
        hello(**self._greeting, nonce=bytes(NONCE_BYTES))  # settings that are not JSON are refused here
        self._audit = audit if audit is not None else lambda event, **fields: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._links: dict[str, Link] = {}

    def serve(self, on_request: Callable[[str, bytes], bytes], on_push: Callable[[str, bytes], None]) -> None:
        """
        Listens, and dials the peers in the background. Call once, before [`request`].

        Args:
            on_request (callable): `(peer, frame) -> frame`, on a thread of its own for each peer.
            on_push (callable): `(peer, frame)`, in one order with the requests of that peer.

        Raises:
            InputError: If the address cannot be bound.
        """
        if self._loop is not None:
            raise RuntimeError("serve was called before")
        self._on_request, self._on_push = on_request, on_push
        self._executor = concurrent.futures.ThreadPoolExecutor(max(1, len(self.peers)), "vertical-responder")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vertical-transport", daemon=True)
        self._thread.start()
        try:
            self._on_loop(self._start()).result()
        except BaseException:
            self.close()
            raise

    def wait_ready(self, timeout: float) -> None:
        """
        Waits until every peer is connected.

        Raises:
            HandshakeRefused: If a peer's settings differ.
            PeerLost: If one is not there in time.
        """

        end = self._loop.time() + timeout

        async def wait(link: Link):
            while not link.connected.is_set():
                if link.refusal:
                    raise link.refusal
                if self._loop.time() > end:
                    raise PeerLost(link.peer, f"not connected within {timeout:g} s: {link.reason}")
                await asyncio.sleep(0.02)

        for link in self._links.values():
            self._on_loop(wait(link)).result()

    def request(self, peer: str, frame: bytes, timeout: float) -> concurrent.futures.Future[bytes]:
        """
        Args:
            peer (`str`): Whom to ask.
            frame (`bytes`): The question.
            timeout (`float`): Seconds for the answer.

        Returns:
            `concurrent.futures.Future`: The answer; `PeerLost` if none comes in time or the connection breaks,
            `HandshakeRefused` (a `PeerLost`) if the settings differ,
            `RequestFailed` if the peer would not serve it.
        """
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        link = self._link(peer, frame)
        try:
            self._loop.call_soon_threadsafe(link.ask, frame, timeout, future)
        except RuntimeError as error:  # the loop was closed meanwhile
            raise PeerLost(peer, "this party closed its transport") from error
        return future

    def push(self, peer: str, frame: bytes) -> None:
        """
        Sends a frame that has no answer. It may be lost with its connection.

        Raises:
            PeerLost: If the peer has been away for the timeout, was refused, or has too much waiting for it.
        """
        link = self._link(peer, frame)
        if link.refusal:
            raise link.refusal
        down_since = link.down_since
        if down_since is not None and self._loop.time() - down_since > self.timeout:
            raise PeerLost(peer, f"no connection for {self.timeout:g} s: {link.reason}")
        try:
            self._loop.call_soon_threadsafe(link.put, Kind.PUSH, frame)
        except RuntimeError as error:
            raise PeerLost(peer, "this party closed its transport") from error

    def close(self) -> None:
        """Ends all connections; what is still awaited fails with `PeerLost`. Not to be called from a callback."""
        if self._closed or self._loop is None:
            self._closed = True
            return
        self._closed = True
        self._on_loop(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _link(self, peer: str, frame: bytes) -> Link:
        if self._closed:
            raise PeerLost(peer, "this party closed its transport")
        if peer not in self._links:
            raise ConfigurationError("peer", peer, f"must be one of {list(self.peers)}, after serve")
        if len(frame) > self.max_frame_bytes:
            remedy = f"must be at most max_frame_bytes={self.max_frame_bytes}: raise that at all parties or send less"
            raise ConfigurationError("frame", f"{len(frame)} bytes", remedy)
        link = self._links[peer]
        if link.num_waiting >= MAX_WAITING:
            raise PeerLost(peer, f"{MAX_WAITING} frames wait to be sent")
        return link

    def _on_loop(self, coroutine: Coroutine) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _options(self) -> list[tuple[str, object]]:
        limit = self.max_frame_bytes + HEADER_BYTES + _SLACK
        return [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", -1)]

    async def _start(self):
        handler = grpc.stream_stream_rpc_method_handler(self._converse)
        generic = grpc.method_handlers_generic_handler(_METHOD.split("/")[1], {_METHOD.split("/")[2]: handler})
        options = [*self._options(), ("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 4)]
        self._server = grpc.aio.server(handlers=[generic], options=options)
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self._listen)
            else:
                own = self._credentials
                pair = [(own.key, own.certificate)]
                secure = grpc.ssl_server_credentials(pair, own.authority, require_client_auth=True)
                self.port = self._server.add_secure_port(self._listen, secure)
        except RuntimeError as error:
            raise InputError(f"listen={self._listen!r} cannot be bound: take a free port of this machine") from error
        # Of a peer that came back, the old connection's last frame may still be served.
        self._serving = {peer: asyncio.Lock() for peer in self.peers}
        self._links = {peer: self._make_link(peer) for peer in self.peers}
        await self._server.start()
        self._tasks = [asyncio.ensure_future(link.run()) for link in self._links.values()]

    def _make_link(self, peer: str) -> Link:
        address = self._addresses[peer]
        options = [*self._options(), ("grpc.initial_reconnect_backoff_ms", 100)]
        options += [("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
        if is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))

        def dial() -> grpc.aio.Channel:
            # A channel for every try: an old one may go on waiting for an address that has come back.
            if self._credentials is None:
                return grpc.aio.insecure_channel(address, options)
            own = self._credentials
            secure = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
            return grpc.aio.secure_channel(address, secure, [*options, ("grpc.ssl_target_name_override", peer)])

        return Link(peer, _METHOD, dial, self._greeting, self.max_frame_bytes, self.timeout)

    async def _stop(self):
        for task in getattr(self, "_tasks", []):
            task.cancel()
        await asyncio.gather(*getattr(self, "_tasks", []), return_exceptions=True)
        for link in self._links.values():
            link.fail("this party closed its transport", unsent=True)
        # What streams that end now raise is nobody's concern, and would be printed with a traceback.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await self._server.stop(grace=0)
        # Handlers of ended streams are cancelled by now; the loop must not stop before they know.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_STOP_SECONDS)

    async def _converse(self, _, context):
        """The answering end of a stream."""
        peer = self._identify(context)
        if peer is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate names no other party of the roster")
        try:
            async with asyncio.timeout(self.timeout):
                peer, session = await self._shake_hands(context, peer)
            if session is None:
                return
            self._audit("connected", peer=peer, detail=context.peer())
            await self._session(context, peer, session).run()
        except (MalformedFrame, TimeoutError) as error:
            event = "malformed" if isinstance(error, MalformedFrame) else "silent"
            self._audit(event, peer=peer, detail=str(error) or "no handshake in time")
            logger.warning("connection of %r closed: %s", peer, error)
            await context.abort(grpc.StatusCode.ABORTED, f"{event}: {error}")

    def _identify(self, context) -> str | None:
        """Whom the certificate names; an empty name until the hello in plaintext."""
        if self._credentials is None:
            return ""
        names = [name.decode() for name in context.auth_context().get("x509_subject_alternative_name", ())]
        named = party_names(names)
        if len(named) == 1 and named[0] in self.peers:
            return named[0]
        self._audit("refused", peer=",".join(named), detail="not in the roster")
        return None

    async def _shake_hands(self, context, peer: str) -> tuple[str, int | None]:
        data = await context.read()
        if data is grpc.aio.EOF:
            return peer, None
        envelope = Channel(self.max_frame_bytes).unpack(data)
        if envelope.kind is not Kind.HELLO:
            raise MalformedFrame("no hello")
        other = read_hello(envelope.frame)
        if other["party"] not in self.peers or (peer and other["party"] != peer):
            raise MalformedFrame("a hello in another party's name")
        peer, nonce = other["party"], os.urandom(NONCE_BYTES)
        fields = differences(self._greeting, other)
        if fields:
            self._audit("refused", peer=peer, detail="; ".join(fields))
            self._links[peer].refuse(fields)
        kind = Kind.REFUSED if fields else Kind.HELLO
        answer = hello(**self._greeting, nonce=nonce)
        await context.write(Channel(self.max_frame_bytes).pack(kind, answer))
        return peer, None if fields else session_of(other["nonce"], nonce)

    def _session(self, context, peer: str, session: int) -> Session:
        loop, lock = asyncio.get_running_loop(), self._serving[peer]

        async def answer(frame: bytes) -> bytes:
            try:
                async with lock:
                    return await loop.run_in_executor(self._executor, self._on_request, peer, frame)
            except InputError as error:
                raise RequestFailed(peer, str(error)) from error
            except Exception as error:
                # The text of an unforeseen error may quote data, which stays here.
                logger.exception("a request of %r failed", peer)
                raise RequestFailed(peer, type(error).__name__) from error

        async def accept(frame: bytes):
            try:
                async with lock:
                    await loop.run_in_executor(self._executor, self._on_push, peer, frame)
            except Exception:
                self._audit("push failed", peer=peer)
                logger.exception("a pushed frame of %r failed", peer)

        return Session(context, self.max_frame_bytes, session, self.timeout, answer, accept)


def is_loopback(address: str) -> bool:
    """Whether `host:port` is on this machine, told without looking names up."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(party, addresses, credentials, listen, timeout, max_frame_bytes, plaintext):
    if party not in addresses:
        raise ConfigurationError("party", party, f"must be one of the roster {list(addresses)}")
    for name, address in (*addresses.items(), ("listen", listen or addresses[party])):
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigurationError(f"addresses[{name}]", address, "must be host:port")
        if plaintext and not is_loopback(address):
            remedy = "plaintext is for loopback only: give every party a certificate"
            raise ConfigurationError(f"addresses[{name}]", address, remedy)
    if plaintext == (credentials is not None):
        remedy = "give credentials, or plaintext=True on loopback, and not both"
        raise ConfigurationError("plaintext", plaintext, remedy)
    if credentials is not None and credentials.party != party:
        raise ConfigurationError("credentials", credentials.party, f"must be those of {party!r}")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise ConfigurationError("timeout", timeout, "must be a positive number of seconds")
    if (
        not isinstance(max_frame_bytes, int)
        or isinstance(max_frame_bytes, bool)
        or not 1024 <= max_frame_bytes < 2**31
    ):
        raise ConfigurationError(
            "max_frame_bytes", max_frame_bytes, "must be a whole number of bytes, 1024 to 2^31 - 1"
        )
