"""The picture of `pipeline.py`."""

import statistics

from common import Results
from matplotlib.figure import Figure
from pipeline_quality import MODES


# Colour-blind safe (Okabe and Ito), by the start of a label; the first that fits. Hatched: nothing is recomputed.
_COLOURS = {
    "gpipe": "#999999",
    "1f1b": "#56B4E9",
    "bp": "#000000",
    "one process": "#999999",
    "fr": "#E69F00",
    "lag1": "#0072B2",
    "dsp:": "#CC79A7",
    "dsp": "#D55E00",
}
_LINES = ("-", "--", ":", "-.")


def draw(results: Results) -> None:
    """Speed beside quality, curves and cosines, then stragglers, memory and the real run: what is there of them."""
    rows = results.record["rows"]
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    quality = of.get("quality", [])
    tasks = list(dict.fromkeys(row["task"] for row in quality))
    labels = _labels(of)
    summary = results.record.get("quality_summary", {})
    lines = [
        [(_speed, (labels, of.get("speed")))] * ("speed" in of)
        + [(_distance, (labels, task, summary[task])) for task in tasks],
        [(_curves, (task, [row for row in quality if row["task"] == task])) for task in tasks]
        + [(_cosines, (task, [row for row in quality if row["task"] == task])) for task in tasks],
        [(_stragglers, (of.get("straggler"),))] * ("straggler" in of),
        [(_memory, (of.get("memory"),))] * ("memory" in of) + [(_real, (of.get("real"),))] * ("real" in of),
    ]
    lines = [line for line in lines if line]
    if not lines:
        return
    figure = Figure(figsize=(18, 5 * len(lines)), layout="constrained")
    for line, place in zip(lines, figure.subfigures(len(lines), 1, squeeze=False)[:, 0], strict=True):
        shared = line[0][0] in (_speed, _distance)
        for axes, (panel, values) in zip(
            place.subplots(1, len(line), squeeze=False, sharey=shared)[0], line, strict=True
        ):
            panel(axes, *values)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
        names = {}
        for axes in place.axes:
            names |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        if names:
            columns = min(len(names), 7)
            place.legend(names.values(), names, frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
    figure.savefig(results.path.with_suffix(".png"), dpi=110)


def _labels(of: dict) -> list[str]:
    """From the top: what is timed, with the modes of quality in place; bp first."""
    timed = [row["label"] for row in of.get("speed", [])]
    trained = {row["mode_name"] for row in of.get("quality", [])}
    return [label for label in timed if label not in MODES] + [name for name in MODES if name in {*timed, *trained}]


def _style(label: str) -> dict:
    colour = next(colour for start, colour in _COLOURS.items() if label.startswith(start))
    return {"color": colour, "hatch": "//" if "recompute=no" in label else "", "edgecolor": "white"}


def _colour(label: str) -> str:
    return _style(label)["color"]


def _speed(axes, labels: list[str], rows: list[dict]) -> None:
    """Times as fast as bp; modes that differ only in what costs no time here have the bar of their schedule, pale."""
    by_label = {row["label"]: row for row in rows}
    base = by_label["bp"]["model_of_F"]
    for place, label in enumerate(labels):
        own = label in by_label
        row = by_label.get(label if own else MODES[label].speed_label)
        if row is None:
            continue
        error = [[row["over_bp"] - row["over_bp_min"]], [row["over_bp_max"] - row["over_bp"]]]
        axes.barh(place, row["over_bp"], xerr=error, alpha=1.0 if own else 0.4, **_style(label))
        name = "event model" if place == 0 else None
        axes.plot(base / row["model_of_F"], place, "D", color="black", markerfacecolor="white", label=name)
    axes.set_yticks(range(len(labels)), labels)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.set(xlabel="times as fast as bp", title="emulated stages, K = 4, B = 2F")


def _distance(axes, labels: list[str], task: str, modes: dict) -> None:
    """Loss over that of bp with the same seed: mean, least and largest."""
    for place, label in enumerate(labels):
        entry = modes.get(label, {})
        if "over_bp" in entry:
            middle = 100 * entry["over_bp"]
            error = [[middle - 100 * entry["over_bp_min"]], [100 * entry["over_bp_max"] - middle]]
            axes.errorbar(middle, place, xerr=error, fmt="o", color=_colour(label), capsize=3)
        elif "diverged" in entry:
            axes.text(0, place, " diverged", va="center", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.axvspan(-1, 1, color="0.9", label="within 1 % of bp")
    axes.set(title=f"{task}: held-out loss at equal samples", xlabel="% above bp")
    axes.set_xscale("symlog", linthresh=1)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -2), max(right, 2))
    axes.xaxis.set_major_formatter("{x:g}")


