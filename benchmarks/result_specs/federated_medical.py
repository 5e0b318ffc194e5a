"""FedSM and Auto-FedRL."""

from result_tables import Spec, Table, Target, last, with_deviation


# Dice that the centralised run must reach with every seed, for the others to be measured by it.
STRONG_CENTRALISED = 0.81


def _is_super(row: dict) -> bool:
    return row["model"].startswith("super")


def _by_site(record: dict) -> list[dict]:
    return [
        {"method": row["method"], "model": row["model"], "site": site, "dice": dice[0]}
        for row in record["rows"]
        if row.get("kind") == "nuclei summary"
        for site, dice in row["dice"].items()
    ]


def _tuned(metric: str, kind: str) -> Table:
    return Table(
        f"Auto-FedRL: {metric} after the last round",
        f"{kind} summary",
        {"method": "method", "rounds": "rounds"},
        {
            metric.partition(" ")[0]: with_deviation("accuracy"),
            "behind the best fixed rate": with_deviation("regret"),
            "rounds to 90 % of its figure on held-out rows": lambda row: [
                "never" if rounds is None else rounds for rounds in row["rounds_to_target"]
            ],
            "seeds": "seeds",
        },
    )


SPECS = {
    "federated_medical": Spec(
        "Federated segmentation, and hyper-parameters that tune themselves",
        (
            Table(
                "Nuclei of five sites: Dice, mean over sites",
                "nuclei summary",
                {"method": "method", "model": "model"},
                {
                    "Dice": with_deviation("dice", "mean"),
                    "gap to centralised closed": with_deviation("gap_closed"),
                    "Dice of the unseen site": with_deviation("unseen"),
                    "selector is right": with_deviation("selector_accuracy"),
                    "rate": "rate",
                    "rounds": "rounds",
                    "seeds": "seeds",
                },
                targets=(
                    Target(lambda row: row["gap_closed"][0], at_least=lambda row: 0.6 if _is_super(row) else None),
                ),
            ),
            Table(
                "Nuclei: Dice site by site",
                _by_site,
                {"method": "method", "model": "model"},
                {"Dice": "dice"},
                across="site",
            ),
            Table(
                "Nuclei: the centralised run of every seed",
                "nuclei",
                {"seed": "seed", "rounds": "rounds"},
                {"Dice": "headline"},
                where=lambda row: row.get("method") == "centralised",
                targets=(Target("headline", at_least=STRONG_CENTRALISED),),
            ),
            Table(
                "One distribution at all sites: Dice of FedSM beyond that of FedAvg",
                "shared summary",
                {"model": "model"},
                {
                    "FedAvg": with_deviation("fedavg"),
                    "beyond FedAvg": with_deviation("beyond_fedavg"),
                    "worst seed": "worst",
                    "seeds": "seeds",
                },
                targets=(Target("worst", at_least=-0.02),),
            ),
            Table(
                "Trained without a site, judged there",
                "leave one out summary",
                {"without": "without"},
                {"Dice": "dice", "beyond the global model": "beyond_global"},
            ),
            Table("Pull of the personal models", "pull summary", {"pull": "pull"}, {"Dice": "dice"}),
            Table(
                "Threshold of the selector",
                "threshold summary",
                {"selector": "selector", "threshold": "threshold"},
                {"Dice": with_deviation("dice"), "of the unseen site": with_deviation("unseen"), "seeds": "seeds"},
            ),
            _tuned("accuracy on CIFAR", "auto_fedrl"),
            _tuned("Dice on the nuclei", "auto_fedrl on nuclei"),
            Table(
                "Auto-FedRL: windows of rewards",
                "window",
                {"method": "method", "rounds": "rounds"},
                {"accuracy": last("accuracies")},
            ),
            Table(
                "Time of a round beyond local training",
                "overhead",
                {"method": "method", "evaluates": "evaluates"},
                {"share": "beyond_local", "seconds a round": "round_seconds"},
                targets=(
                    Target("beyond_local", at_most=lambda row: None if row["method"].startswith("fixed") else 0.03),
                ),
            ),
            Table(
                "Bytes a site and round",
                "bytes",
                {"method": "method", "selector": "selector"},
                {
                    "first, down": "first_down",
                    "first, up": "first_up",
                    "later, down": "later_down",
                    "later, up": "later_up",
                },
            ),
        ),
        omit=("nuclei tuning", "shared", "pull", "leave one out", "auto_fedrl", "auto_fedrl on nuclei"),
    ),
}
