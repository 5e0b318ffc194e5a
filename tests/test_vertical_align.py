"""Alignment: the rows common to all parties, in one order, and nothing else on the wire."""

import hashlib
import itertools
import threading

import numpy as np
import pytest


pytest.importorskip("cryptography", reason="alignment needs the package cryptography")

from hf_mlopt.errors import ConfigurationError, InputError  # noqa: E402
from hf_mlopt.vertical import align as module  # noqa: E402
from hf_mlopt.vertical.align import AlignmentResponder, Blinding, KeyedHash, align, prepare_ids  # noqa: E402
from hf_mlopt.vertical.transport.in_process import InProcessHub  # noqa: E402


# P-256, for an independent check in Python integers (SEC 2, secp256r1).
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
A, B = P - 3, 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def lift(word):
    """A point of the curve by its first coordinate; `None` if there is none."""
    x = int.from_bytes(word, "big")
    square = (x**3 + A * x + B) % P
    y = pow(square, (P + 1) // 4, P)
    return (x, y) if x < P and y * y % P == square else None


def add(p, q):
    if p is None or q is None:
        return p or q
    if p[0] == q[0] and (p[1] + q[1]) % P == 0:
        return None
    if p == q:
        slope = (3 * p[0] ** 2 + A) * pow(2 * p[1], P - 2, P)
    else:
        slope = (q[1] - p[1]) * pow(q[0] - p[0], P - 2, P)
    x = (slope**2 - p[0] - q[0]) % P
    return x, (slope * (p[0] - x) - p[1]) % P


def times(k, p):
    total = None
    for bit in bin(k)[2:]:
        total = add(total, total)
        if bit == "1":
            total = add(total, p)
    return total


def run(tables, label_party="bank", recorded=None, **settings):
    """Aligns over threads; party to alignment."""
    hub = InProcessHub(tuple(tables))
    responders = {}
    for name, ids in tables.items():
        if name == label_party:
            hub.transports[name].serve(lambda peer, frame: b"", lambda peer, frame: None)
            continue
        responders[name] = AlignmentResponder(ids, label_party, **settings)

        def answer(peer, frame, responder=responders[name]):
            answered = responder.answer(peer, frame)
            if recorded is not None:
                recorded.append((frame, answered))
            return answered

        hub.transports[name].serve(answer, lambda peer, frame: None)
    try:
        result = align(hub.transports[label_party], tables[label_party], timeout=30, **settings)
    finally:
        for transport in hub.transports.values():
            transport.close()
    return {label_party: result, **{name: responder.result for name, responder in responders.items()}}


def test_blinding_is_multiplication_on_p_256():
    blinding = Blinding()
    secret = blinding._key.private_numbers().private_value
    words = blinding.hashed([b"7", b"alice"])
    label = b"hf_mlopt/vertical/align/1"
    for identity, word in zip((b"7", b"alice"), words, strict=True):
        for counter in itertools.count():
            parts = (label, counter.to_bytes(4, "big"), identity)
            data = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
            point = lift(hashlib.sha256(data).digest())
            if point:
                break
        assert int.from_bytes(word, "big") == times(secret, point)[0]
        assert times(ORDER, point) is None  # prime order: no subgroup keeps a bit of the id
    other = Blinding()
    assert other.blinded(words) == blinding.blinded(other.hashed([b"7", b"alice"]))


def test_every_blinded_word_is_a_point_of_the_curve():
    words = Blinding().hashed([str(number).encode() for number in range(300)])
    assert all(lift(word) for word in words) and len(set(words)) == 300
    bits = np.unpackbits(np.frombuffer(b"".join(words), np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


@pytest.mark.parametrize("method", ["ecdh", "hmac"])
@pytest.mark.parametrize("num_parties", [2, 3, 5])
@pytest.mark.filterwarnings("ignore:method='hmac'")
def test_parties_find_the_common_rows_in_one_order(num_parties, method):
    rng, names = np.random.default_rng(num_parties), ("bank", "insurer", "shop", "telco", "zoo")
    tables = {name: rng.permutation(120)[: 100 - 3 * place] for place, name in enumerate(names[:num_parties])}
    accept = {"accept_dictionary_attack": True} if method == "hmac" else {}
    aligned = run(tables, method=method, **accept)
    common = set.intersection(*(set(ids.tolist()) for ids in tables.values()))
    orders = {name: tables[name][result.rows].tolist() for name, result in aligned.items()}
    assert len(common) > 10 and set(orders["bank"]) == common
    assert all(order == orders["bank"] for order in orders.values())
    manifests = [result.manifest for result in aligned.values()]
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0].to_dict() == {"rows": len(common), "digest": manifests[0].digest, "method": method}
    # The order is that of no table, and the next alignment's is another.
    for ids in tables.values():
        assert orders["bank"] != [number for number in ids.tolist() if number in common]
    again = run(tables, method=method, **accept)
    assert tables["bank"][again["bank"].rows].tolist() != orders["bank"]
    assert again["bank"].manifest.digest != manifests[0].digest


def test_more_than_one_chunk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    tables = {"bank": [f"a{i}" for i in range(40)], "shop": [f"a{i}" for i in range(11, 60)][::-1]}
    aligned = run(tables)
    orders = [[tables[name][row] for row in aligned[name].rows] for name in tables]
    assert orders[0] == orders[1] and set(orders[0]) == {f"a{i}" for i in range(11, 40)}


def test_texts_and_numbers_are_the_same_ids():
    aligned = run({"bank": [7, 8, 9], "shop": ["9", "7", "x"], "zoo": np.array([9, 7])})
    assert sorted(np.array([7, 8, 9])[aligned["bank"].rows]) == [7, 9]
    assert prepare_ids(["e\u0301"])[0] == prepare_ids(["\u00e9"])[0]


def test_the_wire_holds_no_id_and_no_hash_that_can_be_tried():
    recorded = []
    ids = [f"person-{number}" for number in range(60)]
    aligned = run({"bank": ids[:50], "shop": ids[20:], "zoo": ids}, recorded=recorded)
    wire = b"".join(frame + answer for frame, answer in recorded)
    assert aligned["bank"].manifest.rows == 30 and len(wire) > 60 * 32
    for identity in (text.encode() for text in ids):
        assert identity not in wire
        for known in (Blinding(), KeyedHash(bytes(32))):
            assert known.hashed([identity])[0] not in wire
        assert hashlib.sha256(identity).digest() not in wire


def test_the_responder_learns_its_kept_rows_and_no_order_of_the_label_partys_table():
    """Its rows come sorted by its own shuffle, whatever the label party's table looks like."""
    recorded = []
    run({"bank": list(range(50)), "shop": list(range(50))}, recorded=recorded)
    kept = [np.frombuffer(frame[9:], "<u4") for frame, _ in recorded if frame[4] == module._KEEP]
    assert np.concatenate(kept).tolist() == list(range(50))


def test_the_label_party_learns_no_order_of_the_others_table():
    ids = list(range(50))
    responder, blinding = AlignmentResponder(ids, "bank"), Blinding()
    responder.answer("bank", messages()[0])
    asked = b"".join(blinding.hashed([str(number).encode() for number in ids]))
    in_order = module._words(responder.answer("bank", module._pack(module._BLIND, 0, asked))[9:])
    own = module._words(responder.answer("bank", module._pack(module._OWN, 0))[9:])
    as_sent = blinding.blinded(own)
    assert sorted(as_sent) == sorted(in_order) and as_sent != in_order


def test_repeated_ids():
    ids = ["a", "b", "a", "c", "b", "d"]
    with pytest.raises(InputError, match=r"2 ids occur more than once, the first in rows \[0, 2\]"):
        prepare_ids(ids)
    assert prepare_ids(ids, "first")[1].tolist() == [0, 1, 3, 5]
    assert prepare_ids(ids, "drop")[1].tolist() == [3, 5]
    with pytest.raises(ConfigurationError, match="duplicates='last'"):
        prepare_ids(ids, "last")
    aligned = run({"bank": ids, "shop": ["a", "c", "a", "d"]}, duplicates="drop")
    assert sorted(aligned["bank"].rows.tolist()) == [3, 5]
    assert sorted(run({"bank": ids, "shop": ["a", "c", "a", "d"]}, duplicates="first")["shop"].rows) == [0, 1, 3]


@pytest.mark.parametrize("identity", [None, "", 1.0, float("nan"), True, b"", ("a",)])
def test_ids_of_other_kinds(identity):
    with pytest.raises(InputError, match="row 1 has the id"):
        prepare_ids(["a", identity])


def test_no_common_row():
    with pytest.raises(InputError, match="no row is common to all parties up to 'zoo'"):
        run({"bank": [1, 2], "shop": [2, 3], "zoo": [1, 4]})


def test_hmac_only_when_the_dictionary_attack_is_accepted():
    for make in (lambda: AlignmentResponder([1], "bank", method="hmac"), lambda: align(None, [1], method="hmac")):
        with pytest.raises(ConfigurationError, match="method='hmac': lets the label party try ids"):
            make()
    with pytest.warns(UserWarning, match="can find ids of rows it lacks"):
        AlignmentResponder([1], "bank", method="hmac", accept_dictionary_attack=True)
    with pytest.raises(ConfigurationError, match="method='rsa'"):
        align(None, [1], method="rsa")


@pytest.mark.filterwarnings("ignore:method='hmac'")
def test_the_dictionary_attack_on_hmac_succeeds_and_on_ecdh_does_not():
    """The label party has the key and tries ids that it lacks."""
    found = {}
    for method in module.METHODS:
        recorded, accept = [], {"accept_dictionary_attack": method == "hmac"}
        run({"bank": ["a"], "shop": ["a", "secret"]}, recorded=recorded, method=method, **accept)
        start, own = (next(pair for pair in recorded if pair[0][4] == kind) for kind in (module._START, module._OWN))
        tried = KeyedHash(start[0][9:41]).hashed([b"secret"])[0]
        found[method] = tried in own[1]
    assert found == {"ecdh": False, "hmac": True}


def test_methods_that_differ():
    responder = AlignmentResponder([1], "bank")
    with pytest.raises(InputError, match="method='ecdh' here, another at 'bank'"):
        responder.answer("bank", module._pack(module._START, 0, bytes(32) + b"hmac"))


def test_labels_in_two_parties():
    def labelled(first, second):
        hub = InProcessHub(("bank", "shop"))
        responder = AlignmentResponder([3, 1, 2], "bank", labels=second)
        hub.transports["shop"].serve(responder.answer, lambda peer, frame: None)
        try:
            return align(hub.transports["bank"], [1, 2, 3, 4], labels=first, timeout=20)
        finally:
            for transport in hub.transports.values():
                transport.close()

    assert labelled([0, 1, 1, 5], [1, 0, 1]).manifest.rows == 3  # row 4 is not common
    assert labelled([0, 1, 1, 5], None).manifest.rows == 3
    assert labelled(None, [1, 0, 0]).manifest.rows == 3
    with pytest.raises(InputError, match="'shop' has a label column with other values"):
        labelled([0, 1, 1, 5], [1, 0, 0])


def messages():
    """A whole exchange of one id, as a responder sees it."""
    blinding = Blinding()
    return [
        module._pack(module._START, 0, bytes(32) + b"ecdh"),
        module._pack(module._BLIND, 0, b"".join(blinding.hashed([b"1"]))),
        module._pack(module._OWN, 0),
        module._pack(module._KEEP, 0, np.array([0], "<u4").tobytes()),
        module._pack(module._FINISH, 0, bytes(32)),
    ]


def test_a_responder_answers_the_label_party_only_and_in_turn():
    responder = AlignmentResponder([1], "bank")
    good = messages()
    with pytest.raises(InputError, match="'shop' asks for an alignment, expected 'bank'"):
        responder.answer("shop", good[0])
    for frame in good[1:]:
        with pytest.raises(InputError, match="before the first one"):
            responder.answer("bank", frame)
    for frame in good:
        responder.answer("bank", frame)
    assert responder.result.rows.tolist() == [0]
    with pytest.raises(InputError, match="before the first one"):
        responder.answer("bank", good[1])  # its exponent is gone


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"HFAL",
        b"XXXX" + bytes(5),
        b"HFAL" + bytes([9]) + bytes(4),
        module._pack(module._BLIND, 0, bytes(31)),
        module._pack(module._KEEP, 0, bytes(3)),
        module._pack(module._BLIND, 0, bytes(module.CHUNK * 32 + 32)),
    ],
)
def test_malformed_messages(frame):
    responder = AlignmentResponder([1], "bank")
    responder.answer("bank", messages()[0])
    with pytest.raises(InputError, match="alignment message"):
        responder.answer("bank", frame)


