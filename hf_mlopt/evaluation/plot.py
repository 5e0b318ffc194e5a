"""Several models side by side as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito), with a hatch each so that the bars can be told apart in grey.
_COLOURS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++")


def plot(models: list[dict], path: Path) -> None:
    """
    Draws the accuracies of all models, task by task, and their perplexities, with standard errors.

    Args:
        models (`list[dict]`): `model` (its name), `results` (rows of [`evaluate_tasks`]) and `perplexity` (a record
            with `perplexity` and `stderr`, or None).
        path (`Path`): PNG to write.
    """
    tasks = list(dict.fromkeys(row["task"] for row in models[0]["results"] if row["metric"] == "acc"))
    has_perplexity = models[0]["perplexity"] is not None
    widths = [max(len(tasks), 2)] * bool(tasks) + [2] * has_perplexity
    if not widths:
        return
    figure = Figure(figsize=(2 + 1.1 * sum(widths), 4.5), layout="constrained")
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if tasks:
        axes = panels.pop(0)
        for place, model in enumerate(models):
            rows = {row["task"]: row for row in model["results"] if row["metric"] == "acc"}
            heights = [100 * rows[task]["value"] for task in tasks]
            errors = [100 * (rows[task]["stderr"] or 0) for task in tasks]
            _bars(axes, heights, errors, place, models)
        axes.set_xticks(range(len(tasks)), [task.replace(" (", "\n(") for task in tasks], rotation=30, ha="right")
        axes.set_ylabel("accuracy (%)")
    if has_perplexity:
        axes = panels.pop(0)
        for place, model in enumerate(models):
            record = model["perplexity"]
            _bars(axes, [record["perplexity"]], [record["stderr"] or 0], place, models)
        axes.set_xticks([0], ["perplexity"])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _bars(axes, heights: list[float], errors: list[float], place: int, models: list[dict]) -> None:
    width = 0.8 / len(models)
    places = [index + (place - (len(models) - 1) / 2) * width for index in range(len(heights))]
    colour, hatch = _COLOURS[place % len(_COLOURS)], _HATCHES[place % len(_HATCHES)]
    name = models[place]["model"]
    axes.bar(places, heights, width, yerr=errors, color=colour, hatch=hatch, label=name, edgecolor="white", capsize=2)
