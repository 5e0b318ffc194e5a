"""What every benchmark shares: where data and results are, rows written as they finish, ratios taken in pairs."""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from hf_mlopt.hub import environment


ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SHARED = ROOT.parent / "shared" / "data"


class Results:
    """A JSON file that holds every finished row, also when the run is cut short."""

    def __init__(self, name: str, command: str):
        self.record = {"command": command, "date": time.strftime("%Y-%m-%d"), "environment": environment(), "rows": []}
        self.path = RESULTS / f"{name}.json"
        if name.endswith("_gpu") and not _has_gpu(self.record) and self.path.is_file():
            # A check on a CPU never takes the place of what a GPU measured.
            if _has_gpu(json.loads(self.path.read_text(encoding="utf-8"))):
                self.path = RESULTS / f"{name}_short.json"

    def add(self, **row) -> None:
        self.record["rows"].append(row)
        self.save()
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)

    def note(self, **facts) -> None:
        self.record.update(facts)
        self.save()
        print("  ".join(f"{key}: {_short(value)}" for key, value in facts.items()), flush=True)

    def keep_others(self, kinds: set[str]) -> None:
        """Takes over what earlier runs found, but for rows of the kinds that are measured again."""
        if self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            rows = [row for row in before["rows"] if row["kind"] not in kinds]
            self.record = {**before, **self.record, "rows": rows}

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def _has_gpu(record: dict) -> bool:
    return " x " in record["environment"]["machine"]


def require(*packages: str) -> None:
    """Ends a benchmark that cannot run on this machine, before it does anything."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise SystemExit(f"this benchmark needs {names}, not installed here: python -m pip install {names}")


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired_ratio(function: Callable[[], object], baseline: Callable[[], object], pairs: int) -> dict:
    """Times both in turn, after one warm-up of each; the ratio pair by pair, as median, minimum and maximum."""
    function(), baseline()
    ratios, base = [], []
    for _ in range(pairs):
        base.append(seconds(baseline))
        ratios.append(seconds(function) / base[-1])
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": pairs,
        "baseline_seconds": statistics.median(base),
    }
