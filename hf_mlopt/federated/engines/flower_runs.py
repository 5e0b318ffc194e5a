"""Runs on a SuperLink: what is submitted to it, where, and how it ends."""

import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hf_mlopt.errors import ConfigurationError, InputError


logger = logging.getLogger(__name__)

OLDEST, FIRST_UNTESTED = (1, 42), (1, 43)
_INSTALL = "pip install 'hf-mlopt[flower]'"
_LINK = "hf-mlopt"  # name of the connection in config.toml


def require_flower(simulation: bool = False) -> None:
    """
    Looks for Flower, and for Ray if it is to simulate; an untested version is a warning.

    Raises:
        InputError: If one is not installed, or too old.
    """
    try:
        found = version("flwr")
        if simulation:
            version("ray")
    except PackageNotFoundError as error:
        raise InputError(f"engine='flower': the package {error.name!r} is not installed: {_INSTALL}") from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        raise InputError(f"engine='flower': flwr {found} is too old: {_INSTALL}")
    if numbers >= FIRST_UNTESTED:
        logger.warning("flwr %s has not been tested with this version of hf_mlopt; 1.42 has", found)


def write_app(folder: Path, application: str, run_config: Mapping[str, str | int | float | bool]) -> Path:
    """
    Writes what `flwr run` submits: no code, for that is installed at every site, only what to run.

    Args:
        folder (`Path`): Is made.
        application (`str`): Dotted name of a module, see [`Application`].
        run_config (`Mapping`): What that module and [`FlowerEngine.from_run_config`] read.

    Returns:
        `Path`: The folder.
    """
    import tomli_w  # comes with Flower

    for key, value in run_config.items():
        if type(value) not in (str, int, float, bool):
            raise ConfigurationError(key, value, "a run configuration holds texts, numbers and truth values")
    module = "hf_mlopt.federated.engines.flower_app"
    app = {
        "publisher": "hf-mlopt",
        "components": {"serverapp": f"{module}:server_app", "clientapp": f"{module}:client_app"},
        "config": {**run_config, "application": application},
    }
    project = {"name": "hf-mlopt-federated", "version": "1.0.0", "dependencies": []}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    return folder


def environment(home: Path) -> dict[str, str]:
    """
    Variables of Flower's processes: a home of their own, nothing sent to anybody, and their commands found.

    Args:
        home (`Path`): For `FLWR_HOME`.
    """
    return {
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds
        **os.environ,
        "FLWR_HOME": str(home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


@dataclass(frozen=True)
class Link:
    """
    A SuperLink.

    Args:
        address (`str`): As in `127.0.0.1:8000`.
        root_certificates (`Path`, *optional*): Of the authority that signed its certificate; without, no TLS.
    """

    address: str
    root_certificates: Path | None = None


def submit(
    app: Path, link: Link, home: Path, on_line: Callable[[str], None], timeout: float, num_sites: int | None = None
) -> None:
    """
    Runs an app and waits for its end.

    Args:
        app (`Path`): From [`write_app`].
        link (`Link`): Where it runs.
        home (`Path`): Flower's home folder; the connection is entered there.
        on_line (`Callable[[str], None]`): Takes each line of the server's log.
        timeout (`float`): Seconds until it must have ended.
        num_sites (`int`, *optional*): Of a simulation.

    Raises:
        InputError: If the SuperLink is not there, or its certificate is not trusted.
        RuntimeError: If the run fails or takes too long; with the end of its log.
    """
    _require_link(link)
    home.mkdir(parents=True, exist_ok=True)
    certificates = link.root_certificates and str(link.root_certificates.absolute())
    security = f"root-certificates = {json.dumps(certificates)}" if certificates else "insecure = true"
    address = json.dumps(link.address)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_LINK}"\n\n[superlink.{_LINK}]\naddress = {address}\n{security}\n'
    )
    command = ["flwr", "run", str(app), _LINK, "--stream"]
    if num_sites is not None:
        command += ["--federation-config", f"num-supernodes={num_sites} client-resources-num-cpus=1"]
    lines: list[str] = []

    def take(line: str) -> None:
        lines.append(line)
        on_line(line)

    try:
        is_late = _streamed(command, environment(home), take, timeout)
    except BaseException:
        _end_run(lines, home)
        raise
    if is_late:
        _end_run(lines, home)
        raise RuntimeError(f"the run has not ended within {timeout:g} s; the end of its log:\n{log_tail(lines)}")
    if (run := _run_id(lines)) is None:
        raise InputError(f"superlink={link.address!r}: the run was not started:\n{log_tail(lines)}")
    if (status := _status(run, home)) != "finished:completed":
        told = re.findall(r"^hf_mlopt\.errors\.\w+: (.*)$", "\n".join(lines), re.MULTILINE)
        if told:
            raise InputError(told[-1])
        raise RuntimeError(f"the run has ended as {status!r}; the end of its log:\n{log_tail(lines)}")


def _streamed(command: list[str], env: dict[str, str], on_line: Callable[[str], None], timeout: float) -> bool:
    """Whether it had to be stopped."""
    with subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                on_line(re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip()))
            return process.wait() == -signal.SIGKILL
        finally:
            timer.cancel()
            process.kill()


def _run_id(lines: list[str]) -> str | None:
    found = re.search(r"started run (\d+)", "\n".join(lines))
    return found and found[1]


def _end_run(lines: list[str], home: Path) -> None:
    if (run := _run_id(lines)) is not None:
        _flwr(home, "stop", run, _LINK)


def _status(run: str, home: Path) -> str:
    listed = _flwr(home, "list", "--run-id", run, _LINK, "--format", "json")
    try:
        return json.loads(listed)["runs"][0]["status"]
    except (ValueError, KeyError, IndexError):
        return f"unknown: {listed}"


def _flwr(home: Path, *arguments: str) -> str:
    command = ["flwr", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=120).stdout


def _require_link(link: Link) -> None:
    """What Flower itself would report as a network that is unavailable."""
    host, _, port = link.address.rpartition(":")
    if link.root_certificates is not None and not link.root_certificates.is_file():
        raise ConfigurationError("root_certificates", str(link.root_certificates), "there is no such file")
    try:
        if link.root_certificates is not None:
            context = ssl.create_default_context(cafile=link.root_certificates)
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as connection:
            if link.root_certificates is not None:
                context.wrap_socket(connection, server_hostname=host.strip("[]")).close()
    except ssl.SSLCertVerificationError as error:
        raise InputError(
            f"superlink={link.address!r}: its certificate is not trusted: {error.verify_message}; give the "
            f"certificate of the authority that signed it, not root_certificates={str(link.root_certificates)!r}, "
            "and the address by a name that it holds"
        ) from error
    except ssl.SSLError as error:
        raise InputError(
            f"superlink={link.address!r}, root_certificates={str(link.root_certificates)!r}: {error}; one may be no "
            "certificate, or no TLS is spoken there"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"superlink={link.address!r}: cannot be reached ({error}); start it, and give its address as host:port"
        ) from error


def log_tail(lines: list[str]) -> str:
    """The last lines of a log."""
    return "\n".join(lines[-30:])
