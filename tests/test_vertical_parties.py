"""Parties that really talk: sums, barriers, staleness, refusals, losses and restarts, over threads of one process."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.secure_sum import FixedPoint, Party, Roster
from hf_mlopt.vertical.aggregate import PairwiseSharing, PlainSharing, sum_request
from hf_mlopt.vertical.anchor import AnchorKeeper
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.budget import LeakBudget, LeakBudgetExceeded, automatic_budget
from hf_mlopt.vertical.climb import TreeSharing
from hf_mlopt.vertical.inbox import Inbox
from hf_mlopt.vertical.messages import HEADER_BYTES, Frame, FrameError, Kind, Purpose, parse_frame
from hf_mlopt.vertical.party import VerticalParty
from hf_mlopt.vertical.store import WeightStore
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.vertical.transport.in_process import InProcessHub
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.schedule import BatchSchedule
from hf_mlopt.vertical.updates.weights import LazyWeights, Update
from tests.reference import vertical as reference


RUN = bytes(range(16))
OPEN = {
    "allow_unsafe": True,
    "accept_gram_disclosure": True,
    "accept_two_party_disclosure": True,
    "query_budget": None,
}
LOSSES = {"logistic": 1, "ridge": 1, "multinomial": 3}


def problem(loss="logistic", rows=23, columns=17, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.7)
    if loss == "logistic":
        return X, np.where(rng.random(rows) < 0.4, 1.0, -1.0)
    return X, rng.normal(size=rows) if loss == "ridge" else rng.integers(0, 3, rows)


class Federation:
    """Parties p00, p01, … with the columns of X split among them; the first owns the labels."""

    def __init__(
        self, X, y, splits, epoch=0, recipients=None, wrap=lambda t: t, compute=None, is_sparse=False, **options
    ):
        self.arguments = VerticalArguments(**({"batch_size": 4, "timeout": 20.0} | OPEN | options))
        names = tuple(f"p{number:02d}" for number in range(len(splits)))
        facts = Parties(
            len(X), {name: len(split) for name, split in zip(names, splits, strict=True)}, "p00", recipients
        )
        self.hub = InProcessHub(names)
        keys = {name: Party(name) for name in names} if self.arguments.mask == "pairwise" else {}
        roster = Roster("run", {name: key.public_key for name, key in keys.items()}, epoch) if keys else None
        self.parties = []
        for name, split in zip(names, splits, strict=True):
            if keys:
                keys[name].join(roster)
            sharing = PairwiseSharing(keys[name]) if keys else PlainSharing(names)
            if self.arguments.mask == "tree":
                sharing = TreeSharing(name, names, FixedPoint(len(names)), 20.0)
            block = sparse.csr_array(X[:, split]) if is_sparse else X[:, split]
            labels = y if name in facts.label_holders(self.arguments.labels) else None
            pause = (compute or {}).get(name)
            transport = wrap(self.hub.transports[name])
            party = VerticalParty(self.arguments, facts, transport, sharing, block, labels, compute=pause)
            self.parties.append(party)

    def train(self, **after_step):
        """All parties at once; raises the first error."""
        with ThreadPoolExecutor(len(self.parties)) as pool:
            runs = [pool.submit(party.train, after_step.get(party.name)) for party in self.parties]
        self.errors = [run.exception() for run in runs]
        for error in self.errors:
            if error is not None:
                raise error
        return self

    def close(self):
        for transport in self.hub.transports.values():
            transport.close()

    @property
    def weights(self):
        """Stacked, in the order of the splits, each block's bias after its columns."""
        return np.vstack([party.weights for party in self.parties])


def random_split(columns, parties, seed):
    """Columns in any order, blocks of any size."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, columns), parties - 1, replace=False))
    return np.split(rng.permutation(columns), cuts)


def twin(federation, X, y, splits, algorithm, loss, steps):
    """Iterates of one machine that has the columns in the federation's order and the bias of the first party."""
    first = [np.hstack([X[:, splits[0]], np.ones((len(X), 1))])] if federation.arguments.bias else [X[:, splits[0]]]
    whole = np.hstack(first + [X[:, split] for split in splits[1:]])
    schedule = federation.parties[0].responder.datasets[0].schedule
    rows = [schedule.rows(schedule.batch(k)) for k in range(steps)] + [None]
    options = (federation.arguments.learning_rate, federation.arguments.l2, loss, LOSSES[loss])
    return reference.centralised(algorithm, whole, y, rows.__getitem__, schedule.num_batches, *options)


