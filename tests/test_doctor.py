"""`hf-mlopt doctor`: what it finds, advises and calls broken, and that it neither hangs nor tells secrets."""

import json
import socket
import sys
import threading
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import hf_mlopt, succeed
from loopback_hub import LoopbackHub

from hf_mlopt.workflows import doctor


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def online(monkeypatch):
    """Lets this process ask the Hub at an address, which no proxy is asked for."""
    from huggingface_hub import close_session, constants

    def at(endpoint: str):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # it knows the proxies of an earlier environment
    yield at
    close_session()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Writes the metadata of distributions, and has the doctor look at one of them."""

    def write(name: str, *headers: str, version: str = "1.0"):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *headers)
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "NAME", "toy")
    return write


def test_this_installation_is_whole():
    out = succeed("doctor").out
    names = {line.split()[0] for line in out.splitlines() if line.endswith("fits")}
    assert names == {"python", "torch", "transformers", "accelerate", "peft", "datasets"}
    assert "offline: HF_HUB_OFFLINE is set" in out and "BROKEN" not in out
    assert out.splitlines()[-1] == "nothing that is required is broken"


def test_every_extra_is_told_with_what_it_opens():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.OPENS) == set(project["optional-dependencies"])


def test_the_json_holds_what_was_found(tmp_path):
    file = tmp_path / "doctor.json"
    succeed("doctor", "--json", file)
    record = json.loads(file.read_text())
    names = {row["name"] for row in record["packages"]}
    assert {"python", "torch", "safetensors", "scipy"} <= names and record["broken"] == []
    assert record["memory_bytes"]["total"] >= record["memory_bytes"]["available"] > 0
    assert set(record["disk_bytes"]) == {"here", "HF_HOME"} and set(record["backends"]) == {"gloo", "nccl"}
    assert str(Path.home()) not in file.read_text()

    outcome = hf_mlopt("doctor", "--json", tmp_path / "absent" / "doctor.json")
    assert outcome.status == 2 and "cannot be written (No such file or directory)" in outcome.err


def test_what_is_required_and_does_not_fit_is_broken(toy):
    toy("Aged", version="1.4")
    toy(
        "toy",
        "Requires-Python: >=3.99",
        "Requires-Dist: aged<3,>=2",
        "Requires-Dist: missing>=5",
        "Requires-Dist: elsewhere>=1; sys_platform == 'nowhere'",
        "Requires-Dist: numpy>=1",
    )
    outcome = hf_mlopt("doctor")
    assert outcome.status == 1
    broken = [line for line in outcome.out.splitlines() if line.startswith("BROKEN: ")]
    assert [line.split()[1] for line in broken] == ["python>=3.99", "aged<3,>=2", "missing>=5"]
    assert broken[1].endswith("1.4 is installed: python -m pip install 'aged<3,>=2'")
    assert broken[2].endswith("not installed: python -m pip install 'missing>=5'")
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.endswith("BROKEN")}
    assert rows["aged"] == ["1.4", "<3,>=2", "BROKEN"] and rows["missing"] == ["-", ">=5", "BROKEN"]
    assert outcome.out.splitlines()[-1] == "what is required is broken"


def test_an_extra_lacks_what_its_own_extras_lack(toy):
    toy("middle", "Provides-Extra: deep", "Requires-Dist: leaf==3; extra == 'deep'", "Requires-Dist: unasked>=1")
    toy(
        "toy",
        "Provides-Extra: flower",
        "Requires-Dist: middle[deep]>=1; extra == 'flower'",
        "Requires-Dist: missing>=2; extra == 'flower'",
        "Provides-Extra: all",
        "Requires-Dist: toy[flower]; extra == 'all'",
        "Provides-Extra: plain",
        "Requires-Dist: middle>=1; extra == 'plain'",
    )
    outcome = succeed("doctor")
    extras = {row["extra"]: row for row in doctor.examine()["extras"]}
    assert extras["flower"]["lacks"] == extras["all"]["lacks"] == ["leaf==3", "missing>=2"]
    assert extras["plain"]["lacks"] == [] and extras["plain"]["install"] is None
    assert "to install: flower: python -m pip install leaf==3 'missing>=2'" in outcome.out.splitlines()
    states = {line.split()[-2]: line.split()[-1] for line in outcome.out.splitlines() if line.endswith(("dy", "cks"))}
    assert states == {"flower": "lacks", "all": "lacks", "plain": "ready"}
    assert doctor.OPENS["flower"] in outcome.out


def test_an_installation_without_metadata_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "NAME", "no-such-distribution")
    outcome = hf_mlopt("doctor")
    assert outcome.status == 1 and "BROKEN: no-such-distribution is not installed" in outcome.out


def test_a_torch_that_cannot_be_imported_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = hf_mlopt("doctor")
    assert outcome.status == 1 and "BROKEN: torch cannot be imported" in outcome.out


@pytest.fixture
def two_gpus(monkeypatch):
    import torch

    def memory():
        if memory.asked:
            raise RuntimeError("CUDA error: out of memory\nand how to debug it")
        memory.asked = True
        return 60_000_000_000, 80_000_000_000

    memory.asked = False
    fakes = {
        "device_count": lambda: 2,
        "get_device_name": lambda index: "Fast",
        "device": nullcontext,
        "mem_get_info": memory,
        "is_bf16_supported": lambda including_emulation: not including_emulation,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_gpus_with_memory_and_bf16(two_gpus):
    lines = succeed("doctor").out.splitlines()
    (row,) = [line for line in lines if line.startswith("cuda:")]
    assert row.split() == ["cuda:0", "Fast", "80.0", "GB", "60.0", "GB", "yes"]
    assert "advice: cuda:1 (Fast) cannot be used: CUDA error: out of memory" in lines


def test_gpus_that_torch_does_not_see(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "gpu_memories", lambda device: [1 << 30] * 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert f"nvidia-smi lists 3 GPU(s) that torch {torch.__version__} cannot use" in succeed("doctor").out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "nvidia-smi" not in succeed("doctor").out


@pytest.mark.parametrize("cores, threads, advised", [(8, None, True), (8, "1", False), (1, None, False)])
def test_the_threads_of_several_processes(monkeypatch, cores, threads, advised):
    monkeypatch.setattr(doctor, "_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    out = succeed("doctor").out
    assert ("export OMP_NUM_THREADS=1" in out) == advised
    (row,) = [line for line in out.splitlines() if line.startswith("OMP_NUM_THREADS")]
    assert row.endswith(threads or "not set")


@pytest.mark.parametrize("value, reports", [(None, True), ("1", True), ("0", False)])
def test_what_flower_sends(monkeypatch, value, reports):
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    if value:
        monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", value)
    record = doctor.examine()
    assert record["flower_telemetry"] == reports
    assert any("FLWR_TELEMETRY_ENABLED=0" in text for text in record["advice"]) == reports


def test_a_hub_that_answers(online, tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        online(hub.url)
        record = doctor.examine(hub_seconds=30)
    assert record["hub"]["state"] == "reachable" and record["hub"]["endpoint"] == hub.url
    assert hub.requests == [("HEAD", "/")]


def test_a_hub_that_is_not_there(online):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        online(f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert doctor.examine(hub_seconds=30)["hub"]["state"] == "not reachable (ConnectError)"


@pytest.mark.parametrize("status, state", [(200, "reachable"), (404, "reachable"), (407, None), (503, None)])
def test_what_a_proxy_or_gateway_says_is_no_answer_of_the_hub(online, monkeypatch, status, state):
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    assert doctor.examine()["hub"]["state"] == (state or f"not reachable (status {status})")


def test_a_look_up_that_never_ends_is_left(online, monkeypatch):
    over = threading.Event()
    session = SimpleNamespace(head=lambda url, timeout: over.wait())
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    assert doctor.examine(hub_seconds=0.2)["hub"]["state"] == "not reachable (no answer in 0.2 s)"
    over.set()


def test_no_secret_is_told(online, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        online(f"http://someone:hf_secret@127.0.0.1:{port}")
        outcome = succeed("doctor", "--json", tmp_path / "doctor.json")
    written = (tmp_path / "doctor.json").read_text()
    assert json.loads(written)["hub"]["token"] is True
    assert json.loads(written)["hub"]["endpoint"] == f"http://127.0.0.1:{port}"
    assert "hf_secret" not in outcome.out + outcome.err + written

    monkeypatch.delenv("HF_TOKEN")
    assert doctor.examine()["hub"]["token"] is False
