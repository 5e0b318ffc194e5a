"""The picture at the end of the demo."""

from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from hf_mlopt.pruning import METHODS


# Colour-blind safe (Okabe and Ito), with a marker each so that the lines can be told apart in grey.
STYLES = {
    "magnitude": ("#999999", "x"),
    "wanda": ("#0072B2", "o"),
    "ria": ("#009E73", "^"),
    "moe-pruner": ("#D55E00", "s"),
    "sparsegpt": ("#CC79A7", "v"),
    "sparsegpt-gated": ("#E69F00", "D"),
}
_LEFT = cycle([("#56B4E9", "P"), ("#F0E442", "*"), ("#000000", "h")])
STYLES |= {method: next(_LEFT) for method in METHODS if method not in STYLES}


def plot(rows: list[dict], dense: float, path: Path, title: str) -> None:
    """
    Draws perplexity against sparsity, a line a method, and 2:4 beside it.

    Args:
        rows (`list[dict]`): `method`, `label`, `sparsity` (requested; None for N:M) and `perplexity`.
        dense (`float`): Perplexity of the unpruned model.
        path (`Path`): PNG to write.
        title (`str`): Above the picture.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    lines, bars = figure.subplots(1, 2, width_ratios=(3, 2), sharey=False)
    for method, (colour, marker) in STYLES.items():
        points = [(row["sparsity"], row["perplexity"]) for row in rows if row["method"] == method and row["sparsity"]]
        if points:
            x, y = zip(*sorted(points), strict=True)
            lines.plot([100 * value for value in x], y, color=colour, marker=marker, label=method)
    lines.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    lines.set(xlabel="sparsity of the experts (%)", ylabel="perplexity, held-out text")
    lines.legend(frameon=False, fontsize=8)
    structured = [row for row in rows if row["label"] == "2:4"]
    for height, row in enumerate(structured):
        colour, marker = STYLES[row["method"]]
        bars.plot([dense, row["perplexity"]], [height, height], color=colour, linewidth=1)
        bars.plot(row["perplexity"], height, color=colour, marker=marker)
    bars.set_yticks(range(len(structured)), [row["method"] for row in structured])
    bars.axvline(dense, color="black", linestyle="--", linewidth=1)
    bars.invert_yaxis()
    bars.set(xlabel="perplexity at 2:4")
    for axes in (lines, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
