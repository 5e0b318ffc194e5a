"""The picture of a federated run: losses, and what each site finds, over the rounds."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_TRAIN, _MEAN, _SERVER, _SITE = "#999999", "#0072B2", "#D55E00", "#56B4E9"
_FEW = 12  # sites with a line of their own


def plot_rounds(results: dict, path: Path) -> None:
    """
    Draws the rounds of a run.

    Args:
        results (`dict`): What `federated_results.json` holds.
        path (`Path`): PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds = results["rounds"]
    _line(left, {row["round"] + 1: row["train_loss"] for row in rounds}, "training, at the sites", _TRAIN)
    _line(left, _evaluated(rounds, "eval_loss"), "held out, mean over sites", _MEAN)
    _line(left, _served(rounds, "server_loss"), "held out, server", _SERVER)
    left.set(xlabel="round", ylabel="loss (nats)")
    metric = "loss" if results["task"] == "causal-lm" else "accuracy"
    sites = sorted({site for row in rounds for site in row.get("evaluation", {}).get("sites", {})})
    for number, site in enumerate(sites if len(sites) <= _FEW else []):
        label = "single sites" if number == 0 else None
        _line(right, _evaluated(rounds, f"eval_{metric}", site), label, _SITE, linewidth=0.8, marker=None)
    _line(right, _evaluated(rounds, f"eval_{metric}"), "mean over sites", _MEAN)
    _line(right, _served(rounds, f"server_{metric}"), "server", _SERVER)
    right.set(xlabel="round", ylabel=metric)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{results['model']}, {results['algorithm']['name']}, {len(results['sites'])} sites", fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _evaluated(rounds: list[dict], metric: str, site: str | None = None) -> dict[int, float]:
    found = {row["round"] + 1: row.get("evaluation", {}) for row in rounds}
    if site is not None:
        found = {round: evaluation.get("sites", {}).get(site, {}) for round, evaluation in found.items()}
    return {round: evaluation[metric] for round, evaluation in found.items() if metric in evaluation}


def _served(rounds: list[dict], metric: str) -> dict[int, float]:
    return {row["round"] + 1: row["server"][metric] for row in rounds if metric in (row.get("server") or {})}


def _line(axes, points: dict[int, float | None], label: str | None, colour: str, marker="o", **style) -> None:
    points = {round: value for round, value in points.items() if value is not None}
    if points:
        marker = marker if len(points) < 30 else None
        axes.plot(list(points), list(points.values()), color=colour, label=label, marker=marker, markersize=3, **style)
