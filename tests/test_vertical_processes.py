"""A10, A8 and A9: parties as real processes over gRPC with mutual TLS."""

import csv
import json
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression


pytest.importorskip("grpc", reason="the transport needs the package grpcio")
pytest.importorskip("cryptography", reason="certificates need the package cryptography")

from hf_mlopt.configuration import load_config  # noqa: E402
from hf_mlopt.vertical import pki  # noqa: E402
from hf_mlopt.vertical.audit import verify  # noqa: E402
from hf_mlopt.vertical.checkpoints import load_block  # noqa: E402
from hf_mlopt.vertical.updates.blocks import FeatureBlock  # noqa: E402
from hf_mlopt.vertical.updates.schedule import BatchSchedule  # noqa: E402
from hf_mlopt.workflows.vertical_data import hold_out, load_alignment, read_party, training_labels  # noqa: E402
from hf_mlopt.workflows.vertical_recipe import PartyRecipe  # noqa: E402
from tests.test_vertical_grpc import RecordingProxy  # noqa: E402
from tests.vertical_parties import NAMES, Parties, common_rows, make, table  # noqa: E402


pytestmark = pytest.mark.distributed
NUM_EPOCHS = 20  # of three batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("federation")
    make(made)
    return made


@pytest.fixture
def parties(folder, tmp_path):
    made = []

    def start(**options):
        made.append(Parties(folder, tmp_path / f"run{len(made)}", **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def optimum():
    """Weights of scikit-learn on the common rows, each party's columns scaled by its own rows."""
    X, y = table()
    blocks = []
    for number, columns in enumerate(np.array_split(np.arange(30), 3)):
        own = X[[row for row in range(len(X)) if row // 10 != number]][:, columns]
        blocks.append((X[common_rows()][:, columns] - own.mean(0)) / own.std(0))
    Z, labels = np.hstack([*blocks, np.ones((len(common_rows()), 1))]), 2.0 * y[common_rows()] - 1
    model = LogisticRegression(C=1 / (len(Z) * 0.3), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(Z, labels)
    objective = lambda w: np.mean(np.logaddexp(0, -labels * (Z @ w))) + 0.15 * w @ w  # noqa: E731
    return objective, model.coef_[0], Z


def trained(output):
    blocks = [load_block(output / name)[0][:, 0] for name in NAMES]
    return np.concatenate([blocks[0][:10], *blocks[1:], blocks[0][10:]])


def test_three_processes_align_train_and_predict(parties, folder):
    run = parties(num_epochs=NUM_EPOCHS)
    run.start_all()
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    objective, exact, Z = optimum()
    weights = trained(run.output)
    assert objective(weights) - objective(exact) <= 1e-5
    for name in NAMES:
        found = {path.name for path in (run.output / name).iterdir()}
        written = {"alignment.json", "audit.jsonl", "audit.jsonl.head", "model.safetensors", "party_results.json"}
        assert found == written | {"vertical_config.json"}
        results = json.loads((run.output / name / "party_results.json").read_text())
        assert results["updates"] == NUM_EPOCHS * 3
        log = run.output / name / "audit.jsonl"
        verify(log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        answers = [line for line in lines if line["event"] == "answered" and line["purpose"] == "TRAIN"]
        assert len(answers) == 2 * NUM_EPOCHS * 3
        assert {line["peer"] for line in answers} == set(NAMES) - {name}
        most = max(line["budget_used"] for line in answers)
        assert most == max(results["views_given"].values()) > 0
        sent = [line["peer"] for line in lines if line["event"] == "labels sent"]
        assert sorted(sent) == (["insurer", "shop"] if name == "bank" else [])
        assert "destroyed" not in run.words(name) and "Traceback" not in run.words(name)
    for name in NAMES:
        output = run.output / "predictions.csv"
        run.start(name, "predict", "--rows", folder / f"{name}.csv", "--output", output)
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name, "predict") for name in NAMES]
    with open(run.output / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    expected = 1 / (1 + np.exp(-Z @ weights))
    places = {f"customer {row}": place for place, row in enumerate(common_rows())}
    assert len(rows) == len(places)
    for row in rows:
        assert float(row["prediction"]) == pytest.approx(expected[places[row["id"]]], abs=1e-6)


def test_a_killed_party_is_noticed_and_all_resume_to_the_same_optimum(parties):
    """A8."""
    kill_and_resume(parties(num_epochs=NUM_EPOCHS, save_steps=5, timeout=4.0))


def kill_and_resume(run):
    run.start_all(step_seconds=0.05)
    end = time.monotonic() + 60
    while not all((run.output / name / "checkpoint-10").exists() for name in NAMES):
        assert time.monotonic() < end, [run.words(name) for name in NAMES]
        time.sleep(0.05)
    run.processes["insurer"].kill()
    killed = time.monotonic()
    assert run.statuses() == {"bank": 1, "insurer": -signal.SIGKILL, "shop": 1}
    assert time.monotonic() - killed < 3 * 4.0 + 10  # the bound of the timeout, and time to end
    for name in ("bank", "shop"):
        assert "is lost" in run.words(name), run.words(name)
        assert not (run.output / name / "party_results.json").exists()
    run.start_all(resume=True)
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    objective, exact, _ = optimum()
    assert objective(trained(run.output)) - objective(exact) <= 1e-5
    for name in NAMES:
        results = json.loads((run.output / name / "party_results.json").read_text())
        assert 0 < results["updates"] < NUM_EPOCHS * 3
        verify(run.output / name / "audit.jsonl")


def test_a_foreign_certificate_and_other_settings_are_refused(parties, tmp_path):
    refuse(parties(num_epochs=1, connect_timeout=4.0), tmp_path / "foreign")


def refuse(run, foreign):
    pki.create_authority(foreign)
    pki.issue(foreign, "shop")
    run.start("bank")
    run.start("insurer", learning_rate=0.25)
    run.start("shop", credentials=str(foreign / "shop"))
    assert run.statuses() == dict.fromkeys(NAMES, 1)
    assert "learning_rate: 0.4 here, 0.25 there" in run.words("bank")
    assert "learning_rate: 0.25 here, 0.4 there" in run.words("insurer")
    assert f"party 'bank' is lost: not connected within {run.options['connect_timeout']:g} s" in run.words("shop")
    assert not any("ssl_transport_security" in run.words(name) for name in NAMES)  # gRPC's own words
    for name in ("bank", "insurer"):
        lines = [json.loads(line) for line in (run.output / name / "audit.jsonl").read_text().splitlines()]
        assert not [line for line in lines if line.get("peer") == "shop"]


ONE_COLUMN = {"bank": ["x0"], "insurer": ["x10"], "shop": ["x20"]}


@pytest.mark.parametrize("backward", ["plain", pytest.param("he", marks=pytest.mark.slow)])
def test_blocks_without_labels_resume_after_their_party_was_killed(parties, federate, backward):
    """The killed party comes back with its block, and the owner with the table of what that party has."""
    if backward == "he":
        pytest.importorskip("phe", reason="backward='he' needs the package phe")
    options = {"labels": "owner", "mode": "sync", "batch_size": 4, "max_steps": 9, "step_seconds": 0.1}
    timeout = 10.0 if backward == "he" else 4.0
    run = parties(backward=backward, allow_unsafe=True, save_steps=2, timeout=timeout, **options)
    for name in NAMES:
        run.start(name, columns=ONE_COLUMN[name])
    end = time.monotonic() + 60
    while not (run.output / "bank" / "checkpoint-2").exists():  # the last to be written
        assert time.monotonic() < end, [run.words(name) for name in NAMES]
        time.sleep(0.05)
    run.processes["insurer"].kill()
    assert run.statuses() == {"bank": 1, "insurer": -signal.SIGKILL, "shop": 1}
    for name in NAMES:
        run.start(name, columns=ONE_COLUMN[name], resume=True)
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    assert json.loads((run.output / "bank" / "party_results.json").read_text())["updates"] in (1, 3, 5, 7)
    recipes = [load_config(PartyRecipe, run.output / f"{name}.yaml") for name in NAMES]
    data = [aligned(recipe) for recipe in recipes]
    X, y = np.hstack([one.features for one in data]), training_labels(data[0].label, "logistic")
    arguments = {name: getattr(recipes[0], name) for name in ("labels", "mode", "batch_size", "max_steps", "l2")}
    splits = [np.array([number]) for number in range(3)]
    whole = federate(X, y, splits, backward="plain", learning_rate=0.4, **arguments).train()
    for name, party in zip(NAMES, whole.parties, strict=True):
        weights, config = load_block(run.output / name)
        assert config["version"] == 9 and np.abs(weights).min() > 0
        assert np.abs(weights - party.weights).max() <= (1e-6 if backward == "he" else 0)


def aligned(recipe):
    """Rows of a party in the common order."""
    data = read_party(recipe)
    return data.take(load_alignment(Path(recipe.output_dir) / "alignment.json", len(data)).rows)


@pytest.mark.parametrize("is_plaintext, mask", [(False, "pairwise"), (True, "none")])
def test_a_proxy_records_a_run_and_finds_no_number(parties, is_plaintext, mask):
    """
    P10 over alignment, labels, training and evaluation. Without TLS and masks the same search finds shares and labels;
    columns, weights and sums never travel.
    """
    run = parties(num_epochs=2, eval_share=0.2, mask=mask, allow_unsafe=mask == "none")
    own = {"plaintext": True, "credentials": None} if is_plaintext else {}
    with ExitStack() as stack:
        proxies = {name: RecordingProxy(address) for name, address in run.addresses.items()}
        parties_seen = {name: proxy.address for name, proxy in proxies.items()}
        for name, proxy in proxies.items():
            stack.callback(proxy.close)
            run.start(name, parties=parties_seen, listen=run.addresses[name], **own)
        assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    recorded = b"".join(data for proxy in proxies.values() for data in proxy.recorded)
    assert len(recorded) > 30_000
    numbers = numbers_of(run)
    labels = numbers.pop("y").astype("<f8")
    pieces = [labels[at : at + 8].tobytes() for at in range(0, len(labels) - 8, 8)]
    found = {"y": np.mean([piece in recorded for piece in pieces])}
    words = [np.frombuffer(recorded, "<u8", (len(recorded) - offset) // 8, offset) for offset in range(8)]
    for name, values in numbers.items():
        bits = values.astype("<f8").view("<u8")
        bits = bits[bits & 0xFFFF != 0]  # round numbers are everywhere
        found[name] = np.mean(np.any([np.isin(bits, part) for part in words], axis=0))
    never = {"X": 0, "raw X": 0, "w": 0, "z": 0}
    assert {name: found[name] for name in never} == never
    assert found["y"] > 0.9 if is_plaintext else found["y"] == 0
    assert found["shares"] > 0.9 if mask == "none" else found["shares"] == 0


def numbers_of(run):
    """What no one but its owner should see: all columns, labels, weights, and scores of the rows to evaluate on."""
    shares, columns, weights = {}, [], []
    for name in NAMES:
        recipe = load_config(PartyRecipe, run.output / f"{name}.yaml")
        data = aligned(recipe)
        train, held = hold_out(len(data), recipe.eval_share, recipe.seed)
        block, _ = load_block(run.output / name)
        schedule = BatchSchedule(len(held), recipe.batch_size, recipe.seed, "kept")
        shares[name] = FeatureBlock(data.features[held], schedule, name == "bank").scores(block).ravel()
        columns.append(data.features.ravel())
        weights.append(block.ravel())
        if data.label is not None:
            labels = training_labels(data.label, recipe.loss)[train]
    found = {"X": np.concatenate(columns), "raw X": table()[0].ravel(), "w": np.concatenate(weights), "y": labels}
    return found | {"z": sum(shares.values()), "shares": np.concatenate([shares["insurer"], shares["shop"]])}


def test_rows_are_aligned_first_and_a_party_may_have_no_labels(parties):
    run = parties(
        max_steps=9, label_recipients=["insurer"], eval_share=0.2, mode="sync", mask="tree", algorithm="svrg"
    )
    run.start_all("align")
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name, "align") for name in NAMES]
    assert len({run.words(name, "align").splitlines()[-2] for name in NAMES}) == 1
    assert "210 common rows" in run.words("shop", "align")
    run.start_all()
    assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    results = {name: json.loads((run.output / name / "party_results.json").read_text()) for name in NAMES}
    assert [results[name].get("updates") for name in NAMES] == [9, 9, None]
    # Rows are in the order of their hashed ids, another in every run, and a step is one of nine small batches.
    assert results["bank"]["evaluation"]["auc"] > 0.75 and "evaluation" not in results["insurer"]
    assert not load_block(run.output / "shop")[0].any()
    assert len({result["alignment"] for result in results.values()}) == 1
    run.start("shop", "align")
    assert run.statuses()["shop"] == 2
    assert "holds the results of a run" in run.words("shop", "align")


@pytest.mark.slow
def test_two_hosts(parties, tmp_path, monkeypatch):
    """A9 and A8: parties in network namespaces of their own, between which nothing else runs."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parent.parent / "benchmarks"), *sys.path])
    from communication_network import Network, NoNamespaces

    try:
        with Network(3) as network:
            hosts = {name: f"10.77.0.{number + 1}" for number, name in enumerate(NAMES)}
            prefixes = {name: network.prefix(number) for number, name in enumerate(NAMES)}
            there = {"hosts": hosts, "prefixes": prefixes}
            run = parties(num_epochs=NUM_EPOCHS, **there)
            run.start_all()
            assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
            kill_and_resume(parties(num_epochs=NUM_EPOCHS, save_steps=5, timeout=4.0, **there))
            refuse(parties(num_epochs=1, connect_timeout=30.0, **there), tmp_path / "foreign")
    except NoNamespaces as error:
        pytest.skip(str(error))
    objective, exact, _ = optimum()
    assert objective(trained(run.output)) - objective(exact) <= 1e-5
