"""`hf-mlopt distill --mode layerwise`: streamed as in memory, killed and gone on with, and what it refuses."""

import json
import shutil

import pytest
import torch
from command_line import hf_mlopt, refused, succeed, weights
from families import make_family, token_ids
from pruned import prune
from test_workflow_stream_kill import in_a_fork, points
from transformers import AutoModelForCausalLM

from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.streaming.journal import Journal


pytestmark = pytest.mark.e2e

TIMES = ("seconds", "peak_memory_bytes")
SETTINGS = (
    "--samples", 6, "--eval-samples", 3, "--sequence-length", 24, "--batch-size", 2, "--epochs", 2,
    "--learning-rate", 3e-3, "--logging-steps", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """`teacher/` in several shards, `student/`, pruned from it by half, and token ids."""
    work = tmp_path_factory.mktemp("layerwise")
    make_family("mixtral", num_hidden_layers=3).save_pretrained(work / "teacher", max_shard_size="60KB")
    write_ids(work / "ids.jsonl", 0)
    prune_checkpoint(work, "teacher", "student")
    return work


def write_ids(path, seed):
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids(9, seed=seed).tolist()))


def prune_checkpoint(work, teacher, student):
    succeed(
        "prune", work / teacher, "--output", work / student, "--sparsity", "0.5", "--calibration", work / "ids.jsonl",
        "--samples", 6, "--sequence-length", 24, "--min-tokens", 0, "--stream",
    )  # fmt: skip


def words(work, output, *more, student="student", teacher="teacher"):
    return (
        "distill", work / student, "--teacher", work / teacher, "--output", output,
        "--dataset", work / "ids.jsonl", *SETTINGS, *more,
    )  # fmt: skip


def report_of(directory):
    """A report without what differs from run to run."""
    report = json.loads((directory / "distillation_report.json").read_text())
    report = {key: value for key, value in report.items() if key not in TIMES}
    return report | {"layers": [layer | {"seconds": 0} for layer in report["layers"]]}


def files(directory):
    """The bytes of all files, but for times and memory."""
    found = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "README.md"}
    return found | {"distillation_report.json": report_of(directory)}


def assert_same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), name


def assert_distilled(student, output):
    """Only experts differ, their zeros are where they were, and the files are those of the student."""
    before, after = weights(student), weights(output)
    assert before.keys() == after.keys()
    assert len({frozenset(path.name for path in folder.glob("*.safetensors*")) for folder in (student, output)}) == 1
    for name, value in after.items():
        expert = ".experts." in name
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]) != expert, name
        if expert and value.ndim > 1:
            assert torch.equal(value == 0, before[name] == 0), name


