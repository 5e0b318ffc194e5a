"""The picture of `optimizers.py`."""

import statistics

from common import Results
from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito), with a marker each so that they can be told apart in grey.
_POINTS = {"x": ("#0072B2", "o"), "w": ("#D55E00", "s"), "y": ("#999999", "^")}
_MEMBERS = {
    "fedavg": ("#999999", "x"),
    "fedavg-lm-z": ("#56B4E9", "v"),
    "fedavg-sm": ("#E69F00", "D"),
    "fedavg-slm-z": ("#009E73", "^"),
    "slowmo": ("#F0E442", "P"),
    "diloco": ("#CC79A7", "*"),
    "domo 0.6": ("#D55E00", "s"),
    "domo-s 0.6": ("#0072B2", "o"),
}
_GREYS = ("0.85", "0.65", "0.45", "0.25")


def draw(results: Results) -> None:
    """A line of panels each for quality by task, accuracy by round and the cost of a step, where there are rows."""
    rows = results.record["rows"]
    lines = []
    for panel, kind, key in ((_quality, "quality", "task"), (_rounds, "rounds", "split"), (_step, "step", "device")):
        found = [row for row in rows if row["kind"] == kind]
        names = list(dict.fromkeys(row[key] for row in found))
        if names:
            lines.append([(panel, name, [row for row in found if row[key] == name]) for name in names])
    if not lines:
        return
    figure = Figure(figsize=(15, 4.6 * len(lines)), layout="constrained")
    for line, place in zip(lines, figure.subfigures(len(lines), 1, squeeze=False)[:, 0], strict=True):
        for axes, (panel, name, found) in zip(place.subplots(1, len(line), squeeze=False)[0], line, strict=True):
            panel(axes, name, found)
            axes.spines[["top", "right"]].set_visible(False)
        labels = place.axes[0].get_legend_handles_labels()
        place.legend(*labels, frameon=False, fontsize=8, ncols=len(labels[0]), loc="outside lower center")
    figure.savefig(results.path.with_suffix(".png"), dpi=130)


def _quality(axes, task: str, rows: list[dict]) -> None:
    """Mean and range over the seeds at each point: full after the last epoch, pale after the first."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row, method in enumerate(reversed(methods)):
        for offset, (point, (colour, marker)) in zip((0.2, 0, -0.2), _POINTS.items(), strict=True):
            for is_last in (False, True):
                of_method = [one for one in rows if one["method"] == method and one["is_last"] == is_last]
                values = [one[point] for one in of_method if one.get(point) is not None]
                if values:
                    label = f"{point}, {'last' if is_last else 'first'} epoch" if method == "RSGD" else None
                    style = {"color": colour, "alpha": 1 if is_last else 0.35}
                    axes.plot([min(values), max(values)], [row + offset] * 2, **style)
                    axes.plot(
                        statistics.mean(values), row + offset, marker, linestyle="", markersize=5, label=label, **style
                    )
    axes.set_yticks(range(len(methods)), reversed(methods))
    metric, seeds = rows[0]["metric"], len({row["seed"] for row in rows})
    if metric == "perplexity":  # of an explored iterate it can be ten times as large
        own = [row.get(row["own"]) for row in rows if row["is_last"]]
        own = [value for value in own if value is not None]
        axes.set_xlim(0.95 * min(own), 2 * statistics.median(own))
    axes.grid(axis="x", color="0.9")
    axes.set(title=task, xlabel=f"{metric} on the test part, {seeds} seed{'s' * (seeds > 1)}")


def _rounds(axes, split: str, rows: list[dict]) -> None:
    """Mean over the seeds, and their range."""
    for member, (colour, marker) in _MEMBERS.items():
        curves = [row["accuracy"] for row in rows if row["member"] == member]
        if not curves:
            continue
        rounds = sorted(curves[0], key=int)  # text, once read from the file
        values = [[curve[key] for curve in curves] for key in rounds]
        numbers = [int(key) for key in rounds]
        axes.plot(numbers, [statistics.mean(some) for some in values], color=colour, marker=marker, label=member)
        axes.fill_between(
            numbers, *zip(*((min(some), max(some)) for some in values), strict=True), color=colour, alpha=0.12
        )
    axes.grid(color="0.9")
    axes.set(title=f"digits, 10 clients, {split}", xlabel="rounds of 10 local steps", ylabel="test accuracy")


def _step(axes, device: str, rows: list[dict]) -> None:
    """Ratio of each optimizer's step to its first baseline, with the range over the pairs."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    first = {name: next(row["baseline"] for row in rows if row["name"] == name) for name in names}
    groups = list(dict.fromkeys((row["size"], row["threads"]) for row in rows))
    for number, (size, threads) in enumerate(groups):
        kept = [row for row in rows if (row["size"], row["threads"]) == (size, threads)]
        kept = [row for row in kept if row["baseline"] == first[row["name"]]]
        at = [place + 0.8 * ((number + 0.5) / len(groups) - 0.5) for place in range(len(kept))]
        middle = [row["ratio_median"] for row in kept]
        below = [row["ratio_median"] - row["ratio_min"] for row in kept]
        above = [row["ratio_max"] - row["ratio_median"] for row in kept]
        style = {"width": 0.75 / len(groups), "color": _GREYS[number % len(_GREYS)], "ecolor": "#D55E00"}
        label = f"{size} parameters, {threads} thread{'s' * (threads > 1)}"
        axes.bar(at, middle, yerr=[below, above], label=label, **style)
    for place, row in enumerate(kept):
        if row["claim_at_most"]:
            axes.plot([place - 0.45, place + 0.45], [row["claim_at_most"]] * 2, color="black", linestyle=":")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, 1.5 * max(row["ratio_median"] for row in rows))  # of a disturbed pair the range is far larger
    axes.set_xticks(range(len(names)), [f"{name}\n/ {first[name]}" for name in names], fontsize=8)
    axes.set(title=f"a step, {device}; dotted: at most", ylabel="time of a step / that of the baseline")
