"""Pipelines."""

import re

from result_tables import Spec, Table, Target, scaled, spread


def _speed_claims(record: dict) -> list[dict]:
    """Notes such as `{"dsp over bp (at least 2.6)": 2.97}`."""
    rows = []
    for text, measured in record.get("speed_claims", {}).items():
        name, words, limit = re.fullmatch(r"(.*) \((at most|at least) (.*)\)", text).groups()
        rows.append({"what": name, "measured": measured, words.replace(" ", "_"): float(limit)})
    return rows


def _quality_of_pipeline(record: dict) -> list[dict]:
    summary = record.get("quality_summary", {})
    return [{"task": task, "mode": mode, **row} for task, modes in summary.items() for mode, row in modes.items()]


def _staleness_target(row: dict) -> float | None:
    return 0.01 if row["mode"] == "lag1, predict, update_every=4" else None


SPECS = {
    "pipeline": Spec(
        "Pipelines",
        (
            Table(
                "Speed, the claims",
                _speed_claims,
                {"what": "what"},
                {"measured": "measured"},
                targets=(Target("measured", at_most="at_most"), Target("measured", at_least="at_least")),
            ),
            Table(
                "Loss at equal samples, relative to back-propagation",
                _quality_of_pipeline,
                {"task": "task", "mode": "mode"},
                {"loss": "loss", "over bp": spread("over_bp", ""), "accuracy": "accuracy", "diverged": "diverged"},
                targets=(Target("over_bp", at_most=_staleness_target),),
            ),
            Table(
                "Speed over sequential back-propagation, devices emulated",
                "speed",
                {"schedule": "label"},
                {
                    "over bp": spread("over_bp", ""),
                    "over 1F1B, 8 micro-batches": spread("over_1f1b_8", ""),
                    "over the event model": "of_model",
                },
            ),
            Table(
                "With stragglers", "straggler", {"schedule": "label"}, {"speed over bp": "over_bp"}, across="condition"
            ),
            Table(
                "Nothing emulated, two cores",
                "real",
                {"schedule": "label"},
                {"speed over one process": spread("over_one_process", "")},
            ),
            Table(
                "Memory of a stage",
                "memory",
                {"schedule": "mode", "recompute": "recompute", "stage": "stage"},
                {
                    "held, MB": scaled("held_bytes", 1e-6),
                    "by the formula, MB": scaled("model_held_bytes", 1e-6),
                    "with weights by the formula, MB": scaled("model_total_bytes", 1e-6),
                },
            ),
        ),
        omit=("tuning", "quality"),
    ),
    "pipeline_gpu": Spec(
        "Pipelines on a GPU",
        (
            Table(
                "Processes against threads, to the bit",
                "same",
                {"stages": "stages", "schedule": "mode", "recompute": "recompute"},
                {
                    "losses equal": "losses_equal_threads",
                    "weights equal": "weights_equal_threads",
                    "seconds a batch": "seconds_per_batch",
                },
            ),
            Table(
                "One process", "step", {"stages": "stages", "mode": "mode"}, {"seconds a batch": "seconds_per_batch"}
            ),
        ),
    ),
}
