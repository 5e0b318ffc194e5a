"""`hf-mlopt federate --engine flower`: the same weights, bit for bit, as without Flower, and what it refuses."""

import json
import os
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from command_line import hf_mlopt, succeed, weights
from federations import digests, without_timings
from processes import free_port
from test_data_labelled_text import table
from test_federated_flower_processes import (
    AUTHORITY,
    CONNECTION,
    KEY,
    REGISTER,
    SUPERLINK,
    SUPERNODE,
    Shell,
    kill_children,
    living,
)
from test_workflow_federate import DIGITS, TEXTS, read, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_mlopt.configuration import load_config
from hf_mlopt.data import word_tokenizer
from hf_mlopt.errors import InputError
from hf_mlopt.federated.engines import InProcessEngine
from hf_mlopt.workflows.federate_flower import _run_config, answer_factory, serve
from hf_mlopt.workflows.federate_recipe import FederateRecipe


pytestmark = pytest.mark.e2e

SITES = ("north", "south")
# Each SuperNode has its own data and folder; the rest is the guide's.
NODE = SUPERNODE.replace("""site="{site}"'""", """site="{site}" data="{folder}/{site}.csv" state="{folder}/kept"'""")
assert NODE != SUPERNODE
SECONDS = 600  # of a wait that hangs


