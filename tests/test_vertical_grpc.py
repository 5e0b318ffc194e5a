"""gRPC with mutual TLS between real processes on loopback, and what it refuses."""

import asyncio
import concurrent.futures
import contextlib
import datetime
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest


grpc = pytest.importorskip("grpc", reason="the transport needs the package grpcio")
pytest.importorskip("cryptography", reason="certificates need the package cryptography")

from hf_mlopt.errors import ConfigurationError, InputError  # noqa: E402
from hf_mlopt.vertical import pki  # noqa: E402
from hf_mlopt.vertical.credentials import Credentials  # noqa: E402
from hf_mlopt.vertical.transport import envelope, grpc_link  # noqa: E402
from hf_mlopt.vertical.transport.base import PeerLost  # noqa: E402
from hf_mlopt.vertical.transport.envelope import Channel, Kind, MalformedFrame  # noqa: E402
from hf_mlopt.vertical.transport.grpc import GrpcTransport, is_loopback  # noqa: E402
from hf_mlopt.vertical.transport.grpc_link import HandshakeRefused, RequestFailed  # noqa: E402
from tests.processes import free_port  # noqa: E402


NAMES = ("bank", "insurer", "shop")
ROSTER = "ab" * 32
PARTY = """
import json, sys, time
from hf_mlopt.vertical.credentials import Credentials
from hf_mlopt.vertical.transport.grpc import GrpcTransport
given = json.loads(sys.argv[1])
folder, pushed = given.pop("folder"), []
def answer(peer, frame):
    if frame == b"pushed":
        return json.dumps(pushed).encode()
    if frame == b"sleep":
        time.sleep(60)
    return given["party"].encode() + b" to " + peer.encode() + b": " + frame
transport = GrpcTransport(credentials=Credentials.load(folder, given["party"]), **given)
transport.serve(answer, lambda peer, frame: pushed.append([peer, frame.decode()]))
print("serving", flush=True)
sys.stdin.read()
transport.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pki")
    pki.create_authority(directory)
    for name in NAMES:
        pki.issue(directory, name)
    return directory


@pytest.fixture
def addresses():
    return {name: f"127.0.0.1:{free_port()}" for name in NAMES}


@pytest.fixture
def closing():
    with contextlib.ExitStack() as stack:
        yield stack


class Audit(list):
    def __call__(self, event, **fields):
        self.append((event, fields))

    def of(self, event):
        return [fields for name, fields in self if name == event]


def echo(peer, frame):
    return peer.encode() + frame


def start(closing, party, addresses, folder, answer=echo, push=lambda peer, frame: None, **settings):
    """A party in this process."""
    given = {"credentials": Credentials.load(folder / party, party), "timeout": 3.0, "roster": ROSTER, **settings}
    transport = GrpcTransport(party, addresses, **given)
    closing.callback(transport.close)
    transport.serve(answer, push)
    return transport


def start_process(closing, party, addresses, folder, **settings):
    """A party in a process of its own."""
    given = {"party": party, "addresses": addresses, "roster": ROSTER, "folder": str(folder / party), "timeout": 3.0}
    command = [sys.executable, "-c", PARTY, json.dumps({**given, **settings})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    closing.callback(process.wait, 30)
    closing.callback(process.stdin.close)
    closing.callback(lambda: process.poll() is None and process.send_signal(signal.SIGCONT))
    assert process.stdout.readline() == b"serving\n"
    return process


def eventually(check, seconds=10):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# Between processes.


@pytest.mark.distributed
def test_three_processes_speak_a_killed_one_is_lost_and_comes_back(closing, folder, addresses):
    processes = {name: start_process(closing, name, addresses, folder) for name in NAMES[1:]}
    audit = Audit()
    bank = start(closing, "bank", addresses, folder, audit=audit)
    assert bank.peers == ("insurer", "shop")
    bank.wait_ready(20)
    futures = {(peer, i): bank.request(peer, b"%d" % i, 10) for i in range(50) for peer in bank.peers}
    for (peer, i), future in futures.items():
        assert future.result() == b"%s to bank: %d" % (peer.encode(), i)
    large = os.urandom(5 << 20)
    assert bank.request("shop", large, 20).result().endswith(large)
    for number in range(20):
        bank.push("shop", b"%d" % number)
    assert json.loads(bank.request("shop", b"pushed", 10).result()) == [["bank", str(n)] for n in range(20)]
    eventually(lambda: {fields["peer"] for fields in audit.of("connected")} == {"insurer", "shop"})

    waiting = bank.request("shop", b"sleep", 60)
    time.sleep(0.2)
    processes["shop"].kill()
    with pytest.raises(PeerLost, match="'shop' is lost: connection") as lost:
        waiting.result(timeout=10)
    assert lost.value.peer == "shop"
    with pytest.raises(PeerLost, match=r"no connection \(.*\) within 0.5 s"):
        bank.request("shop", b"", 0.5).result()
    assert bank.request("insurer", b"still", 10).result() == b"insurer to bank: still"

    start_process(closing, "shop", addresses, folder)
    assert bank.request("shop", b"again", 20).result() == b"shop to bank: again"
    assert json.loads(bank.request("shop", b"pushed", 10).result()) == []


@pytest.mark.distributed
def test_a_stopped_process_is_lost_within_the_timeout(closing, folder, addresses):
    two = {name: addresses[name] for name in ("bank", "shop")}
    process = start_process(closing, "shop", two, folder)
    bank = start(closing, "bank", two, folder, timeout=1.0)
    bank.wait_ready(20)
    process.send_signal(signal.SIGSTOP)
    waiting = bank.request("shop", b"hello", 60)
    with pytest.raises(PeerLost, match="silent for 1 s"):
        waiting.result(timeout=10)
    eventually(lambda: bank._loop.time() - bank._links["shop"].down_since > 1.0)
    with pytest.raises(PeerLost, match="no connection for 1 s"):
        bank.push("shop", b"x")
    process.send_signal(signal.SIGCONT)
    assert bank.request("shop", b"hello", 20).result() == b"shop to bank: hello"


# Who may speak.


def impostor(folder, party, of):
    files = [(folder / of / name).read_bytes() for name in (pki.AUTHORITY, pki.CERTIFICATE, pki.KEY)]
    return Credentials(party, *files)


def expired(folder, party):
    """Issued by the right authority, a year ago for a month."""
    builder = pki._builder

    def in_the_past(*arguments):
        made = builder(*arguments)
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=365)
        made._not_valid_before, made._not_valid_after = start, start + datetime.timedelta(days=30)
        return made

    pki._builder = in_the_past
    try:
        authority = folder.parent / f"{folder.name}-expired"
        authority.mkdir(exist_ok=True)
        for name in (pki.AUTHORITY, pki.AUTHORITY_KEY):
            (authority / name).write_bytes((folder / name).read_bytes())
        made = pki.issue(authority, party)
    finally:
        pki._builder = builder
    with pytest.raises(InputError, match="expired"):
        Credentials.load(made, party)
    files = [(made / name).read_bytes() for name in (pki.AUTHORITY, pki.CERTIFICATE, pki.KEY)]
    for path in made.iterdir():
        path.unlink()
    return Credentials(party, *files)


def foreign(folder, party, tmp_path):
    pki.create_authority(tmp_path / "foreign")
    made = pki.issue(tmp_path / "foreign", party)
    # It knows the true authority's certificate, so that only its own is at fault.
    key, certificate = ((made / name).read_bytes() for name in (pki.KEY, pki.CERTIFICATE))
    return Credentials(party, (folder / pki.AUTHORITY).read_bytes(), certificate, key)


@pytest.mark.parametrize("fault", ["wrong name", "expired", "foreign"])
def test_a_certificate_at_fault_is_refused_at_both_ends(closing, folder, addresses, tmp_path, fault):
    two = {name: addresses[name] for name in ("bank", "shop")}
    credentials = {
        "wrong name": lambda: impostor(folder, "shop", "insurer"),
        "expired": lambda: expired(folder, "shop"),
        "foreign": lambda: foreign(folder, "shop", tmp_path),
    }[fault]()
    served, audit = [], Audit()
    bank = start(closing, "bank", two, folder, answer=lambda *given: served.append(given) or b"", audit=audit)
    shop = start(closing, "shop", two, folder, credentials=credentials)
    waiting = {"shop": bank.request("shop", b"secret", 0.8), "bank": shop.request("bank", b"secret", 0.8)}
    for peer, future in waiting.items():
        with pytest.raises(PeerLost, match="no connection") as lost:
            future.result()
        assert lost.value.peer == peer
        if peer == "shop" and fault != "wrong name":
            assert "one of the two certificates is foreign, expired or" in str(lost.value)
    assert served == [] and audit.of("connected") == []
    if fault == "wrong name":  # it is a certificate of this authority, for a party outside this roster
        eventually(lambda: audit.of("refused"))
        assert audit.of("refused")[0] == {"peer": "insurer", "detail": "not in the roster"}


def test_a_party_of_the_roster_cannot_speak_for_another(closing, folder, addresses):
    audit = Audit()
    start(closing, "bank", addresses, folder, audit=audit)
    frames = asyncio.run(converse(addresses["bank"], impostor(folder, "insurer", "insurer"), hello_of("shop"), []))
    assert frames == [] and "another party's name" in audit.of("malformed")[0]["detail"]
    assert audit.of("malformed")[0]["peer"] == "insurer"


def test_a_client_without_certificate_is_rejected(closing, folder, addresses):
    start(closing, "bank", addresses, folder)
    credentials = grpc.ssl_channel_credentials((folder / pki.AUTHORITY).read_bytes())
    options = [("grpc.ssl_target_name_override", "bank")]
    with grpc.secure_channel(addresses["bank"], credentials, options) as channel:
        call = channel.stream_stream("/hf_mlopt.vertical/converse")(iter([hello_of("shop")]))
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_the_server_speaks_tls_1_3_and_shows_its_party(closing, folder, addresses):
    start(closing, "bank", addresses, folder)
    context = ssl.create_default_context(cafile=str(folder / pki.AUTHORITY))
    context.load_cert_chain(folder / "shop" / "certificate.pem", folder / "shop" / "private.key")
    context.set_alpn_protocols(["h2"])
    host, port = addresses["bank"].split(":")
    with socket.create_connection((host, int(port))) as plain:
        with context.wrap_socket(plain, server_hostname="bank") as secure:
            assert secure.version() == "TLSv1.3"
            assert ("DNS", "bank") in secure.getpeercert()["subjectAltName"]


def test_settings_that_differ_are_refused_by_name_until_they_agree(closing, folder, addresses):
    two = {name: addresses[name] for name in ("bank", "shop")}
    common = {"learning_rate": 0.1, "code": "1.0", "layers": [1, 2]}
    audit = Audit()
    bank = start(closing, "bank", two, folder, settings={**common, "batch_size": 256}, audit=audit)
    other = {**common, "batch_size": 128, "code": "1.1", "extra": None}
    with contextlib.ExitStack() as first:
        shop = start(first, "shop", two, folder, settings=other, roster="cd" * 32)
        expected = [
            f"roster: '{ROSTER[:16]}' here, '{'cd' * 8}' there",
            "batch_size: 256 here, 128 there",
            "code: '1.0' here, '1.1' there",
            "extra: 'absent' here, None there",
        ]
        with pytest.raises(HandshakeRefused) as refused:
            bank.request("shop", b"", 5).result()
        assert refused.value.differences == expected and refused.value.peer == "shop"
        with pytest.raises(HandshakeRefused, match="batch_size: 128 here, 256 there"):
            shop.wait_ready(5)
        with pytest.raises(HandshakeRefused):
            bank.push("shop", b"")
        eventually(lambda: audit.of("refused"))  # bank may have learnt of it by dialling, before shop dialled
        assert "batch_size" in audit.of("refused")[0]["detail"]
        assert audit.of("connected") == []
    start(closing, "shop", two, folder, settings={**common, "batch_size": 256})
    eventually(lambda: bank._links["shop"].refusal is None)  # it tries again by itself
    assert bank.request("shop", b"now", 10).result() == b"banknow"


def test_a_party_that_went_away_with_other_settings_is_remembered_with_the_difference(closing, folder, addresses):
    bank = start(closing, "bank", addresses, folder, settings={"batch_size": 256})
    given = hello_of("shop", {"batch_size": 128})
    asyncio.run(converse(addresses["bank"], impostor(folder, "shop", "shop"), given, []))
    with pytest.raises(HandshakeRefused, match="batch_size: 256 here, 128 there"):
        bank.request("shop", b"", 5).result()


# Bad frames, by a party with a good certificate and a mind of its own.


def hello_of(party, settings=None):
    return Channel(1 << 20).pack(Kind.HELLO, envelope.hello(party, ROSTER, settings or {}, bytes(16)))


async def converse(address, credentials, first, then):
    """Sends raw messages; `then` holds functions of the session. What came back, up to the end of the stream."""
    secure = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    options = [("grpc.ssl_target_name_override", "bank"), ("grpc.max_send_message_length", -1)]
    frames = []
    async with grpc.aio.secure_channel(address, secure, options) as channel:
        call = channel.stream_stream("/hf_mlopt.vertical/converse")()
        await call.write(first)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            data = await call.read()
            if data is grpc.aio.EOF:
                return frames
            other = envelope.read_hello(Channel(1 << 20).unpack(data).frame)
            for message in then:
                await call.write(message(envelope.session_of(bytes(16), other["nonce"])))
            while (data := await asyncio.wait_for(call.read(), 10)) is not grpc.aio.EOF:
                frames.append(data)
    return frames


def packed(kind, frame=b"", number=1, after=0, **changes):
    """The envelope with the given number of others before it."""

    def make(session):
        channel = Channel(1 << 20, changes.get("session", session))
        channel.sequence = after
        return channel.pack(kind, frame, number)

    return make


LIMIT = 4096
BAD = {
    "replayed": ([packed(Kind.REQUEST, b"a"), packed(Kind.REQUEST, b"a")], "replayed: sequence 0, expected 1"),
    "reordered": ([packed(Kind.REQUEST, b"a"), packed(Kind.REQUEST, b"c", after=2)], "out of order"),
    "of another session": ([packed(Kind.REQUEST, b"a"), packed(Kind.PUSH, session=7, after=1)], "another session"),
    "short": ([packed(Kind.REQUEST, b"a"), lambda session: b"HFV"], "shorter than a header"),
    "of another magic": ([packed(Kind.REQUEST, b"a"), lambda session: bytes(100)], "unknown magic or kind"),
    "of an unknown kind": ([packed(Kind.REQUEST, b"a"), packed(77, after=1)], "unknown magic or kind"),
    "an answer": ([packed(Kind.REQUEST, b"a"), packed(Kind.ANSWER, after=1)], "ANSWER from an asking party"),
    "a second hello": ([packed(Kind.REQUEST, b"a"), packed(Kind.HELLO, after=1)], "HELLO from an asking party"),
    "over the limit": ([packed(Kind.REQUEST, b"a"), packed(Kind.PUSH, bytes(LIMIT + 1), after=1)], "over the limit"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_frame_is_dropped_audited_and_ends_the_connection(closing, folder, addresses, case):
    messages, expected = BAD[case]
    served, audit = [], Audit()

    def answer(peer, frame):
        served.append((peer, frame))
        return b"ok"

    push = lambda peer, frame: served.append((peer, frame))  # noqa: E731
    start(closing, "bank", addresses, folder, answer=answer, push=push, audit=audit, max_frame_bytes=LIMIT)
    good = packed(Kind.REQUEST, b"never", number=9, after=2)  # what follows a bad frame is not served either
    asyncio.run(converse(addresses["bank"], impostor(folder, "shop", "shop"), hello_of("shop"), [*messages, good]))
    eventually(lambda: audit.of("malformed"))
    (entry,) = audit.of("malformed")
    assert entry["peer"] == "shop" and expected in entry["detail"]
    assert served in ([], [("shop", b"a")])  # the connection may end before the first is served


def test_a_frame_far_over_the_limit_ends_the_connection(closing, folder, addresses):
    served = []
    answer = lambda peer, frame: served.append(frame) or b"ok"  # noqa: E731
    start(closing, "bank", addresses, folder, answer=answer, max_frame_bytes=LIMIT)
    messages = [packed(Kind.REQUEST, b"a"), packed(Kind.REQUEST, bytes(1 << 20), after=1)]
    asyncio.run(converse(addresses["bank"], impostor(folder, "shop", "shop"), hello_of("shop"), messages))
    assert served in ([], [b"a"])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"nothing",
        hello_of("shop")[:-1],
        Channel(99).pack(Kind.HELLO, b"[]"),
        Channel(99).pack(Kind.HELLO, b"[" * 20_000),
        Channel(99).pack(Kind.HELLO, b'{"party": "shop", "roster": 1, "settings": {}, "nonce": ""}'),
        Channel(99).pack(Kind.REQUEST, b"x"),
    ],
)
def test_no_request_is_served_before_a_handshake(closing, folder, addresses, frame):
    audit = Audit()
    start(closing, "bank", addresses, folder, audit=audit)
    assert asyncio.run(converse(addresses["bank"], impostor(folder, "shop", "shop"), frame, [])) == []
    assert len(audit.of("malformed")) == 1 and audit.of("connected") == []


def test_recorded_frames_of_one_connection_are_no_good_for_the_next(closing, folder, addresses):
    served, audit = [], Audit()
    answer = lambda peer, frame: served.append(frame) or b"ok"  # noqa: E731
    start(closing, "bank", addresses, folder, answer=answer, audit=audit)
    sent = []

    def record(session):
        sent.append(packed(Kind.REQUEST, b"a")(session))
        return sent[0]

    credentials = impostor(folder, "shop", "shop")
    closer = packed(Kind.ANSWER, after=1)
    asyncio.run(converse(addresses["bank"], credentials, hello_of("shop"), [record, closer]))
    eventually(lambda: len(audit.of("malformed")) == 1)
    before = list(served)
    # The very bytes of the first connection, hello and all.
    asyncio.run(converse(addresses["bank"], credentials, hello_of("shop"), [lambda session: sent[0]]))
    eventually(lambda: len(audit.of("malformed")) == 2)
    assert audit.of("malformed")[1]["detail"] == "replayed: of another session" and served == before


# On the wire.


class RecordingProxy:
    """Forwards TCP and keeps what passes."""

    def __init__(self, address):
        host, port = address.split(":")
        self.target, self.recorded = (host, int(port)), []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                try:
                    far = socket.create_connection(self.target)
                except OSError:  # the other party is not there yet
                    near.close()
                    continue
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source, sink):
        try:
            while data := source.recv(65536):
                self.recorded.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)  # what is under way in the other direction still arrives
        except OSError:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.server.close()


@pytest.mark.parametrize("plaintext", [False, True])
def test_a_recording_proxy_sees_no_number(closing, folder, addresses, plaintext):
    values = np.random.default_rng(0).normal(size=4096)
    frame = values.astype("<f8").tobytes()
    proxy = RecordingProxy(addresses["shop"])
    closing.callback(proxy.close)
    known_to_bank = {"bank": addresses["bank"], "shop": proxy.address}
    settings = {"plaintext": True, "credentials": None} if plaintext else {}
    bank = start(closing, "bank", known_to_bank, folder, **settings)
    known_to_shop = {name: addresses[name] for name in ("bank", "shop")}
    start(closing, "shop", known_to_shop, folder, answer=lambda peer, given: given[::-1], **settings)
    assert bank.request("shop", frame, 20).result() == frame[::-1]
    recorded = b"".join(proxy.recorded)
    assert len(recorded) > 2 * len(frame)
    seen = sum(frame[at : at + 8] in recorded for at in range(0, len(frame), 8))
    # The control: without TLS the same search finds them all but those cut by HTTP/2's own framing.
    assert seen > 4000 if plaintext else seen == 0
    assert (b"settings" in recorded) == plaintext


@pytest.mark.distributed
def test_alignment_runs_over_it(closing, folder, addresses):
    from hf_mlopt.vertical.align import AlignmentResponder, align

    ids = np.random.default_rng(0).permutation(300)
    tables = {"bank": ids[:250], "insurer": ids[20:][::-1], "shop": ids[:280]}
    responders = {name: AlignmentResponder(tables[name], "bank") for name in NAMES[1:]}
    for name, responder in responders.items():
        start(closing, name, addresses, folder, answer=responder.answer)
    aligned = align(start(closing, "bank", addresses, folder), tables["bank"], timeout=20)
    assert aligned.manifest.rows == 230
    for name, responder in responders.items():
        assert (tables[name][responder.result.rows] == tables["bank"][aligned.rows]).all()
        assert responder.result.manifest == aligned.manifest


def test_what_happens_is_audited_in_the_log_itself(closing, folder, addresses, tmp_path):
    from hf_mlopt.vertical.audit import AuditLog, verify

    log = AuditLog(tmp_path / "audit.jsonl", "bank")
    start(closing, "bank", addresses, folder, audit=log.record)
    first = [packed(Kind.REQUEST, b"a"), packed(Kind.REQUEST, b"a")]
    asyncio.run(converse(addresses["bank"], impostor(folder, "shop", "shop"), hello_of("shop"), first))
    eventually(lambda: log.head.lines == 3)
    assert verify(log.path) == log.head
    assert [json.loads(line)["event"] for line in log.path.open()] == ["started", "connected", "malformed"]


# Times, errors, fields.


def test_late_answers_errors_and_closing(closing, folder, addresses):
    two = {name: addresses[name] for name in ("bank", "shop")}
    release = threading.Event()

    def answer(peer, frame):
        if frame == b"late":
            release.wait(20)
        if frame == b"refuse":
            raise InputError("budget=3: used up")
        if frame == b"fail":
            raise ValueError("secret value 42")
        return frame

    def push(peer, frame):
        raise ValueError("secret value 42")

    audit = Audit()
    shop = start(closing, "shop", two, folder, answer=answer, push=push, audit=audit)
    bank = start(closing, "bank", two, folder)
    with pytest.raises(RequestFailed, match="budget=3: used up"):
        bank.request("shop", b"refuse", 10).result()
    with pytest.raises(RequestFailed, match="ValueError$") as failed:
        bank.request("shop", b"fail", 10).result()
    assert "42" not in str(failed.value) and isinstance(failed.value, PeerLost)
    bank.push("shop", b"x")
    eventually(lambda: audit.of("push failed"))

    late = bank.request("shop", b"late", 0.3)
    with pytest.raises(PeerLost, match=r"no answer within 0.3 s"):
        late.result(timeout=10)
    cancelled = bank.request("shop", b"cancelled", 10)
    assert cancelled.cancel()
    release.set()
    assert bank.request("shop", b"next", 10).result() == b"next"  # the late answer and the cancelled one do no harm

    release.clear()
    waiting = bank.request("shop", b"late", 30)
    bank.close()
    bank.close()
    with pytest.raises(PeerLost, match="this party closed"):
        waiting.result(timeout=10)
    for use in (lambda: bank.request("shop", b"", 1), lambda: bank.push("shop", b"")):
        with pytest.raises(PeerLost, match="this party closed"):
            use()
    release.set()
    with pytest.raises(PeerLost):
        shop.request("bank", b"", 0.5).result()


def test_a_party_that_computes_for_long_is_not_lost(closing, folder, addresses):
    two = {name: addresses[name] for name in ("bank", "shop")}
    start(closing, "shop", two, folder, answer=lambda peer, frame: time.sleep(1.5) or frame, timeout=0.4)
    bank = start(closing, "bank", two, folder, timeout=0.4)
    assert bank.request("shop", b"slow", 20).result() == b"slow"


def test_requests_of_a_peer_are_served_one_after_another(closing, folder, addresses):
    running, most = [0], []

    def answer(peer, frame):
        running[0] += 1
        most.append(running[0])
        time.sleep(0.01)
        running[0] -= 1
        return frame

    two = {name: addresses[name] for name in ("bank", "shop")}
    start(closing, "shop", two, folder, answer=answer)
    bank = start(closing, "bank", two, folder)
    concurrent.futures.wait([bank.request("shop", b"", 20) for _ in range(10)])
    assert len(most) == 10 and max(most) == 1


def test_what_the_sender_refuses(closing, folder, addresses):
    bank = start(closing, "bank", addresses, folder, max_frame_bytes=1024)
    with pytest.raises(ConfigurationError, match="frame='1025 bytes': must be at most max_frame_bytes=1024"):
        bank.request("shop", bytes(1025), 1)
    with pytest.raises(ConfigurationError, match="peer='nobody'"):
        bank.push("nobody", b"")
    with pytest.raises(RuntimeError, match="serve was called before"):
        bank.serve(echo, echo)
    for _ in range(grpc_link.MAX_WAITING):
        bank.push("shop", b"")
    eventually(lambda: bank._links["shop"].num_waiting >= grpc_link.MAX_WAITING)
    with pytest.raises(PeerLost, match="frames wait to be sent"):
        bank.push("shop", b"")
    with pytest.raises(PeerLost, match="'insurer' is lost: not connected within 0.1 s"):
        bank.wait_ready(0.1)


def test_an_address_in_use(closing, folder, addresses):
    start(closing, "bank", addresses, folder)
    with pytest.raises(InputError, match="cannot be bound"):
        start(closing, "bank", addresses, folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"party": "nobody"}, "party='nobody': must be one of the roster"),
        ({"addresses": {"bank": "127.0.0.1"}}, r"addresses\[bank\]='127.0.0.1': must be host:port"),
        ({"addresses": {"bank": "127.0.0.1:99999"}}, "must be host:port"),
        ({"listen": "x"}, r"addresses\[listen\]"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"max_frame_bytes": 10}, "max_frame_bytes=10"),
        ({"plaintext": True}, "plaintext=True: give credentials, or"),
        ({"credentials": None}, "plaintext=False: give credentials"),
        ({"plaintext": True, "credentials": None, "addresses": {"bank": "10.0.0.1:1"}}, "for loopback only"),
        ({"plaintext": True, "credentials": None, "listen": "0.0.0.0:1"}, "for loopback only"),
        ({"plaintext": True, "credentials": None, "addresses": {"bank": "localhost.evil.org:1"}}, "loopback only"),
        ({"party": "shop", "addresses": {"shop": "127.0.0.1:1"}}, "credentials='bank': must be those of 'shop'"),
    ],
)
def test_fields(folder, change, message):
    given = {
        "party": "bank",
        "addresses": {"bank": "127.0.0.1:0"},
        "roster": ROSTER,
        "credentials": Credentials.load(folder / "bank", "bank"),
    }
    with pytest.raises(ConfigurationError, match=message):
        GrpcTransport(**{**given, **change})


def test_loopback_is_told_without_a_name_server():
    for address in ("127.0.0.1:1", "127.9.9.9:1", "[::1]:5", "localhost:80"):
        assert is_loopback(address)
    for address in ("10.0.0.1:1", "0.0.0.0:1", "[::]:1", "bank.org:1", "localhost.org:1"):
        assert not is_loopback(address)


def test_every_bit_of_an_envelope_counts():
    sender, frame = Channel(100, session=5), b"abc"
    data = [sender.pack(Kind.REQUEST, frame, number=n) for n in range(3)]
    receiver = Channel(100, session=5)
    for number, message in enumerate(data):
        got = receiver.unpack(message)
        assert (got.kind, got.number, got.frame) == (Kind.REQUEST, number, frame)
    for bit in range(8 * 20):  # magic, kind, session, sequence
        changed = bytearray(data[0])
        changed[bit // 8] ^= 1 << bit % 8
        fresh = Channel(100, session=5)
        try:
            assert fresh.unpack(bytes(changed)).kind is not Kind.REQUEST
        except MalformedFrame:
            assert fresh.sequence == 0  # a bad frame does not move the window
    with pytest.raises(MalformedFrame, match="over the limit"):
        Channel(2, session=5).unpack(data[0])
