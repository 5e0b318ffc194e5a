"""
Makes docs/dependencies.md: the direct dependencies that `pyproject.toml` names, and the licences that they declare.

    python docs/dependencies.py    # in an environment with all extras: that of `make test`
"""

import tomllib
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement


PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
PAGE = Path(__file__).resolve().parent / "dependencies.md"
INTRODUCTION = """\
# Dependencies and their licences

    python docs/dependencies.py    # makes this page, in an environment with all extras

hf_mlopt itself is under Apache-2.0. Below is what it needs directly, and what each package declares of itself in the
version that `constraints.txt` pins; what they need in turn is theirs to tell (`pip-licenses` lists it).
`hf-mlopt doctor` says what is installed."""
LONGEST = 140  # a text longer than this is a licence, not the name of one


def render() -> str:
    """The page, from `pyproject.toml` and the metadata of what is installed."""
    rows = [(name, needs, users, licence(name)) for name, (needs, users) in sorted(dependencies().items())]
    lines = ["| package | versions | for | licence, as declared |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | `{needs}` | {', '.join(users)} | {text} |" for name, needs, users, text in rows]
    strict = [f"`{name}` ({text}; {', '.join(users)})" for name, _, users, text in rows if "GPL" in text]
    notes = f"Under a GPL, which asks more of those who pass on a work with it: {', '.join(strict)}." if strict else ""
    return "\n\n".join(filter(None, [INTRODUCTION, notes, "\n".join(lines)])) + "\n"


def dependencies() -> dict[str, tuple[str, list[str]]]:
    """Package to the versions that are needed, and to what needs it: `all`, or extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    groups = {"all": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, tuple[str, list[str]]] = {}
    for group, lines in groups.items():
        for requirement in map(Requirement, lines):
            if requirement.name != project["name"]:  # an extra of ours, whose packages have their own lines
                _, users = found.setdefault(requirement.name, (str(requirement.specifier), []))
                users.append(group)
    return found


def licence(name: str) -> str:
    """The SPDX expression where there is one, else the field, else the classifiers."""
    told = metadata(name)
    field = told.get("License") or ""
    classifiers = [
        line.split(" :: ")[-1] for line in told.get_all("Classifier", []) if line.startswith("License :: OSI")
    ]
    names = [told.get("License-Expression"), field if len(field) < LONGEST and "\n" not in field else None]
    return next(filter(None, [*names, ", ".join(classifiers)]), "none declared")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"written to {PAGE}")