def test_points_off_the_curve_and_rows_that_do_not_exist():
    responder = AlignmentResponder([1], "bank")
    responder.answer("bank", messages()[0])
    off = next(word for word in (bytes(31) + bytes([n]) for n in range(256)) if lift(word) is None)
    with pytest.raises(InputError, match="not on the curve"):
        responder.answer("bank", module._pack(module._BLIND, 0, off))
    for places in ([1], [0, 0]):
        responder.answer("bank", messages()[0])
        responder.answer("bank", module._pack(module._KEEP, 0, np.array(places, "<u4").tobytes()))
        with pytest.raises(InputError, match="keeps rows that do not exist, or one twice"):
            responder.answer("bank", module._pack(module._FINISH, 0, bytes(32)))


def test_a_responder_that_cheats_is_noticed():
    class Cheat(AlignmentResponder):
        def _finish(self, content):
            answer = bytearray(super()._finish(content))
            answer[-33] ^= 1
            return bytes(answer)

    hub = InProcessHub(("bank", "shop"))
    hub.transports["shop"].serve(Cheat([1, 2], "bank").answer, lambda peer, frame: None)
    with pytest.raises(InputError, match="'shop' arrives at other rows"):
        align(hub.transports["bank"], [1, 2], timeout=20)
    for transport in hub.transports.values():
        transport.close()


def test_the_credit_tables_align_after_a_shuffle(shared_data):
    folder = shared_data / "vertical"
    if not folder.is_dir():
        pytest.skip(f"credit data not found at {folder}")
    guest, host = (
        np.loadtxt(folder / f"default_credit_hetero_{part}.csv", delimiter=",", skiprows=1, usecols=0, max_rows=2000)
        for part in ("guest", "host")
    )
    shuffled = np.random.default_rng(0).permutation(host.astype(np.int64))[:1500]
    tables = {"bank": guest.astype(np.int64), "shop": shuffled}
    aligned = run(tables)
    assert (tables["bank"][aligned["bank"].rows] == shuffled[aligned["shop"].rows]).all()
    assert aligned["bank"].manifest.rows == 1500


def test_no_thread_is_left():
    run({"bank": [1], "shop": [1]})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("serve ")]
