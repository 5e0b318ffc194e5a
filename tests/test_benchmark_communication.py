"""Parts of the benchmark of compressed gradients, run from end to end at a small size: else nobody sees it break."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import python


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROGRAM = """
import sys
from pathlib import Path
if __name__ == "__main__":
    for absent in ("datasets", "psutil"):  # the machine with the GPU may not have them
        sys.modules[absent] = None
    sys.path.insert(0, sys.argv[1])
    import common
    common.RESULTS = Path(sys.argv[2])
    import communication_gpu
    communication_gpu.main(sys.argv[3:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="spawns ranks")
def test_the_gpu_part_runs_on_a_cpu(tmp_path):
    words = ("--device", "cpu", "--elements", "20000", "--pairs", "1", "--codec-seconds", "5")
    python(PROGRAM, BENCHMARKS, tmp_path, *words)
    record = json.loads((tmp_path / "communication_gpu.json").read_text())
    rows = record["rows"]
    assert not [row for row in rows if row["kind"] == "failed"]
    equal = [row for row in rows if row["kind"] == "equal"]
    assert len(equal) > 20 and all(row["decoded_max_difference"] == 0 for row in equal)
    smoke = [row for row in rows if row["kind"] == "smoke"]
    assert {row["ranks"] for row in smoke} == {2} and all(row["bit_identical"] for row in smoke)
    assert {row["run"] for row in smoke} >= {"fp32", "bingrad-b, step-ahead", "orq-9, two-phase"}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import communication_codecs

    return communication_codecs


@pytest.mark.parametrize("levels", [3, 4])
def test_the_optimum_is_the_best_of_all_choices(measured, levels):
    """The dynamic programme against every choice of levels among a few points, the ends being the points' own."""
    points = np.sort(np.random.default_rng(0).normal(size=9))

    def error(chosen):
        low = np.clip(np.searchsorted(chosen, points, side="right") - 1, 0, levels - 2)
        return sum((chosen[low + 1] - points) * (points - chosen[low]))

    best = min(error(np.array([points[0], *inner, points[-1]])) for inner in combinations(points[1:-1], levels - 2))
    found = measured.least_rounding_errors(points, measured.rounding_cost(points), levels, is_free=False)[levels]
    assert found == pytest.approx(best, rel=1e-9) and best > 0
