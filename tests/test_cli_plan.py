"""`hf-mlopt plan` as a user runs it."""

import argparse
import json
import re

import pytest

from hf_mlopt.cli import distill, plan, prune
from hf_mlopt.planning.table import bytes_text, count_text, flops_text, seconds_text
from tests.command_line import hf_mlopt, python, save, succeed
from tests.families import make_family


@pytest.fixture
def model(tmp_path, tiny_mixtral):
    return save(tiny_mixtral(), None, tmp_path / "model")


WORDS = ("--sparsity", "0.5", "--samples", "4", "--sequence-length", "64", "--device", "cpu")


def test_the_table(model):
    out = succeed("plan", model, *WORDS, "--stream").out
    assert "mixtral, 2 layers (2 with 4 experts, top-2)" in out
    assert "moe-pruner 50%, scope experts, 4 x 64 calibration tokens" in out
    for row in (
        "runs",
        "peak memory",
        "  interpreter",
        "  layer",
        "  states",
        "disk for the output",
        "read",
        "written",
    ):
        assert f"\n{row} " in out
    for row in ("calibration passes", "weights scored", "final size", "  zeros", "  packed"):
        assert f"\n{row} " in out
    assert out.endswith("hf-mlopt prune would run.\n")
    assert "all of it" not in out  # a time needs --measure


def test_conflicts_are_printed_and_end_with_2(model, tmp_path):
    outcome = hf_mlopt("plan", model, *WORDS, "--drop-experts", "0.75", "--output", model)
    assert outcome.status == 2
    assert outcome.out.count("\nconflict: ") == 2
    assert outcome.out.endswith("hf-mlopt prune would stop: 2 conflicts.\n")


def test_what_cannot_be_planned_is_one_line(tmp_path):
    outcome = hf_mlopt("plan", tmp_path, *WORDS)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("hf-mlopt plan: error: model=")
    assert "model=None: is needed" in hf_mlopt("plan", *WORDS).err
    assert "json=" in hf_mlopt("plan", save(make_family("olmoe"), None, tmp_path), *WORDS, "--json", tmp_path).err


