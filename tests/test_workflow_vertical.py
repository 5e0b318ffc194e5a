"""`hf-mlopt vertical`: simulation, attacks, certificates, audit, and what is refused."""

import json

import numpy as np
import pytest
import scipy.sparse
import yaml
from sklearn.datasets import dump_svmlight_file
from sklearn.linear_model import LogisticRegression


pytest.importorskip("grpc", reason="the transport needs the package grpcio")
pytest.importorskip("cryptography", reason="certificates need the package cryptography")

from hf_mlopt.configuration import load_config  # noqa: E402
from hf_mlopt.errors import InputError  # noqa: E402
from hf_mlopt.resources import resource_dir  # noqa: E402
from hf_mlopt.vertical.checkpoints import load_block  # noqa: E402
from hf_mlopt.workflows.vertical import Problem, simulate  # noqa: E402
from hf_mlopt.workflows.vertical_data import hold_out, simulated_parties  # noqa: E402
from hf_mlopt.workflows.vertical_processes import SimulationFailed  # noqa: E402
from hf_mlopt.workflows.vertical_recipe import PartyRecipe, SimulationRecipe  # noqa: E402
from tests.command_line import hf_mlopt, succeed  # noqa: E402


RECIPES = resource_dir("recipes") / "vertical"
OPEN = {"query_budget": None, "accept_gram_disclosure": True}
SMALL = {"max_steps": 24, "batch_size": 64, "l2": 0.1, "learning_rate": 0.5, "step_seconds": 0.01} | OPEN


def recipe(folder, **options):
    return SimulationRecipe(**({"output_dir": str(folder / "out")} | SMALL | options))


# Simulation.


@pytest.mark.distributed
def test_the_embedded_recipe_compares_both_modes(tmp_path):
    """The command at the head of the recipe, with fewer steps."""
    words = ("--parties", 3, "--straggler", "1:3", "--max-steps", 30, "--step-seconds", 0.02, "--l2", 0.1)
    outcome = succeed("vertical", "simulate", RECIPES / "breast_cancer.yaml", *words, "--output-dir", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "vertical_results.json").read_text())
    assert (tmp_path / "out" / "course.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(SimulationRecipe, tmp_path / "out" / "recipe.yaml").straggler == "1:3"
    assert results["step_seconds"] == [0.02, pytest.approx(0.06), 0.02]
    assert list(results["modes"]) == ["sync", "async"]
    for mode, found in results["modes"].items():
        updates = [party["updates"] for party in found["parties"].values()]
        assert updates == [30] * 3 if mode == "sync" else updates[1] < max(updates) == 30
        course = found["course"]
        assert course[0][0] == 0 and course[0][1] == pytest.approx(np.log(2) - results["optimum"], rel=0.2)
        assert 0 <= course[-1][1] < 0.05 and found["objective"] > results["optimum"]
        assert found["evaluation"]["auc"] > 0.98
        assert found["seconds_to_gap"] is None or found["seconds_to_gap"] <= found["seconds"]
        # The objective in the results is that of the blocks that the parties have written.
        given = load_config(SimulationRecipe, tmp_path / "out" / "recipe.yaml")
        blocks, labels = simulated_parties(given)
        train, _ = hold_out(len(labels), 0.2, 42)
        problem = Problem(given, {name: block.take(train) for name, block in blocks.items()}, labels[train])
        weights = np.vstack([load_block(tmp_path / "out" / mode / name)[0] for name in blocks])
        assert problem.objective(weights) == pytest.approx(found["objective"], rel=1e-3)
    assert "A step is a sleep of 0.02, 0.06, 0.02 s" in outcome.out
    assert "updates/s" in outcome.out and "staleness" in outcome.out
    log = tmp_path / "out" / "async" / "p01" / "audit.jsonl"
    end = succeed("vertical", "audit", "verify", log).out.split()[-1]
    assert succeed("vertical", "audit", "verify", log, "--head", end).out.split()[-1] == end
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3] + lines[4:]))
    assert "was changed, moved or taken out" in hf_mlopt("vertical", "audit", "verify", log).err


@pytest.mark.distributed
def test_sparse_files_and_trees_without_tls(tmp_path):
    rng = np.random.default_rng(0)
    X = scipy.sparse.random_array((300, 40), density=0.2, rng=rng, format="csr")
    y = (X @ rng.normal(size=40) > 0).astype(int)
    for number, part in enumerate((X[:, :15], X[:, 15:])):
        dump_svmlight_file(part, y, str(tmp_path / f"p{number}"), zero_based=False)
    files = [str(tmp_path / "p0"), str(tmp_path / "p1")]
    options = {"data": files, "num_features": [15, 25], "parties": 3, "mask": "tree", "plaintext": True}
    results = simulate(recipe(tmp_path, modes=["async"], plot=False, **options))
    found = results["modes"]["async"]
    assert found["course"][-1][1] < found["course"][0][1] / 2
    assert results["parties"] == {"p00": 14, "p01": 13, "p02": 13}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "async",
        "recipe.yaml",
        "vertical_results.json",
    ]


