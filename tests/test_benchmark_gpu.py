"""The GPU benchmark of pruning, run from end to end on a CPU: nobody notices otherwise when it breaks."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_mlopt.pruning.states import LayerCalls, embed
from tests.command_line import python


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROGRAM = """
import sys
from pathlib import Path
for absent in ("datasets", "psutil", "matplotlib"):  # the machine with the GPU may not have them
    sys.modules[absent] = None
sys.path.insert(0, sys.argv[1])
import common
common.RESULTS = Path(sys.argv[2])
import pruning_gpu
pruning_gpu.main(sys.argv[3:])
"""
TINY = (
    "--device cpu --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 256 --samples 16 --length 256 "
    "--batch-size 4 --in-memory-layers 2 --disk-layers 2 --matrix 64"
)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    python(PROGRAM, BENCHMARKS, folder, *TINY.split(), "--folder", folder)
    assert [path.name for path in folder.iterdir()] == ["pruning_gpu.json"]  # no checkpoint is left
    return json.loads((folder / "pruning_gpu.json").read_text())


def rows(record, **wanted):
    return [row for row in record["rows"] if wanted.items() <= row.items()]


def seconds(record, where):
    return {row["part"]: row["seconds_median"] for row in rows(record, kind="part", where=where)}


def test_every_part_is_timed(record):
    memory, disk = seconds(record, "memory"), seconds(record, "disk")
    assert set(memory) == {"forward", "observe", "select", "propagate", "compute"}
    assert set(disk) == {"load", "compute", "write", "sync"}
    assert min(*memory.values(), *disk.values()) > 0
    assert memory["observe"] + memory["select"] + memory["propagate"] == pytest.approx(memory["compute"])
    for row in record["rows"]:
        for key in [key.removesuffix("_median") for key in row if key.endswith("_median")]:
            assert row[f"{key}_min"] <= row[f"{key}_median"] <= row[f"{key}_max"]


def test_what_was_swept_is_what_was_asked_for(record):
    for where in ("memory", "disk"):
        (sweep,) = rows(record, kind="sweep", where=where)
        assert (sweep["layers"], sweep["layers_asked"], sweep["sparsity"]) == (2, 2, 0.5)
        assert sweep["layer_bytes"] == 2 * (8 * 3 * 64 * 128 + 3 * 64 * 64 + 8 * 64 + 2 * 64)
        assert sweep["states_bytes"] == 2 * 16 * 256 * 64
        assert sweep["layers_with_uncovered_experts"] == 0
        assert 0 < sweep["fewest_tokens"] < 16 * 256 * 2 / 8 < sweep["most_tokens"]
        assert sweep["peak_bytes"] > sweep["layer_bytes"]


def test_the_ratio_is_to_two_forward_passes(record):
    (rate,), (ratio,) = rows(record, kind="matrix rate"), rows(record, kind="ratio", claim_at_most=2)
    two_passes = ratio["flops"] / rate["flops_per_second_median"]
    assert ratio["ratio_median"] == pytest.approx(seconds(record, "memory")["compute"] / two_passes)


def test_python_calls_the_same_operations_for_more_experts(record):
    few, many, full = rows(record, kind="operations")
    assert (few["experts"], many["experts"], full["hidden"]) == (8, 16, 64)
    assert few["pieces"] == many["pieces"] == 2
    assert few["operations_called"] == many["operations_called"] > 100


@pytest.mark.parametrize("sizes", [{}, {"length": 24, "heads": 8, "kv_heads": 1, "intermediate": 40}])
def test_flops_are_those_that_torch_counts(sizes, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import pruning_gpu

    arguments = pruning_gpu.parse([*TINY.split(), "--samples", "2"])
    vars(arguments).update({"length": 16, **sizes})
    config = pruning_gpu.shape(arguments, 1)
    model = pruning_gpu.make_model(config, torch.device("cpu"))
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    calls, batches = LayerCalls(), list(pruning_gpu.make_batches(arguments))
    (states,) = embed(model, model.model.layers, batches, torch.device("cpu"), calls)
    with FlopCounterMode(display=False) as counter:
        calls(0, model.model.layers[0], states)
    masked = 2 * states.numel() * arguments.length  # eager attention computes what the causal mask drops
    assert pruning_gpu.forward_flops(config, 2, arguments.length) + masked == counter.get_total_flops()
