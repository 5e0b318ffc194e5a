"""Vertical training."""

from result_tables import Spec, Table, Target


def _accuracy_lost(row: dict) -> float:
    return 100 * (row["scikit_learn"] - row["accuracy"])


SPECS = {
    "vertical": Spec(
        "Vertical training",
        (
            Table(
                "Optimum",
                "optimum",
                {"data": "data", "algorithm": "algorithm"},
                {
                    "objective above the optimum": "gap",
                    "epochs": "epochs",
                    "accuracy": "accuracy",
                    "scikit-learn": "scikit_learn",
                },
                targets=(Target("gap", at_most=1e-5),),
            ),
            Table(
                "Accuracy beside scikit-learn",
                "optimum",
                {"data": "data", "algorithm": "algorithm"},
                {"points lost": _accuracy_lost},
                targets=(Target(_accuracy_lost, at_most=0.1),),
            ),
            Table(
                "One party at a third of the speed, event clock, with longer steps for it",
                "straggler",
                {"data": "data", "algorithm": "algorithm"},
                {"speed-up over in step": "compensated_speed_up", "seeds": "seeds"},
                targets=(Target("compensated_speed_up", at_least=2.5),),
            ),
            Table(
                "The same without longer steps",
                "straggler",
                {"data": "data", "algorithm": "algorithm"},
                {"speed-up over in step": "async_speed_up", "seeds": "seeds"},
                targets=(Target("async_speed_up", at_least=1.3),),
            ),
            Table(
                "The same with real processes",
                "processes",
                {"data": "data", "algorithm": "algorithm", "parties": "parties", "longer steps": "compensation"},
                {"in step, s": "sync_seconds", "asynchronous, s": "async_seconds", "speed-up": "speed_up"},
                targets=(Target("speed_up", at_least=lambda row: 2.5 if row.get("compensation") else 1.3),),
            ),
            Table(
                "A party that answers late: updates a second over those without delay",
                "late",
                {"way": "way"},
                {"ratio": "ratio", "updates a second, without and with": "updates_per_second"},
                targets=(Target("ratio", at_least=lambda row: 0.9 if row["way"] == "pushed" else None),),
            ),
            Table(
                "Masks and TLS",
                "wire",
                {"rows": "rows", "columns": "columns", "parties": "parties", "mask": "mask", "TLS": "tls"},
                {"seconds an epoch": "seconds_per_epoch", "bytes an update": "payload_bytes_per_update"},
                targets=(Target("seconds_per_epoch", at_most=2.0),),
            ),
            Table(
                "Sparse block",
                "sparse",
                {"rows": "rows", "columns": "columns"},
                {"MB": "megabytes", "MB if dense": "dense_megabytes", "ms a step": "step_milliseconds"},
            ),
        ),
    ),
}