def relative(one, two):
    return np.linalg.norm(one - two) / np.linalg.norm(two)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("algorithm", ["sgd", "svrg", "saga"])
@pytest.mark.parametrize("mask", ["none", "pairwise", "tree"])
@pytest.mark.parametrize("share", [False, True])
def test_synchronous_parties_equal_one_machine(federate, algorithm, loss, mask, share):
    """A1, every iterate."""
    X, y = problem(loss)
    splits, steps = random_split(17, 3, seed=1), 14
    options = {"algorithm": algorithm, "loss": loss, "num_labels": 3, "mode": "sync", "max_steps": steps, "l2": 0.05}
    federation = federate(X, y, splits, mask=mask, learning_rate=0.1, share_aggregates=share, **options)
    seen = {party.name: [] for party in federation.parties}
    federation.train(**{name: lambda u: seen[u.responder.name].append(u.store.read_all()) for name in seen})
    for k, exact in enumerate(twin(federation, X, y, splits, algorithm, loss, steps)):
        error = relative(np.vstack([seen[name][k] for name in seen]), exact)
        assert error <= (1e-12 if mask == "none" else 1e-6)
        assert error > 0 or mask == "none" or k == 0  # masked shares of weights but zero are rounded


@pytest.mark.parametrize("parties", range(1, 17))
@pytest.mark.parametrize("algorithm", ["sgd", "svrg", "saga"])
def test_any_number_of_parties_equals_one_machine(federate, parties, algorithm):
    """A1: 1 to 16 parties, dense and sparse, past two anchors of SVRG."""
    X, y = problem()
    splits = random_split(17, parties, seed=parties)
    options = {"mode": "sync", "max_steps": 5, "batch_size": 12, "l2": 0.05, "learning_rate": 0.1}
    masks = (
        ("none",) if parties < 3 else ("none", "pairwise", "tree") if parties in (3, 8, 16) else ("none", "pairwise")
    )
    for number, mask in enumerate(masks):
        is_sparse = (parties + number) % 2 == 0
        federation = federate(X, y, splits, mask=mask, algorithm=algorithm, is_sparse=is_sparse, **options).train()
        exact = twin(federation, X, y, splits, algorithm, "logistic", 5)[-1]
        assert relative(federation.weights, exact) <= (1e-12 if mask == "none" else 1e-6)


def test_only_label_holders_train(federate):
    X, y = problem()
    splits = random_split(17, 4, seed=2)
    for options in ({"recipients": ("p02",), "mode": "sync"}, {"labels": "owner", "backward": "none"}):
        federation = federate(X, y, splits, max_steps=5, **options).train()
        trained = {party.name for party in federation.parties if np.any(party.weights)}
        assert trained == ({"p00", "p02"} if "recipients" in options else {"p00"})


@pytest.mark.parametrize(
    "ways", [{}, {"inflight": 3}, {"push_ahead": 3}, {"mask": "none", "inflight": 2}, {"mask": "tree", "inflight": 2}]
)
@pytest.mark.parametrize("algorithm", ["svrg", "saga"])
def test_asynchronous_parties_reach_the_optimum(federate, algorithm, ways):
    """A2 in small, with real masks."""
    X, y = problem(rows=40, columns=9)
    splits = random_split(9, 3, seed=0)
    options = {"algorithm": algorithm, "l2": 0.3, "learning_rate": 0.2, "num_epochs": 30, "batch_size": 8}
    federation = federate(X, y, splits, **options, **ways).train()
    whole = np.hstack([X[:, splits[0]], np.ones((40, 1)), X[:, splits[1]], X[:, splits[2]]])
    w = federation.weights
    theta = np.array([reference.gradient_of_row(whole, y, w, i, "logistic") for i in range(40)])
    gradient = theta.mean(0) + 0.3 * w
    assert np.linalg.norm(gradient) ** 2 / (2 * 0.3) <= 1e-5  # bounds f - f* by strong convexity
    assert all(party.store.version == 150 for party in federation.parties)
    assert all(sum(party.updater.staleness.values()) == 150 for party in federation.parties)


