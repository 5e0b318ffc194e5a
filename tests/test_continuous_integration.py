"""What the forge runs is what `.ci/run` runs, with the oldest Python that is supported."""

import tomllib
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parent.parent


def test_the_workflow_does_what_ci_run_does():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [step["run"] for step in job["steps"] if "run" in step] == [script[-1]]
    (exports,) = [line for line in script if line.startswith("export ")]
    assert job["env"] == dict(word.split("=") for word in exports.split()[1:])
    (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python['python-version']}"
    assert all((ROOT / path).is_file() for path in python["cache-dependency-path"].split())
