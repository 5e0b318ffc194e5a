"""
The privacy tests P1 to P12 of the specification, and where each of them is:

| id | what | test |
|-|-|-|
| P1 | masked words are uniform and tell nothing | here; the masks alone: test_secure_sum, test_secure_sum_tree |
| P2 | a transcript can be simulated from own inputs and z | here |
| P3 | one party's view gains nothing on another's score | here |
| P4 | colluders | here; pairwise: test_secure_sum `test_what_colluders_see_…`, `test_the_sum_and_all_vectors_…`; |
| | | tree, where two succeed: test_secure_sum_tree `test_two_colluders_…` |
| P5 | equal trees, a shared parent | test_secure_sum_tree `test_equal_trees_and_shared_parents_are_refused` |
| P6 | a request again, out of order, by another | here; frames: test_vertical_grpc `BAD`; rosters: test_secure_sum |
| P7 | Gram and low-rank attacks | test_vertical_attacks; the budget: test_vertical_parties; on a real run: here |
| P8 | labels from passive views | here; the theory: test_vertical_attacks, test_vertical_backward |
| P9 | fewer rows than columns, owner labels | test_vertical_arguments `test_what_the_roster_makes_unsafe_…` |
| P10 | a recording proxy; no certificate | test_vertical_grpc `test_a_recording_proxy_…`, `test_a_client_without_…` |
| P11 | masks from the operating system's generator | here; test_secure_sum, test_secure_sum_tree |
| P12 | an audit line deleted or altered | test_vertical_audit; over a real run: test_workflow_vertical |
"""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

import hf_mlopt.vertical
from hf_mlopt.secure_sum import FixedPoint, Party, Roster
from hf_mlopt.vertical.aggregate import PairwiseSharing, PlainSharing, sum_request
from hf_mlopt.vertical.attacks import accumulated_theta, features_from_low_rank
from hf_mlopt.vertical.audit import AuditLog, verify
from hf_mlopt.vertical.messages import Frame, Kind, Purpose, parse_frame
from tests.test_vertical_parties import OPEN


NAMES = ("p00", "p01", "p02")


def data(rows=600, columns=12, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, columns))
    return X, np.where(X @ rng.normal(size=columns) + rng.normal(size=rows) > 0, 1.0, -1.0)


def splits(columns=12, parties=3):
    return np.array_split(np.arange(columns), parties)


def sharings(mask, names=NAMES):
    if mask == "none":
        return {name: PlainSharing(names) for name in names}, {}
    keys = {name: Party(name) for name in names}
    roster = Roster("run", {name: key.public_key for name, key in keys.items()})
    for key in keys.values():
        key.join(roster)
    return {name: PairwiseSharing(key) for name, key in keys.items()}, keys


