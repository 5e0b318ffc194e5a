"""A YAML file and typed options, into a dataclass; and every way in which they are refused."""

import argparse
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hf_mlopt.configuration import add_arguments, arguments_given, load_config, save_yaml, to_dict
from hf_mlopt.errors import ConfigurationError, InputError


class Device(enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass
class Base:
    """
    What several configurations share.

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of everything.
        output (`Path`, *optional*): Where to write.
    """

    seed: int = 0
    output: Path | None = None


@dataclass
class Example(Base):
    """
    An example.

    Args:
        sparsity (`float`, *optional*): Fraction removed, 50% say,
            of every row.
        pattern (`str`, *optional*):
            N:M.

    Raises:
        ConfigurationError: Is no field.
    """

    sparsity: float | None = None
    pattern: str | None = None
    method: Literal["wanda", "magnitude"] = "wanda"
    propagate: bool = True
    tasks: list[str] = field(default_factory=list)
    extra: dict[str, float] | None = None
    device: Device = Device.CPU
    every: int | float = 1

    def __post_init__(self):
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ConfigurationError("sparsity", self.sparsity, "must be in [0, 1)")
        if self.every == 0:
            raise ValueError("every must not be 0")


@dataclass
class Required:
    """Has a field without a default."""

    model: str
    revision: str
    seed: int = 0


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def parse(words, **kwargs):
    parser = argparse.ArgumentParser(prog="tool", allow_abbrev=False)
    add_arguments(parser, Example, **kwargs)
    return parser.parse_args(words)


def test_the_defaults_need_no_file():
    assert load_config(Example) == Example()


def test_a_file_is_read_and_overrides_win(recipe):
    file = recipe("sparsity: 0.5\nseed: 3\noutput: out/model\ntasks: [a, b]\nextra: {x: 1}\ndevice: cuda\n")
    config = load_config(Example, file, {"seed": 4, "propagate": False})
    assert config == Example(
        seed=4,
        output=Path("out/model"),
        sparsity=0.5,
        propagate=False,
        tasks=["a", "b"],
        extra={"x": 1.0},
        device=Device.CUDA,
    )
    assert type(config.extra["x"]) is float


def test_an_empty_file_is_the_defaults(recipe):
    assert load_config(Example, recipe("# nothing yet\n")) == Example()


def test_numbers_are_read_as_yaml_1_2_does(recipe):
    """PyYAML alone would make 124 of the pattern, a string of the exponent, and 8 of the seed."""
    config = load_config(Example, recipe("pattern: 2:4\nsparsity: 5e-1\nseed: -10\n"))
    assert (config.pattern, config.sparsity, config.seed) == ("2:4", 0.5, -10)


@pytest.mark.parametrize(
    "line, field_name, words",
    [
        ("sparsty: 0.5", "sparsty", "did you mean 'sparsity'?"),
        ("seed-: 1", "seed-", "Known fields: device, every,"),
        ("sparsity: half", "sparsity", "must be float or null"),
        ("sparsity: true", "sparsity", "must be float or null"),
        ("seed: 1.5", "seed", "must be int"),
        ("seed: true", "seed", "must be int"),
        ("seed: null", "seed", "must be int"),
        ("pattern: 24", "pattern", "must be str or null"),
        ("propagate: 1", "propagate", "must be true or false"),
        ("method: sparsegpt", "method", "must be one of 'wanda', 'magnitude'"),
        ("device: tpu", "device", "must be one of 'cpu', 'cuda'"),
        ("tasks: [a, 1]", "tasks", "must be list[str]"),
        ("tasks: a", "tasks", "must be list[str]"),
        ("extra: {x: y}", "extra", "must be dict[str, float] or null"),
        ("sparsity: 1", "sparsity", "must be in [0, 1)"),
    ],
)
def test_a_bad_line_is_refused_by_name(recipe, line, field_name, words):
    with pytest.raises(ConfigurationError) as error:
        load_config(Example, recipe(line))
    assert error.value.field == field_name
    assert str(error.value).startswith(f"{field_name}=") and words in str(error.value)


def test_the_message_names_the_file_that_is_to_blame(recipe):
    file = recipe("seed: x")
    with pytest.raises(ConfigurationError, match=r"must be int \(in .*recipe\.yaml\)"):
        load_config(Example, file)
    with pytest.raises(ConfigurationError, match="must be int$"):
        load_config(Example, None, {"seed": "x"})


@pytest.mark.parametrize(
    "text, words",
    [("- a\n- b\n", "must hold a mapping"), ("a: [1\n", "not valid YAML"), ("a: 1\na: {b: *c}\n", "not valid YAML")],
)
def test_a_file_that_is_no_mapping_is_refused(recipe, text, words):
    with pytest.raises(InputError, match=words) as error:
        load_config(Example, recipe(text))
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"pattern: \xe9\n")
    for name in ("absent.yaml", "latin.yaml"):
        with pytest.raises(InputError, match=f"{name}.*cannot be read"):
            load_config(Example, tmp_path / name)


