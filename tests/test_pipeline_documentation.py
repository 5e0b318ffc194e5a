"""The tables of docs/pipeline.md against the record of the benchmark."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "benchmarks" / "results" / "pipeline.json").read_text())
CONDITIONS = (
    "none",
    "1/3 of operations x2",
    "1/3 of operations x4",
    "latency 0.5 F",
    "latency 1.5 F",
    "one stage x2",
    "one stage x2, rebalanced",
)
LABELS = {
    "GPipe, 8 batches an update": "gpipe M=8",
    "1F1B, 8": "1f1b M=8",
    "1F1B, 32": "1f1b M=32",
}


def table(heading):
    part = TEXT[TEXT.index(heading) :]
    part = part[part.index("|") : part.index("\n\n", part.index("|---"))]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in part.splitlines()]


def label_of(cell):
    plain = cell.replace("`", "")
    plain = LABELS.get(plain, plain)
    return plain.replace(", repeated forwards", "").replace(", graphs kept", ", recompute=no")


def test_times_are_those_of_the_record():
    rows = {(row["condition"], row["label"]): row for row in RECORD["rows"] if row["kind"] in ("speed", "straggler")}
    shown = 0
    for name, *cells in table("**Time of a batch**")[2:]:
        for condition, cell in zip(CONDITIONS, cells, strict=True):
            if not cell:
                continue
            row = rows[condition, label_of(name)]
            number, _, model = cell.partition(" (")
            assert float(number) == pytest.approx(row["of_F"], rel=0.005), (name, condition)
            if model:
                assert float(model.rstrip(")")) == pytest.approx(row["model_of_F"], abs=0.006)
            shown += 1
    assert shown == 6 * 7 + 6 + 2


def test_claims_hold_and_are_said():
    assert all(RECORD["speed_claims_hold"])
    dsp = next(row for row in RECORD["rows"] if row["kind"] == "speed" and row["label"] == "dsp, recompute=no")
    assert f"{dsp['over_bp']:.2f} × ({dsp['over_bp_min']:.2f}–{dsp['over_bp_max']:.2f})" in TEXT
    assert f"{dsp['over_1f1b_8']:.2f} × ({dsp['over_1f1b_8_min']:.2f}–{dsp['over_1f1b_8_max']:.2f})" in TEXT