class Held:
    """A transport that keeps back the answers for anchors until a gate opens."""

    def __init__(self, transport, gate):
        self._transport, self._gate = transport, gate

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def request(self, peer, frame, timeout):
        reply = self._transport.request(peer, frame, timeout)
        if parse_frame(frame, frame[8:24]).purpose is not Purpose.ANCHOR:
            return reply
        late = Future()

        def release():
            self._gate.wait(30)
            late.set_result(reply.result())

        threading.Thread(target=release, daemon=True).start()
        return late


def test_training_goes_on_while_an_anchor_is_summed(federate):
    """D8: no answer for an anchor comes before every party has made two more epochs, and then they use it."""
    X, y = problem()
    gate, arrived = threading.Event(), threading.Barrier(3, timeout=30)
    splits = random_split(17, 3, seed=0)
    federation = federate(X, y, splits, algorithm="svrg", num_epochs=4, wrap=lambda t: Held(t, gate))

    def follow(updater):
        if updater.position == 18:
            assert updater.anchors.number == 0
            assert updater.anchors._sum is not None
            arrived.wait()
            gate.set()
        elif updater.position > 18 and updater.anchors._sum is not None:
            for pending in updater.anchors._sum._pending:
                for reply in pending.replies.values():
                    reply.result(30)

    federation.train(**dict.fromkeys(("p00", "p01", "p02"), follow))
    assert all(party.updater.anchors.number >= 1 for party in federation.parties)


def test_an_anchor_is_asked_for_after_every_pass():
    """With answers that are there at once, in the step after the question."""
    block = FeatureBlock(np.eye(6), BatchSchedule(6, 2, 0))
    collector, asked = SimpleNamespace(responder=SimpleNamespace(store=SimpleNamespace(newest_pin=0))), []

    def ask(purpose, batch, mark):
        asked.append(mark)
        return SimpleNamespace(asked=SimpleNamespace(batch=batch), is_ready=True)

    collector.ask = ask
    collector.collect = lambda pending: SimpleNamespace(z=block.batches[pending.asked.batch].rows[:, None])
    keeper = AnchorKeeper(collector, block, words=1)
    for anchor in (1, 2):
        for step in range(1, 5):
            z = keeper.after_step()
            assert asked.count(anchor) == (3 if step >= 3 else 0)
            assert (z is not None) == (step == 4) and keeper.number == anchor - (step < 4)
        assert z.ravel().tolist() == list(range(6))


def test_pinned_weights_do_not_move_and_the_oldest_go():
    store = WeightStore(LazyWeights(3, 1))
    batch = FeatureBlock(np.eye(3), BatchSchedule(3, 3, 0)).batches[0]
    step = Update(slice(None), np.ones((3, 1)))
    for number in (1, 2, 3):
        store.commit(step, 1.0, 0.0)
        assert store.pinned(number, batch)[0] == number
    store.commit(step, 1.0, 0.0)
    version, weights = store.pinned(2, batch)
    assert version == 2
    assert weights.ravel().tolist() == [-2] * 3
    assert store.read(batch)[0] == 4
    with pytest.raises(InputError, match="anchor 1 is gone, the newest is 3"):
        store.pinned(1, batch)


def test_parties_without_labels_may_not_ask(federate):
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=2), labels="owner", backward="none", max_steps=2).train()
    for purpose in (Purpose.AGAIN, Purpose.ANCHOR, Purpose.TRAIN):
        asker = federation.parties[1].collector
        with pytest.raises(InputError, match=f"'p01' may not ask for {purpose.name}"):
            asker.collect(asker.ask(purpose, 0, round_id=0))


