"""What the rows of `federated_medical.py` say together: means over seeds, and the gaps that are closed."""

import statistics
from collections import defaultdict

from common import Results
from federated_medical_policies import NUM_TRIED


# Largest Dice that the super model may lose against FedAvg where all sites have one distribution.
SHARED_MARGIN = 0.02
_TARGET = 0.9  # of the accuracy that the best fixed rate ends with


def tuned_rates(results: Results) -> dict[str, float]:
    """Method to the rate that is best on the validation images."""
    rows = latest([row for row in results.record["rows"] if row["kind"] == "nuclei tuning"])
    return {row["method"]: row["rate"] for row in sorted(rows, key=lambda row: row["headline"])}


def summarise(results: Results) -> None:
    """Puts the rows of kind `... summary` in place of those there are."""
    rows = [row for row in results.record["rows"] if not row["kind"].endswith("summary")]
    results.record["rows"] = rows
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    for add in (_nuclei, _thresholds, _pulls, _leave_one_out, _shared):
        for row in add(by_kind):
            results.add(**row)
    for row in _auto_fedrl(by_kind["auto_fedrl"], by_kind["window"]):
        results.add(kind="auto_fedrl summary", **row)
    for row in _auto_fedrl(by_kind["auto_fedrl on nuclei"], []):
        results.add(kind="auto_fedrl on nuclei summary", **row)


