"""The picture of `distillation.py`."""

import statistics

from common import Results
from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito), with a marker each so that the lines can be told apart in grey.
_STYLES = {
    "layer-wise": ("#D55E00", "s"),
    "end-to-end": ("#0072B2", "o"),
    "end-to-end, experts only": ("#56B4E9", "v"),
    "masked fine-tuning": ("#999999", "x"),
    "logits": ("#009E73", "^"),
    "dense, trained on": ("black", "D"),
}


def draw(results: Results) -> None:
    """What is won back by pattern, and against tokens; a panel without rows is left out."""
    rows = results.record["rows"]
    panels = [
        (panel, found)
        for panel, kind in ((_quality, "quality"), (_curve, "curve"))
        if (found := [row for row in rows if row["kind"] == kind])
    ]
    if not panels:
        return
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (panel, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, found)
        axes.spines[["top", "right"]].set_visible(False)
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, frameon=False, fontsize=8, ncols=len(names[0]), loc="outside lower center")
    figure.savefig(results.path.with_suffix(".png"), dpi=130)


def _quality(axes, rows: list[dict]) -> None:
    """Share of the gap to the dense model that is closed, a mark a seed."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"]))
    methods = [method for method in _STYLES if any(row["method"] == method and row["pattern"] for row in rows)]
    for place, method in enumerate(methods):
        colour, marker = _STYLES[method]
        for group, pattern in enumerate(patterns):
            closed = [100 * row["gap_closed"] for row in rows if (row["method"], row["pattern"]) == (method, pattern)]
            at = group + 0.16 * (place - (len(methods) - 1) / 2)
            axes.bar(at, statistics.mean(closed), 0.14, color=colour, label=method if group == 0 else None)
            axes.plot([at] * len(closed), closed, linestyle="", marker=".", color="black", markersize=4)
    axes.axhline(80, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(patterns)), patterns)
    axes.set(title="by pattern, three seeds", ylabel="gap to the dense model closed (%)")


def _curve(axes, rows: list[dict]) -> None:
    """The same against tokens."""
    for method, (colour, marker) in _STYLES.items():
        points = [(row["tokens"] / 1000, 100 * row["gap_closed"]) for row in rows if row["method"] == method]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, label=method)
    axes.axhline(80, color="black", linestyle=":", linewidth=1)
    axes.set(title="at 50 %, one seed", xlabel="thousand tokens", ylabel="gap to the dense model closed (%)")
