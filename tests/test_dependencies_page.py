"""docs/dependencies.md against `pyproject.toml` and what is installed."""

import importlib.util
import tomllib
from email.message import Message
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def page():
    spec = importlib.util.spec_from_file_location("dependencies_page", ROOT / "docs" / "dependencies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_what_is_installed(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run python docs/dependencies.py"


def test_no_direct_dependency_is_left_out(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {line.partition(">")[0].partition("[")[0] for line in lines} - {"hf-mlopt"}
    table = [line for line in page.render().splitlines() if line.startswith("| ")][2:]
    assert {line.split()[1] for line in table} == names and len(table) == len(names)
    assert all(line.split("|")[4].strip() not in ("", "none declared") for line in table)


@pytest.mark.parametrize(
    "headers, licence",
    [
        ({"License-Expression": "MIT", "License": "other"}, "MIT"),
        ({"License": "BSD", "Classifier": "License :: OSI Approved :: MIT License"}, "BSD"),
        ({"License": "All of\nits text", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT License"),
        ({"License": "x" * 200, "Classifier": "License :: OSI Approved :: MIT License"}, "MIT License"),
        ({"Classifier": "Topic :: Any"}, "none declared"),
    ],
)
def test_where_a_licence_is_found(page, monkeypatch, headers, licence):
    told = Message()
    for name, value in headers.items():
        told[name] = value
    monkeypatch.setattr(page, "metadata", lambda name: told)
    assert page.licence("any") == licence


def test_what_is_under_a_gpl_is_told_apart(page, monkeypatch):
    found = {"free": (">=1", ["all"]), "strict": (">=2", ["he", "vertical"])}
    monkeypatch.setattr(page, "dependencies", lambda: found)
    monkeypatch.setattr(page, "licence", {"free": "MIT", "strict": "LGPL-3.0"}.get)
    assert "with it: `strict` (LGPL-3.0; he, vertical)." in page.render()
    monkeypatch.setattr(page, "licence", {"free": "MIT", "strict": "BSD"}.get)
    assert "GPL" not in page.render()