@pytest.fixture
def no_process_is_left(tmp_path, monkeypatch):
    """Flower's folders are in one of this test, whose path is as short as those of Ray's sockets must be."""
    folder = Path(tempfile.mkdtemp(prefix="h"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    ends = time.monotonic() + 20
    while (left := living(folder)) and time.monotonic() < ends:
        time.sleep(0.2)
    assert left == [] and list(folder.iterdir()) == []
    folder.rmdir()


@pytest.fixture(scope="module")
def in_this_process(tmp_path_factory):
    """Output of a recipe without Flower, made once for each algorithm."""
    outputs = {}

    def output(algorithm):
        if algorithm not in outputs:
            folder = tmp_path_factory.mktemp(algorithm)
            succeed("federate", write(folder, DIGITS), "--output-dir", folder / "output", "--algorithm", algorithm)
            outputs[algorithm] = folder / "output"
        return outputs[algorithm]

    return output


def assert_same(output, other):
    """Two runs have the same history, but for times, and the same weights."""
    assert without_timings(read(output)["rounds"]) == without_timings(read(other)["rounds"])
    assert len(set(digests(read(output)["rounds"]))) == len(read(output)["rounds"])
    first, second = weights(output), weights(other)
    assert first and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("no_process_is_left")
@pytest.mark.parametrize(
    "algorithm", ["fedavg", *(pytest.param(a, marks=pytest.mark.slow) for a in ("scaffold", "domo", "fedbn"))]
)
def test_simulated_sites_give_the_same_bits(algorithm, in_this_process, tmp_path):
    words = ("--engine", "flower", "--flower-simulation", "--algorithm", algorithm)
    outcome = succeed("federate", write(tmp_path, DIGITS), "--output-dir", tmp_path / "output", *words)
    assert_same(tmp_path / "output", in_this_process(algorithm))
    assert read(tmp_path / "output")["engine"] == "flower"
    assert [line.split()[0] for line in outcome.out.splitlines()[:3]] == ["site", "site_0", "site_1"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_process_is_left")
def test_supernodes_on_this_machine_give_the_same_bits_and_read_relative_paths(in_this_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, DIGITS)
    words = ("--engine", "flower", "--output-dir", "output", "--plot", "plots/run.png")
    succeed("federate", "given.yaml", *words)
    assert_same(tmp_path / "output", in_this_process("fedavg"))
    assert (tmp_path / "plots" / "run.png").is_file()
    outcome = hf_mlopt(
        "federate", "given.yaml", "--engine", "flower", "--output-dir", "bad", "--learning-rate", "1e38"
    )
    assert outcome.status == 1 and "hf-mlopt federate: round 0: 0 usable replies" in outcome.err
    assert "Traceback" not in outcome.err.partition("hf-mlopt federate: ")[2]


def reports(folder):
    """Two tables of texts, a tokenizer and a recipe for them; south has no row of the class `mild`."""
    tokenizer = word_tokenizer(["it was red", "it was blue", "it was green"])
    tokenizer.save_pretrained(folder / "tokenizer")
    for site, colours in ("north", ("red", "blue", "green")), ("south", ("blue", "red")):
        classes = {"red": "warm", "blue": "cold", "green": "mild"}
        rows = [(f"it was {colour}", classes[colour]) for colour in colours * 8]
        table(folder / f"{site}.csv", rows, ("text", "label"))
    return {
        **TEXTS,
        "tokenizer": str(folder / "tokenizer"),
        "label_names": ["cold", "mild", "warm"],
        "site_datasets": {site: f"{site}.csv" for site in SITES},
        "num_rounds": 2,
    }


def in_process(folder, fields, algorithm):
    """Output of the same recipe on one machine that has the data of all."""
    own = {**fields, "site_datasets": {site: str(folder / f"{site}.csv") for site in SITES}}
    output = folder / f"in-process-{algorithm}"
    succeed("federate", write(folder, own), "--output-dir", output, "--algorithm", algorithm)
    return output


@pytest.fixture
def hospitals(tmp_path):
    return tmp_path, reports(tmp_path)


def both_ends(folder, fields, **of_site):
    """Run configuration, and an engine that has each site answer as the application of its SuperNode would."""
    at_server = {**fields, "engine": "flower", "superlink": "server:1", "output_dir": str(folder / "output")}
    run_config = _run_config(load_config(FederateRecipe, None, at_server))
    answers = {}
    for site in SITES:
        node_config = {"site": site, "data": str(folder / f"{site}.csv"), "state": str(folder / "kept")}
        name, answers[site] = answer_factory(of_site.get(site, run_config), node_config)
        assert name == site
    return run_config, InProcessEngine(SITES, lambda site, message: answers[site](site, message))


def test_the_server_has_no_data_and_each_site_its_own(hospitals, monkeypatch):
    folder, fields = hospitals
    expected = in_process(folder, fields, "scaffold")
    run_config, engine = both_ends(folder, {**fields, "algorithm": "scaffold"})
    assert "superlink" not in run_config["recipe"] and run_config["sites"] == "north,south"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")  # where none of the paths in the recipe is
    serve(engine, run_config)
    assert_same(folder / "output", expected)
    assert {path.name for path in (folder / "kept").iterdir()} == set(SITES)
    assert not (folder / "output" / "sites").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "output")
    assert model.config.id2label == {0: "cold", 1: "mild", 2: "warm"}
    assert len(AutoTokenizer.from_pretrained(folder / "output")) == model.config.vocab_size


def test_sites_that_differ_are_refused_before_the_first_round(hospitals, tmp_path):
    folder, fields = hospitals
    word_tokenizer(["it was red or grey or white"]).save_pretrained(folder / "other")

    def config(**changed):
        given = {
            **fields,
            **changed,
            "engine": "flower",
            "superlink": "server:1",
            "output_dir": str(folder / "output"),
        }
        return _run_config(load_config(FederateRecipe, None, given))

    wider = {**TEXTS["model_config"], "hidden_size": 16}
    for of_south, message in (
        (config(tokenizer=str(folder / "other")), "'south' has another model: .*need the same architecture and voca"),
        (config(model_config=wider), "'south' has another model: .*need the same architecture"),
        (config(label_names=["cold", "warm"]), "'south' has another model: .*classifier"),
        (
            config(label_names=["hot", "mild", "cold"]),
            r"site 'south' cannot take part: .*has labels \['warm'\], which",
        ),
    ):
        run_config, engine = both_ends(folder, fields, south=of_south)
        with pytest.raises(InputError, match=message):
            serve(engine, run_config)
    (folder / "south.csv").unlink()
    run_config, engine = both_ends(folder, fields)
    with pytest.raises(InputError, match="site 'south' cannot take part: .*south.csv.*no such file"):
        serve(engine, run_config)
    assert not (folder / "output").exists()


def test_a_node_without_a_folder_of_its_own_is_refused(hospitals):
    folder, fields = hospitals
    run_config, _ = both_ends(folder, fields)
    with pytest.raises(InputError, match="state=None: the node of site 'north' needs a folder: --node-config 'state="):
        answer_factory(run_config, {"site": "north"})


def test_a_node_of_a_simulation_is_known_by_its_number(hospitals):
    folder, fields = hospitals
    run_config = both_ends(folder, fields)[0] | {"state": str(folder / "kept")}
    assert answer_factory(run_config, {"partition-id": 1, "num-partitions": 2})[0] == "south"


def test_what_travels_is_the_recipe_with_paths_of_this_machine_or_none(hospitals, monkeypatch):
    folder, fields = hospitals
    monkeypatch.chdir(folder)
    given = {**fields, "tokenizer": "tokenizer", "engine": "flower", "output_dir": "out", "round_timeout": 60.0}
    here = _run_config(load_config(FederateRecipe, None, given))
    recipe = yaml.safe_load(here["recipe"])
    assert recipe["output_dir"] == str(folder / "out") and recipe["tokenizer"] == str(folder / "tokenizer")
    assert recipe["site_datasets"] == {site: str(folder / f"{site}.csv") for site in SITES}
    assert here["timeout"] == 60.0 and "nodes" not in here
    (folder / "ca.crt").write_text("")
    of_sender = {"superlink": "server:1", "root_certificates": "ca.crt", "flower_nodes": {"north": 7, "south": 8}}
    sent = _run_config(load_config(FederateRecipe, None, {**given, **of_sender, "resume_from_checkpoint": True}))
    recipe = yaml.safe_load(sent["recipe"])
    assert sent["nodes"] == "north=7,south=8" and not set(of_sender) & set(recipe)
    assert recipe["output_dir"] == "out" and recipe["site_datasets"] == fields["site_datasets"]
    assert recipe["resume_from_checkpoint"] is True and "resume_from_checkpoint" not in yaml.safe_load(here["recipe"])


@contextmanager
def meanwhile(function):
    """Runs it in another thread, once; what it raises is raised at the end."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(SECONDS)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def await_file(path):
    ends = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < ends, path
        time.sleep(0.05)


def kill_server_application(home):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"FLWR_HOME={home}".encode() in (folder / "environ").read_bytes()
            if is_ours and b"flwr-serverapp" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    assert found
    for process in found:
        os.kill(process, signal.SIGKILL)


@contextmanager
def deployment(folder, fields):
    """SuperLink and SuperNodes as the guide starts them; the shell, the nodes, and what runs a recipe on them."""
    at_server = folder / "server"
    at_server.mkdir()
    recipe = write(at_server, {**fields, "engine": "flower", "round_timeout": 400.0, "site_retries": 4})
    with Shell(folder, server="localhost", port=free_port()) as shell:
        shell(AUTHORITY)
        (folder / "config.toml").write_text(CONNECTION.format(**shell.values))
        shell.start("superlink", SUPERLINK)
        shell.await_log("superlink", "Uvicorn running|startup complete")
        nodes = {}
        for site in SITES:
            shell(KEY, site=site)
            nodes[site] = int(json.loads(shell(REGISTER, site=site))["node-id"])
            shell.start(site, NODE, site=site, own_port=free_port())
        link = ("--superlink", f"localhost:{shell.values['port']}", "--root-certificates", folder / "ca.crt")
        link += ("--flower-nodes", json.dumps(nodes))

        def federate(output, *words):
            return hf_mlopt("federate", recipe, "--output-dir", at_server / output, *link, *words)

        yield shell, nodes, federate


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_guide_with_certificates_keys_and_data_of_sites(hospitals):
    folder, fields = hospitals
    expected = in_process(folder, fields, "fedavg")
    with deployment(folder, fields) as (shell, nodes, federate):
        outcome = federate("fedavg")
        assert outcome.status == 0, outcome.err
        assert f"machine of the SuperLink has written model and federated_results.json to {folder}" in outcome.out
        assert_same(folder / "server" / "fedavg", expected)

        outcome = federate("fedavg")
        assert outcome.status == 2 and "output_dir=" in outcome.err and "is not empty" in outcome.err
        outcome = federate("never", "--label-names", "cold", "warm")
        assert outcome.status == 2 and "label_names does not list" in outcome.err, outcome.err
        (folder / "other").mkdir()
        Shell(folder / "other", server="localhost")(AUTHORITY)
        outcome = federate("never", "--root-certificates", folder / "other" / "ca.crt")
        assert outcome.status == 2 and "its certificate is not trusted" in outcome.err
        swapped = json.dumps({"north": nodes["south"], "south": nodes["north"]})
        outcome = federate("never", "--flower-nodes", swapped)
        assert outcome.status == 2 and "which is registered as node" in outcome.err, outcome.err
        assert not (folder / "server" / "never").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_that_dies_comes_back_with_the_state_that_it_has_kept(hospitals):
    folder, fields = hospitals
    expected = in_process(folder, fields, "scaffold")
    with deployment(folder, fields) as (shell, _, federate):

        def kill_site():
            await_file(folder / "server" / "scaffold" / "checkpoint-1")
            kill_children(shell.started["south"].pid)

        with meanwhile(kill_site):
            outcome = federate("scaffold", "--algorithm", "scaffold")
        assert outcome.status == 0, outcome.err
        assert_same(folder / "server" / "scaffold", expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_that_dies_goes_on_where_it_was(hospitals):
    folder, fields = hospitals
    expected = in_process(folder, fields, "scaffold")
    with deployment(folder, fields) as (_, _, federate):

        def kill_server():
            await_file(folder / "server" / "scaffold" / "checkpoint-1")
            kill_server_application(folder)

        with meanwhile(kill_server):
            outcome = federate("scaffold", "--algorithm", "scaffold")
        assert outcome.status == 1 and "hf-mlopt federate: " in outcome.err, outcome
        assert not (folder / "server" / "scaffold" / "federated_results.json").exists()
        outcome = federate("scaffold", "--algorithm", "scaffold", "--resume-from-checkpoint", "true")
        assert outcome.status == 0, outcome.err
        assert_same(folder / "server" / "scaffold", expected)


def test_the_guide_says_what_is_tested_here():
    guide = (Path(__file__).parent.parent / "docs" / "federate.md").read_text(encoding="utf-8")
    named = {"server": "SERVER", "port": "PORT", "site": "north", "own_port": "OWN"}
    node = NODE.replace("{folder}/{site}.csv", "/srv/{site}.csv").replace("{folder}/kept", "/srv/federated")
    for commands in (AUTHORITY, KEY, REGISTER):
        assert commands.strip().format(**named) in guide
    for command in (SUPERLINK, node):
        assert " ".join(command.split("\n")).strip().format(**named) in guide
    connection = CONNECTION.strip().format(folder="/absolute/path", **named)
    assert connection in guide


def test_a_site_may_insist_on_masks_and_noise(tmp_path):
    node_config = {"site": "north", "state": str(tmp_path)}
    config = {"recipe": yaml.safe_dump({"task": "image-classification", "model_type": "resnet", "output_dir": "out"})}
    for demand, words in (
        ({"secure_sum": True}, "secure_sum=False: site 'north' takes part in masked sums only"),
        ({"noise_multiplier": 1.0}, "noise_multiplier=0.0: site 'north' demands at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            answer_factory(config, {**node_config, **demand})
    assert answer_factory(config, node_config)[0] == "north"
