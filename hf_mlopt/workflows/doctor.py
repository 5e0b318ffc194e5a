"""`hf-mlopt doctor`: what this machine can do, and what to install for the rest."""

import os
import platform
import shlex
import threading
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

import hf_mlopt
from hf_mlopt.planning.machine import available_memory, free_disk, gpu_memories


NAME = "hf-mlopt"
HUB_SECONDS = 3.0  # that an answer of the Hub is waited for
# What an extra opens. Its packages are read from the metadata of the installation.
OPENS = {
    "secure-sum": "federate with secure_sum: true; masks and certificates of vertical",
    "privacy": "federate with noise_multiplier, whose epsilon is accounted",
    "medical": "federate on volumes and the models of MONAI (recipes/federated/ct_volumes)",
    "vertical": "vertical: parties that hold other columns of the same rows",
    "he": "vertical with backward: he",
    "flower": "federate --engine flower: sites on several machines",
    "test": "make test",
    "quality": "make quality",
    "dev": "make test and make quality",
}


def examine(hub_seconds: float = HUB_SECONDS) -> dict:
    """
    Looks at the installation, the devices and the network; changes nothing and downloads nothing.

    Args:
        hub_seconds (`float`, *optional*, defaults to 3.0): How long the Hub may take to answer, in seconds.

    Returns:
        `dict`: JSON: `packages` and `extras` (what is installed, what is needed, `lacks` and `install`), `devices`,
            `memory_bytes` and `disk_bytes`, `backends` of `torch.distributed`, `hub` (whether there is a token, never
            the token), `flower_telemetry`, and in words `broken` (without it no command works) and `advice`.
    """
    broken: list[str] = []
    advice: list[str] = []
    metadata = _metadata(broken)
    record = {
        "hf_mlopt": hf_mlopt.__version__,
        "system": platform.platform(),
        "packages": _packages(metadata, broken),
        "extras": _extras(metadata),
        "cores": _cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **_torch_says(broken, advice),
        "memory_bytes": _memory(),
        "hub": _hub(hub_seconds),
        "flower_telemetry": os.environ.get("FLWR_TELEMETRY_ENABLED", "1") != "0",
    }
    record["disk_bytes"] = {"here": free_disk(Path.cwd()), "HF_HOME": free_disk(_hub_home())}
    if record["omp_num_threads"] is None and record["cores"] > 1:
        advice.append(
            f"OMP_NUM_THREADS is not set: each of several processes on one machine would use all {record['cores']} "
            "cores, and be slower for it; `export OMP_NUM_THREADS=1` before such runs"
        )
    if record["flower_telemetry"] and not next(_unmet(Requirement("flwr")), None):
        advice.append(
            "Flower's own commands report their use to Flower; `export FLWR_TELEMETRY_ENABLED=0` keeps them quiet, as "
            "hf-mlopt does with those that it starts"
        )
    return record | {"broken": broken, "advice": advice}


def _metadata(broken: list[str]) -> Distribution | None:
    try:
        return distribution(NAME)
    except PackageNotFoundError:
        broken.append(
            f"{NAME} is not installed, so that nobody knows what it needs: python -m pip install -e CHECKOUT"
        )
        return None


def _packages(metadata: Distribution | None, broken: list[str]) -> list[dict]:
    """Python, then every direct requirement, as in `pyproject.toml`."""
    if metadata is None:
        return []
    needed = metadata.metadata["Requires-Python"] or ""
    rows = [_row("python", platform.python_version(), Requirement(f"python{needed}"))]
    rows += [_row(one.name, _version(one.name), one) for one in _asked(metadata, "")]
    for row in rows:
        if not row["fits"]:
            found = f"{row['installed']} is installed" if row["installed"] else "not installed"
            remedy = (
                install_line([row["name"] + row["needs"]]) if row["name"] != "python" else "install another Python"
            )
            broken.append(f"{row['name']}{row['needs']} is needed, {found}: {remedy}")
    return rows


def _row(name: str, installed: str | None, requirement: Requirement) -> dict:
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return {"name": name, "installed": installed, "needs": str(requirement.specifier), "fits": fits}


