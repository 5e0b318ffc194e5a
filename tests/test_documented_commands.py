"""What the pages say to type: every command is run or declared, and every option, file and import is there."""

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import time
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from hf_mlopt.cli import _make_parser


ROOT = Path(__file__).resolve().parent.parent


def load():
    spec = importlib.util.spec_from_file_location("run_commands", ROOT / "docs" / "run_commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load()
COMMANDS = [command for page in PAGES.PAGES for command in PAGES.commands(page)]
SHELL = [command for command in COMMANDS if not command.is_python]
SNIPPETS = [command for command in COMMANDS if command.is_python]
OF_FLOWER = {"--node-config"}


def place(command) -> str:
    return f"{command.page}:{command.line}"


def spans(page: str) -> list[str]:
    """Code within lines of text."""
    text = re.sub(r"^```[\s\S]*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    return _make_parser([verb])


@cache
def verbs() -> list[str]:
    return list(subparsers(_make_parser([])))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else {}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Those of its subparsers as well."""
    return set(parser._option_string_actions).union(*map(options_of, subparsers(parser).values()))


@cache
def options() -> set[str]:
    """Of all verbs, of `accelerate launch`, and of our scripts."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "hub_scripts").glob("*.py")]
    ours = {option for path in scripts for option in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    return ours.union(options_of(launch_command_parser()), *(options_of(parser_of(verb)) for verb in verbs()))


def parse(words: list[str]) -> None:
    """Has the parsers of a command read it; ends with `SystemExit` or `AssertionError` if one does not take it."""
    if words[0] == "hf-mlopt":
        _, unknown = parser_of(words[1]).parse_known_args(words[1:])
        assert not unknown
    elif words[0] in ("accelerate", "torchrun"):
        parser, skip = (launch_command_parser(), 2) if words[0] == "accelerate" else (torchrun_parser(), 1)
        launched = parser.parse_args(words[skip:])
        verb = {"hf_mlopt": [], "recipes/train.py": ["train"]}[launched.training_script]
        assert bool(launched.module) == (not verb)
        parse(["hf-mlopt", *verb, *launched.training_script_args])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_command_is_run_or_says_what_it_needs():
    assert len(SHELL) > 70 and len(SNIPPETS) > 15
    unknown = [f"{place(command)}: {command.text}" for command in COMMANDS if command.needs is None]
    assert not unknown, "add rows to CLASSES in docs/run_commands.py for\n" + "\n".join(unknown)


def test_no_command_writes_where_another_has_written():
    """A folder that is not empty is refused."""
    starts = [command.text for command in SHELL if "--resume-from-checkpoint" not in command.text]
    folders = re.findall(r"--output-dir (\S+)", "\n".join(starts))
    assert len(folders) == len(set(folders)) > 15, [name for name, count in Counter(folders).items() if count > 1]


def test_no_row_of_a_table_is_left_over():
    texts = [command.text for command in COMMANDS]
    fitting = {next((row for row in PAGES.CLASSES if re.search(row[0], text)), None) for text in texts}
    assert fitting - {None} == set(PAGES.CLASSES)
    assert all(any(re.search(pattern, text) for text in texts) for pattern, _ in PAGES.STAND_INS)
    assert all(any(name in text for text in texts) for name in PAGES.MODELS)
    for needs in (needs for _, needs in PAGES.CLASSES):
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/\w+\.py", needs))


@pytest.mark.parametrize("command", SHELL, ids=place)
def test_parsers_take_the_command(command):
    for text in (command.text, command.to_run):
        parse(shlex.split(text.replace("\\\n", " "), comments=True))


@pytest.mark.parametrize("page", PAGES.PAGES)
def test_the_text_names_options_and_files_that_exist(page):
    for words in (span.split() for span in spans(page)):
        named = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "hf-mlopt" and len(words) > 1 and words[1] in verbs():
            assert named <= options_of(parser_of(words[1])), words
        elif words[0] == "torchrun":
            assert named <= options_of(torchrun_parser()), words
        elif words[0] == "python":
            script = (ROOT / words[1]).read_text(encoding="utf-8").replace("_", "-")
            assert all(option.removeprefix("--") in script for option in named), words
        elif words[0] == "accelerate" or words[0].startswith("--"):
            assert named <= options() | OF_FLOWER, words
    text = (ROOT / page).read_text(encoding="utf-8")
    files = re.findall(r"\b(?:recipes|benchmarks|hub_scripts|docs|tests)/[\w/]+\.(?:py|yaml|md|json|sbatch)\b", text)
    assert not [file for file in files if not (ROOT / file).is_file() and "NAME" not in file]


@pytest.mark.parametrize("command", SNIPPETS, ids=place)
def test_a_snippet_calls_what_there_is(command):
    nodes = list(ast.walk(ast.parse(command.text)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_mlopt")]
    ours = {alias.name: getattr(import_module(node.module), alias.name) for node in imports for alias in node.names}
    for call in nodes:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ours:
            inspect.signature(ours[call.func.id]).bind(*call.args, **{word.arg: word for word in call.keywords})


PAGE = """
```
hf-mlopt recipes copy all --output recipes
echo outside && test ! -e page.md
```

    echo "it failed" && exit 3
    echo 'goes on \\
    here' > fine

```text
shown
```

```
make nothing
frobnicate
echo of the checkout && cat fine page.md
```

```python
from pathlib import Path
Path("written").write_text("here")
theirs.train(Path("never"))
```
"""


def test_pages_are_run_as_a_reader_would(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "page.md").write_text(PAGE)
    (tmp_path / "checkout" / "good.md").write_text("# Good\n\n    echo fine\n")
    (tmp_path / "checkout" / "slow.md").write_text("# Slow\n\n    echo slow && sleep 60\n")
    monkeypatch.setattr(PAGES, "ROOT", tmp_path / "checkout")
    folder = tmp_path / "out"
    assert PAGES.main(["--pages", "page.md", "--folder", str(folder), "--timeout", "120"]) == 1
    printed = capsys.readouterr().out
    found = re.findall(r"^(ok|failed|not run) +\d+ s  page.md:(\d+)", printed, re.MULTILINE)
    outcomes = [outcome for outcome, _ in found]
    assert outcomes == ["ok", "ok", "failed", "ok", "not run", "failed", "ok", "ok"]
    assert [line for _, line in found] == ["3", "4", "7", "8", "16", "17", "18", "22"]
    assert "exit status 3\n    it failed" in printed and "needs --all" in printed
    assert "in no class" in printed and "up to what refers to theirs\n" in printed and "2 failed;" in printed
    place = folder / "page.md" / "checkout"
    assert (place / "written").read_text() == "here" and "goes on" in (place / "fine").read_text()
    assert not list(folder.rglob("never"))
    assert PAGES.main(["--pages", "good.md", "--folder", str(folder)]) == 0
    assert PAGES.main(["--pages", "good.md", "slow.md", "--folder", str(folder), "--timeout", "0.5"]) == 1
    assert "slow.md:3  echo slow && sleep 60\n    took longer than 0.5 s\n1 failed;" in capsys.readouterr().out


def test_what_takes_too_long_is_stopped_with_all_it_started(tmp_path):
    with (tmp_path / "log").open("a") as log:
        assert PAGES.run(["bash", "-c", "(sleep 1; touch late) & sleep 60"], tmp_path, log, timeout=0.3) is None
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()
