"""`hf-mlopt demo`: the same seed gives the same numbers, what is written, and what is never overwritten."""

import json
import shutil

import pytest
from command_line import hf_mlopt, succeed, weights
from huggingface_hub import ModelCard
from PIL import Image

from hf_mlopt.pruning import METHODS


pytestmark = pytest.mark.e2e

FILES = [
    "continuations.jsonl", "mixtral-demo", "mixtral-demo-50", "mixtral-demo-50-distilled", "perplexity.png",
    "results.json",
]  # fmt: skip


def results(directory):
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def numbers(result):
    """What does not depend on the clock."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result["rows"]]
    layers = [{**layer, "seconds": 0} for layer in result["distillation"]["layers"]]
    return {"dense": result["dense"], "rows": rows, "recovery": result["recovery"], "layers": layers}


def printed_table(out):
    """Rows of the table, split into words."""
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("method "))
    return [line.split() for line in lines[first + 1 : lines.index("", first)]]


def assert_table_is_that_of(result, out):
    dense, *rows = printed_table(out)
    assert dense == ["dense", "0.0", "%", f"{result['dense']:.2f}"]
    shown = [row for label in ("50%", "2:4") for row in result["rows"] if row["label"] == label]
    assert len(rows) == len(shown)
    for words, row in zip(rows, shown, strict=True):
        assert words[:5] == [row["method"], row["label"], "50.0", "%", f"{row['perplexity']:.2f}"]
        assert words[5:7] == [f"{100 * (row['perplexity'] / result['dense'] - 1):+.1f}", "%"]
        assert words[7] == f"{row['seconds']:.2f}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The short form, and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "output"
    return output, succeed("demo", "--short", "--output", output)


def test_the_files(demo):
    output, outcome = demo
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert [path.name for path in output.parent.iterdir()] == ["output"]  # no staging directory
    assert f"written to {output}" in outcome.out


def test_the_table_has_a_row_for_every_variant(demo):
    output, outcome = demo
    result = results(output)
    assert [(row["method"], row["label"]) for row in result["rows"]] == [
        (method, label) for method in ("magnitude", "wanda", "moe-pruner") for label in ("50%", "2:4")
    ]
    assert all(row["achieved_sparsity"] == 0.5 for row in result["rows"])
    assert_table_is_that_of(result, outcome.out)


def test_it_says_the_commands_for_a_real_model(demo):
    _, outcome = demo
    assert "hf-mlopt prune mistralai/Mixtral-8x7B-v0.1 --sparsity 0.5 --output mixtral-8x7b-50" in outcome.out
    assert "hf-mlopt distill mixtral-8x7b-50 --teacher mistralai/Mixtral-8x7B-v0.1" in outcome.out
    assert "mixtral-8x7b-50-distilled --perplexity wikitext" in outcome.out


def test_there_is_a_bar_for_training_and_one_for_the_variants(demo):
    _, outcome = demo
    assert "4/4" in outcome.err and "pruning and evaluating: 100%" in outcome.err
    assert "Loading weights" not in outcome.err and "Writing model shards" not in outcome.err


def test_the_plot_is_a_png(demo):
    output, _ = demo
    with Image.open(output / "perplexity.png") as image:
        assert image.format == "PNG" and image.width > 800
        darkest, brightest = image.convert("L").getextrema()
    assert darkest < 64 and brightest == 255  # something is drawn


def test_the_numbers_of_the_card_are_those_of_the_results(demo):
    output, _ = demo
    result, card = results(output), ModelCard.load(output / "mixtral-demo-50" / "README.md")
    row = next(row for row in result["rows"] if row["method"] == "moe-pruner" and row["sparsity"] == 0.5)
    (measured,) = card.data.eval_results
    assert measured.metric_value == round(row["perplexity"], 4) and measured.dataset_split == "test"
    assert f"| {result['dense']:.2f} | **{row['perplexity']:.2f}** |" in card.text
    assert f"| {row['tokens']} | " in card.text and "calibration" in card.text.lower()
    report = json.loads((output / "mixtral-demo-50" / "pruning_report.json").read_text())
    assert report["evaluation"][0]["pruned"] == row["perplexity"]
    assert report["evaluation"][0]["dense"] == result["dense"]


def test_the_card_of_the_distilled_model_holds_what_was_measured_of_the_three(demo):
    output, outcome = demo
    folder = output / "mixtral-demo-50-distilled"
    rows, card = results(output)["recovery"], ModelCard.load(folder / "README.md")
    assert [row["model"] for row in rows] == ["mixtral-demo", "mixtral-demo-50", "mixtral-demo-50-distilled"]
    dense, pruned, distilled = rows
    assert len({row["perplexity"] for row in rows}) == 3
    assert dense["perplexity"] == pytest.approx(results(output)["dense"], rel=1e-6)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["perplexity"] == pytest.approx(distilled["perplexity"], abs=1e-3)
    assert measured["acc"] == pytest.approx(distilled["accuracy"])
    for row in rows:
        assert f"{row['perplexity']:.2f}" in card.text
        assert f"{row['model']:<28} {row['perplexity']:>11.2f}" in outcome.out
    assert str(output.parent) not in card.content
    questions = (output / "continuations.jsonl").read_text().splitlines()
    assert len(questions) == distilled["questions"] == 8


def test_the_distilled_model_has_the_zeros_of_the_pruned_one_and_can_be_pushed(demo):
    output, _ = demo
    before, after = (weights(output / name) for name in ("mixtral-demo-50", "mixtral-demo-50-distilled"))
    experts = [name for name in before if ".experts." in name]
    assert experts and all(((before[name] == 0) == (after[name] == 0)).all() for name in experts)
    for name in ("mixtral-demo-50", "mixtral-demo-50-distilled"):
        assert "model.safetensors" in succeed("push", output / name, "user/model", "--dry-run").out


def test_the_recipe_distils_the_pruned_model_to_the_same_bits(demo, tmp_path):
    output, _ = demo
    folder = output / "mixtral-demo-50-distilled"
    succeed("distill", "--config", folder / "recipe.yaml", "--output", tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_the_perplexities_are_those_of_the_checkpoints(demo, tmp_path):
    output, _ = demo
    result = results(output)
    row = next(row for row in result["rows"] if row["method"] == "moe-pruner" and row["sparsity"] == 0.5)
    words = ("--perplexity", "embedded", "--max-windows", "4")
    for name, expected in (("mixtral-demo", result["dense"]), ("mixtral-demo-50", row["perplexity"])):
        outcome = succeed("evaluate", output / name, *words, "--output", tmp_path / name)
        (model,) = json.loads((tmp_path / name).read_text())["models"]
        assert model["perplexity"]["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert "of the calibration text" not in outcome.err


def test_the_recipe_prunes_the_dense_model_to_the_same_bits(demo, tmp_path):
    output, _ = demo
    succeed("prune", "--config", output / "mixtral-demo-50" / "recipe.yaml", "--output", tmp_path / "again")
    first, second = output / "mixtral-demo-50" / "model.safetensors", tmp_path / "again" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_the_routers_were_trained_with_the_load_balancing_loss(demo):
    output, _ = demo
    config = json.loads((output / "mixtral-demo" / "config.json").read_text())
    assert config["output_router_logits"] is True and config["router_aux_loss_coef"] > 0
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["use_cache"]) == (8, 2, True)
    assert {value.dtype.itemsize for value in weights(output / "mixtral-demo").values()} == {4}


def test_an_earlier_demo_is_replaced_and_the_same_seed_gives_the_same_numbers(demo, tmp_path):
    output = shutil.copytree(demo[0], tmp_path / "output")
    (output / "results.json").write_text("{}")
    (output / "mixtral-demo-50" / "stale.txt").write_text("stale")
    succeed("demo", "--short", "--output", output, "--seed", "0")
    assert numbers(results(output)) == numbers(results(demo[0]))
    assert not (output / "mixtral-demo-50" / "stale.txt").exists()
    assert sorted(path.name for path in output.iterdir()) == FILES


@pytest.fixture
def no_training(monkeypatch):
    """Ends the demo where it would begin its work."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_mlopt.demo.run.train_tokenizer", stop)


