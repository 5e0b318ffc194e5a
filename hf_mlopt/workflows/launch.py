"""Several processes on this machine: the command line starts itself again under `torch.distributed.run`."""

import json
import os
import signal
import subprocess
import sys
from typing import get_type_hints

from hf_mlopt.errors import ConfigurationError


def launched() -> bool:
    """Whether `accelerate launch`, `torchrun` or [`launch`] has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_num_processes(num_processes: int | None, use_cpu: bool) -> None:
    """
    Refuses a number of processes that cannot be had.

    Args:
        num_processes (`int`, *optional*): What the user asked for.
        use_cpu (`bool`): Whether they compute on the CPU.

    Raises:
        ConfigurationError: If it is below 1, there are fewer GPUs, or a launcher has started another number.
    """
    if num_processes is None:
        return
    if num_processes < 1:
        raise ConfigurationError("num_processes", num_processes, "must be at least 1")
    if launched():
        started = int(os.environ["WORLD_SIZE"])
        if started != num_processes:
            raise ConfigurationError(
                "num_processes",
                num_processes,
                f"but the launcher has started {started}; give both the same number, or leave this one out "
                "(--num-processes null)",
            )
        return
    if not use_cpu:
        import torch

        gpus = torch.accelerator.device_count()
        if gpus < num_processes:
            raise ConfigurationError(
                "num_processes", num_processes, f"this machine has {gpus} GPUs; lower it, or add --use-cpu"
            )


def launch(words: list[str], num_processes: int, use_cpu: bool) -> int:
    """
    Runs `hf-mlopt` in several processes that find one another.

    Args:
        words (`list[str]`): The words after `hf-mlopt`.
        num_processes (`int`): How many.
        use_cpu (`bool`): Whether they share the cores of one CPU; then each computes with one thread, unless
            `OMP_NUM_THREADS` says otherwise.

    Returns:
        `int`: The exit status: 0 if all of them succeeded.
    """
    environment = dict(os.environ)
    if use_cpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes))
    command = [sys.executable, *torchrun, "-m", "hf_mlopt", *words]
    with subprocess.Popen(command, env=environment) as process:
        # A scheduler's end goes on to them. Ctrl-C reaches them by itself, and they are waited for.
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)


def as_words(given: dict, cls: type) -> list[str]:
    """
    Options of the command line out of the values that it was read into.

    Args:
        given (`dict`): Field names to values, from [`~configuration.arguments_given`].
        cls (`type`): The dataclass whose fields they are.
    """
    kinds, words = get_type_hints(cls), []
    for name, value in given.items():
        option = name.replace("_", "-")
        if kinds[name] in (bool, bool | None):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(_word, value)]
        else:
            words.append(f"--{option}={_word(value)}")  # in one word, since a value may begin with a dash
    return words


def _word(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
