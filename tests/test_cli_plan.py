"""`hf-mlopt plan` as a user runs it."""

import argparse
import json

import pytest

from hf_mlopt.cli import plan, prune
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


def test_it_takes_every_option_of_prune():
    options = []
    for verb in (prune, plan):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        options.append({option for action in parser._actions for option in action.option_strings})
    assert options[1] - options[0] == {"--measure", "--json"} and options[0] <= options[1]


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


def test_neither_torch_nor_transformers_is_imported(model):
    program = """
import sys
from hf_mlopt.cli import main
status = main(["plan", sys.argv[1], "--sparsity", "0.5", "--samples", "4", "--sequence-length", "64"])
print(status, [name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    assert python(program, model).endswith("0 []\n")


def test_numbers_are_printed_in_units_a_reader_takes_in():
    assert [bytes_text(n) for n in (93.4e9, 12.34e6, 4000)] == ["93.40 GB", "12.3 MB", "4 kB"]
    assert [count_text(n) for n in (46.7e9, 4.7e6, 512)] == ["46.70 B", "4.7 M", "512"]
    assert [flops_text(n) for n in (13.4e15, 2e12, 3e9)] == ["13.40 PFLOP", "2.00 TFLOP", "3.00 GFLOP"]
    assert [seconds_text(n) for n in (4.06, 199.6, 7500)] == ["4.1 s", "3 min 20 s", "2 h 05 min"]
