"""Every recipe parses, and runs with a tiny random model of its family; accelerate takes its own."""

import argparse
import gc
import json
import re
import runpy
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from command_line import hf_mlopt, save, succeed
from families import make_family
from mixtral_8x7b import write as write_mixtral_8x7b
from processes import together
from pruned import prune

from hf_mlopt.configuration import add_arguments, arguments_given, load_config
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.distill import DistillRecipe
from hf_mlopt.workflows.prune import PruneRecipe
from hf_mlopt.workflows.train_recipe import TrainRecipe


pytestmark = pytest.mark.e2e

RECIPES = sorted((resource_dir("recipes") / "pruning").glob("*.yaml"))
DISTILLATION = sorted((resource_dir("recipes") / "distillation").glob("*.yaml"))
OPTIMIZERS = sorted((resource_dir("recipes") / "optimizers").glob("*.yaml"))
COMMUNICATION = sorted((resource_dir("recipes") / "communication").glob("*.yaml"))

ACCELERATE = sorted((resource_dir("recipes") / "accelerate").glob("*.yaml"))

# Recipe -> its family; a new recipe needs a line here.
FAMILY = {
    "demo": "mixtral",
    "mixtral_8x7b": "mixtral",
    "mixtral_8x7b_experts": "mixtral",
    "mixtral_8x22b": "mixtral",
    "qwen3_moe": "qwen3_moe",
}

# What a test has to change: it has no network, and little time.
OVERRIDES = {"calibration": "embedded", "samples": 4, "sequence_length": 64}


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_there_are_those_of_the_documentation():
    assert {path.stem for path in RECIPES} >= {"mixtral_8x7b", "mixtral_8x22b", "qwen3_moe", "demo"}


def test_it_parses(recipe):
    config = load_config(PruneRecipe, recipe)
    assert config.model and config.output is None  # whoever runs it says where to


def test_it_begins_with_what_it_is_for_and_its_own_command(recipe):
    first, second, *_ = recipe.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(first) > 20
    assert f"hf-mlopt prune --config {recipe.name} --output " in second


