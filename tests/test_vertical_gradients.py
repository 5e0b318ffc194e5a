"""Parties without labels that train: by plain, noisy and encrypted derivatives."""

import numpy as np
import pytest

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.vertical.aggregate import sum_request
from hf_mlopt.vertical.backward import noise_for
from hf_mlopt.vertical.messages import Frame, FrameError, Kind, Purpose, parse_frame
from tests.reference import vertical as reference
from tests.test_vertical_parties import problem, random_split, relative, twin


OWNER = {"labels": "owner", "learning_rate": 0.1, "l2": 0.05}


@pytest.mark.parametrize("mask, bound", [("none", 1e-12), ("pairwise", 1e-6)])
@pytest.mark.parametrize("loss", ["logistic", "ridge", "multinomial"])
def test_plain_derivatives_give_the_iterates_of_one_machine(federate, loss, mask, bound):
    X, y = problem(loss)
    splits = random_split(17, 3, seed=1)
    options = {"algorithm": "sgd", "loss": loss, "num_labels": 3, "mode": "sync", "max_steps": 9, "batch_size": 8}
    federation = federate(X, y, splits, mask=mask, backward="plain", **options, **OWNER).train()
    assert relative(federation.weights, twin(federation, X, y, splits, "sgd", loss, 9)[-1]) <= bound
    assert [party.updater is None for party in federation.parties] == [False, True, True]


def test_saga_of_others_begins_with_an_empty_table(federate):
    """D4: t = 0 and a_l = 0; in plain loops."""
    X, y = problem()
    splits = random_split(17, 3, seed=1)
    options = {"algorithm": "saga", "mode": "sync", "max_steps": 11, "mask": "none", "batch_size": 8}
    federation = federate(X, y, splits, backward="plain", **options, **OWNER).train()
    schedule = federation.parties[0].responder.datasets[0].schedule
    blocks = [np.hstack([X[:, splits[0]], np.ones((23, 1))]), X[:, splits[1]], X[:, splits[2]]]
    weights = [np.zeros((block.shape[1], 1)) for block in blocks]
    start = np.array([reference.theta_of("logistic", [0.0], label, 1) for label in y])
    tables = [start.copy(), np.zeros((23, 1)), np.zeros((23, 1))]
    for k in range(11):
        rows = schedule.rows(schedule.batch(k))
        z = sum(block[rows] @ w for block, w in zip(blocks, weights, strict=True))
        theta = np.array([reference.theta_of("logistic", score, y[i], 1) for score, i in zip(z, rows, strict=True)])
        for number, block in enumerate(blocks):
            mean = block.T @ tables[number] / 23
            step = block[rows].T @ (theta - tables[number][rows]) / len(rows) + mean
            weights[number] = weights[number] - 0.1 * (step + 0.05 * weights[number])
            tables[number][rows] = theta
    assert relative(federation.weights, np.vstack(weights)) <= 1e-12


def test_all_blocks_reach_the_optimum_without_anyone_waiting(federate):
    X, y = problem(rows=40, columns=9)
    splits = random_split(9, 3, seed=0)
    options = {"l2": 0.3, "learning_rate": 0.2, "num_epochs": 60, "batch_size": 8}
    federation = federate(X, y, splits, backward="plain", **(OWNER | options)).train()
    whole = np.hstack([X[:, splits[0]], np.ones((40, 1)), X[:, splits[1]], X[:, splits[2]]])
    w = federation.weights
    gradient = np.mean([reference.gradient_of_row(whole, y, w, i, "logistic") for i in range(40)], axis=0) + 0.3 * w
    assert np.linalg.norm(gradient) ** 2 / (2 * 0.3) <= 1e-4
    assert all(0 < party.store.version <= 300 for party in federation.parties)


def test_encrypted_derivatives_give_the_same_gradients(federate):
    pytest.importorskip("phe", reason="backward='he' needs the package phe")
    X, y = problem(rows=8, columns=3)
    splits = [np.array([0]), np.array([1]), np.array([2])]
    options = {"mode": "sync", "max_steps": 2, "batch_size": 4, "bias": False, "algorithm": "saga"}
    plain = federate(X, y, splits, backward="plain", **options, **OWNER).train()
    encrypted = federate(X, y, splits, backward="he", **options, **OWNER).train()
    assert relative(encrypted.weights, plain.weights) <= 1e-5
    assert np.all(encrypted.weights != 0)