def _curves(axes, task: str, rows: list[dict]) -> None:
    for name, found in _of_modes(rows):
        curves = [row["train_curve"] for row in found if "train_curve" in row]
        if curves:
            values = [statistics.mean(points) for points in zip(*curves, strict=True)]
            share = [(number + 1) / len(values) for number in range(len(values))]
            axes.plot(share, values, label=name, color=_colour(name), linestyle=_line(name))
    axes.set(title=f"{task}: training loss", xlabel="share of the samples", yscale="log")


def _cosines(axes, task: str, rows: list[dict]) -> None:
    for name, found in _of_modes(rows):
        points = [list(row["cosines"].values()) for row in found if row.get("cosines")]
        if points:
            blocks = range(len(points[0][0]))
            values = [statistics.mean(update[k] for run in points for update in run) for k in blocks]
            axes.plot(blocks, values, "o", color=_colour(name), linestyle=_line(name), label=name)
            axes.set_xticks(blocks)
    axes.set(title=f"{task}: gradient · bp's", xlabel="block", ylabel="cosine at the same weights")


def _of_modes(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    found = [(name, [row for row in rows if row["mode_name"] == name]) for name in MODES]
    return [(name, some) for name, some in found if some]


def _line(name: str) -> str:
    """A line for each of a colour."""
    alike = [other for other in MODES if _colour(other) == _colour(name)]
    return _LINES[alike.index(name) % len(_LINES)]


def _stragglers(axes, rows: list[dict]) -> None:
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        found = [row for row in rows if row["label"] == label]
        places = [conditions.index(row["condition"]) + (number - (len(labels) - 1) / 2) * width for row in found]
        middle = [row["of_F"] for row in found]
        low = [row["of_F"] - row["of_F_min"] for row in found]
        high = [row["of_F_max"] - row["of_F"] for row in found]
        axes.bar(places, middle, width, yerr=[low, high], label=label, **_style(label))
        name = "event model" if number == 0 else None
        model = [row["model_of_F"] for row in found]
        axes.plot(places, model, "D", color="black", markerfacecolor="white", markersize=4, linestyle="", label=name)
    axes.set_xticks(range(len(conditions)), conditions)
    axes.set(ylabel="time of a batch, in F", title="stragglers and links")


def _memory(axes, rows: list[dict]) -> None:
    cases = list(dict.fromkeys((row["mode"], row["recompute"]) for row in rows))
    width = 0.8 / len(cases)
    for number, (mode, recompute) in enumerate(cases):
        found = [row for row in rows if (row["mode"], row["recompute"]) == (mode, recompute)]
        label = f"{mode}, recompute=no" if recompute == "no" and mode in ("lag1", "dsp") else mode
        places = [row["stage"] + (number - (len(cases) - 1) / 2) * width for row in found]
        model = [row["model_total_bytes"] / 2**20 for row in found]
        if "total_bytes" in found[0]:
            axes.bar(places, [row["total_bytes"] / 2**20 for row in found], width, label=label, **_style(label))
            axes.plot(places, model, "D", color="black", markerfacecolor="white", markersize=4, linestyle="")
        else:
            style = {"edgecolor": "#009E73" if mode == "pipedream" else "#56B4E9", "fill": False, "linewidth": 1.5}
            axes.bar(places, model, width, label=f"{mode}, formula alone", **style)
    axes.set_xticks(range(1 + max(row["stage"] for row in rows)))
    axes.set(xlabel="stage", ylabel="MiB with weights, gradients and Adam", title="memory; marks are the formula")


def _real(axes, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        ratio = row["over_one_process"]
        error = [[ratio - row["over_one_process_min"]], [row["over_one_process_max"] - ratio]]
        axes.bar(place, ratio, yerr=error, **_style(row["label"]))
    axes.set_xticks(range(len(rows)), [row["label"].replace(", ", "\n") for row in rows])
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set(ylabel="times as fast as one process", title="a small Llama in two stages on two cores, not emulated")