def test_shares_ahead_begin_where_the_requester_is(federate):
    """After a restart with new keys no earlier share is made, and never more than agreed."""
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=2), push_ahead=2)
    responder, sent = federation.parties[1].responder, []
    responder._push = lambda peer, data: sent.append(parse_frame(data, responder.run).round_id)
    for position, ahead in ((40, 1), (41, 2), (41, 2), (44, 1000)):
        frame = Frame(Kind.AHEAD, Purpose.TRAIN, responder.run, position, mark=ahead)
        responder.on_push("p00", frame.to_bytes())
    assert sent == [40, 41, 42, 43, 44, 45, 46]


def test_what_was_read_does_not_change_with_the_next_step():
    store = WeightStore(LazyWeights(2, 1))
    batch = FeatureBlock(np.eye(2), BatchSchedule(2, 2, 0)).batches[0]
    _, before = store.read(batch)
    store.commit(Update(slice(None), np.ones((2, 1))), 1.0, 0.0)
    assert before.ravel().tolist() == [0, 0]


def test_sums_that_are_too_old_are_asked_for_again(federate):
    """D14: with a bound no step uses an older sum; without, the same run has older ones."""
    X, y = problem()
    splits = random_split(17, 3, seed=0)
    compute = {"p01": lambda: time.sleep(0.02)}
    for bound in (None, 2):
        federation = federate(X, y, splits, max_steps=30, inflight=6, max_staleness=bound, compute=compute).train()
        slow = federation.parties[1].updater
        if bound is None:
            assert max(slow.staleness) > 2
            assert slow.drops == 0
        else:
            assert max(slow.staleness) <= 2
            assert slow.drops > 0
            assert sum(slow.staleness.values()) == 30


def test_a_slow_party_does_not_hold_others_up(federate):
    X, y = problem()
    gate = threading.Event()
    federation = federate(X, y, random_split(17, 3, seed=0), max_steps=20, compute={"p01": lambda: gate.wait(20)})
    finished = []

    def note(updater):
        if updater.position == 20:
            finished.append((updater.responder.name, federation.parties[1].store.version))
            if len(finished) == 2:
                gate.set()

    federation.train(p00=note, p02=note)
    assert sorted(finished) == [("p00", 0), ("p02", 0)]  # both done before the slow one's first step
    assert federation.parties[1].store.version == 20


def test_a_party_that_updates_rarely_takes_longer_steps(federate):
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=0), learning_rate=0.01)
    updater = federation.parties[0].updater
    assert updater.learning_rate() == 0.01
    updater.inbox.saw("p01", 3)
    assert updater.learning_rate() == pytest.approx(0.03)
    updater.arguments.delay_compensation = False
    assert updater.learning_rate() == 0.01


def test_a_lost_party_stops_the_others(federate):
    X, y = problem()
    for mode in ("sync", "async"):
        federation = federate(X, y, random_split(17, 3, seed=0), mode=mode, max_steps=1000, timeout=600.0)

        def die(updater):
            if updater.position == 5:
                raise KeyError("crash")

        with pytest.raises((KeyError, PeerLost)):
            federation.train(p01=die)
        kinds = [type(error) for error in federation.errors]
        assert kinds == [PeerLost, KeyError, PeerLost]


def test_an_excluded_party_leaves_the_sum(federate):
    X, y = problem()
    options = {"mask": "none", "on_dropout": "exclude", "labels": "owner", "backward": "none"}
    federation = federate(X, y, random_split(17, 3, seed=0), max_steps=10, **options)
    for party in federation.parties[1:]:
        party.start()
    federation.hub.transports["p02"].close()
    federation.parties[0].train()
    assert federation.parties[0].store.version == 10
    assert federation.parties[0].collector.peers == ("p01",)


def test_a_party_that_comes_back_is_waited_for(federate):
    X, y = problem()
    options = {"on_dropout": "wait", "labels": "owner", "backward": "none", "timeout": 0.2}
    federation = federate(X, y, random_split(17, 3, seed=0), max_steps=6, **options)
    federation.parties[1].start()
    threading.Timer(0.7, federation.parties[2].start).start()  # answers nothing before
    federation.parties[0].train()
    assert federation.parties[0].store.version == 6