def test_noise_is_that_of_the_bound_and_the_same_for_all(federate):
    X, y = problem()
    splits = random_split(17, 3, seed=1)
    options = {"algorithm": "sgd", "mode": "sync", "max_steps": 6, "mask": "none", "batch_size": 8} | OWNER
    noisy = federate(X, y, splits, backward="dp", dp_epsilon=2.0, dp_delta=1e-3, **options)
    sent = []
    for party in noisy.parties[1:]:
        step = party.responder.backward.answer
        party.responder.backward.answer = lambda peer, f, step=step: sent.append(f.values) or step(peer, f)
    noisy.train()
    owner = noisy.parties[0]
    visits = owner.responder.datasets[0].schedule.most_visits(6)
    assert owner.updater.backward.noise == pytest.approx(noise_for(2.0, 1e-3, visits, 1.0))
    assert len(sent) == 12
    for one, two in zip(sent[::2], sent[1::2], strict=True):
        np.testing.assert_array_equal(one, two)  # one release, not two
    assert np.std(np.concatenate(sent[::2])) > 0.5 * owner.updater.backward.noise
    weak = federate(X, y, splits, backward="dp", dp_epsilon=1e9, dp_delta=1e-3, **options).train()
    exact = twin(weak, X, y, splits, "sgd", "logistic", 6)[-1]
    assert relative(weak.weights, exact) < 1e-2 < relative(noisy.weights, exact)


def test_what_is_out_of_turn_is_refused(federate):
    X, y = problem()
    party = federate(X, y, random_split(17, 3, seed=1), backward="plain", batch_size=8, **OWNER).parties[1]

    def answer(kind, position, values, peer="p00", batch=0):
        frame = Frame(kind, Purpose.TRAIN, party.responder.run, position, batch=batch, values=values)
        return parse_frame(party.responder.on_request(peer, frame.to_bytes()), party.responder.run)

    good = np.zeros((8, 1))
    assert answer(Kind.THETA, 3, good).kind is Kind.RECEIPT
    assert party.store.version == 1
    assert "sent before" in answer(Kind.THETA, 3, good).text
    assert "has no labels" in answer(Kind.THETA, 4, good, peer="p02").text
    assert "derivatives of shape [7, 1]" in answer(Kind.THETA, 5, good[:7]).text
    assert "batch 99 is unknown" in answer(Kind.THETA, 6, good, batch=99).text
    assert "of another mode" in answer(Kind.CIPHER, 7, np.zeros((4, 1), np.uint8)).text
    assert "not asked for" in answer(Kind.PLAIN, 8, np.zeros((4, 1), np.uint8)).text
    assert party.store.version == 1


def test_words_that_climb_out_of_turn_are_refused(federate):
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=1), mask="tree")
    for party in federation.parties:
        party.start()
    sharings = {party.name: party.responder.sharing for party in federation.parties}
    name, tree, child = next(
        (name, tree, child)
        for name, sharing in sharings.items()
        for tree in (0, 1)
        for child in sorted(sharing._places["p00"].children[tree])
    )
    responder = next(party.responder for party in federation.parties if party.name == name)

    def climb(peer, route, shape=(4, 1), round_id=0):
        values = np.ones(shape, np.uint64)
        frame = Frame(Kind.CLIMB, Purpose.TRAIN, responder.run, round_id, values=values, route=route)
        responder.on_push(peer, frame.to_bytes())

    climb(child, tree)
    with pytest.raises(FrameError, match="came twice"):
        climb(child, tree)
    stranger = next(one for one in sharings if one not in sharings[name]._places["p00"].children[tree])
    with pytest.raises(FrameError, match="is no child"):
        climb(stranger, tree, round_id=1)
    with pytest.raises(FrameError, match="party number 9"):
        climb(child, 18)
    with pytest.raises(FrameError, match=r"words of .* are \[3, 1\]"):
        sharings[name]._add(sum_request("p00", Purpose.TRAIN, 0, 0, 0, 0), tree, name, np.ones((3, 1), np.uint64))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"backward": "plain", "algorithm": "svrg", "allow_unsafe": True}, "no derivatives at an anchor"),
        ({"backward": "dp"}, "dp_epsilon=None"),
        ({"backward": "dp", "dp_epsilon": 1.0, "loss": "ridge"}, "dp_clip=None"),
        ({"backward": "dp", "dp_epsilon": 1.0, "dp_delta": 1.0}, "dp_delta=1.0"),
    ],
)
def test_modes_that_cannot_be(options, text):
    from hf_mlopt.vertical.arguments import VerticalArguments

    with pytest.raises(ConfigurationError, match=text):
        VerticalArguments(labels="owner", **options)


