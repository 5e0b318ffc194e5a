"""The GPU benchmark of distillation, run from end to end on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import python


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROGRAM = """
import sys
from pathlib import Path
for absent in sys.argv[2].split(","):  # the machine with the GPU may not have them
    sys.modules[absent] = None
sys.path.insert(0, sys.argv[1])
import common
common.RESULTS = Path(sys.argv[3])
import distillation_gpu
distillation_gpu.main(sys.argv[4:])
"""
TINY = (
    "--device cpu --hidden 64 --intermediate 128 --heads 4 --kv-heads 2 --vocabulary 256 --layers 2 --length 32 "
    "--batch-size 2 --windows 6 --pairs 2 --depths 1 3"
)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    python(PROGRAM, BENCHMARKS, "datasets,lm_eval,evaluate,psutil,matplotlib", folder, *TINY.split())
    assert [path.name for path in folder.iterdir()] == ["distillation_gpu.json"]
    return json.loads((folder / "distillation_gpu.json").read_text())


def rows(record, **wanted):
    return [row for row in record["rows"] if wanted.items() <= row.items()]


def test_a_step_is_compared_with_the_passes_it_replaces(record):
    (ratio,) = rows(record, kind="ratio")
    assert (ratio["claim_at_most"], ratio["tokens"], ratio["pairs"]) == (1.25, 64, 2)
    assert 0 < ratio["ratio_min"] <= ratio["ratio_median"] <= ratio["ratio_max"]
    passes = {row["name"]: row for row in rows(record, kind="pass")}
    assert set(passes) == {"distillation", "cross-entropy", "teacher"}
    for row in passes.values():
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds_median"])
        assert row["peak_bytes"] > 0


def test_the_step_distils_a_pruned_student_and_holds_its_zeros(record):
    (model,) = rows(record, kind="model")
    assert (model["layers"], model["layers_asked"], model["mask_violations"]) == (2, 2, 0)
    assert model["lmbda"] > 0  # the experts differ from the teacher's
    assert "SGD" in model["optimizer"]
    layer = 8 * 3 * 64 * 128 + 3 * 64 * 64 + 8 * 64 + 2 * 64
    assert model["parameters"] == 2 * layer + 2 * 256 * 64 + 64


def test_layer_wise_distillation_is_measured_for_every_depth(record):
    found = rows(record, kind="layer-wise")
    assert [row["layers"] for row in found] == [1, 3]
    for row in found:
        assert (row["tokens"], row["steps_per_layer"], row["mask_violations"]) == (6 * 32, 3, 0)
        assert row["layer_bytes"] == 2 * (8 * 3 * 64 * 128 + 3 * 64 * 64 + 8 * 64 + 2 * 64)
        assert row["model_bytes"] == row["layers"] * row["layer_bytes"] + 2 * (2 * 256 * 64 + 64)
        assert 0 < row["seconds_min"] <= row["seconds_median"]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common
    import distillation_gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for absent in ("accelerate", "peft"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SystemExit, match="this benchmark needs accelerate peft, not installed here"):
        distillation_gpu.main(TINY.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROGRAM, PROGRAM.replace("distillation_gpu", "train_moe")])
def test_nothing_that_is_not_installed_is_imported_before_it_is_named(tmp_path, program):
    words = [str(BENCHMARKS), "accelerate,peft", str(tmp_path), *(["train"] if "train_moe" in program else [])]
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1].startswith("this benchmark needs accelerate"), result.stderr
    assert result.returncode == 1 and list(tmp_path.iterdir()) == []


def test_what_does_not_fit_leaves_the_rest_to_be_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common
    import distillation_gpu
    import torch

    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    results = common.Results("some", "command")
    distillation_gpu.attempt(results, "step", too_large)
    distillation_gpu.attempt(results, "layer-wise", lambda: results.add(kind="layer-wise"))
    assert [row["kind"] for row in results.record["rows"]] == ["out of memory", "layer-wise"]