@pytest.mark.parametrize("mask", ["none", "pairwise"])
@pytest.mark.parametrize("algorithm", ["sgd", "svrg", "saga"])
def test_a_restart_continues_to_the_bit(federate, algorithm, mask):
    X, y = problem()
    splits, saved = random_split(17, 3, seed=3), {}
    options = {"algorithm": algorithm, "mask": mask, "mode": "sync", "max_steps": 17}

    def save(updater, party):
        if updater.position == 8:
            saved[party.name] = party.state_dict()

    whole = federate(X, y, splits, **options)
    whole.train(**{party.name: lambda u, p=party: save(u, p) for party in whole.parties})
    again = federate(X, y, splits, epoch=1, **options)
    for party in again.parties:
        party.load_state_dict(saved[party.name])
    again.train()
    np.testing.assert_array_equal(again.weights, whole.weights)
    assert not np.array_equal(saved["p00"]["store"]["weights"]["values"], whole.parties[0].weights)
    for one, two in zip(again.parties, whole.parties, strict=True):
        assert one.responder.budget.used() == two.responder.budget.used()


def test_a_restart_with_old_keys_answers_no_round_twice(federate):
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=3), max_steps=3).train()
    state = federation.parties[1].state_dict()
    for new_keys in (True, False):
        again = federate(X, y, random_split(17, 3, seed=3), max_steps=3).parties[1]
        again.load_state_dict(state, new_keys=new_keys)
        schedule = again.responder.datasets[0].schedule
        ask = Frame(Kind.ASK, Purpose.TRAIN, again.responder.run, 2, batch=schedule.batch(2)).to_bytes()
        reply = parse_frame(again.responder.on_request("p00", ask), again.responder.run)
        assert reply.kind is (Kind.SHARE if new_keys else Kind.REFUSED)
    assert "answered before, the last is 2" in reply.text


def test_the_budget_ends_training(federate):
    """D11: refused by whoever would disclose, also where the requester is not bound by its own arguments."""
    X, y = problem()
    federation = federate(X, y, random_split(17, 3, seed=0), num_epochs=5, timeout=3.0)
    for party in federation.parties:
        party.responder.budget.limits = dict.fromkeys(party.parties.names, 2)
    with pytest.raises((LeakBudgetExceeded, PeerLost)):
        federation.train()
    assert LeakBudgetExceeded in [type(error) for error in federation.errors]
    assert all(max(party.responder.budget.used().values()) <= 2 for party in federation.parties)


def test_views_are_counted_by_version():
    budget = LeakBudget({"bank": 2, "shop": None})
    for version in (0, 0, 1, 1):
        budget.view("bank", 0, 7, version)
    budget.view("bank", 0, 8, 2)
    with pytest.raises(LeakBudgetExceeded, match="'bank' has seen batch 7 at 2 versions"):
        budget.view("bank", 0, 7, 2)
    for version in range(9):
        budget.view("shop", 0, 7, version)
    assert budget.used() == {"bank": 2, "shop": 9}
    copy = LeakBudget(budget.limits)
    copy.load_state_dict(budget.state_dict())
    assert copy.used() == budget.used()
    with pytest.raises(LeakBudgetExceeded):
        copy.view("bank", 0, 7, 2)
    with pytest.raises(ConfigurationError, match="requester='thief'"):
        budget.view("thief", 0, 0, 0)
    assert [automatic_budget(*sizes) for sizes in ((100, 10), (5, 10), (2, 1), (30_000, 11))] == [5, 2, 1, 5]


def test_sums_shared_by_all_label_holders_count_for_each(federate):
    X, y = problem()
    options = {"mode": "sync", "share_aggregates": True, "num_epochs": 3, "algorithm": "sgd"}
    federation = federate(X, y, random_split(17, 3, seed=0), **options).train()
    assert federation.parties[0].responder.budget.used() == {"p00": 0, "p01": 3, "p02": 3}


