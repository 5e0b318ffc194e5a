"""`hf-mlopt push` against a Hub on loopback, and what it refuses before it asks for anything."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file, save_file

from hf_mlopt.hub import push as sending
from hf_mlopt.hub.push import plan_files
from tests.command_line import hf_mlopt, python, save, succeed
from tests.loopback_hub import LoopbackHub, connect


# huggingface_hub's own way of calling httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/pruned"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tiny_mixtral, tiny_tokenizer, tmp_path_factory):
    """What `hf-mlopt prune` wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("push")
    dense = save(tiny_mixtral(), tiny_tokenizer, folder / "dense")
    succeed("prune", dense, "--output", folder / "pruned", "--sparsity", 0.5, "--method", "magnitude")
    return folder / "pruned"


@pytest.fixture
def directory(checkpoint, tmp_path):
    """A copy to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "pruned"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to; large files go in parts."""
    with LoopbackHub(tmp_path / "hub", part_bytes=40_000) as server:
        connect(monkeypatch, server, tmp_path / "home")
        monkeypatch.setattr(sending, "_WAIT", 0.01)
        yield server


def local(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def refused(directory, *words):
    outcome = hf_mlopt("push", directory, REPO, *words)
    assert outcome.status == 2 and outcome.out == ""
    assert "Traceback" not in outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("hf-mlopt push: error: ")]
    return line.removeprefix("hf-mlopt push: error: ")


