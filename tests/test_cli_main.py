"""The command itself: help, errors, exit statuses, and that none of it waits for torch."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_mlopt
from hf_mlopt import cli
from hf_mlopt.cli import main
from hf_mlopt.errors import ConfigurationError


VERBS = sorted(
    path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("*.py") if path.stem != "__init__"
)
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


@pytest.fixture
def recipes(monkeypatch, tmp_path):
    folder = tmp_path / "package_recipes"
    (folder / "pruning").mkdir(parents=True)
    (folder / "pruning" / "small.yaml").write_text("# A small one.\nsparsity: 0.5\n")
    (folder / "train.py").write_text('"""Trains."""\n')
    (folder / "train.pyc").write_bytes(b"\0")
    monkeypatch.setattr("hf_mlopt.cli.recipes.resource_dir", lambda name: folder)
    return folder


def heavy_modules_after(code):
    program = f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["hf_mlopt", "hf_mlopt.errors", "hf_mlopt.configuration", "hf_mlopt.resources"])
def test_light_modules_import_nothing_heavy(module):
    assert heavy_modules_after(f"import {module}") == "[]\n"


@pytest.mark.parametrize("words", [[], ["recipes"], ["recipes", "list"]])
def test_help_imports_nothing_heavy(words):
    call = f"main({[*words, '--help']})"
    output = heavy_modules_after(f"from hf_mlopt.cli import main\ntry: {call}\nexcept SystemExit: pass")
    assert output.startswith("usage: hf-mlopt") and output.endswith("[]\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_line_and_its_help(verb, capsys):
    for words, text in (["--help"], verb), ([verb, "--help"], f"usage: hf-mlopt {verb}"):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0 and text in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"hf-mlopt {hf_mlopt.__version__}\n"


@pytest.mark.parametrize("words", [[], ["prone"], ["recipes"], ["recipes", "copy", "all", "--out", "x"]])
def test_a_wrong_command_line_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "raised, status, message",
    [
        (ConfigurationError("sparsity", 2, "must be in [0, 1)"), 2, "error: sparsity=2: must be in [0, 1)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_causes_is_one_line(monkeypatch, capsys, raised, status, message):
    def run(args):
        raise raised

    fake = SimpleNamespace(HELP="Fails.", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name: fake)
    assert main(["recipes"]) == status
    assert capsys.readouterr().err == f"hf-mlopt recipes: {message}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    fake = SimpleNamespace(HELP="Fails.", add_arguments=lambda parser: None, run=lambda args: 1 // 0)
    monkeypatch.setattr(cli, "import_module", lambda name: fake)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])


def test_recipes_are_listed_with_their_first_line(recipes, capsys):
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == "pruning/small.yaml  A small one.\ntrain.py            Trains.\n"


def test_recipes_are_copied_and_never_overwritten(recipes, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(["recipes", "copy", "pruning/small", "--output", str(output)]) == 0
    copy = output / "pruning" / "small.yaml"
    assert copy.read_text() == (recipes / "pruning" / "small.yaml").read_text()
    assert capsys.readouterr().out == f"{copy}\n"

    copy.write_text("sparsity: 0.7\n")
    assert main(["recipes", "copy", "all", "--output", str(output)]) == 2
    assert f"{copy} exists already" in capsys.readouterr().err
    assert copy.read_text() == "sparsity: 0.7\n" and not (output / "train.py").exists()

    assert main(["recipes", "copy", "all", "--output", str(tmp_path / "all")]) == 0
    assert (tmp_path / "all" / "train.py").exists()


def test_an_unknown_recipe_names_the_known_ones(recipes, tmp_path, capsys):
    assert main(["recipes", "copy", "large", "--output", str(tmp_path / "mine")]) == 2
    assert "NAME='large': must be `all` or one of: pruning/small.yaml, train.py" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_resource_folders_are_found_in_the_package_first(monkeypatch, tmp_path):
    from hf_mlopt import resources

    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "hf_mlopt")
    with pytest.raises(resources.InputError, match="recipes: not found"):
        resources.resource_dir("recipes")
    (tmp_path / "recipes").mkdir()
    assert resources.resource_dir("recipes") == tmp_path / "recipes"
    (tmp_path / "hf_mlopt" / "recipes").mkdir(parents=True)
    assert resources.resource_dir("recipes") == tmp_path / "hf_mlopt" / "recipes"


def test_an_unknown_option_is_named_with_the_one_probably_meant(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["prune", "model", "--sequence-lenght", "3"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "hf-mlopt prune: error: unknown argument --sequence-lenght, did you mean --sequence-length?\n"
    )