@pytest.mark.distributed
def test_a_party_that_fails_ends_the_simulation_with_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlopt.workflows.vertical_processes._PATIENCE", 1e-3)
    with pytest.raises(SimulationFailed, match="p0.: party 'p0.' is lost: not connected within 0.001 s"):
        simulate(recipe(tmp_path, modes=["async"], parties=3))


def test_the_optimum_is_that_of_scikit_learn(tmp_path):
    given = recipe(tmp_path)
    blocks, labels = simulated_parties(given)
    problem = Problem(given, blocks, labels)
    model = LogisticRegression(C=1 / (569 * 0.1), fit_intercept=False, tol=1e-12, max_iter=10_000)
    weights = model.fit(problem.features, labels).coef_.T
    assert problem.optimum() == pytest.approx(problem.objective(weights), abs=1e-9)


def test_columns_are_dealt_out_and_rows_held_back_alike(tmp_path):
    blocks, labels = simulated_parties(recipe(tmp_path, parties=4))
    assert [block.features.shape[1] for block in blocks.values()] == [8, 8, 7, 7]
    assert [block.label is None for block in blocks.values()] == [False, True, True, True]
    assert set(labels) == {-1.0, 1.0}
    train, held = hold_out(100, 0.2, 7)
    assert len(held) == 20 and sorted([*train, *held]) == list(range(100))
    np.testing.assert_array_equal(held, hold_out(100, 0.2, 7)[1])
    assert not np.array_equal(held, hold_out(100, 0.2, 8)[1])
    assert len(hold_out(100, 0.0, 7)[1]) == 0


@pytest.mark.parametrize("loss, data", [("ridge", "diabetes"), ("multinomial", "wine")])
def test_other_embedded_data(tmp_path, loss, data):
    given = recipe(tmp_path, loss=loss, num_labels=3, data=[data])
    blocks, labels = simulated_parties(given)
    assert Problem(given, blocks, labels).optimum() < Problem(given, blocks, labels).objective(
        np.zeros((sum(b.features.shape[1] for b in blocks.values()) + 1, 3 if loss == "multinomial" else 1))
    )


def test_files_of_parties_are_joined_by_id(tmp_path):
    (tmp_path / "a.csv").write_text("id,y,u\n1,0,1.0\n2,1,2.5\n3,1,3.0\n")
    (tmp_path / "b.csv").write_text("id,v,w\n3,30,1\n1,10,2\n2,20,4\n")
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    two = {"mask": "none", "accept_two_party_disclosure": True, "label_column": "y"}
    blocks, labels = simulated_parties(recipe(tmp_path, data=files, parties=2, **two))
    assert labels.tolist() == [-1, 1, 1]
    assert blocks["p01"].features[:, 0].tolist() == sorted(blocks["p01"].features[:, 0])
    blocks, _ = simulated_parties(recipe(tmp_path, data=files, parties=3, label_column="y"))
    assert [block.features.shape[1] for block in blocks.values()] == [1, 1, 1]
    (tmp_path / "b.csv").write_text("id,v,w\n3,30,1\n1,10,2\n")
    with pytest.raises(InputError, match="lacks 1 ids of the first file"):
        simulated_parties(recipe(tmp_path, data=files, parties=2, **two))
    (tmp_path / "b.csv").write_text("id,v,y\n3,30,1\n1,10,0\n2,20,1\n")  # the label again is no column
    blocks, _ = simulated_parties(recipe(tmp_path, data=files, parties=2, **two))
    assert blocks["p01"].names == ("v",) and blocks["p01"].label is None
    (tmp_path / "b.csv").write_text("id,v,y\n3,30,1\n1,10,0\n2,20,0\n")
    with pytest.raises(InputError, match="row 1 has the label 0, and in the first file 1; the rows do not align"):
        simulated_parties(recipe(tmp_path, data=files, parties=2, **two))


