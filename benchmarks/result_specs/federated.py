"""Federated training."""

from result_tables import RATIO, Spec, Table, Target, last, spread


SPECS = {
    "federated": Spec(
        "Federated training",
        (
            Table(
                "Time of a round over that of its local trainings",
                "overhead",
                {"of": "of", "sites": "sites"},
                RATIO,
                targets=(Target("ratio_median", at_most=1.05),),
            ),
            Table(
                "Engines: seconds beyond local training",
                "engines",
                {"engine": "engine", "sites": "sites"},
                {"seconds a round": spread("beyond"), "same bits": "same_bits"},
            ),
            Table(
                "Number of sites",
                "scale",
                {"sites": "sites"},
                {"peak, GB": "peak_gigabytes", "seconds": "seconds"},
            ),
            Table(
                "Beside Flower's strategies",
                "peers",
                {"algorithm": "algorithm", "peer": "peer", "rounds": "rounds"},
                {
                    "difference of weights, first round": "first_difference",
                    "last round": "last_difference",
                    "time of an aggregation, ours over theirs": "aggregation_ratio",
                },
            ),
            Table(
                "Quality at the best rate",
                "quality summary",
                {"task": "task", "method": "method"},
                {
                    "rate": "rate",
                    "accuracy after the last round": last("accuracy"),
                    "MB a run": "megabytes",
                    "seeds": "seeds",
                },
            ),
            Table(
                "Quality, every run",
                "quality",
                {"task": "task", "method": "method", "rate": "rate"},
                {"accuracy after the last round": last("accuracies"), "of held-out training images": "validation"},
                is_sorted=True,
            ),
        ),
    ),
}
