"""Flower's own processes on this machine: the same weights, bit for bit, and nothing that is left behind."""

import ast
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import flower_toy
import pytest
from processes import free_port

from hf_mlopt.errors import InputError
from hf_mlopt.federated.engines.flower_deployment import LocalFlower
from hf_mlopt.federated.engines.flower_runs import Link, environment, submit, write_app
from hf_mlopt.federated.engines.in_process import InProcessEngine


pytestmark = pytest.mark.slow
SITES = ["hosp0", "hosp1"]
SECONDS = 240  # a run that hangs

# What the guide says, for a server and sites on machines of their own; {server} is the server's name.
AUTHORITY = """
openssl req -x509 -newkey rsa:3072 -nodes -days 365 -keyout ca.key -out ca.crt -subj "/CN=Federation authority"
openssl req -newkey rsa:3072 -nodes -keyout server.key -out server.csr -subj "/CN={server}"
echo "subjectAltName=DNS:{server},IP:127.0.0.1" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile server.ext -out server.pem
"""
SUPERLINK = """
flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key
--enable-supernode-auth --disable-runtime-dependency-installation --host 0.0.0.0 --port {port}
"""
KEY = 'ssh-keygen -q -t ecdsa -b 384 -N "" -f {site}'
CONNECTION = """
[superlink.prod]
address = "{server}:{port}"
root-certificates = "{folder}/ca.crt"
"""
REGISTER = "flwr supernode register {site}.pub prod --name {site} --format json"
SUPERNODE = """
until flower-supernode --root-certificates ca.crt --superlink {server}:{port} --auth-supernode-private-key {site}
--port {own_port} --node-config 'site="{site}"'; do sleep 5; done
"""  # again after a crash, for the SuperLink takes it back only when it has missed its heartbeat for a while