@pytest.mark.parametrize("second, is_good", [("1 1 0", True), ("0 0 0", True), ("1 0 0", False)])
def test_rows_of_libsvm_files_align_by_their_labels(tmp_path, second, is_good):
    for name, labels in (("a", "1 1 0"), ("b", second)):
        rows = [f"{label} 1:{row + 1} 2:{row**2 + 1}" for row, label in enumerate(labels.split())]
        (tmp_path / name).write_text("\n".join(rows))
    given = recipe(tmp_path, data=[str(tmp_path / "a"), str(tmp_path / "b")], parties=3)
    if is_good:
        assert simulated_parties(given)[1].tolist() == [1, 1, -1]
    else:
        with pytest.raises(InputError, match="b: row 1 has the label 0, and in the first file 1"):
            simulated_parties(given)


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_recipe_loads_and_says_what_it_is(name, tmp_path):
    given = load_config(SimulationRecipe, RECIPES / name, {"output_dir": str(tmp_path)})
    assert given.max_steps and given.finish == "first"
    lines = (RECIPES / name).read_text().splitlines()
    assert lines[1] == f"# hf-mlopt vertical simulate {name} --parties 4 --straggler 1:3 --output-dir DIR"


def test_recipes_of_files_read_them(shared_data, tmp_path):
    for name, shape in (("credit.yaml", (30_000, 23)), ("a9a.yaml", (32_561, 123))):
        given = yaml.safe_load((RECIPES / name).read_text())
        files = [str(shared_data / "vertical" / file) for file in given["data"]]
        options = {"data": files, "output_dir": str(tmp_path)}
        blocks, labels = simulated_parties(load_config(SimulationRecipe, RECIPES / name, options))
        assert len(labels) == shape[0]
        assert sum(block.features.shape[1] for block in blocks.values()) == shape[1]


# Attacks.


def test_attacks_say_what_holds_and_try_it():
    out = succeed("vertical", "attack", RECIPES / "breast_cancer.yaml", "--parties", 3).out
    assert "2 parties that collude isolate the last one's, 1 or fewer do not" in out
    assert "labels=shared: p00, p01, p02 know every label" in out
    assert "p01 sees a row at" in out
    errors = [float(word) for word in out.split() if "e-" in word]
    assert errors and max(errors) < 1e-6  # with as many views as they need all succeed
    few = succeed("vertical", "attack", RECIPES / "breast_cancer.yaml", "--parties", 3, "--max-steps", 8).out
    gram = [line for line in few.splitlines() if "inner products" in line]
    assert all(float(line.split("relative error ")[1].split()[0]) > 0.3 for line in gram)


@pytest.mark.parametrize(
    "words, text",
    [
        (("--mask", "tree"), "two that collude, one in each tree, do"),
        (("--mask", "none", "--allow-unsafe"), "whoever asks learns the score of each other party"),
        (("--labels", "owner", "--backward", "none"), "others learn nothing of the labels"),
        (("--labels", "owner", "--backward", "plain", "--allow-unsafe"), "100% of a batch are right"),
        (
            ("--labels", "owner", "--backward", "he"),
            "labels by theory: AUC 0.69 from one epoch, at most 1.00 from all",
        ),
        (("--labels", "owner", "--backward", "dp", "--dp-epsilon", 1), "noisy derivatives"),
    ],
)
def test_what_each_mode_discloses(words, text):
    assert text in succeed("vertical", "attack", RECIPES / "breast_cancer.yaml", *words).out


# Certificates.


def test_certificates_from_the_command_line(tmp_path):
    ca, shop = tmp_path / "ca", tmp_path / "shop"
    succeed("vertical", "pki", "init", ca)
    assert succeed("vertical", "pki", "issue", ca, "bank", "--host", "bank.example.org").out.strip() == str(
        ca / "bank"
    )
    request = succeed("vertical", "pki", "request", shop, "shop").out.strip()
    signed = succeed("vertical", "pki", "sign", ca, request, "shop", "--days", 30).out.strip()
    assert sorted(path.name for path in (tmp_path / "ca" / "shop").iterdir()) == ["authority.pem", "certificate.pem"]
    assert signed == str(ca / "shop")
    assert hf_mlopt("vertical", "pki", "init", ca).status == 2
    assert "party='Bank'" in hf_mlopt("vertical", "pki", "issue", ca, "Bank").err


# Refusals.


@pytest.mark.parametrize(
    "options, text",
    [
        ({"straggler": "4:3"}, "must be PARTY:FACTOR"),
        ({"straggler": "slow"}, "must be PARTY:FACTOR"),
        ({"parties": 2}, "set mask=none"),
        ({"data": ["nowhere.csv"]}, "no such file"),
        ({"data": ["wine", "diabetes"]}, "one embedded data set"),
        ({"modes": ["fast"]}, "must be of sync and async"),
        ({"gap": 0.0}, "must be above 0"),
        ({"num_features": [1, 2]}, "one number a file, 1"),
        ({"parties": 31}, "number of columns, 30"),
        ({"data": ["wine"], "loss": "logistic"}, "3 values"),
        ({"query_budget": "auto", "accept_gram_disclosure": False, "max_steps": 200}, "query_budget"),
    ],
)
def test_simulations_that_are_refused(tmp_path, options, text):
    with pytest.raises(InputError, match=text):
        simulate(recipe(tmp_path, **options))
    assert not (tmp_path / "out").exists()


