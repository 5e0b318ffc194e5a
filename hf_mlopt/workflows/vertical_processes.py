"""Parties of a simulation as processes of this machine."""

import multiprocessing
import multiprocessing.context
import os
import shutil
import socket
import sys
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

from hf_mlopt.configuration import load_config, save_yaml
from hf_mlopt.errors import InputError
from hf_mlopt.vertical.budget import LeakBudgetExceeded
from hf_mlopt.vertical.transport.base import PeerLost
from hf_mlopt.workflows.vertical_party import train_party
from hf_mlopt.workflows.vertical_recipe import PartyRecipe, SimulationRecipe


_PATIENCE = 120.0  # seconds for all processes to start


class SimulationFailed(RuntimeError):
    """A party's process ended with an error; the message is the end of what it wrote."""


def run_processes(recipe: SimulationRecipe, mode: str, files: dict[str, Path], scratch: Path):
    """One `hf-mlopt vertical party` for each, to their end."""
    names, ports = recipe.names, free_ports(recipe.parties)
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(names, ports, strict=True)}
    processes: dict[str, BaseProcess] = {}
    with ExitStack() as stack:
        for name, factor in zip(names, recipe.factors(), strict=True):
            is_table = files[name].suffix == ".parquet"
            given = PartyRecipe(
                **recipe.arguments(mode),
                party=name,
                parties=addresses,
                label_owner=names[0],
                credentials=None if recipe.plaintext else str(scratch / "pki" / name),
                plaintext=recipe.plaintext,
                data=str(files[name]),
                label_column="label" if name == names[0] and is_table else None,
                scale="none",
                constant="keep",
                alignment="as-is",
                eval_share=recipe.eval_share,
                output_dir=str(Path(recipe.output_dir) / mode / name),
                connect_timeout=_PATIENCE,
                step_seconds=recipe.step_seconds * factor,
                trace_steps=recipe.trace_steps,
            )
            path = scratch / f"{mode}-{name}.yaml"
            save_yaml(given, path)
            processes[name] = start_process(path, scratch / f"{mode}-{name}.log")
            stack.callback(_end, processes[name])
        while any(process.is_alive() for process in processes.values()):
            time.sleep(0.05)
            if any(process.exitcode for process in processes.values()):
                time.sleep(1.0)  # for the words of the others
                break
    failed = [name for name, process in processes.items() if process.exitcode]
    if failed:
        words = [_last_line(scratch / f"{mode}-{name}.log") for name in failed]
        shutil.rmtree(Path(recipe.output_dir) / mode, ignore_errors=True)
        raise SimulationFailed("; ".join(f"{name}: {text}" for name, text in zip(failed, words, strict=True)))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that no one listens on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Makes processes by forking one that has imported what parties need: imports take seconds, a fork does not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    context = multiprocessing.get_context("forkserver")
    names = ("transport.grpc", "checkpoints", "metrics")
    modules = [__name__, "sklearn.preprocessing", *(f"hf_mlopt.vertical.{name}" for name in names)]
    context.set_forkserver_preload(modules)
    return context


def start_process(config: Path, log: Path) -> BaseProcess:
    """A party in a process of its own."""
    context = fork_context()
    process = context.Process(target=_party_process, args=(config, log))
    process.start()
    return process


def _party_process(config: Path, log: Path):
    with open(log, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        train_party(load_config(PartyRecipe, config))
    except (InputError, PeerLost, LeakBudgetExceeded) as error:
        print(error, flush=True)
        sys.exit(1)


def _end(process: BaseProcess):
    if process.is_alive():
        process.terminate()
    process.join()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