def _extras(metadata: Distribution | None) -> list[dict]:
    rows = []
    for extra in metadata.metadata.get_all("Provides-Extra", []) if metadata else []:
        needs = _asked(metadata, extra)
        lacks = list(dict.fromkeys(str(lacking) for one in needs for lacking in _unmet(one)))
        row = {"extra": extra, "opens": OPENS.get(extra), "needs": [_bare(one) for one in needs], "lacks": lacks}
        rows.append(row | {"install": install_line(lacks) if lacks else None})
    return rows


def install_line(requirements: list[str]) -> str:
    """The command that installs them into this Python, whichever a shell would find first."""
    return shlex.join(["python", "-m", "pip", "install", *requirements])


def _asked(metadata: Distribution, extra: str) -> list[Requirement]:
    """What a distribution needs here for one of its extras alone; for `""` what it always needs."""
    asked = [Requirement(line) for line in metadata.requires or []]
    always = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in asked if one not in always and one.marker.evaluate({"extra": extra})] if extra else always


def _unmet(requirement: Requirement) -> Iterator[str]:
    """The requirement, or those of its extras, that the installation does not meet."""
    found = _version(requirement.name)
    if found is None or not requirement.specifier.contains(found, prereleases=True):
        yield _bare(requirement)
        return
    for extra in sorted(requirement.extras):
        for one in _asked(distribution(requirement.name), extra):
            yield from _unmet(one)


def _bare(requirement: Requirement) -> str:
    """Name, extras and versions, without the marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_says(broken: list[str], advice: list[str]) -> dict:
    """GPUs and backends. A torch that is there and cannot be imported is what breaks every command."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        if _version("torch"):
            broken.append(f"torch cannot be imported ({error}): {install_line(['--force-reinstall', 'torch'])}")
        return {"devices": [], "backends": {}}
    devices = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            with torch.cuda.device(index):
                free, total = torch.cuda.mem_get_info()
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        except RuntimeError as error:
            advice.append(f"cuda:{index} ({name}) cannot be used: {str(error).splitlines()[0]}")
            continue
        devices.append(
            {"device": f"cuda:{index}", "name": name, "memory_bytes": total, "free_bytes": free, "bf16": bf16}
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not torch.cuda.device_count() and not hidden and (seen := len(gpu_memories("auto"))):
        advice.append(
            f"nvidia-smi lists {seen} GPU(s) that torch {torch.__version__} cannot use: install a build of torch for "
            "their driver, https://pytorch.org/get-started/locally"
        )
    there = dist.is_available()
    backends = {"gloo": there and dist.is_gloo_available(), "nccl": there and dist.is_nccl_available()}
    return {"devices": devices, "backends": backends}


def _memory() -> dict:
    try:
        import psutil
    except ImportError:  # told among the packages
        return {}
    return {"total": psutil.virtual_memory().total, "available": available_memory()}


def _hub_home() -> Path:
    try:
        from huggingface_hub import constants
    except ImportError:  # told among the packages
        return Path.home()
    return Path(constants.HF_HOME).expanduser().resolve()


def _hub(seconds: float) -> dict:
    """Where the Hub is, whether it answers, and whether a token is there, of which nothing else is told."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:  # told among the packages
        return {}
    parts = urlsplit(constants.ENDPOINT)  # an endpoint may carry a password
    endpoint = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    state = "offline: HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _answer(constants.ENDPOINT, seconds)
    return {"endpoint": endpoint, "state": state, "token": get_token() is not None}


def _answer(endpoint: str, seconds: float) -> str:
    """`reachable`, or why not. The look-up of a name knows no timeout, so that it has a thread, which may be left."""
    from huggingface_hub.utils import get_session

    said: list[str] = []

    def ask():
        try:
            status = get_session().head(endpoint, timeout=seconds).status_code
        except Exception as error:  # of whichever HTTP library the client uses; its text may hold the endpoint
            said.append(f"not reachable ({type(error).__name__})")
        else:
            refused = status >= 500 or status == 407  # by a gateway or a proxy
            said.append(f"not reachable (status {status})" if refused else "reachable")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else f"not reachable (no answer in {seconds:g} s)"
