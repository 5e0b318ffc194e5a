"""The picture of a training run: loss, and what the held-out data say, over the steps."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_TRAIN, _HELD_OUT = "#999999", "#0072B2"


def plot_training(results: dict, path: Path, title: str) -> None:
    """
    Draws the log of a run.

    Args:
        results (`dict`): What `train_results.json` holds.
        path (`Path`): PNG to write.
        title (`str`): Above the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _line(left, results["log"], "loss", "training", _TRAIN)
    _line(left, results["log"], "eval_loss", "held out", _HELD_OUT)
    left.set(xlabel="step", ylabel="loss (nats)")
    metric = "eval_accuracy" if results["task"] == "image-classification" else "eval_perplexity"
    _line(right, results["log"], metric, "held out", _HELD_OUT)
    right.set(xlabel="step", ylabel=metric.removeprefix("eval_"))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _line(axes, rows: list[dict], key: str, label: str, colour: str) -> None:
    # Of two values at one step the later one holds: the last evaluation follows the last step.
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    if points:
        marker = "o" if len(points) < 30 else None
        axes.plot(list(points), list(points.values()), color=colour, label=label, marker=marker, markersize=3)
