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


def test_workflows_run_targets_that_the_makefile_has():
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            make, *wanted = command.split()
            assert make == "make" and set(wanted) <= targets, path.name