def test_a_pushed_model_is_loaded_by_its_name_in_another_process(hub, checkpoint, tmp_path):
    before = local(checkpoint)
    outcome = succeed("push", checkpoint, REPO, "--private", "--message", "First one")
    assert f"pushed to {hub.url}/{REPO}" in outcome.out
    assert hub.repositories[REPO]["private"] and hub.commit(REPO, "main")["title"] == "First one"
    assert local(checkpoint) == before  # nothing is left here
    there = hub.files(REPO)
    assert there.keys() - {".gitattributes"} == before.keys()
    changed = {name for name in before if there[name] != before[name]}
    assert changed == {"README.md", "recipe.yaml"}
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}"' in there["README.md"].decode()
    parts = [path for method, path in hub.requests if method == "PUT"]
    assert len(parts) == -(-(checkpoint / "model.safetensors").stat().st_size // 40_000) > 1

    program = """
import sys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
name, directory = sys.argv[1:]
here, there = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (directory, name))
print(here.keys() == there.keys() and all(here[key].equal(there[key]) for key in here), len(here))
here, there = (AutoTokenizer.from_pretrained(each)("the fox").input_ids for each in (directory, name))
print(here == there)
"""
    printed = python(program, REPO, checkpoint, **hub.environment(tmp_path / "home"))
    equal, count, tokens = printed.split()
    assert (equal, tokens) == ("True", "True") and int(count) > 10


def test_the_same_again_changes_nothing(hub, checkpoint):
    succeed("push", checkpoint, REPO)
    commit, sent = hub.commit(REPO, "main")["oid"], len(hub.requests)
    succeed("push", checkpoint, REPO)
    assert hub.commit(REPO, "main")["oid"] == commit
    assert "PUT" not in {method for method, _ in hub.requests[sent:]}


@pytest.mark.parametrize(
    "where",
    ["api/repos/create", "preupload", "objects/batch", "?part=1", "/commit/", "after:?part=1", "after:/commit/"],
)
def test_a_dropped_connection_is_tried_again_and_ends_complete(hub, checkpoint, monkeypatch, where):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its own attempts wait 1 s
    hub.drop = {where: 1}
    outcome = succeed("push", checkpoint, REPO)
    assert hub.drop == {where: 0} and "pushed to" in outcome.out
    assert hub.files(REPO)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert len(hub.repositories[REPO]["branches"]["main"]) == 2  # the first one, and ours once


def test_a_connection_that_stays_away_is_one_line_and_what_arrived_is_not_sent_again(hub, checkpoint):
    hub.drop = {"/commit/": 99}
    message = refused(checkpoint)
    assert "the connection failed 5 times" in message and "run the same command again" in message
    assert hub.files(REPO).keys() == {".gitattributes"}  # never half a model
    hub.drop, sent = {}, len(hub.requests)
    succeed("push", checkpoint, REPO)
    assert "PUT" not in {method for method, _ in hub.requests[sent:]}
    assert hub.files(REPO)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()


def test_a_refused_token_is_one_line(hub, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refused(checkpoint) == (
        "the Hub refuses the token; log in again with `hf auth login`, or set HF_TOKEN to one that is valid"
    )
    assert hub.repositories == {}


def test_without_a_token_nothing_is_asked(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refused(checkpoint) == "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"
    assert hub.requests == []


def test_a_branch_is_made_where_it_is_absent(hub, checkpoint):
    outcome = succeed("push", checkpoint, REPO, "--revision", "fifty/percent")
    assert f"pushed to {hub.url}/{REPO}/tree/fifty/percent" in outcome.out
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert "model.safetensors" in hub.files(REPO, "fifty/percent")
    succeed("push", checkpoint, REPO, "--revision", "fifty/percent")  # it is there now


def test_a_public_repository_does_not_get_what_should_be_private(hub, checkpoint):
    succeed("push", checkpoint, REPO)
    commit = hub.commit(REPO, "main")["oid"]
    assert "exists and is public, which --private does not change" in refused(checkpoint, "--private")
    assert hub.commit(REPO, "main")["oid"] == commit


def test_weights_of_an_earlier_push_do_not_stay_in_the_way(hub, directory):
    succeed("push", directory, REPO)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    outcome = succeed("push", directory, REPO)
    assert "removed there: model.safetensors" in outcome.out.splitlines()
    assert hub.files(REPO).keys() - {".gitattributes"} == local(directory).keys()


def test_a_dry_run_lists_what_would_go_and_asks_nobody(directory, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (directory / "training_args.bin").write_bytes(b"pickle")
    (directory / "checkpoint-10").mkdir()
    (directory / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    (directory / ".eval_results").mkdir()
    (directory / ".eval_results" / "gsm8k.yaml").write_text("[]\n")
    before = local(directory)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))
    lines = succeed("push", directory, REPO, "--dry-run").out.splitlines()
    assert "stays here: checkpoint-10, training_args.bin" in lines
    assert lines[-1] == f"nothing was sent; without --dry-run this goes to {REPO}"
    listed = {words[2]: (words[0], words[1]) for words in (line.split() for line in lines[:-3])}
    assert listed.keys() == before.keys() - {"checkpoint-10/optimizer.pt", "training_args.bin"}
    assert listed["model.safetensors"] == (f"{len(before['model.safetensors']):,}", "large")
    assert listed["config.json"] == (f"{len(before['config.json']):,}", "text")
    assert local(directory) == before


def test_the_recipe_that_goes_names_no_place_on_this_machine(hub, directory):
    assert (
        str(directory.parent.parent) in (directory / "recipe.yaml").read_text()
        or "model: /" in (directory / "recipe.yaml").read_text()
    )
    succeed("push", directory, REPO)
    here, there = (directory / "recipe.yaml").read_text(), hub.files(REPO)["recipe.yaml"].decode()
    changed = [pair for pair in zip(here.splitlines(), there.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [new for _, new in changed] == ["model: dense"]

    card = directory / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: someone/dense\n", 1))
    succeed("push", directory, REPO)
    assert "model: someone/dense\n" in hub.files(REPO)["recipe.yaml"].decode()


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_a_report_that_the_weights_contradict_is_refused_before_a_request(hub, directory):
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

    def fill_in(tensors):
        row = tensors[name][3]
        row[(row == 0).nonzero()[0]] = 1.0

    change_weights(directory, fill_in)
    message = refused(directory)
    assert "says 4,096 of 8,192 weights of model.layers.1.mlp.experts.down_proj are zero (50.00 %)" in message
    assert "but 4,095 are (49.99 %)" in message and "copy both from one run" in message
    assert hub.requests == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda report: report["layers"][0]["tensors"][0].update(zeros=8191), "says 8,191 of 16,384"),
        (lambda report: report["totals"].update(zeros=1), "totals.zeros is 1, its tensors have 24,576"),
        (lambda report: report["totals"].update(parameters=1), "totals.parameters is 1, the model has"),
        (lambda report: report["layers"][0]["tensors"][0].update(shape=[1]), "has shape [1], it has [4, 128, 32]"),
        (lambda report: report["layers"][0]["tensors"][0].update(name="x"), "names x, which the model does not have"),
        (lambda report: report.update(sparsity=0.6), "hf_mlopt.sparsity is 0.5, in pruning_report.json it is 0.6"),
    ],
)
def test_a_report_of_another_run_is_refused(directory, change, message):
    report = json.loads((directory / "pruning_report.json").read_text())
    change(report)
    (directory / "pruning_report.json").write_text(json.dumps(report))
    assert message in refused(directory, "--dry-run")


def test_after_distillation_zeros_may_come_but_not_go(directory):
    (directory / "distillation_report.json").write_text("{}")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    change_weights(directory, lambda tensors: tensors[name][0].zero_())
    succeed("push", directory, REPO, "--dry-run")
    change_weights(directory, lambda tensors: tensors[name].fill_(1))
    assert "the zeros did not survive the training" in refused(directory, "--dry-run")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: (d / "README.md").unlink(), "README.md: is missing; a model without a card"),
        (lambda d: (d / "README.md").write_text("---\na: [\n---\n"), "README.md: its header cannot be read"),
        (
            lambda d: (d / "README.md").write_text("# x\n"),
            "its header misses library_name, pipeline_tag, tags; add it",
        ),
        (lambda d: change_json(d / "config.json", quantization_config={}), "holds quantization_config"),
        (lambda d: change_json(d / "config.json", sparsity_config={}), "holds sparsity_config"),
        (lambda d: (d / "pruning_report.json").unlink(), "there is no pruning_report.json"),
        (lambda d: (d / "pruning_report.json").write_text("{"), "pruning_report.json: not JSON"),
        (lambda d: (d / "a.safetensors.incomplete").touch(), "is the rest of a run that did not finish"),
        (lambda d: (d / ".cache.tmp").mkdir(), "is the rest of a run that did not finish"),
        (
            lambda d: save_file({"a": torch.zeros(1)}, d / "b.safetensors"),
            "b.safetensors: is no part of the",
        ),
        (
            lambda d: (d / "notes.md").write_text("a\nb /home/me/x\n"),
            "notes.md:2: names a place on this machine",
        ),
        (lambda d: (d / "notes.txt").write_text(f"see {ROOT}/tests"), "notes.txt:1: names a place on this machine"),
        (lambda d: (d / "packed.index.json").write_text("{}"), "is packed; unpack it first: hf-mlopt unpack"),
        (lambda d: change_weights(d, lambda t: t.pop("lm_head.weight")), "1 tensors are missing in its weight files"),
        (lambda d: change_json(d / "config.json", num_local_experts=2), "another shape"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda d: (d / "recipe.yaml").write_text("- a\n"), "recipe.yaml: must hold a mapping"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(directory, change, message):
    change(directory)
    assert message in refused(directory, "--dry-run")


def test_urls_and_vocabularies_are_no_places(directory):
    (directory / "notes.md").write_text("https://x.org/home/me/a and/or /usr/bin/env, a/home/b, /v1/chat\n")
    (directory / "vocab.json").write_text('{"/home/me/a": 1}')
    succeed("push", directory, REPO, "--dry-run")


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", REPO], "directory='nowhere': no such directory"),
        ([None, "pruned"], "repo='pruned': must have the form user/name, such as your-name/pruned"),
        ([None, "a/b/c"], "repo='a/b/c': must have the form user/name"),
        ([None, REPO, "--revision", "a" * 40], "must name a branch; a commit cannot be pushed to"),
    ],
)
def test_a_wrong_command_is_refused(checkpoint, words, message):
    outcome = hf_mlopt("push", *(checkpoint if word is None else word for word in words), "--dry-run")
    assert outcome.status == 2 and message in outcome.err