def mean_and_std(values: list[float]) -> list[float | None]:
    """`[mean, standard deviation]`; of one value there is no deviation."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]


def latest(rows: list[dict]) -> list[dict]:
    """Those of the most rounds: rows of a shorter plan may stand beside them."""
    most = max((row["rounds"] for row in rows), default=None)
    return [row for row in rows if row["rounds"] == most]


def _nuclei(by_kind: dict[str, list[dict]]):
    rows = latest(by_kind["nuclei"])
    ends = {
        method: {row["seed"]: row["headline"] for row in rows if row["method"] == method}
        for method in ("FedAvg", "centralised")
    }
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        for model in of_method[0]["dice"]:
            found = {row["seed"]: row["dice"][model] for row in of_method}
            closed = [
                (dice["mean"] - ends["FedAvg"][seed]) / (ends["centralised"][seed] - ends["FedAvg"][seed])
                for seed, dice in found.items()
                if seed in ends["FedAvg"] and seed in ends["centralised"]
            ]
            unseen = [row["unseen"]["mixed"][model] for row in of_method if model in row["unseen"].get("mixed", {})]
            selector = model.removeprefix("super, ")
            accuracy = [row["selector_accuracy"][selector] for row in of_method if model.startswith("super")]
            yield {
                "kind": "nuclei summary",
                "method": method,
                "model": model,
                "rate": of_method[0]["rate"],
                "rounds": of_method[0]["rounds"],
                "seeds": len(found),
                "dice": {
                    site: mean_and_std([dice[site] for dice in found.values()]) for site in next(iter(found.values()))
                },
                "unseen": mean_and_std(unseen) if unseen else None,
                "gap_closed": mean_and_std(closed) if closed else None,
                "selector_accuracy": mean_and_std(accuracy) if accuracy else None,
            }


def _thresholds(by_kind: dict[str, list[dict]]):
    rows = [row for row in latest(by_kind["nuclei"]) if row["method"] == "FedSM"]
    for selector, found in (rows[0]["thresholds"] if rows else {}).items():
        for threshold in found:
            at = [row["thresholds"][selector][threshold] for row in rows]
            yield {
                "kind": "threshold summary",
                "selector": selector,
                "threshold": float(threshold),
                "seeds": len(at),
                "dice": mean_and_std([one["mean"] for one in at]),
                "unseen": mean_and_std([one["mixed"] for one in at]),
            }


def _pulls(by_kind: dict[str, list[dict]]):
    rows = latest(by_kind["pull"])
    if not rows:
        return
    same = [
        {**row, "pull": 0.7}
        for row in by_kind["nuclei"]
        if row["method"] == "FedSM" and all(row[name] == rows[0][name] for name in ("rate", "rounds", "seed"))
    ]
    for row in sorted([*rows, *same], key=lambda row: row["pull"]):
        dice = {model: found["mean"] for model, found in row["dice"].items()}
        yield {"kind": "pull summary", "pull": row["pull"], "dice": dice}


def _leave_one_out(by_kind: dict[str, list[dict]]):
    for row in latest(by_kind["leave one out"]):
        dice = row["unseen"][row["without"]]
        gained = {model: value - dice["global"] for model, value in dice.items() if model != "global"}
        yield {"kind": "leave one out summary", "without": row["without"], "dice": dice, "beyond_global": gained}


def _shared(by_kind: dict[str, list[dict]]):
    rows = {(row["method"], row["seed"]): row["dice"] for row in latest(by_kind["shared"])}
    seeds = sorted(seed for method, seed in rows if method == "FedSM" and ("FedAvg", seed) in rows)
    for model in ("super, learned", "super, moments") if seeds else ():
        less = [rows["FedSM", s][model]["mean"] - rows["FedAvg", s]["global"]["mean"] for s in seeds]
        yield {
            "kind": "shared summary",
            "model": model,
            "seeds": len(seeds),
            "fedavg": mean_and_std([rows["FedAvg", seed]["global"]["mean"] for seed in seeds]),
            "beyond_fedavg": mean_and_std(less),
            "worst": min(less),
            "global_is_fedavg": all(rows["FedSM", s]["global"] == rows["FedAvg", s]["global"] for s in seeds),
            "passes": min(less) >= -SHARED_MARGIN,
        }


def _auto_fedrl(rows: list[dict], windows: list[dict]):
    rows = latest(rows)
    rows += [row for row in windows if rows and row["rounds"] == rows[0]["rounds"]]
    by_method = defaultdict(dict)
    for row in [*rows, *_grids(rows)]:
        by_method[row["method"]][row["seed"]] = row
    fixed = [method for method in by_method if method.startswith("fixed")]
    if not fixed:
        return
    best = max(fixed, key=lambda method: statistics.mean(_final(row) for row in by_method[method].values()))
    for method, found in by_method.items():
        seeds = [seed for seed in found if seed in by_method[best]]
        regret = [_final(by_method[best][seed]) - _final(found[seed]) for seed in seeds]
        # By the accuracy on what sites hold out, which is there for every round.
        reached = [_rounds_to(found[seed], _TARGET * by_method[best][seed]["validation"][-1]) for seed in seeds]
        yield {
            "method": method,
            "is_best_fixed": method == best,
            "rounds": rows[0]["rounds"],
            "seeds": len(found),
            "accuracy": mean_and_std([_final(row) for row in found.values()]),
            "regret": mean_and_std(regret) if regret else None,
            "rounds_to_target": reached,
            "beyond_local": statistics.mean(row["beyond_local"] for row in found.values()),
        }


def _grids(rows: list[dict]) -> list[dict]:
    """
    Search over the grid of fixed rates in as many rounds: each is tried for an eighth, and the best one by the loss on
    what sites hold out goes on for a half. It is what the fixed runs found on their way, for they are the same runs.
    """
    grids = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        tried = [row for row in rows if row["seed"] == seed and row["method"].startswith("fixed")]
        if len(tried) < NUM_TRIED:
            continue
        first = tried[0]["rounds"] // 8
        # A loss that has left the finite numbers is none.
        best = min(tried, key=lambda row: row["validation_loss"][first - 1] or float("inf"))
        end = first + tried[0]["rounds"] // 2
        accuracies = {number: value for number, value in best["accuracies"].items() if int(number) <= end}
        grids.append({**best, "method": "grid", "accuracies": accuracies, "validation": best["validation"][:end]})
    return grids


def _final(row: dict) -> float:
    return row["accuracies"][max(row["accuracies"], key=int)]


def _rounds_to(row: dict, target: float) -> int | None:
    """Rounds spent until the target is reached; those of the settings that a search has dropped count."""
    spent = (NUM_TRIED - 1) * row["rounds"] // 8 if row["method"] in ("grid", "random search") else 0
    return next((spent + number for number, value in enumerate(row["validation"], 1) if value >= target), None)
