"""The picture of a federated run: losses, and what each site finds, over the rounds."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_TRAIN, _MEAN, _SERVER, _SITE, _PERSONAL = "#999999", "#0072B2", "#D55E00", "#56B4E9", "#009E73"
_MANY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
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
    metric = {"causal-lm": "loss", "segmentation": "dice"}.get(results["task"], "accuracy")
    sites = sorted({site for row in rounds for site in row.get("evaluation", {}).get("sites", {})})
    for number, site in enumerate(sites if len(sites) <= _FEW else []):
        label = "single sites" if number == 0 else None
        _line(right, _evaluated(rounds, f"eval_{metric}", site), label, _SITE, linewidth=0.8, marker=None)
    _line(right, _evaluated(rounds, f"eval_{metric}"), "mean over sites", _MEAN)
    _line(right, _evaluated(rounds, f"eval_personal_{metric}"), "personal models", _PERSONAL)
    _line(right, _served(rounds, f"server_{metric}"), "server", _SERVER)
    right.set(xlabel="round", ylabel=metric)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{results['model']}, {results['algorithm']['name']}, {len(results['sites'])} sites", fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def plot_trace(trace: list[dict], path: Path) -> None:
    """
    Draws what Auto-FedRL had every round train with, and what came of it.

    Args:
        trace (`list[dict]`): `AutoFedRL.trace`.
        path (`Path`): PNG to write.
    """
    common = ("learning_rate", "local_epochs", "local_steps", "server_lr")
    shown = [name for name in common if any(row[name] is not None for row in trace)]
    shown += ["aggregation_weight"] if any(row["aggregation_weight"] for row in trace) else []
    shown += ["eval_loss", "reward"]
    figure = Figure(figsize=(8, 1.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True)
    sites = sorted({row["site"] for row in trace})
    for axes, name in zip(panels, shown, strict=True):
        if name in ("aggregation_weight", "eval_loss"):
            for number, site in enumerate(sites):
                points = {row["round"] + 1: row[name] for row in trace if row["site"] == site}
                _line(axes, points, site if len(sites) <= _FEW else None, _MANY[number % len(_MANY)])
            axes.legend(frameon=False, fontsize=7, ncols=4)
        else:
            _line(axes, {row["round"] + 1: row[name] for row in trace}, None, _MEAN)
        if name == "learning_rate":
            axes.set_yscale("log")
        axes.set_ylabel(name.replace("_", " "), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("round")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
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
