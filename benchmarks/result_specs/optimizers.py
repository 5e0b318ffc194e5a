"""Optimizers."""

from result_tables import CLAIM, RATIO, Spec, Table, last, scaled


STEP = Table(
    "Time of an optimizer's step",
    "step",
    {"optimizer": "name", "over": "baseline", "parameters": "size", "threads": "threads"},
    RATIO | {"bandwidth, share of a triad": "share_of_triad"},
    targets=(CLAIM,),
)


COMPILE = Table(
    "torch.compile against eager steps",
    "compile",
    {"optimizer": "name"},
    {"largest difference": "max_difference", "largest change of a parameter": "max_change"},
)


BANDWIDTH = Table(
    "Memory bandwidth",
    "bandwidth",
    {"device": "device", "threads": "threads", "elements": "elements"},
    {"copy, GB/s": scaled("copy", 1e-9), "triad, GB/s": scaled("triad", 1e-9)},
)


SPECS = {
    "optimizers": Spec(
        "Optimizers",
        (
            Table(
                "Quality after the last epoch",
                "quality",
                {"task": "task", "metric": "metric", "method": "method"},
                {
                    "its own point": lambda row: row[row["own"]],
                    "which is": "own",
                    "trained w": "w",
                    "average x": "x",
                    "explored y": "y",
                },
                where=lambda row: row.get("is_last"),
            ),
            Table(
                "Local steps at ten clients",
                "rounds",
                {"member": "member"},
                {"accuracy after the last round": last("accuracy")},
                across="split",
            ),
            Table(
                "Traffic",
                "traffic",
                {"variant": "variant"},
                {"bytes a round": "bytes_per_round", "bytes a local step": "bytes_per_local_step"},
            ),
            STEP,
            COMPILE,
            BANDWIDTH,
        ),
        omit=("tuning", "rounds-tuning"),
    ),
    "optimizers_gpu": Spec("Optimizers on a GPU", (STEP, COMPILE, BANDWIDTH)),
}
