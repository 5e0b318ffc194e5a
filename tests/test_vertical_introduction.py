"""Conversations over one transport, and what parties tell each other before and after training."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from hf_mlopt.errors import InputError
from hf_mlopt.vertical import pki
from hf_mlopt.vertical.credentials import Credentials
from hf_mlopt.vertical.introduction import PREFIX, Facts, Introduction, session_id
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.transport.in_process import InProcessHub
from hf_mlopt.vertical.transport.shared import SharedTransport


NAMES = ("bank", "insurer", "shop")
OTHER = b"hfv1"


@pytest.fixture
def shared():
    hub = InProcessHub(NAMES)
    made = {name: SharedTransport(hub.transports[name], (PREFIX, OTHER), patience=5.0) for name in NAMES}
    for one in made.values():
        one.start()
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    pki.create_authority(folder)
    return {name: Credentials.load(pki.issue(folder, name), name) for name in NAMES}


def introductions(shared, credentials=None, notes=None, timeout=5.0, run="run"):
    made = {}
    for name in NAMES:
        note = (lambda event, **fields: notes.append((event, fields))) if notes is not None else (lambda e, **f: None)
        given = (credentials[name] if credentials else None, run, timeout, timeout, note)
        made[name] = Introduction(shared[name].conversation(PREFIX), *given)
        made[name].listen()
    return made


def facts(name, **changes):
    key = {"bank": "01", "insurer": "02", "shop": "03"}[name] * 32
    return replace(Facts(3, 100, "ab" * 32, key), **changes)


def exchange(made, given, labels=None, recipients=("bank", "insurer")):
    with ThreadPoolExecutor(3) as pool:
        parts = {
            name: pool.submit(one.exchange, given[name], labels if name == "bank" else None, recipients)
            for name, one in made.items()
        }
    return {name: part.result() for name, part in parts.items()}


# Conversations.


def test_a_frame_waits_until_its_conversation_begins(shared):
    asker = shared["bank"].conversation(OTHER)
    early = asker.request("shop", OTHER + b"1", 5.0)
    pushed = []
    asker.push("shop", OTHER + b"2")
    time.sleep(0.1)
    assert not early.done()
    shared["shop"].conversation(OTHER).serve(lambda peer, f: peer.encode() + f, lambda peer, f: pushed.append(f))
    assert early.result(5) == b"bank" + OTHER + b"1"
    assert asker.request("shop", OTHER + b"3", 5.0).result(5) == b"bank" + OTHER + b"3"
    assert pushed == [OTHER + b"2"]
    assert (asker.name, asker.peers) == ("bank", ("insurer", "shop"))


def test_frames_of_no_conversation_and_a_second_server_are_refused(shared):
    with pytest.raises(PeerLost, match="is of another program or version"):
        shared["bank"].conversation(OTHER).request("shop", b"what", 5.0).result(5)
    shared["shop"].conversation(OTHER).serve(lambda peer, f: f, lambda peer, f: None)
    with pytest.raises(RuntimeError, match="served already"):
        shared["shop"].conversation(OTHER).serve(lambda peer, f: f, lambda peer, f: None)


def test_what_waits_ends_when_the_party_closes(shared):
    waiting = shared["bank"].conversation(OTHER).request("shop", OTHER, 60.0)
    time.sleep(0.1)
    start = time.monotonic()
    shared["shop"].conversation(PREFIX).close()
    with pytest.raises(PeerLost):
        waiting.result(5)
    assert time.monotonic() - start < 4


# Introductions.


def test_all_learn_the_facts_of_all_and_recipients_the_labels(shared, credentials):
    notes, labels = [], np.array([1.0, -1.0, 1.0])
    made = introductions(shared, credentials, notes)
    found = exchange(made, {name: facts(name, num_features=len(name)) for name in NAMES}, labels)
    for name in NAMES:
        assert {other: fact.num_features for other, fact in found[name].items()} == {n: len(n) for n in NAMES}
        assert {other: fact.public_key[:2] for other, fact in found[name].items()} == {
            "bank": "01", "insurer": "02", "shop": "03",
        }  # fmt: skip
    np.testing.assert_array_equal(made["insurer"].labels("bank"), labels)
    assert notes == [("labels sent", {"peer": "insurer", "rows": 3})]
    with pytest.raises(PeerLost, match="'shop' may not ask 'bank'"):
        made["shop"].labels("bank")
    with pytest.raises(PeerLost, match="may not ask 'shop'"):
        made["bank"].labels("shop")
    ids = {session_id(found[name]) for name in NAMES}
    assert len(ids) == 1
    changed = {**found["bank"], "shop": replace(found["bank"]["shop"], nonce="0" * 32)}
    assert session_id(changed) not in ids


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"num_rows": 99}, "num_rows: 100 here, 99 at 'shop'"),
        ({"alignment": "cd" * 32}, "alignment: .* at 'shop'"),
        ({"public_key": ""}, "disagree on masks"),
    ],
)
def test_parties_that_differ_are_refused(shared, changes, text):
    made = introductions(shared)
    given = {name: facts(name, **(changes if name == "shop" else {})) for name in NAMES}
    with pytest.raises(InputError, match=text):
        exchange({"bank": made["bank"], "insurer": made["insurer"], "shop": made["shop"]}, given)


@pytest.mark.parametrize("fault", ["another key", "another run", "another party", "unsigned"])
def test_a_key_that_its_party_did_not_sign_is_refused(shared, credentials, fault):
    made = introductions(shared, credentials)
    if fault == "another run":
        made["shop"].run = "another"
    if fault == "another party":
        made["shop"].credentials = credentials["insurer"]
    if fault == "unsigned":
        made["shop"].credentials = None
    if fault == "another key":
        answer = made["shop"]._answer

        def relay(peer, frame):
            told = Facts.from_bytes(answer(peer, frame), peer)
            return replace(told, public_key="04" * 32).to_bytes()

        shared["shop"]._handlers[PREFIX] = (relay, lambda peer, frame: None)
    with pytest.raises(InputError, match="'shop'"):
        exchange(made, {name: facts(name) for name in NAMES})


ALIKE = b'"num_rows": 1, "alignment": "", "public_key": '


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"num_features": 1}',
        b'{"num_features": -1, ' + ALIKE + b'""}',
        b'{"num_features": 1, ' + ALIKE + b'"xy"}',
        b'{"num_features": 1, "more": 1, ' + ALIKE + b'""}',
    ],
)
def test_facts_that_are_none(data):
    with pytest.raises(InputError, match="'shop' introduces itself"):
        Facts.from_bytes(data, "shop")


def test_others_stay_until_the_label_owner_ends(shared):
    made = introductions(shared, timeout=0.4)
    ended = []
    threads = [threading.Thread(target=lambda n=name: ended.append(made[n].part("bank") or n)) for name in NAMES[1:]]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # longer than they take to look whether the owner is alive
    assert ended == []
    made["bank"].part("bank")
    for thread in threads:
        thread.join(5)
    assert sorted(ended) == ["insurer", "shop"]


def test_an_owner_that_is_gone_is_missed(shared):
    made = introductions(shared, timeout=0.4)
    shared["bank"].close()
    with pytest.raises(PeerLost, match="'bank' is lost"):
        made["shop"].part("bank")