def test_it_runs_with_a_tiny_model_of_its_family(recipe, tiny_tokenizer, tmp_path):
    source = save(make_family(FAMILY[recipe.stem]), tiny_tokenizer, tmp_path / "source")
    output = tmp_path / "output"
    words = [word for name, value in OVERRIDES.items() for word in (f"--{name.replace('_', '-')}", value)]
    succeed("prune", source, "--config", recipe, "--output", output, *words)
    assert (output / "model.safetensors").is_file() and (output / "README.md").is_file()
    written = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert len(written.pop("calibration_fingerprint")) == 64
    expected = asdict(load_config(PruneRecipe, recipe)) | OVERRIDES | {"model": str(source)}
    assert written == {key: value for key, value in expected.items() if key != "calibration_fingerprint"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_takes_its_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(first) > 20 and not second.startswith("#")
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == ("FSDP" if path.stem == "fsdp2" else "MULTI_GPU")
    expected = {"cpu2": (2, "no"), "cpu4": (4, "no")}.get(path.stem, (8, "bf16"))
    assert (config.num_processes, config.mixed_precision) == expected


@pytest.fixture(params=DISTILLATION, ids=lambda path: path.stem)
def distillation(request):
    return request.param


def test_there_are_recipes_of_every_way_to_distil():
    assert {path.stem for path in DISTILLATION} >= {"demo", "mixtral_8x7b_layerwise", "mixtral_8x7b_fsdp2"}


def test_a_recipe_of_distill_parses(distillation):
    config = load_config(DistillRecipe, distillation)
    assert config.output is None
    assert config.mode == ("end-to-end" if "fsdp" in distillation.stem else "layerwise")


def test_a_recipe_of_distill_begins_with_what_it_is_for_and_its_own_command(distillation):
    first, second, *_ = distillation.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(first) > 20
    assert f"distill --config {distillation.name} --output " in second
    if "fsdp" in distillation.stem:
        launcher = second.removeprefix("# accelerate launch --config_file recipes/").split()[0]
        assert (resource_dir("recipes") / launcher).is_file()


@pytest.mark.parametrize("name", ["demo", "mixtral_8x7b_fsdp2"])
def test_recipes_of_distill_run_with_tiny_models(name, tiny_tokenizer, tmp_path):
    """Two steps of either mode, in one process."""
    distillation = resource_dir("recipes") / "distillation" / f"{name}.yaml"
    teacher, student = make_family("mixtral"), make_family("mixtral")
    prune(student)
    source, pruned = (
        save(teacher, tiny_tokenizer, tmp_path / "source"),
        save(student, tiny_tokenizer, tmp_path / "pruned"),
    )
    config, output = load_config(DistillRecipe, distillation), tmp_path / "output"
    samples = 2 * config.batch_size
    words = ("--dataset", "embedded", "--samples", samples, "--eval-samples", "2", "--sequence-length", "32")
    words += ("--epochs", "1", "--device", "cpu")
    succeed("distill", pruned, "--teacher", source, "--config", distillation, "--output", output, *words)
    assert (output / "model.safetensors").is_file() and (output / "README.md").is_file()
    report = json.loads((output / "distillation_report.json").read_text(encoding="utf-8"))
    assert report["mask_violations"] == 0 and report["steps"] == 2


@pytest.mark.parametrize(
    "name, gpus, memory",
    [("mixtral_8x7b_layerwise", 1, 80), ("mixtral_8x7b_fsdp2", 8, 141), ("mixtral_8x7b_fsdp2", 16, 80)],
)
def test_recipes_of_distill_say_what_they_need(name, gpus, memory, tmp_path):
    from hf_mlopt.planning import plan_distillation

    recipe, model = (
        resource_dir("recipes") / "distillation" / f"{name}.yaml",
        str(write_mixtral_8x7b(tmp_path / "8x7b")),
    )
    config = load_config(DistillRecipe, recipe, {"student": model, "teacher": model})
    plan = plan_distillation(config, gpus=gpus, gpu_memory=memory * 10**9, sharded=gpus > 1)
    assert plan.way.fits
    text = recipe.read_text(encoding="utf-8")
    assert f"{memory} GB" in text and f"{plan.way.gpu.total / 1e9:.0f} GB" in text
    if gpus <= 8:
        assert f"{plan.way.host_bytes / 1e9:.0f} GB of memory" in text


def test_adapters_are_planned_as_the_recipe_says(tmp_path):
    from hf_mlopt.planning import plan_distillation

    recipe, model = (
        resource_dir("recipes") / "distillation" / "mixtral_8x7b_fsdp2.yaml",
        str(write_mixtral_8x7b(tmp_path / "8x7b")),
    )
    config = load_config(DistillRecipe, recipe, {"student": model, "teacher": model, "lora_rank": 16})
    plan = plan_distillation(config, gpus=8, gpu_memory=80 * 10**9, sharded=True)
    assert plan.way.fits and f"{plan.way.gpu.total / 1e9:.0f} GB on 8 with --lora-rank 16" in recipe.read_text()


@pytest.fixture(params=OPTIMIZERS, ids=lambda path: path.stem)
def training(request):
    return request.param


# What a test has to change in recipes of `train`, by architecture.
SMALL = {
    "word_lm": {"hidden_size": 8, "num_layers": 1},
    "gpt2": {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16},
    "vit": {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "convnext": {"patch_size": 2, "num_stages": 1, "hidden_sizes": [4], "depths": [1]},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"},
}


def test_there_are_recipes_of_every_kind_of_training():
    recipes = [load_config(TrainRecipe, path, {"num_processes": None}) for path in OPTIMIZERS]
    assert {recipe.task for recipe in recipes} == {"causal-lm", "image-classification"}
    assert {recipe.mlopt_optim for recipe in recipes} >= {"sgd", "adamw", "rsgdm", "rsgd-adamw", "domo", "diloco"}
    assert {recipe.model_type for recipe in recipes} == set(SMALL)


def test_a_recipe_of_train_begins_with_what_it_is_for_and_its_own_command(training):
    first, second, *_ = training.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and len(first) > 20
    assert second == f"# hf-mlopt train --config {training.name} --output-dir DIR"
    given = yaml.safe_load(training.read_text(encoding="utf-8"))
    assert "output_dir" not in given
    assert ("num_processes" in given) == ("local_steps" in given)  # alone, a process has nothing to average with
    if "without a network" in first:
        assert given["dataset"] in ("embedded", "digits") and given.get("tokenizer") in ("words", "byte-bpe", None)


def test_a_recipe_of_train_runs_two_steps(training, tiny_tokenizer, tmp_path):
    """In one process, at a small size; what it says of the optimizer and of the schedule stays as it is."""
    config = load_config(TrainRecipe, training, {"num_processes": None})
    words = ("--model-config", json.dumps(SMALL[config.model_type]), "--max-steps", "2", "--num-processes", "null")
    words += ("--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "1", "--eval-strategy", "no")
    if config.task == "causal-lm":
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
        words += ("--dataset", tmp_path / "text.txt", "--sequence-length", "16")
        if config.tokenizer not in ("words", "byte-bpe"):
            tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
            words += ("--tokenizer", tmp_path / "tokenizer")
    succeed("train", "--config", training, "--output-dir", tmp_path / "output", *words, "--disable-tqdm")
    results = json.loads((tmp_path / "output" / "train_results.json").read_text(encoding="utf-8"))
    assert results["steps"] == 2 and results["optimizer"]["name"] == config.mlopt_optim
    assert results["local_steps"] == config.local_steps and results["eval_loss"] > 0


def test_the_script_takes_what_the_verb_takes(tmp_path, monkeypatch, capsys):
    script = resource_dir("recipes") / "train.py"
    monkeypatch.setattr(
        "sys.argv", [str(script), "--output-dir", str(tmp_path / "output"), "--dataset", "missing.txt"]
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 2 and "hf-mlopt train: error: dataset='missing.txt'" in capsys.readouterr().err


def test_every_recipe_of_train_is_documented_with_overrides_that_parse():
    page = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(optimizers/\w+\.yaml)` \| .* \| (.*) \|$", page, re.M))
    assert sorted(rows) == [f"optimizers/{path.name}" for path in OPTIMIZERS]
    parser = argparse.ArgumentParser()
    add_arguments(parser, TrainRecipe)
    for name, cell in rows.items():
        overrides = re.findall(r"`(--.*?)`", cell)
        assert overrides
        for words in overrides:
            given = arguments_given(parser.parse_args(shlex.split(words)), TrainRecipe)
            config = load_config(TrainRecipe, resource_dir("recipes") / name, {"num_processes": None, **given})
            assert "mlopt_optim" not in given or config.mlopt_optim == given["mlopt_optim"]


PIPELINE = sorted((resource_dir("recipes") / "pipeline").glob("*.yaml"))
GRADIENTS = [path for path in COMMUNICATION if not path.stem.startswith("saef")]


@pytest.fixture(params=GRADIENTS, ids=lambda path: path.stem)
def compressed(request):
    return request.param


def test_there_are_recipes_of_every_kind_of_compression():
    recipes = [load_config(TrainRecipe, path, {"num_processes": None}) for path in GRADIENTS]
    found = {(recipe.grad_codec, recipe.error_feedback, recipe.error_average_period > 0) for recipe in recipes}
    assert found >= {
        ("bingrad-b", "step-ahead", False),
        ("orq-9", "none", False),
        ("orq-5-optimal", "step-ahead", False),
        ("top-k-0.01", "step-ahead", True),
        ("sign", "classic", False),
    }
    assert any(recipe.grad_codec_down not in (None, recipe.grad_codec) for recipe in recipes)
    assert {(recipe.model_type, recipe.dataset) for recipe in recipes} == {("gpt2", "embedded")}


@pytest.fixture(scope="module")
def quick_to_fork():
    """What training imports is there, and not copied when a fork collects its garbage."""
    import hf_mlopt.training.trainer  # noqa: F401
    import hf_mlopt.workflows.train_data  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


def _in_this_rank(words):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
        state._reset_state()
    outcome = hf_mlopt("train", "--use-cpu", "--ddp-backend", "gloo", *words)
    return outcome.status, outcome.err


def test_a_recipe_of_compressed_gradients_runs_three_steps_in_its_processes(compressed, quick_to_fork, tmp_path):
    """At a small size; the first step is not coded. What it says of the codec stays as it is."""
    first, second, _, *_ = compressed.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith("runs without a network.")
    assert second == f"# hf-mlopt train --config {compressed.name} --output-dir DIR"
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    words = ("--config", compressed, "--output-dir", tmp_path / "output", "--dataset", tmp_path / "text.txt")
    words += ("--model-config", json.dumps(SMALL["gpt2"]), "--sequence-length", "16", "--vocab-size", "300")
    words += ("--max-steps", "3", "--logging-steps", "1", "--compress-min-bytes", "0", "--eval-strategy", "no")
    words += ("--plot=false", "--disable-tqdm")
    config = load_config(TrainRecipe, compressed, {"num_processes": None})
    world = load_config(TrainRecipe, compressed).num_processes
    answers = together(lambda rank: _in_this_rank(words), world, group=False)
    assert [status for status, _ in answers] == [0] * world, answers
    results = json.loads((tmp_path / "output" / "train_results.json").read_text(encoding="utf-8"))
    assert (results["world_size"], results["steps"]) == (world, 3) and world in (2, 4)
    rows = [row for row in results["log"] if "loss" in row]
    assert [row["grad_plain_buckets"] for row in rows] == [1, 0, 0]
    assert rows[0]["grad_of_bf16"] == pytest.approx(2, rel=1e-3)  # float32
    assert rows[1]["grad_bytes"] < rows[0]["grad_bytes"]
    has_feedback = config.error_feedback != "none"
    assert all(("grad_unsent" in row) == has_feedback for row in rows)


def test_the_recipe_of_saef_runs_in_two_processes(quick_to_fork, tmp_path):
    path = resource_dir("recipes") / "communication" / "saef_digits.yaml"
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.endswith("runs without a network.")
    assert second == f"# hf-mlopt train --config {path.name} --output-dir DIR"
    words = ("--config", path, "--output-dir", tmp_path / "output", "--max-steps", "3", "--logging-steps", "1")
    words += ("--plot=false", "--disable-tqdm", "--eval-strategy", "no")
    answers = together(lambda rank: _in_this_rank(words), group=False)
    assert [status for status, _ in answers] == [0, 0], answers
    results = json.loads((tmp_path / "output" / "train_results.json").read_text(encoding="utf-8"))
    rows = [row for row in results["log"] if "loss" in row]
    assert (results["world_size"], results["steps"]) == (2, 3) and results["optimizer"]["name"] == "saef"
    assert all(0 < row["grad_of_bf16"] < 0.2 for row in rows)
    assert all(0 < row["grad_unsent"] < 1 for row in rows[1:])  # the first learning rate is 0


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.stem)
def test_a_recipe_of_a_pipeline_runs_three_steps_in_its_stages(path, quick_to_fork, tmp_path):
    """At a small size; the model that is written is one that transformers loads."""
    from transformers import AutoModelForCausalLM

    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and first.endswith("runs without a network.")
    assert second == f"# hf-mlopt train --config {path.name} --output-dir DIR"
    config = load_config(TrainRecipe, path)
    assert config.num_processes == config.stages == 2
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    words = ("--config", path, "--output-dir", tmp_path / "output", "--dataset", tmp_path / "text.txt")
    words += ("--model-config", json.dumps(SMALL_STAGES[config.model_type]), "--sequence-length", "16")
    words += ("--vocab-size", "300", "--max-steps", "3", "--logging-steps", "1", "--disable-tqdm")
    answers = together(lambda rank: _in_this_rank(words), group=False)
    assert [status for status, _ in answers] == [0, 0], answers
    results = json.loads((tmp_path / "output" / "train_results.json").read_text(encoding="utf-8"))
    assert (results["world_size"], results["steps"]) == (2, 3) and results["pipeline"]["mode"].startswith("dsp:")
    rows = [row for row in results["log"] if "loss" in row]
    assert len(rows) == 3 and all(0 <= row["stage_1_wait"] <= 1 for row in rows)
    assert rows[-1]["stage_0_grad_norm"] > 0 and rows[-1]["stage_1_grad_norm"] > 0
    for name in ("curves.png", "timeline.png", "pipeline.json"):
        assert (tmp_path / "output" / name).is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert loaded.config.model_type == config.model_type


# With tied embeddings, and with a load-balancing loss, as the recipes have them.
SMALL_STAGES = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
    "mixtral": {
        **{"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True},
    },
}


def test_stages_without_their_number_are_refused(tmp_path):
    outcome = hf_mlopt("train", "--pipeline", "dsp", "--output-dir", tmp_path / "output", "--use-cpu")
    assert outcome.status == 2 and "stages=None: is needed with pipeline" in outcome.err
    outcome = hf_mlopt(
        "train", "--pipeline", "dsp:1,2", "--stages", "2", "--output-dir", tmp_path / "output", "--use-cpu"
    )
    assert outcome.status == 2 and "pipeline='dsp:1,2'" in outcome.err