@pytest.mark.parametrize(
    "name, dtype, form, more",
    [
        ("mixtral", torch.bfloat16, {"max_shard_size": "30KB"}, ("--offload-states", "STATES")),
        ("deepseek_v3", torch.float32, {}, ("--save-states-every", 1)),
        ("gpt_oss", torch.bfloat16, {"save_original_format": False}, ()),
    ],
)
def test_streamed_is_in_memory(tmp_path, work, name, dtype, form, more):
    teacher, student = (make_family(name, dtype) for _ in range(2))
    prune(student)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student", **form)
    shutil.copy(work / "ids.jsonl", tmp_path)
    more = [tmp_path / "states" if word == "STATES" else word for word in more]
    succeed(*words(tmp_path, tmp_path / "streamed", *more))
    succeed(*words(tmp_path, tmp_path / "in_memory", "--no-stream"))
    assert_same_weights(tmp_path / "streamed", tmp_path / "in_memory")
    assert report_of(tmp_path / "streamed") == report_of(tmp_path / "in_memory")
    assert_distilled(tmp_path / "student", tmp_path / "streamed")
    assert not (tmp_path / "states").exists() or not any((tmp_path / "states").iterdir())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_written(tmp_path, work, tiny_tokenizer):
    student, output = tmp_path / "student", tmp_path / "distilled"
    shutil.copytree(work / "student", student)
    tiny_tokenizer.save_pretrained(student)
    outcome = succeed(*words(work, output, student=student))
    assert "layer 2: error of the experts" in outcome.out and "held out" in outcome.out
    assert_distilled(student, output)
    for name in ("pruning_report.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (student / name).read_bytes()
    assert (output / "distillation.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "distillation_report.json").read_text())
    assert report["mode"] == "layerwise" and report["trained"] == "experts" and report["freeze_router"]
    assert (report["samples"], report["eval_samples"], report["tokens"], report["steps"]) == (6, 3, 6 * 2 * 24, 6)
    assert report["teacher"] == {"source": "teacher", "revision": None} and report["student"]["source"] == "student"
    assert report["mask_violations"] == 0 and report["dataset"]["source"] == "ids.jsonl"
    for index, layer in enumerate(report["layers"]):
        assert layer["index"] == index and layer["kept"] and layer["eval_mse_after"] < layer["eval_mse_before"]
        assert [row["step"] for row in layer["curve"]] == [2, 4, 6] and layer["steps"] == 6
    record, before = read_config(output)["hf_mlopt"], read_config(student)["hf_mlopt"]
    assert all(record[key] == value for key, value in before.items())
    assert record["distillation"]["teacher"] == {"source": "teacher", "revision": None}
    card = (output / "README.md").read_text()
    assert "hf-mlopt distill student --output DIR --teacher teacher" in card and str(tmp_path) not in card
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.hf_mlopt["method"] == "moe-pruner"

    again = tmp_path / "again" / output.name
    succeed("distill", "--config", output / "recipe.yaml", "--output", again)
    assert files(again) == files(output)


def finish(work, output, expected, more, seed):
    """Goes on with a killed run, which is killed once more, until it is done."""
    resumed = words(work, output, *more, "--resume")
    if not output.exists():
        in_a_fork(resumed, 20 + seed % 150, ("before", "half", "after")[seed % 3])
    if output.exists():  # it was complete, and only what stands beside it was still to be removed
        assert "the run is complete" in refused(*resumed)
    else:
        succeed(*resumed)
    assert files(output) == expected
    assert [path.name for path in output.parent.iterdir() if path.name != "states"] == ["distilled"]
    assert not (output.parent / "states").exists() or not any((output.parent / "states").iterdir())


def kill_everywhere(tmp_path, work, number, more=()):
    def settings(parent):
        return [parent / "states" if word == "STATES" else word for word in more]

    whole = tmp_path / "whole" / "distilled"
    status, count, said = in_a_fork(words(work, whole, *settings(whole.parent)))
    assert status == 0 and count > 50, said
    expected, killed = files(whole), 0
    for at, where in points(f"layerwise {more}", count, number):
        output = tmp_path / f"{at}" / "distilled"
        status, _, said = in_a_fork(words(work, output, *settings(output.parent)), at, where)
        assert status in (None, 0), said
        killed += status is None
        if status is None:
            finish(work, output, expected, settings(output.parent), at)
    assert killed >= number * 2 // 3


RUNS = ("--save-states-every", 1), ("--save-states-every", 2), ("--offload-states", "STATES")


@pytest.mark.parametrize("more", RUNS[1:])
def test_killed_anywhere(tmp_path, work, more):
    kill_everywhere(tmp_path, work, 3, more)


@pytest.mark.slow
@pytest.mark.parametrize("more", RUNS)
def test_killed_at_many_moments(tmp_path, work, more):
    kill_everywhere(tmp_path, work, 25, more)


@pytest.fixture
def interrupted(tmp_path, work, monkeypatch):
    """The output of a run that was stopped after two layers."""
    output, record = tmp_path / "distilled", Journal.record

    def stop(journal, index, *args):
        if index == 2:
            raise KeyboardInterrupt
        record(journal, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        assert hf_mlopt(*words(work, output, "--save-states-every", 1)).status == 130
    return output


def test_another_run_is_not_gone_on_with(tmp_path, work, interrupted):
    for change, named in (
        (("--learning-rate", 1e-3), "recipe.learning_rate was 0.003 and is 0.001"),
        (("--seed", 1), "recipe.seed was 0 and is 1"),
        (("--samples", 5, "--eval-samples", 4), "recipe.eval_samples was 3 and is 4"),
        (("--samples", 5), "windows was"),
    ):
        assert named in refused(*words(work, interrupted, *change, "--resume"))
    for name in ("student", "teacher"):
        other = shutil.copytree(work / name, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(other)
        model.model.norm.weight.data += 0.5
        model.save_pretrained(other, max_shard_size="60KB")
        assert f"{name}.files." in refused(*words(work, interrupted, "--resume", **{name: other}))
    assert "add --resume" in refused(*words(work, interrupted))
    outcome = succeed(*words(work, interrupted, "--save-states-every", 1, "--logging-steps", 2, "--resume"))
    assert "going on with layer 2 of 3" in outcome.err
    succeed(*words(work, tmp_path / "whole"))
    assert_same_weights(interrupted, tmp_path / "whole")


@pytest.mark.parametrize(
    "more, named",
    [
        (("--no-stream", "--resume"), "resume=True: needs a streamed run"),
        (("--lmbda", 1), "lmbda=1.0: belongs to --mode end-to-end"),
        (("--mode", "end-to-end", "--offload-states", "s"), "offload_states='s': belongs to --mode layerwise"),
        (("--save-states-every", 0), "save_states_every=0: must be at least 1"),
        (("--learning-rate", 0), "learning_rate=0.0: must be above 0"),
        (("--offload-states", "/proc/none"), "offload_states='/proc/none': cannot be written"),
        (("--samples", 900), "samples=903"),
    ],
)
def test_options_that_cannot_be(tmp_path, work, more, named):
    assert named in refused(*words(work, tmp_path / "distilled", *more))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be(tmp_path, work, tiny_tokenizer, monkeypatch):
    output = tmp_path / "distilled"
    teachers = {
        "a vocabulary of 260 and 300": {"vocab_size": 300},
        "experts per layer 4 and 8": {"num_local_experts": 8},
    }
    for named, overrides in teachers.items():
        teacher = tmp_path / named
        make_family("mixtral", **{"num_hidden_layers": 3, **overrides}).save_pretrained(teacher)
        assert named in refused(*words(work, output, teacher=teacher))
    assert "--allow-dense" in refused(*words(work, output, student="teacher"))
    quantized = shutil.copytree(work / "student", tmp_path / "quantized")
    config = read_config(quantized) | {"quantization_config": {"quant_method": "fp8"}}
    (quantized / "config.json").write_text(json.dumps(config))
    assert "is quantized" in refused(*words(work, output, student=quantized))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "runs in one process" in refused(*words(work, output))
    assert not output.exists() and not output.with_name(".distilled.unfinished").exists()
    succeed(*words(work, output, "--allow-dense", student="teacher"))
    assert "pruning_report.json" not in {path.name for path in output.iterdir()}
