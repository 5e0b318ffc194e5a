"""The secure sum: exact against a twin in Python integers, uniform without it, and refused where it would not hide."""

import ast
import itertools
import math
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import hf_mlopt.secure_sum
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum import (
    FixedPoint,
    IncompleteRound,
    MaskedSum,
    MaskedVector,
    Party,
    Request,
    Roster,
    keys,
    masks,
    pairwise,
)
from tests.reference import secure_sum as reference


NAMES = ("bank", "insurer", "shop", "telco", "zoo", "Airline", "Größe")
PRIVATE = {name: bytes([number + 1]) * 32 for number, name in enumerate(NAMES)}  # fixed keys: nothing here is chance
RUN = "credit-2026"
KEYS_7 = tuple((name, bytes([number]) * 32) for number, name in enumerate(NAMES))  # for what needs no agreement
SHAPES = [(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (17,), (2, 2, 2, 2)]


def make_parties(num: int = 3, **roster):
    """Parties with known keys that have joined one roster."""
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    parties = {}
    for name in NAMES[:num]:
        parties[name] = Party.resume(name, {"private_key": PRIVATE[name].hex(), "answered": {}})
    roster = Roster(RUN, {name: party.public_key for name, party in parties.items()}, **roster)
    for party in parties.values():
        party.join(roster)
    return parties, roster


def add_all(roster, request, vectors):
    total = MaskedSum(roster, request)
    for vector in vectors:
        total.add(vector)
    return total.result()


def draw(shape, seed, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


# Building blocks against their RFCs, twin and library alike.


def test_x25519_is_that_of_rfc_7748():
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice_public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    bob_public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    base = (9).to_bytes(32, "little")
    assert keys.public_key(alice).hex() == reference.x25519(alice, base).hex() == alice_public
    assert keys.public_key(bob).hex() == reference.x25519(bob, base).hex() == bob_public
    assert reference.x25519(alice, bytes.fromhex(bob_public)).hex() == shared


def test_the_twin_has_the_hkdf_of_rfc_5869():
    extracted = reference.hkdf_extract(bytes(range(13)), b"\x0b" * 22)
    assert extracted.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    expanded = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert reference.hkdf_expand(extracted, bytes(range(0xF0, 0xFA)), 42).hex() == expanded


def test_the_keystream_is_that_of_rfc_8439():
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    blocks = (  # Appendix A.1, test vectors 1 and 2
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    (words,) = masks.keystream(bytes(32), 16)
    assert words.tobytes().hex() == blocks
    assert reference.stream(bytes(32), 16) == words.tolist()


def test_the_keystream_goes_on_over_chunks():
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    key, size = bytes(range(32)), 2 * masks.CHUNK + 3
    chunks = list(masks.keystream(key, size))
    assert [len(chunk) for chunk in chunks] == [masks.CHUNK, masks.CHUNK, 3]
    words = np.concatenate(chunks)
    assert len(set(words.tolist())) == size  # no block comes back
    for place in (0, masks.CHUNK - 8, masks.CHUNK, 2 * masks.CHUNK):
        block = reference.chacha20_block(key, place // 8, bytes(12))
        assert words[place : place + 8].tobytes() == block[: 8 * len(words[place : place + 8])]
    vector = np.arange(size, dtype=np.uint64)
    masks.add_mask(vector, key, negative=False)
    assert (vector == np.arange(size, dtype=np.uint64) + words).all()
    masks.add_mask(vector, key, negative=True)
    assert (vector == np.arange(size, dtype=np.uint64)).all()


# Fixed point.


@pytest.mark.parametrize("bits", [1, 24, 52])
def test_encoding_is_the_twins(bits):
    values = np.concatenate(
        [draw(200, bits), draw(50, 1, 1e-8), [0.0, -0.0, 0.5, -0.5, 1.5, 2.0**-bits, -(2.0**-bits)]]
    )
    point = FixedPoint(3, bits)
    words = point.encode(values)
    assert words.dtype == np.uint64
    assert words.tolist() == [reference.encode(x, bits) for x in values.tolist()]
    assert point.decode(words).tolist() == [reference.decode(word, bits) for word in words.tolist()]


@pytest.mark.parametrize("num_parties", [1, 3, 4, 7, 1000, 4096, 100_003])
@pytest.mark.parametrize("bits", [1, 24, 52])
def test_parties_at_the_limit_do_not_wrap_around_and_beyond_it_they_are_refused(num_parties, bits):
    point = FixedPoint(num_parties, bits)
    for sign in (1, -1):
        word = reference.encode(sign * point.limit, bits)
        assert point.encode([sign * point.limit]).tolist() == [word]
        total = np.array([num_parties * word % 2**64], np.uint64)
        assert point.decode(total)[0] == float(num_parties * Fraction(sign * point.limit))
        with pytest.raises(ConfigurationError, match="absolute value for .* parties"):
            point.encode([sign * math.nextafter(point.limit, math.inf)])
    beyond = max(math.nextafter(point.limit, math.inf), point.limit + 2.0**-bits)
    assert num_parties * Fraction(point.limit) * 2**bits <= 2**63 - 1 < num_parties * Fraction(beyond) * 2**bits


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint16, np.int64])
def test_other_types_are_encoded_by_value_and_left_alone(dtype):
    values = np.arange(24, dtype=dtype).reshape(4, 6)[::2, ::-1]
    before = values.copy()
    words = FixedPoint(3).encode(values)
    assert (words == before.astype(np.uint64) << np.uint64(24)).all() and (values == before).all()


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.0, math.nan], r"values\[1\]=nan: must be finite"),
        ([[0.0], [-math.inf]], r"values\[1, 0\]=-inf: must be finite"),
        (math.inf, "values=inf: must be finite"),
        ([1.0, 2.0, 1.9e11], r"values\[2\]=190000000000.0: must be at most 1.83252e\+11 .* scale or clip"),
        ([1e308], "must be at most"),
        ([2**63], "must be at most"),
        ([1j], "must be an array of real numbers"),
        ([True], "must be an array of real numbers"),
        (["1"], "must be an array of real numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_cannot_be_encoded(values, message):
    with pytest.raises(ConfigurationError, match=message):
        FixedPoint(3).encode(values)
    with pytest.raises(ConfigurationError, match="^gradient"):
        FixedPoint(3).encode(values, "gradient")


@pytest.mark.parametrize("fields", [(0,), (-3,), (3.0,), (True,), (3, 0), (3, 53), (3, 24.0), (3, True)])
def test_fields_of_the_fixed_point(fields):
    with pytest.raises(ConfigurationError, match="must be a whole number"):
        FixedPoint(*fields)


# The sum.


@pytest.mark.parametrize("num", [3, 4, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("error")
def test_every_word_and_every_sum_is_the_twins(num, shape):
    bits, request = 20 + num, Request(12, "bank/train", b"epoch 3")
    parties, roster = make_parties(num, epoch=2, fraction_bits=bits)
    # Parties need not agree on how an array lies in memory.
    values = {name: np.array(draw(shape, seed, 1e3), order="CF"[seed % 2]) for seed, name in enumerate(parties)}
    vectors = {name: party.mask(values[name], request) for name, party in parties.items()}

    private = {name: PRIVATE[name] for name in parties}
    twin = {}
    for name in parties:
        flat = np.ravel(values[name]).tolist()
        twin[name] = reference.masked(flat, name, private, RUN, 2, bits, 12, "bank/train", b"epoch 3")
        assert vectors[name].words.shape == shape and vectors[name].words.dtype == np.uint64
        assert np.ravel(vectors[name].words).tolist() == twin[name]

    total = add_all(roster, request, reversed(list(vectors.values())))
    assert total.shape == shape and total.dtype == np.float64
    assert np.ravel(total).tolist() == reference.total(twin.values(), bits)
    exact = sum(values.values(), np.zeros(shape))
    assert np.all(np.abs(total - exact) <= num * 2.0 ** -(bits + 1) + 1e-11)


def test_many_parties_and_more_than_a_chunk():
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    parties = [Party(f"site {number}") for number in range(24)]
    roster = Roster(RUN, tuple((party.name, party.public_key) for party in parties))
    request, size = Request(0), masks.CHUNK + 5
    total, words = MaskedSum(roster, request), np.zeros(size, np.uint64)
    for number, party in enumerate(parties):
        party.join(roster)
        values = draw(size, number)
        words += roster.fixed_point.encode(values)
        total.add(party.mask(values, request))
    assert (total.result() == roster.fixed_point.decode(words)).all()


# What it hides.


def test_masked_words_of_structured_data_are_uniform():
    parties, _ = make_parties()
    size = 102_400
    values = np.repeat([0.0, 1.0, -1.0, 1e6], size // 4)
    for party in parties.values():
        words = party.mask(values, Request(0)).words
        counts = np.bincount(words.view(np.uint8), minlength=256)
        expected = 8 * size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert 165 < chi_square < 355  # 255 degrees of freedom, 4 standard deviations of 22.6 each way
        bits = np.unpackbits(words.view(np.uint8)).reshape(size, 64).mean(0)
        assert np.abs(bits - 0.5).max() < 5 * 0.5 / math.sqrt(size)
        correlation = np.corrcoef(values, words.astype(np.float64))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(size)


def test_without_masks_the_same_statistics_speak():
    words = FixedPoint(3).encode(np.repeat([0.0, 1.0, -1.0, 1e6], 25_600))
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert ((counts - 3200) ** 2 / 3200).sum() > 1e6


def test_one_vector_masked_twice_looks_like_two_vectors():
    parties, _ = make_parties()
    values = draw(20_000, 0)
    first, second = (parties["bank"].mask(values, Request(number)).words for number in (0, 1))
    for words in (second - first, second + first):
        counts = np.bincount(words.view(np.uint8), minlength=256)
        assert ((counts - 625) ** 2 / 625).sum() < 355


def sign_matrix(parties, roster, request):
    """Rows: parties in order. Columns: pairs. Checked on the way: masks are these signs times the keystreams."""
    names = roster.names
    pairs = list(itertools.combinations(range(len(names)), 2))
    matrix = np.zeros((len(names), len(pairs)), np.int64)
    streams = []
    for column, (low, high) in enumerate(pairs):
        matrix[low, column], matrix[high, column] = 1, -1
        key = parties[names[low]]._pair_keys[names[high]]
        assert key == parties[names[high]]._pair_keys[names[low]]
        key = keys.request_key(key, roster.digest, request.to_bytes())
        streams.append(np.concatenate(list(masks.keystream(key, 6))))
    for row, name in enumerate(names):
        words = parties[name].mask(np.zeros(6), request).words
        assert (words == matrix[row].astype(np.uint64) @ np.array(streams)).all()
    return matrix, pairs


@pytest.mark.parametrize("num", [3, 5])
def test_what_colluders_see_fixes_the_sum_of_the_others_and_no_more(num):
    parties, roster = make_parties(num)
    matrix, pairs = sign_matrix(parties, roster, Request(0))
    for count in range(1, num + 1):
        for honest in itertools.combinations(range(num), count):
            # Colluders strip the keystreams they share; those inside `honest` remain. A combination of the honest
            # words free of masks is in the left null space, which holds multiples of (1, ..., 1) and nothing else.
            # Minors of such a matrix are 0 or ±1, so ranks over the reals are ranks modulo 2^64.
            inside = [column for column, pair in enumerate(pairs) if set(pair) <= set(honest)]
            rest = matrix[np.ix_(honest, inside)]
            assert (np.linalg.matrix_rank(rest) if inside else 0) == count - 1
            assert (rest.sum(0) == 0).all()
            if count == num:  # any q - 1 of the words, without the last: nothing is free of masks
                for row in range(num):
                    assert np.linalg.matrix_rank(np.delete(rest, row, axis=0)) == num - 1


def test_the_sum_and_all_vectors_but_one_give_the_sum_of_the_rest():
    parties, roster = make_parties(4)
    request, fixed_point = Request(0), roster.fixed_point
    values = {name: draw(1000, seed) for seed, name in enumerate(parties)}
    words = {name: party.mask(values[name], request).words for name, party in parties.items()}
    total = sum(words.values())
    for name in parties:
        # Subtracting what the others sent leaves what this one sent: still masked.
        rest = total - sum(word for other, word in words.items() if other != name)
        assert (rest == words[name]).all()
        assert not (rest == fixed_point.encode(values[name])).any()
        # All others together do isolate it, as the documentation says.
        own = sum(fixed_point.encode(values[other]) for other in parties if other != name)
        assert (total - own == fixed_point.encode(values[name])).all()


def test_no_request_shares_a_key_with_another(monkeypatch):
    used = []

    def recording(*arguments):
        used.append(keys.request_key(*arguments))
        return used[-1]

    monkeypatch.setattr(pairwise, "request_key", recording)
    requests = [Request(number, channel, context) for number, channel, context in [
        (0, "", b""), (1, "", b""), (256, "", b""), (0, "a", b""), (1, "a", b"b"), (0, "ab", b""), (1, "ab", b""),
        (0, "c", b"x"), (1, "c", b"y"), (0, "bank/train", b""), (0, "bank/predict", b""),
    ]]  # fmt: skip
    for settings in ({}, {"epoch": 1}, {"fraction_bits": 20}):
        parties, _ = make_parties(3, **settings)
        for request, party in itertools.product(requests, parties.values()):
            party.mask([1.0], request)
    assert len(used) == 3 * len(requests) * 3 * 2  # settings, requests, parties, peers
    assert sorted(used.count(key) for key in set(used)) == [2] * (len(used) // 2)  # both ends of a pair, none else


def test_a_state_used_twice_discloses_a_difference():
    """Why rounds are refused: the same keystream under two vectors is gone from their difference."""
    (first, _), (second, roster) = make_parties(), make_parties()
    a, b = draw(10, 0), draw(10, 1)
    words = first["bank"].mask(a, Request(0)).words - second["bank"].mask(b, Request(0)).words
    assert (words == roster.fixed_point.encode(a) - roster.fixed_point.encode(b)).all()


# Rounds, restarts, threads.


def test_a_round_is_answered_once_and_only_upwards():
    parties, roster = make_parties()
    bank = parties["bank"]
    for bad in ([math.nan], [1e300]):
        with pytest.raises(ConfigurationError, match=r"^update\[0\]"):
            bank.mask(bad, Request(5), field="update")
    bank.mask([1.0], Request(5))  # what was refused did not use the round up
    for round_id in (5, 4, 0):
        with pytest.raises(InputError, match="'bank' has answered up to 5.*ask for a higher round"):
            bank.mask([1.0], Request(round_id, context=b"other"))
    bank.mask([1.0], Request(0, "other"))
    bank.mask([1.0], Request(7))
    bank.join(Roster(RUN, roster.members, epoch=1))
    with pytest.raises(InputError, match="answered up to 7"):
        bank.mask([1.0], Request(7))


def test_a_restart_keeps_the_key_and_the_rounds():
    parties, roster = make_parties()
    parties["bank"].mask([1.0], Request(3, "train"))
    state = parties["bank"].state_dict()
    parties["bank"].mask([1.0], Request(9, "train"))
    assert state["answered"] == {"train": 3}  # a state is a copy
    again = Party.resume("bank", state)
    assert again.public_key == parties["bank"].public_key and again.state_dict() == state
    with pytest.raises(InputError, match="has not joined a roster"):
        again.mask([1.0], Request(4, "train"))
    again.join(roster)
    with pytest.raises(InputError, match="answered up to 3"):
        again.mask([1.0], Request(3, "train"))
    parties["bank"] = again
    request = Request(4, "train")
    vectors = [party.mask([number], request) for number, party in enumerate(parties.values())]
    assert add_all(roster, request, vectors).tolist() == [3.0]
    assert state["answered"] == {"train": 3}  # the party took a copy


def test_keys_are_fresh_whatever_the_seeds():
    pytest.importorskip("cryptography", reason="masks need the package cryptography")
    public = set()
    for _ in range(4):
        np.random.seed(0)
        public.add(Party("bank").public_key)
    assert len(public) == 4


def test_of_two_threads_that_ask_for_one_round_one_is_answered():
    parties, _ = make_parties()
    start, answers = threading.Barrier(8), []

    def ask():
        start.wait()
        try:
            answers.append(parties["bank"].mask(np.ones(1000), Request(0)))
        except InputError:
            answers.append(None)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8 and sum(answer is not None for answer in answers) == 1


# Bad input.


@pytest.mark.parametrize(
    "change, message",
    [
        ({"members": KEYS_7[:2]}, r"members=\['bank', 'insurer'\]: a masked sum needs three parties"),
        ({"members": KEYS_7[:1]}, "needs three parties"),
        ({"members": ()}, "needs three parties"),
        ({"members": (*KEYS_7[:3], ("bank", bytes([9]) * 32))}, "members='bank': this name occurs twice"),
        ({"members": (*KEYS_7[:3], ("new", KEYS_7[0][1]))}, "this public key occurs twice"),
        ({"members": (*KEYS_7[:3], ("", bytes([9]) * 32))}, "a party needs a name"),
        ({"members": (*KEYS_7[:3], ("new", b"short"))}, r"members\[new\]=b'short': must be an X25519 public key"),
        ({"members": (*KEYS_7[:3], ("new", "ab" * 16))}, "must be an X25519 public key of 32 bytes"),
        ({"run": ""}, "run=''"),
        ({"epoch": -1}, "epoch=-1: must be a whole number"),
        ({"fraction_bits": 60}, "fraction_bits=60"),
    ],
)
def test_rosters_that_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        Roster(**{"run": RUN, "members": KEYS_7[:3], **change})


def test_a_roster_is_what_it_says_in_any_order():
    roster = Roster(RUN, KEYS_7)
    assert roster == Roster(RUN, KEYS_7[::-1]) == Roster(RUN, dict(KEYS_7))
    assert roster.names == tuple(sorted(NAMES)) and roster.fixed_point == FixedPoint(7, 24)
    others = [Roster("other", KEYS_7), Roster(RUN, KEYS_7[:6]), Roster(RUN, KEYS_7, 1), Roster(RUN, KEYS_7, 0, 23)]
    swapped = (("bank", KEYS_7[1][1]), ("insurer", KEYS_7[0][1]), *KEYS_7[2:])
    others.append(Roster(RUN, swapped))
    assert len({roster.digest, *(other.digest for other in others)}) == 6


@pytest.mark.parametrize("fields", [(-1,), (1.0,), (True,), (2**63,), (0, b"channel"), (0, "", "context")])
def test_requests_that_are_refused(fields):
    with pytest.raises(ConfigurationError, match="must be"):
        Request(*fields)


def test_rosters_a_party_does_not_join():
    parties, roster = make_parties(4)
    bank = parties["bank"]
    with pytest.raises(InputError, match="'bank' is not in the roster"):
        bank.join(Roster(RUN, [member for member in roster.members if member[0] != "bank"], 1))
    stranger = Party("bank")
    with pytest.raises(InputError, match="make a roster with the new key"):
        stranger.join(roster)
    bank.join(roster)  # the same once more
    with pytest.raises(InputError, match="epoch=0: a changed roster of run 'credit-2026' needs an epoch above 0"):
        bank.join(Roster(RUN, roster.members[:3]))
    zero = tuple((name, bytes(32) if name == "shop" else key) for name, key in roster.members)
    with pytest.raises(InputError, match="'bank', 'shop'.*ask that party for a new key"):
        bank.join(Roster(RUN, zero, 1))
    assert bank.roster == roster
    bank.join(Roster("another run", roster.members[:3]))


def test_vectors_a_sum_does_not_take():
    parties, roster = make_parties(4)
    request = Request(1, "train", b"batch 1")
    bank, insurer, shop, telco = (party.mask(np.ones(3), request) for party in parties.values())
    total = MaskedSum(roster, request)
    before = bank.words.copy()
    total.add(bank)

    def changed(vector, **fields):
        return MaskedVector(**{**vars(vector), **fields})

    for vector, message in [
        (bank, "masked vector of 'bank' for .*: a second one; drop it"),
        (changed(insurer, party="zoo"), "not in the roster"),
        (changed(insurer, roster=bytes(32)), "made for roster 0000000000000000, expected"),
        (changed(insurer, request=Request(0, "train", b"batch 1")), "made for .*round_id=0.*would not cancel"),
        (changed(insurer, request=Request(1, "train", b"batch 2")), "made for .*batch 2"),
        (changed(insurer, words=insurer.words[:2]), r"shape \[2\], others sent \[3\]"),
        (changed(insurer, words=insurer.words[None]), r"shape \[1, 3\], others sent \[3\]"),
        (changed(insurer, words=np.ones(3)), "words are float64, expected a uint64 array"),
        (changed(insurer, words=insurer.words.tolist()), "words are <class 'list'>"),
    ]:
        with pytest.raises(InputError, match=message):
            total.add(vector)
    for vector in (insurer, shop):
        total.add(vector)
    with pytest.raises(
        IncompleteRound, match=r"is void, vectors are missing from \['telco'\].*higher epoch"
    ) as caught:
        total.result()
    assert caught.value.missing == ["telco"] and caught.value.request == request
    total.add(telco)  # refused ones left the sum as it was
    assert total.result().tolist() == [4.0] * 3
    assert (bank.words == before).all()


def test_the_rest_go_on_with_a_roster_of_their_own():
    parties, roster = make_parties(4)
    gone = parties.pop("telco")
    smaller = Roster(RUN, {name: party.public_key for name, party in parties.items()}, epoch=1)
    for party in parties.values():
        party.join(smaller)
    request = Request(2)
    vectors = [party.mask([1.0], request) for party in parties.values()]
    assert add_all(smaller, request, vectors).tolist() == [3.0]
    with pytest.raises(InputError, match="not in the roster"):
        MaskedSum(smaller, request).add(gone.mask([1.0], request))
    with pytest.raises(InputError, match="made for roster"):
        MaskedSum(roster, request).add(vectors[0])


# The room.


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.x25519", None)
    with pytest.raises(InputError, match=r"pip install 'hf-mlopt\[secure-sum\]'"):
        Party("bank")


def test_no_private_key_in_what_is_printed():
    parties, roster = make_parties()
    printed = repr(parties) + repr(roster) + repr(parties["bank"].mask([1.0], Request(0)))
    assert PRIVATE["bank"].hex() not in printed and repr(PRIVATE["bank"]) not in printed


def test_neither_pickle_nor_a_generator_that_can_be_seeded():
    banned = {"pickle", "random", "torch", "marshal", "dill"}
    files = sorted(Path(hf_mlopt.secure_sum.__file__).parent.glob("*.py"))
    assert len(files) == 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            words = set()
            if isinstance(node, ast.Import):
                words = {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.ImportFrom):
                words = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Attribute):
                words = {node.attr}
            assert not words & banned, (file, node.lineno)


def test_public_names():
    assert set(hf_mlopt.secure_sum.__all__) == {
        "FixedPoint", "IncompleteRound", "MaskedSum", "MaskedVector", "Party", "Request", "Roster",
        "build_trees", "climb", "hops", "mask_share", "unmask", "validate_trees",
    }  # fmt: skip
    for name in hf_mlopt.secure_sum.__all__:
        assert getattr(hf_mlopt.secure_sum, name).__doc__