def transcript(mask, scores, names=NAMES, first=0):
    """What p00 makes and is sent for sums of `scores` ([rows] a party), 100 rows a request, as 8 bytes a word."""
    made, _ = sharings(mask, names)
    rows = len(scores[names[0]])
    seen = {name: [] for name in names}
    for place in range(0, rows, 100):
        request = sum_request("p00", Purpose.TRAIN, 0, first + place // 100, 0, 0)
        for name in names:
            words = made[name].share(scores[name][place : place + 100, None], request)
            seen[name].append(words.view(np.uint64).reshape(-1))
    return {name: np.concatenate(words) for name, words in seen.items()}


def as_bytes(words):
    return words[:, None].view(np.uint8).astype(float)


# P1.


@pytest.mark.parametrize("mask", ["pairwise", "none"])
def test_p1_words_at_a_requester_are_uniform_and_tell_nothing(federate, mask):
    X, y = data()
    federation = federate(X, y, splits(), mask=mask, batch_size=100, num_epochs=20, mode="async")
    sent = []
    sharing = federation.parties[1].responder.sharing
    share = sharing.share

    def keep(scores, request):
        words = share(scores, request)
        sent.append((scores.ravel().copy(), words.ravel().view(np.uint64).copy()))
        return words

    kept = {"share": staticmethod(keep), "combine": sharing.combine}
    federation.parties[1].responder.sharing = type("Kept", (), kept)
    federation.train()
    good = 0
    for _, words in sent:
        counts = np.bincount(words[:, None].view(np.uint8).ravel() >> 4, minlength=16)
        expected = counts.sum() / 16
        good += chi2.sf(((counts - expected) ** 2 / expected).sum(), 15) > 1e-3
    scores, words = (np.concatenate(part) for part in zip(*sent, strict=True))
    signed = words.view(np.int64).astype(float)
    correlation = np.corrcoef(scores, signed if mask == "pairwise" else words.view(np.float64))[0, 1]
    assert len(words) > 20_000
    if mask == "pairwise":
        assert good >= 0.98 * len(sent)
        assert abs(correlation) < 5 / np.sqrt(len(words))
    else:  # the same statistics speak where there is no mask
        assert good < 0.5 * len(sent)
        assert correlation > 0.999


# P2 and P3.


@pytest.mark.parametrize("mask", ["pairwise", "none"])
def test_p2_a_transcript_is_simulated_from_the_sum_alone(mask):
    rng = np.random.default_rng(0)
    rows = 20_000
    scores = {name: rng.normal(size=rows) for name in NAMES}
    real = transcript(mask, scores)
    own, others = real["p00"], scores["p01"] + scores["p02"]
    one = np.frombuffer(rng.bytes(8 * rows), np.uint64)
    two = FixedPoint(3, 24).encode(sum(scores.values()), "scores") - own - one
    if mask == "none":
        one = rng.normal(size=rows)
        one, two = one.view(np.uint64), (others - one).view(np.uint64)
    total = np.hstack([others[:, None], as_bytes(own)])
    true = np.hstack([as_bytes(real["p01"]), as_bytes(real["p02"]), total])
    false = np.hstack([as_bytes(one), as_bytes(np.ascontiguousarray(two)), total])
    X, label = np.vstack([true, false]), np.repeat([1, 0], rows)
    order = rng.permutation(2 * rows)
    train, test = order[:rows], order[rows:]
    model = HistGradientBoostingClassifier(max_iter=30, random_state=0).fit(X[train], label[train])
    auc = roc_auc_score(label[test], model.predict_proba(X[test])[:, 1])
    if mask == "pairwise":
        assert abs(auc - 0.5) <= 0.02
    else:  # the simulator has to invent a share, and is caught
        assert auc > 0.52


def r_squared(view, target):
    view = np.hstack([view, np.ones((len(view), 1))])
    residual = target - view @ np.linalg.lstsq(view, target, rcond=None)[0]
    return 1 - residual.var() / target.var()


@pytest.mark.parametrize("victim", ["p01", "p02"])
@pytest.mark.parametrize("mask", ["pairwise", "none"])
def test_p3_a_view_gains_nothing_on_the_score_of_another(mask, victim):
    rng = np.random.default_rng(1)
    scores = {name: rng.normal(size=5000) for name in NAMES}
    words = transcript(mask, scores)
    own = np.column_stack([scores["p00"], sum(scores.values())])
    if mask == "pairwise":
        seen = [as_bytes(words[name]) for name in NAMES[1:]]
        seen += [words[name].view(np.int64)[:, None].astype(float) / 2**63 for name in NAMES[1:]]
    else:
        seen = [words[name].view(np.float64)[:, None] for name in NAMES[1:]]
    alone = r_squared(own, scores[victim])
    gain = r_squared(np.hstack([own, *seen]), scores[victim]) - alone
    assert 0.4 < alone < 0.6  # the legal sum of two like shares gives half
    assert gain <= 0.01 if mask == "pairwise" else gain > 0.3


# P4.


def test_p4_two_of_four_who_pool_their_keys_gain_nothing_and_three_have_it_all():
    rng = np.random.default_rng(2)
    names = (*NAMES, "p03")
    made, keys = sharings("pairwise", names)
    scores = {name: rng.normal(size=4000) for name in names}
    request = sum_request("p00", Purpose.TRAIN, 0, 0, 0, 0)
    words = {name: made[name].share(scores[name][:, None], request) for name in names}
    total = sum(scores.values())

    def view(colluders):
        """The victim's words without the masks that colluders share with it, by their own keys."""
        left = words["p01"].copy()
        for name in colluders:
            alone = Party.resume(name, keys[name].state_dict() | {"answered": {}})
            alone.join(made[name].roster)
            alone._pair_keys = {"p01": alone._pair_keys["p01"]}
            left += alone.mask(np.zeros((4000, 1)), request, "zeros").words
        return left

    two = view(("p00", "p02"))
    own = np.column_stack([scores["p00"], scores["p02"], total])
    gain = r_squared(np.hstack([own, as_bytes(two.ravel())]), scores["p01"]) - r_squared(own, scores["p01"])
    assert gain <= 0.01
    three = view(("p00", "p02", "p03"))
    np.testing.assert_allclose(FixedPoint(4, 24).decode(three).ravel(), scores["p01"], atol=1e-6)


# P6.


@pytest.mark.parametrize("mask", ["pairwise", "tree", "none"])
def test_p6_requests_again_or_by_others_are_refused_and_audited(federate, tmp_path, mask):
    X, y = data(rows=40)
    federation = federate(X, y, splits(), recipients=("p01",), mask=mask)
    federation.parties[2].start()
    log = AuditLog(tmp_path / "audit.jsonl", "p02")
    responder = federation.parties[2].responder
    responder.note = log.record
    schedule, run = responder.datasets[0].schedule, responder.run

    def ask(peer, position, purpose=Purpose.TRAIN):
        frame = Frame(Kind.ASK, purpose, run, position, batch=schedule.batch(position))
        return parse_frame(responder.on_request(peer, frame.to_bytes()), run).kind

    assert ask("p00", 3) is Kind.SHARE
    assert [ask("p00", 3), ask("p00", 2), ask("p01", 0, Purpose.PREDICT)] == [Kind.REFUSED] * 3
    log.close()
    lines = verify(tmp_path / "audit.jsonl").lines
    text = (tmp_path / "audit.jsonl").read_text()
    assert (lines, text.count('"refused"'), text.count('"answered"')) == (5, 3, 1)


# P7 on a real run.


@pytest.mark.parametrize("is_bound", [True, False])
def test_p7_scores_of_a_real_run_give_the_columns_only_beyond_the_budget(federate, is_bound):
    X, y = data(rows=300, columns=12)
    budget = {"query_budget": "auto", "accept_gram_disclosure": False} if is_bound else {}
    epochs = 3 if is_bound else 20
    options = {"mode": "sync", "batch_size": 300, "num_epochs": epochs, "algorithm": "sgd", "learning_rate": 1.0}
    federation = federate(X, y, splits(), **(OPEN | options | budget))
    owner, partial = federation.parties[0], []

    def look(updater):
        block = owner.responder.datasets[0]
        rows = block.batches[0].rows
        mine = block.scores(seen_weights[-1])
        own_part = np.empty(300)
        own_part[rows] = mine[rows, 0]
        partial.append(sums[-1] - own_part)

    sums, seen_weights = [], []
    step = owner.updater.step

    def watched(batch, total):
        z = np.empty(300)
        z[owner.responder.datasets[0].batches[batch].rows] = total.z[:, 0]
        sums.append(z)
        seen_weights.append(owner.store.read_all())
        step(batch, total)

    owner.updater.step = watched
    federation.train(p00=look)
    known = np.arange(40)
    found = features_from_low_rank(np.array(partial), 8, known, X[known][:, 4:])
    error = np.linalg.norm(found - X[:, 4:]) / np.linalg.norm(X[:, 4:])
    assert error >= 0.3 if is_bound else error < 0.1


# P8.


@pytest.mark.parametrize("batch, succeeds", [(512, False), (16, True)])
def test_p8_labels_from_own_gradients(batch, succeeds):
    """`he`: labels independent of the features; B = 128 E d_l hides them, B = 4 d_l over four epochs does not."""
    rng = np.random.default_rng(3)
    rows, columns, epochs = (512, 4, 4) if succeeds else (2048, 4, 1)
    X, y = rng.normal(size=(rows, columns)), rng.choice([-1.0, 1.0], rows)
    theta = -y / 2  # of w = 0; small steps keep it
    gradients, batches = [], []
    for _ in range(epochs):
        order = rng.permutation(rows)
        for place in range(0, rows, batch):
            part = order[place : place + batch]
            batches.append(part)
            gradients.append(X[part].T @ theta[part] / len(part))
    guess = -accumulated_theta(gradients, X, batches)
    auc = roc_auc_score(y, guess)
    assert auc > 0.95 if succeeds else auc <= 0.55 + 3 * 0.5 / np.sqrt(rows)


# P11.


def test_p11_seeds_leave_the_masks_changing():
    scores = {name: np.zeros(100) for name in NAMES}
    seen = set()
    for _ in range(3):
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
        seen.add(transcript("pairwise", scores)["p01"].tobytes())
    assert len(seen) == 3


SECRET = ("climb", "introduction", "credentials", "pki", "align", "backward", "gradients", "aggregate", "responder")
WIRE = ("grpc", "grpc_link", "envelope", "shared", "in_process", "base")


@pytest.mark.parametrize("name", [*SECRET, *(f"transport/{name}" for name in WIRE)])
def test_p11_no_generator_that_can_be_seeded_and_no_pickle(name):
    banned = {"pickle", "random", "torch", "marshal", "dill", "default_rng", "shelve"}
    tree = ast.parse((Path(hf_mlopt.vertical.__file__).parent / f"{name}.py").read_text())
    for node in ast.walk(tree):
        words = set()
        if isinstance(node, ast.Import):
            words = {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            words = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            words = {node.attr}
        assert not words & banned, (name, node.lineno)
