"""A10, A8 and A9: parties as real processes over gRPC with mutual TLS."""

import csv
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression


pytest.importorskip("grpc", reason="the transport needs the package grpcio")
pytest.importorskip("cryptography", reason="certificates need the package cryptography")

from hf_mlopt.vertical import pki  # noqa: E402
from hf_mlopt.vertical.audit import verify  # noqa: E402
from hf_mlopt.vertical.checkpoints import load_block  # noqa: E402
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
    run = parties(num_epochs=NUM_EPOCHS, save_steps=5, timeout=4.0)
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


def test_a_foreign_certificate_and_other_settings_are_refused(parties, folder, tmp_path):
    pki.create_authority(tmp_path / "foreign")
    pki.issue(tmp_path / "foreign", "shop")
    run = parties(num_epochs=1, connect_timeout=4.0)
    run.start("bank")
    run.start("insurer", learning_rate=0.25)
    run.start("shop", credentials=str(tmp_path / "foreign" / "shop"))
    assert run.statuses() == dict.fromkeys(NAMES, 1)
    assert "learning_rate: 0.4 here, 0.25 there" in run.words("bank")
    assert "learning_rate: 0.25 here, 0.4 there" in run.words("insurer")
    assert "party 'bank' is lost: not connected within 4 s" in run.words("shop")
    for name in ("bank", "insurer"):
        lines = [json.loads(line) for line in (run.output / name / "audit.jsonl").read_text().splitlines()]
        assert not [line for line in lines if line.get("peer") == "shop"]


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
    assert results["bank"]["evaluation"]["auc"] > 0.9 and "evaluation" not in results["insurer"]
    assert not load_block(run.output / "shop")[0].any()
    assert len({result["alignment"] for result in results.values()}) == 1
    run.start("shop", "align")
    assert run.statuses()["shop"] == 2
    assert "holds the results of a run" in run.words("shop", "align")


@pytest.mark.slow
def test_two_hosts(parties, monkeypatch):
    """A9: the parties in network namespaces of their own, between which nothing else runs."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parent.parent / "benchmarks"), *sys.path])
    from communication_network import Network, NoNamespaces

    try:
        with Network(3) as network:
            hosts = {name: f"10.77.0.{number + 1}" for number, name in enumerate(NAMES)}
            prefixes = {name: network.prefix(number) for number, name in enumerate(NAMES)}
            run = parties(hosts=hosts, prefixes=prefixes, num_epochs=NUM_EPOCHS)
            run.start_all()
            assert run.statuses() == dict.fromkeys(NAMES, 0), [run.words(name) for name in NAMES]
    except NoNamespaces as error:
        pytest.skip(str(error))
    objective, exact, _ = optimum()
    assert objective(trained(run.output)) - objective(exact) <= 1e-5