def test_missing_fields_are_named_together():
    with pytest.raises(InputError, match="Required needs a value for model, revision"):
        load_config(Required, None, {"seed": 1})


def test_a_plain_value_error_of_the_dataclass_becomes_an_input_error():
    with pytest.raises(InputError, match="Example: every must not be 0"):
        load_config(Example, None, {"every": 0})


def test_only_what_was_typed_is_given():
    assert arguments_given(parse([]), Example) == {}
    words = "--sparsity 1 --no-propagate --tasks a 1 --seed 7 --pattern 2:4 --device cuda --method magnitude".split()
    config = load_config(Example, None, arguments_given(parse(words[2:]), Example))
    assert (config.propagate, config.tasks, config.seed, config.pattern) == (False, ["a", "1"], 7, "2:4")
    assert (config.device, config.method) == (Device.CUDA, "magnitude")
    assert arguments_given(parse(words[:2]), Example) == {"sparsity": 1.0}


def test_typed_words_reach_unions_dicts_and_paths():
    words = ["--extra", '{"x": 1}', "--output", "~", "--every", "0.5", "--pattern", "24"]
    given = arguments_given(parse(words), Example)
    assert given == {"extra": {"x": 1.0}, "output": Path("~"), "every": 0.5, "pattern": "24"}


def test_null_takes_back_what_a_file_says(recipe):
    given = arguments_given(parse(["--sparsity", "null", "--pattern", "2:4"]), Example)
    assert load_config(Example, recipe("sparsity: 0.5"), given) == Example(pattern="2:4")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "x"], "argument --seed: invalid value 'x': must be int"),
        (["--method", "ria"], "must be one of 'wanda', 'magnitude'"),
        (["--extra", "x"], "argument --extra: invalid value 'x'"),
        (["--spars", "0.5"], "unrecognized arguments"),
    ],
)
def test_a_bad_word_is_refused_by_option(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_help_comes_from_the_docstrings_and_excluded_fields_have_no_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Example, exclude=("tasks",))
    text = " ".join(parser.format_help().split())
    assert "Fraction removed, 50% say, of every row." in text
    assert "--pattern STR N:M." in text
    assert "Seed of everything. (default: 0)" in text
    assert "{wanda,magnitude}" in text and "--no-propagate" in text
    assert "--tasks" not in text and "Is no field" not in text


@pytest.mark.parametrize("pattern", ["2:4", "1e5", "1e-5", "null", "no", "2024-01-01", "0x1f", "Grüße: #1"])
def test_what_is_saved_loads_back_equal(tmp_path, pattern):
    config = Example(1, Path("a b"), 1e-5, pattern, "magnitude", False, ["x"], {"y": 2.0}, Device.CUDA, 2)
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_config(Example, tmp_path / "saved.yaml") == config


def test_to_dict_is_plain():
    plain = to_dict(Example(output=Path("out"), device=Device.CUDA))
    assert plain["output"] == "out" and plain["device"] == "cuda" and plain["tasks"] == []
    assert list(plain)[:3] == ["seed", "output", "sparsity"]
