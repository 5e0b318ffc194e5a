"""Every pruning recipe parses, and runs with a tiny random model of its family."""

from dataclasses import asdict

import pytest
import yaml
from command_line import save, succeed
from families import make_family

from hf_mlopt.configuration import load_config
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.prune import PruneRecipe


pytestmark = pytest.mark.e2e

RECIPES = sorted((resource_dir("recipes") / "pruning").glob("*.yaml"))

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