def snapshot(directory):
    return {path.relative_to(directory): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def test_an_interrupted_demo_leaves_the_earlier_one(demo, no_training, tmp_path):
    output = shutil.copytree(demo[0], tmp_path / "output")
    assert hf_mlopt("demo", "--short", "--output", output).status == 130
    assert snapshot(output) == snapshot(demo[0]) and [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("found", ["something else", "an earlier demo and something else", "results of another kind"])
def test_a_folder_that_is_not_an_earlier_demo_is_refused(demo, no_training, tmp_path, found):
    output = tmp_path / "output"
    if found == "something else":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    elif found == "an earlier demo and something else":
        shutil.copytree(demo[0], output)
        (output / "thesis.txt").write_text("mine")
    else:
        output.mkdir()
        for name in ("results.json", "perplexity.png"):
            (output / name).write_text("mine")
    before = snapshot(tmp_path)
    outcome = hf_mlopt("demo", "--short", "--output", output)
    assert outcome.status == 2 and outcome.err.startswith("hf-mlopt demo: error: output=")
    assert "not empty; name a new one" in outcome.err and snapshot(tmp_path) == before


@pytest.mark.slow
def test_the_full_demo(tmp_path):
    output = tmp_path / "output"
    outcome = succeed("demo", "--output", output)
    result = results(output)
    labels = ("40%", "50%", "60%", "70%", "2:4")
    assert [(row["method"], row["label"]) for row in result["rows"]] == [
        (method, label) for method in METHODS for label in labels
    ]
    assert len(printed_table(outcome.out)) == 1 + 2 * len(METHODS)
    assert_table_is_that_of(result, outcome.out)
    assert result["dense"] < 100  # of 2048: it has learnt
    dense, pruned, distilled = (row["perplexity"] for row in result["recovery"])
    assert dense < distilled < pruned
    assert all(row["accuracy"] > 0.35 for row in result["recovery"])  # of four choices
    for row in result["rows"]:
        requested = 0.5 if row["sparsity"] is None else row["sparsity"]
        assert row["achieved_sparsity"] == pytest.approx(requested, abs=1 / 128)
        assert row["perplexity"] > result["dense"]
    for method in METHODS:
        curve = [row["perplexity"] for row in result["rows"] if row["method"] == method and row["sparsity"]]
        assert curve == sorted(curve)