def test_json(model, tmp_path):
    succeed("plan", model, *WORDS, "--pattern", "1:4", "--sparsity", "null", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model"]["experts"] == 4 and plan["run"]["pattern"] == "1:4"
    assert plan["peak"]["total"] == sum(plan["peak"]["parts"].values())
    assert plan["result"]["zeros"] == 2 * 4 * 3 * 64 * 32 * 3 // 4
    assert plan["conflicts"] == [] and plan["seconds"] is None


def test_a_recipe_is_read_and_the_command_line_wins(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nsparsity: 0.7\nsamples: 8\nsequence_length: 32\ndevice: cpu\n")
    assert "moe-pruner 70%, scope experts, 8 x 32" in succeed("plan", "--config", recipe).out
    assert (
        "moe-pruner 2:4, scope experts, 2 x 32"
        in succeed("plan", "--config", recipe, "--pattern", "2:4", "--samples", "2").out
    )


def test_it_takes_every_option_of_prune_and_distill():
    options = []
    for verb in (prune, distill, plan):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        options.append({option for action in parser._actions for option in action.option_strings})
    own = {"--measure", "--json", "--distill", "--gpus", "--gpu-memory", "--fsdp"}
    assert options[2] - options[0] - options[1] == own and options[0] | options[1] <= options[2]


DISTILL = ("--distill", "--samples", "8", "--sequence-length", "64", "--device", "cpu")


def test_the_table_of_a_distillation(model):
    out = succeed("plan", model, *DISTILL, "--gpus", "8", "--gpu-memory", "80").out
    assert "layerwise, 8 + 16 windows of 64 tokens" in out and "GB per GPU, of 80" in out
    assert re.search(r"^> 2  layerwise, one GPU +0\.0\d\d +0\.5\d\d  fits$", out, re.M)
    for way in ("layerwise, CPU", "end-to-end, one GPU", "end-to-end, DDP on 8", "end-to-end, FSDP2 on 8"):
        assert re.search(rf"^  \d  {way} ", out, re.M)
    for way in ("DDP on 8", "FSDP2 on 8"):
        assert f"  end-to-end with LoRA of rank 16, {way} " in out
    for row in ("student", "teacher", "gradients", "AdamW", "masks", "targets", "gathered layers", "buckets of DDP"):
        assert re.search(rf"^{row}  +[-\d]", out, re.M), row
    assert max(map(len, out.splitlines()[2:])) <= 100
    assert out.endswith("hf-mlopt distill would run.\n")


def test_ddp_that_does_not_fit_ends_with_2(model):
    words = (*DISTILL, "--mode", "end-to-end", "--batch-size", "1", "--gpus", "4", "--gpu-memory", "0.0018")
    outcome = hf_mlopt("plan", model, *words)
    assert outcome.status == 2 and outcome.out.count("\nconflict: ") == 1
    assert "conflict: memory: end-to-end, DDP on 4, needs" in outcome.out
    assert "What fits: --mode layerwise on one GPU" in outcome.out
    assert outcome.out.endswith("hf-mlopt distill would stop: 1 conflict.\n")
    assert "> 5  end-to-end, FSDP2 on 4" in hf_mlopt("plan", model, *words, "--fsdp").out


def test_a_distillation_as_json(model, tmp_path):
    succeed("plan", model, *DISTILL, "--lora-rank", "2", "--mode", "end-to-end", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["asked"] == "end-to-end with LoRA of rank 2, CPU" and plan["conflicts"] == []
    way = next(way for way in plan["ways"] if way["label"] == plan["asked"])
    assert way["total"] == sum(way["host"]["parts"].values()) and way["fits"] is True
    assert plan["run"]["trained_parameters"] == 2 * 2 * 4 * (32 + 128 + 64 + 32)


def test_a_recipe_of_distill(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"student: {model}\nteacher: {model}\nmode: end-to-end\nsamples: 8\ndevice: cpu\n")
    assert "end-to-end, 8 + 16 windows" in succeed("plan", "--distill", "--config", recipe).out
    assert "end-to-end, 4 + 16 windows" in succeed("plan", "--distill", "--config", recipe, "--samples", "4").out


@pytest.mark.parametrize(
    "words, error",
    [
        (("--teacher", "t", "--sparsity", "0.5"), "teacher='t': belongs to --distill"),
        (("--fsdp", "--sparsity", "0.5"), "fsdp=True: belongs to --distill"),
        (("--distill", "--sparsity", "0.5"), "sparsity=0.5: belongs to a plan of pruning"),
        (("--distill", "--measure"), "measure=True: belongs to a plan of pruning"),
        (("--distill", "--gpus", "0"), "gpus=0: must be above 0"),
        (("--distill", "--gpu-memory", "-1"), "gpu_memory=-1.0: must be above 0"),
        (("--distill", "--lora-rank", "2"), "lora_rank=2: belongs to --mode end-to-end"),
    ],
)
def test_options_of_the_other_plan(model, words, error):
    outcome = hf_mlopt("plan", model, *words)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith(f"hf-mlopt plan: error: {error}")


def test_a_distillation_of_nothing():
    assert "student=None: is needed" in hf_mlopt("plan", "--distill").err


def test_measuring_gives_seconds_for_every_part(model, tmp_path, monkeypatch):
    for name in ("_MATRIX_SECONDS", "_SCORE_SECONDS", "_DISK_SECONDS"):
        monkeypatch.setattr(f"hf_mlopt.planning.probe.{name}", 0.01)
    out = succeed("plan", model, *WORDS, "--measure", "--stream", "--json", tmp_path / "plan.json").out
    assert "time\n" in out and "all of it" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    rates, seconds, costs = plan["rates"], plan["seconds"], plan["costs"]
    assert rates["device"] == "cpu"
    assert seconds["calibrate"] == pytest.approx(costs["forward_flops"] / rates["flops"])
    assert seconds["write"] == pytest.approx(costs["written_bytes"] / rates["written_bytes"])
    compute = seconds["calibrate"] + seconds["solve"] + seconds["score"]
    assert seconds["total"] == pytest.approx(max(compute, seconds["read"] + seconds["write"]))
    assert [path.name for path in tmp_path.iterdir()].count("plan.json") == len(list(tmp_path.iterdir())) - 1


@pytest.mark.parametrize("method", ["sparsegpt", "ria", "magnitude"])
def test_measuring_knows_every_method(model, method, monkeypatch):
    for name in ("_MATRIX_SECONDS", "_SCORE_SECONDS", "_DISK_SECONDS"):
        monkeypatch.setattr(f"hf_mlopt.planning.probe.{name}", 0.01)
    assert "all of it" in succeed("plan", model, *WORDS, "--method", method, "--measure").out


@pytest.mark.parametrize("words", [("--sparsity", "0.5"), ("--distill", "--mode", "end-to-end")])
def test_neither_torch_nor_transformers_is_imported(model, words):
    program = """
import sys
from hf_mlopt.cli import main
status = main(["plan", *sys.argv[1:], "--samples", "4", "--sequence-length", "64"])
print(status, [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    assert python(program, model, *words).endswith("0 []\n")


def test_numbers_are_printed_in_units_a_reader_takes_in():
    assert [bytes_text(n) for n in (93.4e9, 12.34e6, 4000)] == ["93.40 GB", "12.3 MB", "4 kB"]
    assert [count_text(n) for n in (46.7e9, 4.7e6, 512)] == ["46.70 B", "4.7 M", "512"]
    assert [flops_text(n) for n in (13.4e15, 2e12, 3e9)] == ["13.40 PFLOP", "2.00 TFLOP", "3.00 GFLOP"]
    assert [seconds_text(n) for n in (4.06, 199.6, 7500)] == ["4.1 s", "3 min 20 s", "2 h 05 min"]