def test_scores_of_other_rows_go_to_the_label_owner_only(federate):
    X, y = problem()
    splits = random_split(17, 3, seed=0)
    federation = federate(X, y, splits, max_steps=6).train()
    other = np.random.default_rng(9).normal(size=(11, 17))
    for party, split in zip(federation.parties, splits, strict=True):
        party.add_rows(1, other[:, split], 11)
    first = np.hstack([other[:, splits[0]], np.ones((11, 1))])
    whole = np.hstack([first, other[:, splits[1]], other[:, splits[2]]])
    np.testing.assert_allclose(federation.parties[0].predict(1), whole @ federation.weights, atol=1e-6)
    trained = np.hstack([X[:, splits[0]], np.ones((23, 1)), X[:, splits[1]], X[:, splits[2]]])
    np.testing.assert_allclose(federation.parties[0].predict(0), trained @ federation.weights, atol=1e-6)
    with pytest.raises(InputError, match="party 'p00' refuses: 'p01' may not ask for PREDICT"):  # whatever p01 runs
        thief = federation.parties[1].collector
        thief.collect(thief.ask(Purpose.PREDICT, 0, dataset=1))
    with pytest.raises(InputError, match="'p01' may not ask for scores"):
        federation.parties[1].predict(1)
    with pytest.raises(ConfigurationError, match="dataset=2"):
        federation.parties[0].predict(2)


def test_frames_survive_the_wire():
    words = np.array([[1, 2**64 - 1], [3, 4], [5, 6]], np.uint64)
    for values in (words, np.array([[1.5, -0.25]])):
        frame = Frame(Kind.SHARE, Purpose.ANCHOR, RUN, 2**63, 2**40, 7, 8, 3, values)
        data = frame.to_bytes()
        assert len(data) == HEADER_BYTES + values.nbytes
        back = parse_frame(data, RUN)
        for field in ("kind", "purpose", "run", "round_id", "version", "batch", "mark", "dataset", "text"):
            assert getattr(back, field) == getattr(frame, field)
        assert back.values.dtype == values.dtype
        np.testing.assert_array_equal(back.values, values)
    refusal = Frame(Kind.REFUSED, Purpose.TRAIN, RUN, 1, text="nö")
    assert parse_frame(refusal.to_bytes(), RUN).text == "nö"


def good_frame():
    return Frame(Kind.SHARE, Purpose.TRAIN, RUN, 1, values=np.ones((2, 1))).to_bytes()


def edited(offset, new):
    data = bytearray(good_frame())
    data[offset : offset + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "frame of 0 bytes"),
        (good_frame()[: HEADER_BYTES - 1], "a header has"),
        (good_frame()[:-1], "announces a payload of 16"),
        (good_frame() + b"x", "announces a payload of 16"),
        (edited(0, b"pick"), "another program"),
        (edited(4, b"\x63"), "unknown codes 99"),
        (edited(5, b"\x00"), "unknown codes"),
        (edited(6, b"\x09"), "unknown codes"),
        (edited(8, b"\xff"), "frame of run ff01"),
        (edited(HEADER_BYTES - 8, b"\xff" * 8), "of at most"),
        (edited(4, b"\x01"), "ASK with words"),
        (Frame(Kind.SHARE, Purpose.TRAIN, RUN, 1).to_bytes(), "SHARE without words"),
    ],
)
def test_malformed_frames_are_refused(data, text):
    with pytest.raises(FrameError, match=text):
        parse_frame(data, RUN)


def test_requests_outside_the_schedule_are_refused(federate):
    X, y = problem()
    party = federate(X, y, random_split(17, 3, seed=0)).parties[1]
    schedule, run = party.responder.datasets[0].schedule, party.responder.run

    def reply(purpose, round_id, batch, dataset=0):
        ask = Frame(Kind.ASK, purpose, run, round_id, batch=batch, dataset=dataset)
        return parse_frame(party.responder.on_request("p00", ask.to_bytes()), run)

    right = schedule.batch(3)
    assert "data set 4 is unknown" in reply(Purpose.AGAIN, 0, 0, 4).text
    assert "is not that of position 3" in reply(Purpose.TRAIN, 3, (right + 1) % 6).text
    assert "batch 6 of data set 0 is unknown" in reply(Purpose.AGAIN, 0, 6).text
    assert "data set 4 is unknown" in reply(Purpose.PREDICT, 0, 0, 4).text
    assert reply(Purpose.TRAIN, 3, right).kind is Kind.SHARE
    assert "answered before" in reply(Purpose.TRAIN, 3, right).text
    assert "answered before" in reply(Purpose.TRAIN, 2, schedule.batch(2)).text
    with pytest.raises(FrameError, match="only ASK is answered"):
        party.responder.on_request("p00", Frame(Kind.DONE, Purpose.TRAIN, run, 0).to_bytes())
    with pytest.raises(FrameError, match="ask by a request"):
        party.responder.on_push("p00", Frame(Kind.ASK, Purpose.TRAIN, run, 9).to_bytes())