def test_results_that_nobody_measured_are_refused(directory):
    card = ModelCard.load(directory / "README.md")
    report = json.loads((directory / "pruning_report.json").read_text())
    row = {"dataset": "a/b", "split": "test", "window": 8, "tokens": 80, "dense": 4.0, "pruned": 5.0}
    (directory / "pruning_report.json").write_text(json.dumps(report | {"evaluation": [row]}))
    card.data.model_name = "pruned"
    kinds = {"task_type": "text-generation", "dataset_type": "a/b", "dataset_name": "a/b", "metric_type": "perplexity"}
    for value, other in ((5.0, {}), (4.9, {}), (5.0, {"metric_type": "acc"})):
        card.data.eval_results = [EvalResult(**kinds | other, dataset_split="test", metric_value=value)]
        card.save(directory / "README.md")
        outcome = hf_mlopt("push", directory, REPO, "--dry-run")
        assert outcome.status == (0 if (value, other) == (5.0, {}) else 2), outcome.err
    assert "acc 5.0 on a/b was not measured: no record here has it" in outcome.err


def test_a_source_on_the_hub_must_stand_in_the_card(directory):
    report = json.loads((directory / "pruning_report.json").read_text())
    report["model"]["source"] = "someone/dense"
    (directory / "pruning_report.json").write_text(json.dumps(report))
    assert "its header misses base_model (base_model: someone/dense); add it" in refused(directory, "--dry-run")
    card = directory / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: someone/other\n", 1))
    assert "base_model is 'someone/other', the model was made from 'someone/dense'" in refused(directory, "--dry-run")


def test_files_of_tools_and_pickles_stay_here(tmp_path):
    for name in (
        ".git/config",
        ".cache/huggingface/x",
        "a.pt",
        "runs/events.out.tfevents.1.host",
        "sub/b.py",
        "c.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files, left_out = plan_files(tmp_path, [])
    assert [file.path for file in files] == ["c.json", "sub/b.py"]
    assert left_out == [".cache", ".git", "a.pt", "runs/events.out.tfevents.1.host"]


@pytest.mark.slow
def test_the_typed_command_pushes_in_a_process_of_its_own(checkpoint, tmp_path):
    with LoopbackHub(tmp_path / "hub") as server:
        server.drop = {"/commit/": 1}
        words = [sys.executable, "-m", "hf_mlopt", "push", str(checkpoint), REPO]
        environment = {**os.environ, **server.environment(tmp_path / "home")}
        result = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"pushed to {server.url}/{REPO}"
        assert server.files(REPO)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
