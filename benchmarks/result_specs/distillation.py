"""Distillation."""

from result_tables import CLAIM, RATIO, Spec, Table, scaled, spread


SPECS = {
    "distillation": Spec(
        "Distillation",
        (
            Table("Quality", "quality", {"method": "method"}, {"perplexity": "perplexity"}, "pattern"),
            Table("Quality", "quality", {"method": "method"}, {"share of the gap closed": "gap_closed"}, "pattern"),
            Table("Time of a step", "step", {"what": "name"}, RATIO, targets=(CLAIM,)),
            Table(
                "Memory of the layer-wise mode",
                "depth",
                {"layers": "layers"},
                {"peak, GB": scaled("peak_bytes", 1e-9), "model, GB": scaled("model_bytes", 1e-9), "s": "seconds"},
            ),
        ),
        {"perplexity of the dense model": "dense_perplexity"},
        omit=("tuning", "curve"),
    ),
    "distillation_gpu": Spec(
        "Distillation on a GPU, in the width of Mixtral-8x7B",
        (
            Table("Time of a step", "ratio", {"what": "name"}, RATIO, targets=(CLAIM,)),
            Table(
                "Passes",
                "pass",
                {"pass": "name"},
                {
                    "seconds": spread("seconds"),
                    "tokens a second": "tokens_per_second",
                    "peak, GB": scaled("peak_bytes", 1e-9),
                },
            ),
        ),
        omit=("model",),
    ),
}