def test_parties_with_other_arguments_do_not_understand_each_other(federate):
    X, y = problem()
    splits = random_split(17, 3, seed=0)
    one, two = (federate(X, y, splits, learning_rate=rate).parties[0].responder for rate in (0.1, 0.2))
    with pytest.raises(FrameError, match="arguments or code differ"):
        two.on_request("p01", Frame(Kind.ASK, Purpose.TRAIN, one.run, 0).to_bytes())


def test_an_inbox_takes_each_frame_once():
    inbox = Inbox(("p01",), size=2)
    frame = Frame(Kind.SHARE, Purpose.TRAIN, RUN, 0, 5, values=np.ones((1, 1)))
    inbox.put("p01", frame)
    assert inbox.versions == {"p01": 5}
    with pytest.raises(FrameError, match="a second one"):
        inbox.put("p01", frame)
    assert inbox.take("p01", Purpose.TRAIN, 0, 1.0) is frame
    with pytest.raises(PeerLost, match="'p01' is lost: no share of TRAIN 0"):
        inbox.take("p01", Purpose.TRAIN, 0, 0.01)


def test_masks_are_bound_to_all_that_a_request_says():
    one = ("a", Purpose.TRAIN, 0, 3, 1, 0)
    changed = [("b",), (Purpose.AGAIN,), (1,), (4,), (2,), (5,)]
    others = [one[:place] + new + one[place + 1 :] for place, new in enumerate(changed)]
    assert len({sum_request(*fields).to_bytes() for fields in (one, *others)}) == 7


def test_masked_words_on_the_wire_are_not_the_scores():
    keys = {name: Party(name) for name in ("a", "b", "c")}
    roster = Roster("run", {name: key.public_key for name, key in keys.items()})
    scores, request = {name: np.full((64, 1), 0.5 + i) for i, name in enumerate(keys)}, sum_request(
        "a", Purpose.TRAIN, 0, 3, 1, 0
    )  # fmt: skip
    shares, sharings = {}, {}
    for name, key in keys.items():
        key.join(roster)
        sharings[name] = PairwiseSharing(key)
        shares[name] = sharings[name].share(scores[name], request)
        assert len(set(shares[name].ravel().tolist())) == 64  # equal scores, distinct words
    np.testing.assert_allclose(sharings["a"].combine(shares, request), np.full((64, 1), 4.5))
    other = sum_request("a", Purpose.TRAIN, 0, 4, 1, 0)
    words = {name: sharings[name].share(scores[name], other) for name in keys}
    assert not np.isin(words["b"], shares["b"]).any()
    with pytest.raises(InputError, match="has not joined"):
        PairwiseSharing(Party("d"))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"features": np.ones((23, 2))}, "2 columns, the roster says"),
        ({"labels": None}, "'p00' needs labels"),
        ({"labels": np.ones(5)}, "labels: 5 rows, the roster says 23"),
    ],
)
def test_data_that_do_not_fit_the_roster_are_refused(changes, text):
    X, y = problem()
    facts = Parties(23, {"p00": 9, "p01": 4, "p02": 4}, "p00")
    hub = InProcessHub(facts.names)
    given = {"features": X[:, :9], "labels": y} | changes
    arguments = VerticalArguments(batch_size=4, mask="none", **OPEN)
    with pytest.raises(InputError, match=text):
        VerticalParty(arguments, facts, hub.transports["p00"], PlainSharing(facts.names), **given)
    with pytest.raises(InputError, match="the roster has"):
        strangers = InProcessHub(("p00", "x")).transports["p00"]
        VerticalParty(arguments, facts, strangers, PlainSharing(facts.names), X[:, :9], y)
