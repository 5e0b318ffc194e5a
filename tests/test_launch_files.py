"""Launch files for SLURM and Kubernetes: what they would start, by the parsers of accelerate and Flower."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from hf_mlopt.resources import resource_dir


ROOT = Path(__file__).resolve().parent.parent
SBATCH = resource_dir("recipes") / "slurm" / "train.sbatch"
MANIFEST = resource_dir("recipes") / "kubernetes" / "flower.yaml"
# What SLURM gives a job of two machines; `srun` runs a command on each. Hosts may be more than a pipe holds.
STAND_INS = {
    "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n" && seq 100000',
    "srun": 'shift; for number in 0 1; do SLURM_NODEID=$number "$@"; done',
    "accelerate": 'python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
}
JOB = {
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "41234",
    "SLURM_CPUS_PER_TASK": "64",
}


@pytest.fixture
def submit(tmp_path):
    """Runs the script as a job of two machines, and gives the words behind `accelerate` on each."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        env = {**os.environ, **JOB, **environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(["bash", SBATCH, *words], env=env, cwd=ROOT, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("launch, is_sharded", [(None, False), ("recipes/accelerate/fsdp2.yaml", True)])
def test_slurm_starts_accelerate_once_on_each_machine(submit, launch, is_sharded, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    done = submit("train", "--config", "a b.yaml", **({"LAUNCH": launch} if launch else {}))
    assert done.returncode == 0, done.stderr
    machines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(machines) == 2
    for rank, words in enumerate(machines):
        assert words[0] == "launch"
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[1:]))
        prepare_multi_gpu_env(args)
        assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", rank)
        assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", f"node7:{10_000 + 41_234 % 20_000}")
        assert (args.use_fsdp, args.mixed_precision, args.module) == (is_sharded, "bf16", True)
        assert [args.training_script, *args.training_script_args] == ["hf_mlopt", "train", "--config", "a b.yaml"]


def test_slurm_is_told_what_the_script_needs():
    head = SBATCH.read_text(encoding="utf-8").partition("\nset -euo pipefail\n")[0].splitlines()
    assert head[0] == "#!/bin/bash" and all(line.startswith("#") for line in head if line)
    asked = dict(line.removeprefix("#SBATCH --").split("=") for line in head if line.startswith("#SBATCH"))
    assert asked["ntasks-per-node"] == "1"  # one launcher a machine
    assert {"nodes", "gpus-per-node", "cpus-per-task", "time"} <= set(asked)


def test_slurm_script_stops_without_a_verb_and_without_hosts(submit):
    done = submit()
    assert done.returncode == 2 and "VERB" in done.stderr and not done.stdout
    done = submit("train", SLURM_JOB_NODELIST="unknown")
    assert done.returncode != 0 and not done.stdout


@pytest.fixture
def objects():
    found = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


def container(objects, deployment: str) -> dict:
    (found,) = objects["Deployment", deployment]["spec"]["template"]["spec"]["containers"]
    return found


def words_of(found: dict) -> list[str]:
    """`--option=value` in two words."""
    return [word for arg in found["args"] for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]


def guide(command: str) -> list[str]:
    """The words of a command in docs/federate.md."""
    text = (ROOT / "docs" / "federate.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^(?:until )?{command} ([^;\n]+)", text, re.MULTILINE)
    return shlex.split(line)


def test_kubernetes_has_the_options_of_the_guide(objects):
    def options(words):
        return {word for word in words if word.startswith("--")}

    assert options(words_of(container(objects, "superlink"))) == options(guide("flower-superlink"))
    # A pod has its ports for itself.
    assert options(words_of(container(objects, "supernode-north"))) == options(guide("flower-supernode")) - {"--port"}
    config = words_of(container(objects, "supernode-north"))[-1]
    assert shlex.quote(config) == shlex.quote(guide("flower-supernode")[-1])


def test_flower_understands_what_kubernetes_starts(objects):
    superlink = pytest.importorskip("flwr.superlink.cli.flower_superlink", reason="needs hf-mlopt[flower]")
    supernode = pytest.importorskip("flwr.supernode.cli.flower_supernode", reason="needs hf-mlopt[flower]")
    from flwr.common.config import parse_config_args

    link = superlink._parse_args_run_superlink().parse_args(container(objects, "superlink")["args"])
    assert (link.host, link.port, link.enable_supernode_auth, link.insecure) == ("0.0.0.0", 8000, True, False)
    assert link.runtime_dependency_install is False
    node = supernode._parse_args_run_supernode().parse_args(container(objects, "supernode-north")["args"])
    assert (node.superlink, node.insecure) == (f"superlink:{link.port}", False)
    assert parse_config_args([node.node_config])["site"] == "north"


def test_what_kubernetes_mounts_is_there_and_ports_and_labels_meet(objects):
    (service,) = objects["Service", "superlink"]["spec"]["ports"]
    ports = {port["name"]: port["containerPort"] for port in container(objects, "superlink")["ports"]}
    assert ports == {service["targetPort"]: service["port"]}
    for name in ("superlink", "supernode-north"):
        spec = objects["Deployment", name]["spec"]
        labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        assert spec["selector"]["matchLabels"] == labels
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container(objects, name)["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        claim = volumes["state"]["persistentVolumeClaim"]["claimName"]
        assert ("PersistentVolumeClaim", claim) in objects
        files = [word for word in words_of(container(objects, name)) if word.startswith("/")]
        assert files and all(file.startswith(mounts["certificates"] + "/") for file in files)
    policy = objects["NetworkPolicy", "superlink"]["spec"]
    assert policy["podSelector"] == {"matchLabels": objects["Service", "superlink"]["spec"]["selector"]}
    (rule,) = policy["ingress"]
    admitted = rule["from"][0]["podSelector"]["matchLabels"]
    node = objects["Deployment", "supernode-north"]["spec"]["template"]["metadata"]["labels"]
    assert admitted.items() <= node.items()
    assert all(item["metadata"]["namespace"] == "federation" for item in objects.values())
