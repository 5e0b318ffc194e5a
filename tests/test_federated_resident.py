"""Messages to a process that stands at a site; needs no Flower."""

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flower_toy
import numpy as np
import pytest
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines import flower_runs
from hf_mlopt.federated.engines.application import load_application
from hf_mlopt.federated.engines.flower_deployment import LocalFlower
from hf_mlopt.federated.engines.resident import ask
from hf_mlopt.federated.engines.site import Site, pack, unpack


GUARD = [sys.executable, "-m", "hf_mlopt.federated.engines.guard"]
RESIDENT = [sys.executable, "-m", "hf_mlopt.federated.engines.resident"]
RUN = {"application": "flower_toy"}
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def odd_message():
    """Every type, a tensor without elements, one without dimensions, transposed ones, bits that compare unequal."""
    torch.manual_seed(0)
    numbers = torch.randn(3, 5) * 100
    return Message(
        {
            **{dtype: {"a": numbers.to(getattr(torch, dtype)), "b": torch.ones(7, 0)} for dtype in DTYPES},
            "odd sizes": {"byte": torch.ones(3, dtype=torch.uint8), "double": torch.randn(2, dtype=torch.float64)},
            "transposed": {"t": numbers.T, "0-d": torch.tensor(2**62 + 1)},
            "bits": {"nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])},
            "only empty": {"e": torch.empty(0, 3, dtype=torch.bfloat16)},
            "no tensor": {},
        },
        {"round": 3, "share": 0.1, "nan": float("nan"), "text": 'ü "', "yes": True},
    )


@pytest.fixture
def resident(monkeypatch):
    """The path of the socket of a process that has been started as a user does."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        with subprocess.Popen([*GUARD, "--again", *RESIDENT, address], stdin=subprocess.PIPE, start_new_session=True):
            await_that(Path(address).exists)
            yield address


def await_that(condition):
    ends = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def test_a_packed_message_is_the_same_bit_for_bit():
    message = odd_message()
    header, blobs = pack(message)
    assert unpack(header, blobs) == message
    assert sum(blob.nbytes for blob in blobs.values()) == message.nbytes
    assert "only empty" not in blobs and "no tensor" not in blobs


def test_bytes_that_do_not_fit_are_refused():
    header, blobs = pack(Message({"weights": {"w": torch.ones(3)}}))
    for wrong in ({}, {"weights": blobs["weights"][:-1]}, {"weights": np.append(blobs["weights"], np.uint8(0))}):
        with pytest.raises(InputError, match="do not fit together"):
            unpack(header, wrong)
    with pytest.raises(InputError, match="do not fit together"):
        unpack(header, {**blobs, "more": blobs["weights"]})


def test_a_resident_answers_as_the_application_does(resident):
    message = Message({"weights": {"w": torch.tensor([1.5, -0.0]).bfloat16()}}, {"round": 1})
    node = {"site": "hosp1", "resident": resident}
    assert ask(resident, RUN, node) == ("hosp1", None, {})
    expected = unpack(*Site(flower_toy, RUN, node).answered(*pack(message)))
    processes = set()
    for _ in range(2):
        site, header, blobs = ask(resident, RUN, node, *pack(message))
        reply = unpack(header, blobs)
        processes.add(reply.scalars["pid"])
        assert (site, reply.scalars["factory_calls"]) == ("hosp1", 1)
        assert reply.groups["weights"]["w"].tolist() == [3.0, 0.0]
        assert Message(reply.groups) == Message(expected.groups)
    assert len(processes) == 1 and processes != {expected.scalars["pid"]}
    for configs, calls in (
        ((RUN, {**node, "site": "hosp2"}), 2),
        (({**RUN, "other": 1}, {**node, "site": "hosp2"}), 3),
    ):
        site, header, blobs = ask(resident, *configs, *pack(message))
        assert (site, unpack(header, blobs).scalars["factory_calls"]) == ("hosp2", calls)


def test_a_resident_outlives_what_goes_wrong(resident):
    node = {"site": "hosp1"}
    with pytest.raises(InputError, match="^site 'refuses': its data set is empty$"):
        ask(resident, RUN, {"site": "refuses"})
    with pytest.raises(InputError, match="no_such_module.*install it here"):
        ask(resident, {"application": "no_such_module"}, node)
    message = Message({"weights": {}}, {"round": 0, "raises": "hosp1"})
    _, header, blobs = ask(resident, RUN, node, *pack(message))
    assert unpack(header, blobs).scalars == {"error": "ValueError: no data at hosp1"}
    with pytest.raises(InputError, match="do not fit together"):
        ask(resident, RUN, node, "no header", {})
    from multiprocessing.connection import Client

    with Client(resident, family="AF_UNIX") as connection:
        connection.send_bytes(b"[]")  # no request, and whoever sent it goes
    assert ask(resident, RUN, {"site": "hosp2"})[0] == "hosp2"


def test_no_resident_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="resident=.*start `python -m"):
        ask(str(tmp_path / "none"), RUN, {})


@pytest.mark.parametrize(
    "run_config, said",
    [
        ({}, "application=None"),
        ({"application": "json"}, "has no function answer_factory and no serve"),
        ({"application": "no_such_module"}, "cannot be imported"),
    ],
)
def test_an_application_that_is_none(run_config, said):
    with pytest.raises(InputError, match=said):
        load_application(run_config)


def test_missing_or_old_flower_is_an_input_error_and_an_untested_one_a_warning(monkeypatch, tmp_path, caplog):
    versions = {"flwr": "1.43.0"}

    def version(name):
        if name not in versions:
            raise flower_runs.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(flower_runs, "version", version)
    flower_runs.require_flower()
    assert "flwr 1.43.0 has not been tested" in caplog.text
    with pytest.raises(InputError, match="'ray' is not installed: pip install"):
        LocalFlower(tmp_path, ["hosp0"], simulation=True)
    versions["flwr"] = "1.41.9"
    with pytest.raises(InputError, match="flwr 1.41.9 is too old"):
        LocalFlower(tmp_path, ["hosp0"])
    del versions["flwr"]
    with pytest.raises(InputError, match="engine='flower': the package 'flwr' is not installed: pip install"):
        LocalFlower(tmp_path, ["hosp0"])


def test_processes_of_an_earlier_run_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(flower_runs, "version", lambda name: "1.42.0")
    with subprocess.Popen([*GUARD, "sleep", "100"], stdin=subprocess.PIPE, start_new_session=True) as process:
        (tmp_path / "processes.json").write_text(f'{{"superlink": {process.pid}}}')
        await_that(lambda: b"engines.guard" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        with pytest.raises(InputError, match=f"still there.*kill -- -{process.pid}`"):
            LocalFlower(tmp_path, ["hosp0"]).__enter__()


def test_a_superlink_that_is_not_there_or_speaks_no_tls(tmp_path):
    def submitted(*link):
        flower_runs.submit(tmp_path, flower_runs.Link(*link), tmp_path, print, 10.0)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match="root_certificates='.*none': there is no such file"):
            submitted(f"127.0.0.1:{port}", tmp_path / "none")
        (tmp_path / "ca.crt").write_text("no certificate")
        with pytest.raises(InputError, match="root_certificates='.*ca.crt': .*one may be no certificate"):
            submitted(f"127.0.0.1:{port}", tmp_path / "ca.crt")
    for address in (f"127.0.0.1:{port}", "127.0.0.1", "127.0.0.1:99999"):
        with pytest.raises(InputError, match=f"superlink='{address}': cannot be reached.*host:port"):
            submitted(address)
    assert not (tmp_path / "config.toml").exists()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids_in(path):
    return [int(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def test_what_is_guarded_ends_with_whoever_started_it(tmp_path):
    # Even if that is killed; and with it a child, and one that will not hear.
    shell = f"sleep 100 & echo $! >> {tmp_path}/pids; trap '' TERM; echo $$ >> {tmp_path}/pids; sleep 100; sleep 100"
    start = f"import subprocess as s; s.Popen({[*GUARD, 'bash', '-c', shell]!r}, stdin=s.PIPE).wait()"
    with subprocess.Popen([sys.executable, "-c", start], start_new_session=True) as parent:
        pids = await_that(lambda: len(pids_in(tmp_path / "pids")) == 2 and pids_in(tmp_path / "pids"))
        assert all(map(is_alive, pids))
        parent.kill()
    await_that(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("options, status, starts", [([], 3, 1), (["--again"], 3, 2), (["--again"], 0, 1)])
def test_what_is_guarded_is_started_again_where_asked_and_only_after_a_failure(tmp_path, options, status, starts):
    shell = f"echo $$ >> {tmp_path}/pids; [ $(wc -l < {tmp_path}/pids) = 2 ] || exit {status}"
    command = [*GUARD, *options, "bash", "-c", shell]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.wait(timeout=60) == (status if starts == 1 else 0)
    assert len(pids_in(tmp_path / "pids")) == starts