def party(folder, **options):
    (folder / "a.csv").write_text("id,y,u\n1,0,1.0\n2,1,2.5\n3,1,4.0\n")
    given = {
        "party": "a",
        "parties": {"a": "127.0.0.1:1", "b": "127.0.0.1:2", "c": "127.0.0.1:3"},
        "label_owner": "a",
        "plaintext": True,
        "data": str(folder / "a.csv"),
        "label_column": "y",
        "output_dir": str(folder / "out"),
    }
    (folder / "a.yaml").write_text(yaml.safe_dump(given | options))
    return folder / "a.yaml"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"party": "z"}, "party='z'"),
        ({"label_owner": "z"}, "label_owner='z'"),
        ({"label_recipients": ["z"]}, "label_recipients"),
        ({"parties": {"A b": "x:1"}}, "party='A b'"),
        ({"plaintext": False}, "credentials=None: name their folder"),
        ({"credentials": "x"}, "and not both"),
        ({"label_column": None}, "label_column=None: is needed at the label owner"),
        ({"label_owner": "b"}, "label_column='y': names the labels of a table at the label owner alone"),
        ({"label_column": "u"}, "label_column='u': the label has 3 values"),
        ({"id_column": "y"}, "id_column='y': 1 ids occur more than once, the first in rows [1, 2]"),
        ({"alignment": "hmac"}, "accept_dictionary_attack"),
        ({"eval_share": 1.0}, "below 1"),
        ({"parties": {"a": "127.0.0.1:1", "b": "127.0.0.1:2"}}, "set mask=none"),
        ({"data": "nowhere.csv"}, "no such file"),
        ({"plaintext": False, "credentials": "nowhere"}, "cannot be read"),
        ({"parties": {"a": "127.0.0.1:1", "b": "10.0.0.7:2", "c": "127.0.0.1:3"}}, "plaintext is for loopback only"),
        ({"parties": {"a": "127.0.0.1", "b": "127.0.0.1:2", "c": "127.0.0.1:3"}}, "must be host:port"),
        ({"resume": True, "labels": "owner", "backward": "dp", "dp_epsilon": 1.0}, "resume=True: is of no use"),
        ({"save_steps": 5, "labels": "owner", "backward": "dp", "dp_epsilon": 1.0}, "dp_epsilon exceeded"),
        ({"learnig_rate": 0.1}, "did you mean 'learning_rate'"),
    ],
)
def test_parties_that_are_refused(tmp_path, options, text):
    outcome = hf_mlopt("vertical", "party", "-c", party(tmp_path, **options))
    assert outcome.status == 2
    assert text in outcome.err
    assert not (tmp_path / "out" / "party_results.json").exists()


def test_a_party_that_has_run_is_not_run_over(tmp_path):
    path = party(tmp_path)
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    assert "set resume=true" in hf_mlopt("vertical", "party", "-c", path).err
    (tmp_path / "out" / "party_results.json").write_text("{}")
    assert "holds the results of a run" in hf_mlopt("vertical", "party", "-c", path).err
    assert (
        "no block of a vertical model"
        in hf_mlopt(
            "vertical", "predict", "-c", path, "--rows", tmp_path / "a.csv", "--output", tmp_path / "p.csv"
        ).err
    )
    assert (
        "--rows='none.csv'"
        in hf_mlopt("vertical", "predict", "-c", path, "--rows", "none.csv", "--output", tmp_path / "p.csv").err
    )


def test_files_of_parties_travel_through_yaml(tmp_path):
    given = load_config(PartyRecipe, party(tmp_path, columns=["u"], eval_share=0.25, algorithm="sgd"))
    assert given.arguments.algorithm == "sgd" and given.columns == ["u"] and given.is_table
    assert hf_mlopt("vertical", "audit", "verify", tmp_path / "a.csv", "--head", "x").status == 2


def test_the_file_in_the_documentation_is_one(tmp_path):
    page = (resource_dir("recipes").parent / "docs" / "vertical.md").read_text()
    bank = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "bank.yaml").write_text(bank)
    given = load_config(PartyRecipe, tmp_path / "bank.yaml")
    shop = {"party": "shop", "credentials": "shop-keys", "data": "shop.csv", "label_column": None}
    other = load_config(PartyRecipe, tmp_path / "bank.yaml", shop)
    assert given.arguments == other.arguments
    assert page.splitlines()[3].startswith("hf-mlopt vertical simulate recipes/vertical/breast_cancer.yaml ")
