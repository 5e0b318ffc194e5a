"""The wheel alone, outside the checkout: what it holds, and that recipes, demo and card work from it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard


pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent


def run(*words, **options):
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the package without its dependencies, and how to run there what it holds."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run(*pip, "--target", folder, wheel)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    # Comes before the editable installation of the checkout, which site-packages adds at the end.
    return folder, {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(folder)}}


def test_the_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hf_mlopt", "hf_mlopt-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mlopt").rglob("*.py")}
    assert sources <= set(names)
    for folder in ("recipes", "model_cards"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files and {f"hf_mlopt/{name}" for name in files} <= set(names)
    assert "hf_mlopt-0.1.0.dist-info/licenses/LICENSE" in names


def test_it_is_the_installed_package_that_runs(installed):
    folder, options = installed
    program = "import hf_mlopt, hf_mlopt.resources as r; print(hf_mlopt.__file__, r.resource_dir('model_cards'))"
    package = folder / "hf_mlopt"
    assert run(sys.executable, "-c", program, **options).split() == [
        str(package / "__init__.py"),
        str(package / "model_cards"),
    ]


def test_recipes_are_listed_and_copied(installed):
    folder, options = installed
    command = folder / "bin" / "hf-mlopt"
    listed = run(command, "recipes", "list", **options)
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("pruning/")] == [
        f"pruning/{name}.yaml"
        for name in ("demo", "mixtral_8x22b", "mixtral_8x7b", "mixtral_8x7b_experts", "qwen3_moe")
    ]
    run(command, "recipes", "copy", "pruning/demo", "--output", "mine", **options)
    copied = options["cwd"] / "mine" / "pruning" / "demo.yaml"
    assert copied.read_bytes() == (ROOT / "recipes" / "pruning" / "demo.yaml").read_bytes()


def test_the_demo_runs_and_writes_its_card(installed):
    folder, options = installed
    output = run(folder / "bin" / "hf-mlopt", "demo", "--short", **options)
    written = options["cwd"] / "demo_output"
    assert "written to demo_output" in output
    rows = json.loads((written / "results.json").read_text())["rows"]
    expected = next(row["perplexity"] for row in rows if row["method"] == "moe-pruner" and row["label"] == "50%")
    card = ModelCard.load(written / "mixtral-demo-50" / "README.md")
    assert card.data.eval_results[0].metric_value == round(expected, 4)
    assert "## What was removed" in card.text and "## Limits" in card.text
