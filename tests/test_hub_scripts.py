"""The scripts of `hub_scripts/`: what they plan to send, and that they read only what they need."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from tests.command_line import hf_mlopt, save, succeed
from tests.loopback_hub import LoopbackHub, connect
from tests.test_hub_results import EVALUATION


SCRIPTS = Path(__file__).resolve().parent.parent / "hub_scripts"
REPO = "someone/pruned"


def script(name):
    spec = importlib.util.spec_from_file_location(f"hub_scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RecordingApi:
    """A Hub with the files of a directory, which remembers what it is asked to do."""

    token = "hf_test"

    def __init__(self, directory: Path | None = None):
        self.directory, self.commits, self.created, self.downloads = directory, [], [], []

    def create_repo(self, repo, **options):
        self.created.append((repo, options))
        return f"https://huggingface.co/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=False)

    def list_repo_files(self, repo, revision=None):
        files = self.directory.rglob("*") if self.directory else ()
        return [path.relative_to(self.directory).as_posix() for path in files if path.is_file()]

    def hf_hub_download(self, repo, name, revision=None, local_dir=None):
        self.downloads.append(name)
        return shutil.copy(self.directory / name, Path(local_dir) / name)

    def create_commit(self, repo, operations, **options):
        self.commits.append((repo, operations, options))


@pytest.fixture(scope="module")
def checkpoint(tiny_mixtral, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    dense = save(tiny_mixtral(), tiny_tokenizer, folder / "dense")
    succeed("prune", dense, "--output", folder / "pruned", "--sparsity", 0.5, "--method", "magnitude")
    return folder / "pruned"


@pytest.fixture
def directory(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "pruned"))


@pytest.fixture
def evaluation(tmp_path):
    file = tmp_path / "result.json"
    models = [model | {"source": f"/home/me/{model['model']}"} for model in EVALUATION["models"]]
    file.write_text(json.dumps(EVALUATION | {"models": models}))
    return str(file)


def measured_values():
    model = EVALUATION["models"][1]
    return sorted([row["value"] for row in model["results"]] + [model["perplexity"]["perplexity"]])


def test_results_get_into_the_card_of_a_directory_which_can_then_be_pushed(directory, evaluation, capsys):
    collect = script("collect_results")
    assert collect.main([evaluation, str(directory), "--dry-run"]) == 0
    assert not (directory / "evaluation.json").exists() and "would write README.md" in capsys.readouterr().out
    assert collect.main([evaluation, str(directory)]) == 0
    results = ModelCard.load(directory / "README.md").data.eval_results
    assert sorted(result.metric_value for result in results) == measured_values()
    assert "## Tasks" in (directory / "README.md").read_text()
    kept = json.loads((directory / "evaluation.json").read_text())
    assert [model["model"] for model in kept["models"]] == ["dense", "pruned", "distilled"]
    rows = EVALUATION["models"][1]["results"]
    assert kept["models"][1]["results"] == [*rows[:3], rows[3] | {"dataset": "mine.jsonl"}]  # not where it lay
    (entry,) = yaml.safe_load((directory / ".eval_results" / "gsm8k.yaml").read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 27.5

    assert collect.main([evaluation, str(directory)]) == 0  # an unedited card is written again
    succeed("push", directory, REPO, "--dry-run")
    kept["models"][1]["results"][0]["value"] = 0.7
    (directory / "evaluation.json").write_text(json.dumps(kept))
    outcome = hf_mlopt("push", directory, REPO, "--dry-run")
    assert outcome.status == 2 and "acc 0.6875 on allenai/ai2_arc was not measured" in outcome.err


def test_an_edited_card_is_not_written_over_unasked(directory, evaluation, capsys):
    collect, card = script("collect_results"), directory / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    assert collect.main([evaluation, str(directory)]) == 2
    assert "was edited since it was written" in capsys.readouterr().err and "Mine." in card.read_text()
    assert collect.main([evaluation, str(directory), "--overwrite"]) == 0 and "Mine." not in card.read_text()


def test_results_get_into_the_card_of_a_repository_by_one_commit(directory, evaluation):
    api = RecordingApi(directory)
    assert script("collect_results").main([evaluation, REPO, "--dry-run"], api) == 0 and api.commits == []
    assert script("collect_results").main([evaluation, REPO, "--revision", "x"], api) == 0
    ((repo, operations, options),) = api.commits
    assert (repo, options["revision"]) == (REPO, "x")
    contents = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
    assert contents.keys() == {"README.md", "evaluation.json", ".eval_results/gsm8k.yaml"}
    card = ModelCard(contents["README.md"].decode())
    assert sorted(result.metric_value for result in card.data.eval_results) == measured_values()
    assert set(api.downloads) == {"README.md", "pruning_report.json"}  # no weights


def test_the_push_script_plans_one_commit_of_everything(directory, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = RecordingApi()
    assert script("push").main([str(directory), REPO, "--private", "--message", "m"], api) == 2
    assert "exists and is public" in capsys.readouterr().err and api.commits == []
    assert script("push").main([str(directory), REPO, "--message", "m"], api) == 0
    ((repo, operations, options),) = api.commits
    assert (repo, options) == (REPO, {"commit_message": "m", "revision": None})
    assert {operation.path_in_repo for operation in operations} == {path.name for path in directory.iterdir()}
    assert api.created[-1] == (REPO, {"private": None, "exist_ok": True})


def compared(capsys, *words, api=None):
    status = script("compare_repos").main([*map(str, words), "--json"], api)
    return status, json.loads(capsys.readouterr().out)


def test_two_directories_are_compared_down_to_the_weights(checkpoint, directory, capsys):
    status, found = compared(capsys, checkpoint, directory)
    total = found["equal_tensors"]
    assert status == 0 and total > 10 and not found["different_files"]
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name].zero_()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"use_cache": "no"}))
    (directory / "recipe.yaml").unlink()
    status, found = compared(capsys, checkpoint, directory)
    assert status == 1 and found["equal_tensors"] == total - 1
    assert found["only_left"] == ["recipe.yaml"] and found["only_right"] == []
    assert found["different_files"] == ["config.json", "model.safetensors"]
    assert found["config"] == {"use_cache": [config["use_cache"], "no"]}
    row = found["values"][name]
    assert (row["different"], row["of"], row["sparsity"]) == (1024, 2048, [0.5, 1.0])

    tensors[name] = tensors[name][:8].contiguous()
    tensors["new"] = tensors.pop("lm_head.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    _, found = compared(capsys, checkpoint, directory)
    assert found["shapes"] == {name: [["F32", 64, 32], ["F32", 8, 32]]}
    assert (found["tensors_only_left"], found["tensors_only_right"]) == (["lm_head.weight"], ["new"])


def test_of_a_repository_only_hashes_and_headers_are_fetched(checkpoint, directory, tmp_path, capsys, monkeypatch):
    with LoopbackHub(tmp_path / "hub") as hub:
        connect(monkeypatch, hub, tmp_path / "home")
        api = HfApi()
        succeed("push", checkpoint, REPO)
        asked, hub.sent = len(hub.requests), 0
        status, found = compared(capsys, checkpoint, REPO, api=api)
        assert status == 1 and found["only_right"] == [".gitattributes"]
        assert found["different_files"] == ["README.md", "recipe.yaml"]
        assert found["equal_tensors"] > 10 and not found["not_compared"]

        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"][0, 0] += 1
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        _, found = compared(capsys, directory, REPO, api=api)
        assert "lm_head.weight" in found["not_compared"]
        assert "GET" not in {method for method, path in hub.requests[asked:] if path.endswith((".json", ".md"))}
        assert hub.sent < 220_000 < (checkpoint / "model.safetensors").stat().st_size  # headers, not weights
        _, found = compared(capsys, directory, REPO, "--weights", api=api)
        assert list(found["values"]) == ["lm_head.weight"] and not found["not_compared"]


def test_a_wrong_name_is_one_line(capsys, evaluation, tmp_path):
    assert script("compare_repos").main(["nobody/nothing", "nobody/nothing"]) == 2
    assert capsys.readouterr().err.startswith("compare_repos: error: model='nobody/nothing': ")
    assert script("collect_results").main([evaluation, str(tmp_path)]) == 2
    assert "holds no pruning_report.json and no distillation_report.json" in capsys.readouterr().err