def stopped_and_resumed(federate, X, y, splits, at, total, **options):
    """A whole run, one that goes on from its states of step `at`, and those states."""
    saved = {}

    def after_step(updater):
        if updater.position == at:
            whole.parties[0].settle()
            saved["p00"] = whole.parties[0].state_dict()

    options = {"max_steps": total} | options | OWNER
    whole = federate(X, y, splits, **options)
    for party in whole.parties:
        party.on_save(lambda position, party=party: saved.update({party.name: party.state_dict(), "at": position}))
    whole.train(p00=after_step)
    assert saved.pop("at") == at and sorted(saved) == [party.name for party in whole.parties]
    again = federate(X, y, splits, epoch=1, **options)
    for party in again.parties:
        party.load_state_dict(saved[party.name])
    again.train()
    return whole, again, saved


@pytest.mark.parametrize("mask", ["none", "pairwise"])
@pytest.mark.parametrize("algorithm", ["sgd", "saga"])
def test_a_restart_of_all_blocks_continues_to_the_bit(federate, algorithm, mask):
    X, y = problem()
    options = {"algorithm": algorithm, "mode": "sync", "batch_size": 8, "backward": "plain", "mask": mask}
    whole, again, saved = stopped_and_resumed(federate, X, y, random_split(17, 3, seed=1), 5, 11, **options)
    np.testing.assert_array_equal(again.weights, whole.weights)
    for name in ("p01", "p02"):
        assert saved[name]["store"]["version"] == 5
        assert not np.array_equal(saved[name]["store"]["weights"]["values"], whole.parties[int(name[1:])].weights)
    for one, two in zip(again.parties, whole.parties, strict=True):
        assert (one.store.version, one.responder.budget.used()) == (11, two.responder.budget.used())


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_restart_under_encryption(federate, mode):
    """New keys, the same table: to the bit in sync mode, and in async mode no party in the middle of a batch."""
    pytest.importorskip("phe", reason="backward='he' needs the package phe")
    X, y = problem(rows=8, columns=2)
    splits = [np.array([0]), np.array([1])]
    options = {"mode": mode, "batch_size": 4, "bias": False, "backward": "he", "mask": "none"}
    at = 2 if mode == "sync" else 1  # the other party then computes with the first batch
    whole, again, saved = stopped_and_resumed(federate, X, y, splits, at, at + 2, **options)
    assert [saved[name]["store"]["version"] for name in ("p00", "p01")] == [at, at]
    keys = {federation.parties[1].responder.backward._paillier._public.n for federation in (whole, again)}
    assert len(keys) == 2
    if mode == "sync":
        np.testing.assert_array_equal(again.weights, whole.weights)
    consistent(saved, X[:, splits[1]], "p01", 2.0**-20)
    assert again.parties[1].store.version > at


def consistent(saved, features, name, bound):
    """SAGA's a_l of a party is that of the table which the owner keeps for it."""
    table = saved["p00"]["updater"]["backward"]["tables"][name]
    mean = features.T @ table / len(table)
    assert np.any(mean) and np.abs(saved[name]["store"]["weights"]["drift"] - mean).max() <= bound


def test_states_of_an_asynchronous_run_are_of_one_moment(federate):
    X, y = problem(rows=40, columns=9)
    splits = random_split(9, 3, seed=0)
    options = {"num_epochs": 60, "max_steps": None, "batch_size": 8, "backward": "plain"}
    _, again, saved = stopped_and_resumed(federate, X, y, splits, 100, None, **options)
    for name, split in zip(("p01", "p02"), splits[1:], strict=True):
        consistent(saved, X[:, split], name, 1e-12)
    assert [party.store.version for party in again.parties][0] == 300
    assert all(party.store.version > saved[party.name]["store"]["version"] for party in again.parties)


def test_no_state_in_the_middle_of_a_batch_or_under_noise(federate):
    X, y = problem()
    splits = random_split(17, 3, seed=1)
    party = federate(X, y, splits, backward="plain", batch_size=8, **OWNER).parties[1]
    party.on_save(lambda position: pytest.fail("it must not save"))
    party.responder.backward._masks = (3, 0, [1])
    save = Frame(Kind.SAVE, Purpose.TRAIN, party.responder.run, 4).to_bytes()
    reply = parse_frame(party.responder.on_request("p00", save), party.responder.run)
    assert "in the middle of a batch" in reply.text
    assert "has no labels" in parse_frame(party.responder.on_request("p02", save), party.responder.run).text
    options = {"backward": "dp", "dp_epsilon": 2.0, "dp_delta": 1e-3, "batch_size": 8, "max_steps": 2}
    for party in federate(X, y, splits, **options, **OWNER).parties[:2]:
        with pytest.raises(ConfigurationError, match="more than dp_epsilon allows; train from the start"):
            party.load_state_dict(party.state_dict())
