"""Every recipe parses, and runs with a tiny random model of its family; accelerate takes its own."""

import json
from dataclasses import asdict

import pytest
import yaml
from command_line import save, succeed
from families import make_family
from mixtral_8x7b import write as write_mixtral_8x7b
from pruned import prune

from hf_mlopt.configuration import load_config
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.distill import DistillRecipe
from hf_mlopt.workflows.prune import PruneRecipe


pytestmark = pytest.mark.e2e

RECIPES = sorted((resource_dir("recipes") / "pruning").glob("*.yaml"))
DISTILLATION = sorted((resource_dir("recipes") / "distillation").glob("*.yaml"))

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
    assert {"fsdp2": "FSDP", "ddp": "MULTI_GPU"}[path.stem] == config.distributed_type
    assert config.num_processes == 8 and config.mixed_precision == "bf16"


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
