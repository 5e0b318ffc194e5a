"""
The sweep of `hf-mlopt prune` with a clock on what it asks of its source and its layer calls; nothing of it is copied.
"""

import time
from collections import defaultdict

import torch

from hf_mlopt.pruning import PruningConfig
from hf_mlopt.pruning.states import LayerCalls, States, embed
from hf_mlopt.pruning.sweep import InMemory, sweep


class WatchedLayers:
    """A `LayerSource` that tells when a layer was asked for, loaded, finished and stored."""

    def __init__(self, source, tell):
        self.source, self.tell, self.smaller = source, tell, source.smaller

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int):
        self.tell("asked", index)
        loaded = self.source.load(index)
        self.tell("loaded", index)
        return loaded

    def store(self, index: int, changed: bool = True) -> None:
        self.tell("finished", index)
        self.source.store(index, changed)
        self.tell("stored", index)


class TimedCalls(LayerCalls):
    """
    Layer calls that note when each began and ended; `spans` holds those of each layer in order.

    Waiting for the device costs nothing here: the sweep does so after every call, to see that the output is finite.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.spans = device, defaultdict(list)

    def __call__(self, index: int, layer, states_BSH: torch.Tensor) -> torch.Tensor:
        begun = now(self.device)
        try:
            return super().__call__(index, layer, states_BSH)
        finally:
            self.spans[index].append((begun, now(self.device)))


def now(device: torch.device) -> float:
    """The time when the device has done all it was given, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_sweep(
    source, model, batches, config: PruningConfig, device: torch.device, sync=lambda: None
) -> tuple[dict, list]:
    """
    Runs the sweep of `hf-mlopt prune` over a source.

    Returns:
        `tuple[dict[str, list[float]], list[LayerReport]]`: Seconds of each part for every layer but the last, and of
        `forward` for the layers that were run unwatched before; what the sweep reports.
    """
    calls, times, seconds = TimedCalls(device), {}, defaultdict(list)
    with source.embedding():
        states = States(embed(model, source.layers, list(batches), device, calls))

    def tell(event: str, index: int) -> None:
        times[event, index] = now(device)
        if event == "stored":
            sync()
            times["synced", index] = now(device)

    if isinstance(source, InMemory):
        calls(0, source.layers[0], states[0])  # warms up
        for index in range(min(3, len(source))):
            begun = now(device)
            for state in states:
                calls(index, source.layers[index], state)
            seconds["forward"].append(now(device) - begun)
        calls.spans.clear()
    reports = sweep(WatchedLayers(source, tell), states, calls, config, iter)
    for index in range(len(source) - 1):
        # The first calls observe, the last ones propagate; between them are others only if experts are not covered.
        observed, rerun = calls.spans[index][len(states) - 1][1], calls.spans[index][-len(states)][0]
        seconds["load"].append(times["loaded", index] - times["asked", index])
        seconds["observe"].append(observed - times["loaded", index])
        seconds["select"].append(rerun - observed)
        seconds["propagate"].append(times["finished", index] - rerun)
        seconds["compute"].append(times["finished", index] - times["loaded", index])
        seconds["write"].append(times["stored", index] - times["finished", index])
        seconds["sync"].append(times["synced", index] - times["stored", index])
    return seconds, reports
