"""Pruning, and the mixture of experts that is trained to be pruned."""

from result_tables import CLAIM, RATIO, Spec, Table, Target, scaled, spread


SPECS = {
    "pruning": Spec(
        "Pruning: cost and quality",
        (
            Table("Cost", "cost", {"what": "name"}, RATIO, targets=(CLAIM,)),
            Table(
                "Quality",
                "quality",
                {"method": "method"},
                {"perplexity": "perplexity"},
                across="pattern",
                split="scope",
            ),
        ),
        {"perplexity of the dense model": "dense_perplexity"},
    ),
    "pruning_scale": Spec(
        "Pruning: large models, fewer experts, peers",
        (
            Table(
                "Memory of the streamed sweep",
                "depth",
                {"layers": "layers"},
                {
                    "peak, GB": scaled("peak_bytes", 1e-9),
                    "model, GB": scaled("model_bytes", 1e-9),
                    "own peak over layer, states and buffer": "own_peak_over_layer_states_and_buffer",
                    "planned over measured": "planned_over_measured",
                    "seconds": "seconds",
                },
                targets=(Target("own_peak_over_layer_states_and_buffer", at_most="claim_at_most"),),
            ),
            Table("Time, streamed", "wall", {"what": "name", "layers": "layers"}, RATIO, targets=(CLAIM,)),
            Table(
                "Beside peers: below 1 is less than theirs",
                "peer ratio",
                {"what": "name", "method": "method", "of": "quantity"},
                {"ratio": spread("ratio")},
            ),
            Table(
                "Quality",
                "quality",
                {
                    "experts removed": "drop_experts",
                    "by": "drop_score",
                    "zeros": "sparsity",
                    "allocation": "allocation",
                    "method": "method",
                },
                {"perplexity": "perplexity", "parameters": "parameters", "not zero": "nonzero"},
            ),
        ),
        {"perplexity of the dense model": "dense_perplexity"},
        omit=("peer",),
    ),
    "pruning_gpu": Spec(
        "Pruning on a GPU, in the shape of Mixtral-8x7B",
        (
            Table("Time over the least that its operations take", "ratio", {"what": "name"}, RATIO, targets=(CLAIM,)),
            Table(
                "Seconds a layer",
                "part",
                {"model in": "where", "part": "part"},
                {"seconds": spread("seconds"), "layers timed": "layers_timed"},
            ),
            Table(
                "The sweeps",
                "sweep",
                {"model in": "where", "layers": "layers"},
                {
                    "peak, GB": scaled("peak_bytes", 1e-9),
                    "tokens of an expert, fewest": "fewest_tokens",
                    "most": "most_tokens",
                    "sparsity": "sparsity",
                },
            ),
            Table(
                "Rate of a matrix product",
                "matrix rate",
                {"size": "size"},
                {"TFLOP/s": scaled("flops_per_second_median", 1e-12)},
            ),
        ),
        omit=("operations",),
    ),
    "train_moe": Spec(
        "A mixture of experts trained, pruned and distilled",
        (
            Table("Pruned", "pruned", {"method": "method"}, {"perplexity": "perplexity"}, "pattern", "scope"),
            Table(
                "Distilled",
                "distilled",
                {"method": "method", "pattern": "pattern", "rate": "rate"},
                {"pruned": "pruned", "distilled": "perplexity", "gap closed": "gap_closed", "tokens": "tokens"},
            ),
        ),
        {"parameters": "parameters", "of which active": "parameters_active", "dense perplexity": "dense_perplexity"},
    ),
}
