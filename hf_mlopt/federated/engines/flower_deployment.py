"""A private SuperLink with its SuperNodes: Flower on one machine, of which nothing is left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from hf_mlopt.errors import InputError
from hf_mlopt.federated.engines.flower_runs import Link, environment, log_tail, require_flower, submit, write_app


_PATIENCE = 20.0  # seconds to end, of which a guard takes ten


class LocalFlower:
    """
    A SuperLink of this process, on a free port of the loopback interface, until the `with` block ends: either one that
    simulates, or with a SuperNode for each site. No TLS, since nothing leaves the machine.

    Args:
        folder (`Path`): Takes logs and Flower's home.
        sites (`Sequence[str]`): Names; a SuperNode tells its application as `site` in `node_config`.
        simulation (`bool`, *optional*, defaults to `False`): Sites are actors of Ray, known as `partition-id`.
        residents (`bool`, *optional*, defaults to `True`): Beside each SuperNode stands a process that answers, so
            that torch and data are loaded once; see [`resident.listen`].
        start_timeout (`float`, *optional*, defaults to 60): Seconds.

    Raises:
        InputError: If Flower is missing, or processes of an earlier use of the folder still run.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str],
        *,
        simulation: bool = False,
        residents: bool = True,
        start_timeout: float = 60.0,
    ):
        require_flower(simulation)
        self.folder, self.sites, self.simulation = folder, list(sites), simulation
        self.residents, self.start_timeout = residents and not simulation, start_timeout
        self.home = folder / "home"
        self._processes: dict[str, subprocess.Popen] = {}
        self._exit = ExitStack()

    def __enter__(self) -> "LocalFlower":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_leftovers()
        try:
            self._start_all()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def run(
        self,
        application: str,
        run_config: Mapping[str, str | int | float | bool],
        on_line: Callable[[str], None],
        timeout: float,
    ) -> None:
        """See [`write_app`] and [`submit`]."""
        app = write_app(self.folder / "app", application, run_config)
        submit(app, self.link, self.home, on_line, timeout, len(self.sites) if self.simulation else None)

    def stop(self) -> None:
        """Ends all processes and their children; whoever does not end is killed."""
        for process in reversed(self._processes.values()):
            process.stdin.close()  # which ends the guard
        for process in self._processes.values():
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        self._pid_file.unlink(missing_ok=True)

    @property
    def _pid_file(self) -> Path:
        return self.folder / "processes.json"

    def _start_all(self) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="hf_mlopt_"))  # short, as paths of sockets must be
        self._exit.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        self._exit.callback(self.stop)
        port = _free_port()
        self.link = Link(f"127.0.0.1:{port}")
        command = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
        command += ["--host", "127.0.0.1", "--port", str(port), *(["--simulation"] if self.simulation else [])]
        self._start("superlink", command)
        self._await("superlink", lambda: _is_open(port))
        for number, site in enumerate([] if self.simulation else self.sites):
            config = f"site={json.dumps(site)}"
            if self.residents:
                address = self._scratch / str(number)
                module = "hf_mlopt.federated.engines.resident"
                self._start(f"resident-{number}", ["--again", sys.executable, "-m", module, str(address)])
                self._await(f"resident-{number}", address.exists)
                config += f" resident={json.dumps(str(address))}"
            command = ["--again", "flower-supernode", "--insecure", "--superlink", self.link.address]
            self._start(f"supernode-{number}", [*command, "--port", str(_free_port()), "--node-config", config])

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "hf_mlopt.federated.engines.guard", *command],
                env={**environment(self.home), "RAY_TMPDIR": str(self._scratch)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        pids = {name: process.pid for name, process in self._processes.items()}
        self._pid_file.write_text(json.dumps(pids))

    def _await(self, name: str, is_there: Callable[[], bool]) -> None:
        ends = time.monotonic() + self.start_timeout
        while not is_there():
            if time.monotonic() > ends or self._processes[name].poll() is not None:
                path = self.folder / f"{name}.log"
                tail = log_tail(path.read_text(errors="replace").splitlines())
                raise RuntimeError(f"the {name} has not started within {self.start_timeout:g} s; {path} ends:\n{tail}")
            time.sleep(0.1)

    def _refuse_leftovers(self) -> None:
        if not self._pid_file.is_file():
            return
        running = {name: pid for name, pid in json.loads(self._pid_file.read_text()).items() if _is_ours(pid)}
        if running:
            raise InputError(
                f"{self.folder}: processes of an earlier run are still there, {running}; end them with "
                f"`kill -- {' '.join(f'-{pid}' for pid in running.values())}`"
            )


def _is_ours(pid: int) -> bool:
    try:
        return b"engines.guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
