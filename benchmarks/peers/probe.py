"""
Time, memory and sparsity of a run, taken the same way for every peer.

Peak memory is `VmHWM` of /proc/self/status. `ru_maxrss` is written beside it but is not the figure to compare: at
exec Linux starts it from the resident size of the process that launched this one.
"""

import importlib.metadata
import json
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


PACKAGES = ("torch", "transformers", "safetensors", "llmcompressor", "compressed-tensors", "accelerate")


def memory(field: str) -> int:
    """`VmRSS`, `VmHWM` or `RssAnon` of this process, in bytes; 0 where /proc has none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            match = re.search(rf"^{field}:\s+(\d+) kB", status.read(), flags=re.MULTILINE)
    except FileNotFoundError:
        return 0
    return 1024 * int(match[1]) if match else 0


class Record:
    """What one run measured: seconds and sampled peak of each phase, and one JSON line at the end."""

    def __init__(self, interval: float = 0.02, **facts):
        self.facts = {**facts, "start_bytes": memory("VmRSS"), "phases": {}, "messages": [], "finding": None}
        self._interval = interval
        self._peaks = {"VmRSS": 0, "RssAnon": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._sample()
            time.sleep(self._interval)

    def _sample(self) -> None:
        for field in self._peaks:
            self._peaks[field] = max(self._peaks[field], memory(field))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """
        Seconds of the block, on the clock and summed over cores, and memory: the highest samples taken in it (without
        mapped files: anonymous), and exactly, the high water of the process so far.
        """
        self._peaks = dict.fromkeys(self._peaks, 0)
        self.facts["stage"] = name
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            self._sample()
            self.facts["phases"][name] = {
                "seconds": elapsed,
                "cpu_seconds": cpu,
                "peak_bytes": self._peaks["VmRSS"],
                "peak_anonymous_bytes": self._peaks["RssAnon"],
                "high_water_bytes": memory("VmHWM"),
            }

    @contextmanager
    def catch(self) -> Iterator[None]:
        """A peer that cannot do the work is a finding, with its own words, and not the end of the benchmark."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.facts["finding"] = {
                "stage": self.facts.get("stage"),
                "error": type(error).__name__,
                "message": str(error),
            }

    def stop(self) -> None:
        """Takes the peaks of the process, so that checks that follow do not count."""
        self.facts["peak_bytes"] = memory("VmHWM")
        self.facts["ru_maxrss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> str:
        """The JSON line."""
        if "peak_bytes" not in self.facts:
            self.stop()
        self.facts.pop("stage", None)
        self.facts["versions"] = versions()
        return json.dumps(self.facts)


def versions() -> dict[str, str]:
    """Versions of the packages that matter and are installed here."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def share_of_zeros(weight: torch.Tensor) -> float:
    """Fraction of exact zeros, without a boolean copy of the whole tensor."""
    return 1.0 - sum(int(torch.count_nonzero(row)) for row in weight.split(256)) / weight.numel()


def expert_sparsity(model: nn.Module) -> dict:
    """
    Zeros in every expert matrix that is an `nn.Linear`, against the number of matrices the model should have.

    Returns:
        `dict`: `matrices` found and `expected`, minimum, mean and maximum share of zeros over them, the same share
        for all other linear layers of the decoder together, and `all_pruned`.
    """
    config = model.config
    experts, others = [], []
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Linear):
            zeros = share_of_zeros(module.weight.detach())
            (experts if re.search(r"\.experts\.", name) else others).append(zeros)
    expected = config.num_hidden_layers * config.num_local_experts * 3
    return {
        "matrices": len(experts),
        "expected": expected,
        "minimum": min(experts, default=0.0),
        "mean": sum(experts) / max(len(experts), 1),
        "maximum": max(experts, default=0.0),
        "other_linear_layers": sum(others) / max(len(others), 1),
        "all_pruned": len(experts) == expected and min(experts, default=0.0) > 0.0,
    }
