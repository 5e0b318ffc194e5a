"""`hf-mlopt distill --mode end-to-end`: what it writes, interrupted and gone on with, adapters, stored targets."""

import json
import shutil

import pytest
import torch
from accelerate.state import PartialState
from command_line import hf_mlopt, refused, succeed, weights
from families import make_family, token_ids
from huggingface_hub import ModelCard
from processes import together
from pruned import prune
from test_distillation_trainer_ranks import afresh, environment_of
from transformers import AutoModelForCausalLM

from hf_mlopt.distillation import ExpertDistillationTrainer
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.training import KeepZerosCallback


pytestmark = pytest.mark.e2e

SETTINGS = (
    "--mode", "end-to-end", "--samples", 8, "--eval-samples", 4, "--sequence-length", 16, "--batch-size", 2,
    "--epochs", 2, "--learning-rate", 1e-3, "--logging-steps", 1, "--save-steps", 3, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """`teacher/`, `student/` in bfloat16, pruned by half, and token ids."""
    work = tmp_path_factory.mktemp("end_to_end")
    teacher, student = (make_family("mixtral", torch.bfloat16) for _ in range(2))
    prune(student)
    teacher.save_pretrained(work / "teacher")
    student.save_pretrained(work / "student")
    rows = token_ids(12, length=16, seed=0).tolist()
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    succeed(*words(work, work / "distilled"))
    return work


def words(work, output, *more, teacher=True):
    given = ("--teacher", work / "teacher") if teacher else ()
    return ("distill", work / "student", *given, "--output", output, "--dataset", work / "ids.jsonl", *SETTINGS, *more)


def assert_zeros_stayed(student, output):
    """Stored in the student's dtype under its names, changed, and zero where an expert of the student is."""
    before, after = weights(student), weights(output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    for name, value in after.items():
        assert value.dtype == before[name].dtype == torch.bfloat16, name
        if ".experts." in name:
            zeros = before[name] == 0
            assert 0.4 < zeros.float().mean() < 0.6 and not value[zeros].any(), name


def test_an_ordinary_checkpoint_comes_out(work):
    output = work / "distilled"
    assert_zeros_stayed(work / "student", output)
    config, source = read_config(output), read_config(work / "student")
    assert config.pop("hf_mlopt")["distillation"]["mode"] == "end-to-end"
    assert config == {key: value for key, value in source.items() if key != "hf_mlopt"}
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16
    assert not list(work.glob(".distilled*"))


def test_the_report_holds_the_course(work):
    report = json.loads((work / "distilled" / "distillation_report.json").read_text())
    assert (report["steps"], report["tokens"], report["mask_violations"]) == (8, 2 * 8 * 16, 0)
    logged = [row for row in report["loss"] if "ce" in row]
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert report["lmbda"] == pytest.approx(logged[0]["ce"] / logged[0]["expert_mse"], rel=1e-5)
    evaluated = [row for row in report["loss"] if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert evaluated[-1]["eval_expert_mse"] < evaluated[0]["eval_expert_mse"]
    assert (work / "distilled" / "distillation.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(work / "distilled" / "README.md")
    assert "distillation" in card.data.tags and str(work) not in card.content


def test_interrupted_and_gone_on_with_is_uninterrupted(work, tmp_path, monkeypatch):
    real = ExpertDistillationTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return real(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertDistillationTrainer, "training_step", interrupted)
        assert hf_mlopt(*words(work, tmp_path / "out")).status == 130
    assert not (tmp_path / "out").exists()
    assert "add --resume" in refused(*words(work, tmp_path / "out"))
    assert "recipe.weight_decay was" in refused(*words(work, tmp_path / "out", "--resume", "--weight-decay", 0.1))
    succeed(*words(work, tmp_path / "out", "--resume"))
    left, right = weights(work / "distilled"), weights(tmp_path / "out")
    assert all(torch.equal(left[name], right[name]) for name in left)
    (tmp_path / ".out.unfinished" / "training").mkdir(parents=True)  # killed right after the output had its name
    assert "is complete" in refused(*words(work, tmp_path / "out", "--resume"))
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_checkpoint_that_a_kill_left_half_written_is_not_gone_on_from(work, tmp_path, monkeypatch):
    real = ExpertDistillationTrainer._save_optimizer_and_scheduler

    def killed(trainer, output_dir):
        if output_dir.endswith("checkpoint-6"):
            raise KeyboardInterrupt
        real(trainer, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertDistillationTrainer, "_save_optimizer_and_scheduler", killed)
        assert hf_mlopt(*words(work, tmp_path / "out")).status == 130
    assert (tmp_path / ".out.unfinished" / "training" / "checkpoint-6").is_dir()
    succeed(*words(work, tmp_path / "out", "--resume"))
    left, right = weights(work / "distilled"), weights(tmp_path / "out")
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_other_weights_are_not_gone_on_with(work, tmp_path, monkeypatch, changed):
    for name in ("student", "teacher", "ids.jsonl"):
        (shutil.copytree if (work / name).is_dir() else shutil.copy)(work / name, tmp_path / name)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExpertDistillationTrainer, "training_step", interrupted)
        assert hf_mlopt(*words(tmp_path, tmp_path / "out")).status == 130
    other = make_family("mixtral", torch.bfloat16, seed=5)
    prune(other)
    other.save_pretrained(tmp_path / changed)
    assert f"{changed}.files" in refused(*words(tmp_path, tmp_path / "out", "--resume"))


def test_weights_that_come_back_are_counted_in_what_is_written(work, tmp_path, monkeypatch):
    monkeypatch.setattr(KeepZerosCallback, "on_train_begin", lambda *args, **kwargs: None)
    succeed(*words(work, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "distillation_report.json").read_text())["mask_violations"] > 1000
    assert "are not zero any more" in (tmp_path / "out" / "README.md").read_text()


def test_adapters_are_merged(work, tmp_path):
    succeed(*words(work, tmp_path / "out", "--lora-rank", 4, "--learning-rate", 1e-2))
    assert_zeros_stayed(work / "student", tmp_path / "out")
    before, after = weights(work / "student"), weights(tmp_path / "out")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(".experts." in name for name in changed)
    assert json.loads((tmp_path / "out" / "distillation_report.json").read_text())["trained"] == "lora"


def test_only_experts_are_trained_where_asked(work, tmp_path):
    succeed(*words(work, tmp_path / "out", "--trained", "experts", "--epochs", 1))
    before, after = weights(work / "student"), weights(tmp_path / "out")
    for name in after:
        assert torch.equal(before[name], after[name]) != (".experts." in name), name


def test_targets_are_stored_once_and_trained_from(work, tmp_path):
    out = succeed(*words(work, tmp_path / "unused", "--store-targets", tmp_path / "targets")).out
    assert "--teacher-targets" in out and not (tmp_path / "unused").exists()
    succeed(*words(work, tmp_path / "out", "--teacher-targets", tmp_path / "targets", teacher=False))
    assert_zeros_stayed(work / "student", tmp_path / "out")
    with_teacher, without = (
        json.loads((path / "distillation_report.json").read_text()) for path in (work / "distilled", tmp_path / "out")
    )
    assert without["teacher"]["source"] == "teacher"
    assert without["lmbda"] == pytest.approx(with_teacher["lmbda"], rel=1e-2)  # the targets were rounded to bfloat16
    rows = token_ids(12, length=16, seed=1).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    other = ("--dataset", tmp_path / "ids.jsonl", "--teacher-targets", tmp_path / "targets")
    assert "targets" in refused(*words(work, tmp_path / "other", *other, teacher=False))


@pytest.mark.parametrize(
    "more, said",
    [
        (("--stream",), None),
        (("--offload-states", "x"), "belongs to --mode layerwise"),
        (("--lmbda", -1), "lmbda=-1.0"),
        (("--lora-rank", 0), "lora_rank=0"),
        (("--temperature", 0), "temperature=0.0"),
        (("--mode", "layerwise", "--lmbda", 1), "belongs to --mode end-to-end"),
        (("--learning-rate", 0), "learning_rate=0.0"),
        (("--samples", 0), "samples"),
        (("--device", "tpu"), "device='tpu'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(work, tmp_path, monkeypatch, more, said):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("hf_mlopt.workflows.distill_end_to_end.load_model", load)
    if said is None:
        with pytest.raises(AssertionError):  # nothing is wrong with it
            hf_mlopt(*words(work, tmp_path / "out", *more))
    else:
        assert said in refused(*words(work, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused_by_its_sizes(work, tmp_path):
    make_family("mixtral", num_local_experts=6, num_hidden_layers=3).save_pretrained(tmp_path / "teacher")
    err = refused(*words(work, tmp_path / "out", "--teacher", tmp_path / "teacher"))
    assert "experts per layer 4 and 6" in err and "decoder layers 2 and 3" in err


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["ddp", "fsdp2", "fsdp2 with adapters"])
def test_two_processes_write_what_one_does(work, tmp_path, form):
    more = ("--lora-rank", 4) if "adapters" in form else ()
    environment = environment_of("fsdp2", ACCELERATE_MIXED_PRECISION="no") if form.startswith("fsdp2") else {}

    def run(rank):
        afresh(environment)
        status = hf_mlopt(*words(work, tmp_path / "out", "--batch-size", 1, *more)).status
        return status, PartialState._shared_state.get("num_processes")

    assert together(run, group=False) == [[0, 2], [0, 2]]
    assert_zeros_stayed(work / "student", tmp_path / "out")
    one, two = (
        json.loads((path / "distillation_report.json").read_text()) for path in (work / "distilled", tmp_path / "out")
    )
    assert two["tokens"] == one["tokens"] and two["steps"] == one["steps"]
    assert (two["processes"], two["sharded"]) == (2, form != "ddp")
    assert "accelerate launch --num_processes 2" in (tmp_path / "out" / "README.md").read_text()
    assert two["loss"][1]["ce"] == pytest.approx(one["loss"][1]["ce"], rel=1e-4)