@pytest.fixture(autouse=True)
def toy_is_installed(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def nothing_is_left(tmp_path):
    """No process of a test lives on; each has Flower's home in its environment."""
    yield
    ends = time.monotonic() + 20
    while (left := living(tmp_path)) and time.monotonic() < ends:
        time.sleep(0.2)
    assert left == []


def living(home):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"FLWR_HOME={home}".encode() in (folder / "environ").read_bytes()
            if is_ours and (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append((folder / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def kill_children(process):
    """Kills what a guard, or a loop, starts again."""
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


def in_this_process(num_rounds):
    return flower_toy.rounds(InProcessEngine(SITES, flower_toy.answer), num_rounds)[0].digest()


def run_config(folder, **more):
    return {"sites": "hosp0,hosp1", "rounds": 2, "timeout": 90.0, "output": str(folder / "output"), **more}


def output(folder):
    return ast.literal_eval((folder / "output").read_text())


@pytest.mark.usefixtures("nothing_is_left")
def test_simulated_sites_give_the_weights_of_this_process(tmp_path):
    lines = []
    with LocalFlower(tmp_path, SITES, simulation=True) as flower:
        flower.run("flower_toy", run_config(tmp_path), lines.append, SECONDS)
        living_then = living(tmp_path)
    sites, digest, processes, failures = output(tmp_path)
    assert (sites, digest, failures) == (SITES, in_this_process(2), [{}, {}])
    assert processes[0] and any("Starting Flower Simulation" in line for line in lines)
    assert any(b"flower-superlink" in command for command in living_then)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("residents", [True, False])
def test_supernodes_give_the_weights_of_this_process(tmp_path, residents):
    with LocalFlower(tmp_path, SITES, residents=residents) as flower:
        flower.run("flower_toy", run_config(tmp_path), lambda line: None, SECONDS)
        sites, digest, processes, failures = output(tmp_path)
        assert (sites, digest, failures) == (SITES, in_this_process(2), [{}, {}])
        assert len(set(sum(processes, []))) == (2 if residents else 4)  # a new one for each message
        if residents:  # more runs on the same link, a SuperNode having died; too few sites; too little time
            kill_children(json.loads((tmp_path / "processes.json").read_text())["supernode-1"])
            flower.run("flower_toy", run_config(tmp_path, rounds=1), lambda line: None, SECONDS)
            assert output(tmp_path)[1] == in_this_process(1)
            with pytest.raises(InputError, match="[0-2] of 3 sites have come within 5 s"):
                config = run_config(tmp_path, sites=3, timeout=5.0)
                flower.run("flower_toy", config, lambda line: None, SECONDS)
            with pytest.raises(RuntimeError, match="has not ended within 8 s"):
                flower.run("flower_toy", run_config(tmp_path, sites=3), lambda line: None, 8)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_site_that_refuses_and_an_application_that_is_missing_are_input_errors(tmp_path):
    with LocalFlower(tmp_path, ["hosp0", "refuses"]) as flower:
        for application, said in (
            ("flower_toy", "does not take part: site 'refuses': its data set is empty"),
            ("no_such_module", "application='no_such_module': cannot be imported"),
        ):
            with pytest.raises(InputError, match=said):
                flower.run(application, run_config(tmp_path, sites=2), lambda line: None, SECONDS)


@pytest.mark.usefixtures("nothing_is_left")
def test_no_superlink_is_an_input_error(tmp_path):
    app = write_app(tmp_path / "app", "flower_toy", run_config(tmp_path))
    with pytest.raises(InputError, match="superlink='127.0.0.1:9': cannot be reached"):
        submit(app, Link("127.0.0.1:9"), tmp_path, lambda line: None, 60)


class Shell:
    """Commands of the guide in a folder; what they start ends with the `with` block."""

    def __init__(self, folder, **values):
        self.folder, self.values, self.started = folder, {"folder": folder, **values}, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.started):
            self.kill(name)

    def __call__(self, commands, **values):
        line = commands.strip().format(**self.values, **values)
        env = environment(self.folder)
        done = subprocess.run(["bash", "-ec", line], cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    def start(self, name, command, **values):
        line = " ".join(command.split("\n")).strip().format(**self.values, **values)
        log = open(self.folder / f"{name}.log", "wb")
        self.started[name] = subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=environment(self.folder), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def kill(self, name, number=signal.SIGTERM):
        process = self.started.pop(name)
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=10)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def await_log(self, name, pattern):
        ends = time.monotonic() + 60
        while not (found := re.search(pattern, self.log(name))):
            assert time.monotonic() < ends, self.log(name)
            time.sleep(0.1)
        return found


@pytest.mark.usefixtures("nothing_is_left")
def test_the_guide_with_certificates_and_keys_of_nodes(tmp_path):
    with Shell(tmp_path, server="localhost", port=free_port()) as shell:
        shell(AUTHORITY)
        (tmp_path / "config.toml").write_text(CONNECTION.format(**shell.values))
        shell.start("superlink", SUPERLINK)
        shell.await_log("superlink", "Uvicorn running|startup complete")
        nodes = {}
        for site in SITES:
            shell(KEY, site=site)
            nodes[site] = json.loads(shell(REGISTER, site=site))["node-id"]
        for site in SITES:
            shell.start(site, SUPERNODE, site=site, own_port=free_port())
        table = ",".join(f"{site}={node}" for site, node in nodes.items())
        app = write_app(tmp_path / "app", "flower_toy", run_config(tmp_path, nodes=table))
        log = shell("flwr run app prod --stream")
        assert output(tmp_path)[1:2] == [in_this_process(2)], log
        assert output(tmp_path)[3] == [{}, {}]

        link, home = Link(f"localhost:{shell.values['port']}", tmp_path / "ca.crt"), tmp_path / "home"

        # Another authority's certificate.
        (tmp_path / "other").mkdir()
        other = Shell(tmp_path / "other", server="localhost")
        other(AUTHORITY)
        with pytest.raises(InputError, match="is not trusted: .*not root_certificates=.*other/ca.crt"):
            submit(app, Link(link.address, tmp_path / "other" / "ca.crt"), home, lambda line: None, 60)

        # A site dies and comes back under the same node id, and is the same site.
        kill_children(shell.started["hosp1"].pid)
        config = run_config(tmp_path, nodes=table, timeout=150.0)
        app = write_app(tmp_path / "app", "flower_toy", config)
        submit(app, link, home, lambda line: None, SECONDS)
        assert output(tmp_path)[1] == in_this_process(2)

        # One whose key is not registered.
        shell(KEY, site="stranger")
        shell.start("stranger", SUPERNODE, site="stranger", own_port=free_port())
        shell.await_log("superlink", "No SuperNode found with the given public key")
