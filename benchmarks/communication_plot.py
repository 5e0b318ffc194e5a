"""The picture of `communication.py`."""

import statistics

from common import Results
from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito), with a marker each so that they can be told apart in grey. By the start of a name;
# the first that fits.
_FAMILIES = {
    "bingrad": ("BinGrad", "#D55E00", "s"),
    "sign": ("sign", "#E69F00", "D"),
    "terngrad": ("TernGrad", "#F0E442", "v"),
    "orq-9-shared": ("ORQ-9, one codebook", "#56B4E9", "o"),
    "orq": ("ORQ", "#0072B2", "o"),
    "qsgd": ("QSGD", "#999999", "^"),
    "linear": ("linear", "#666666", "x"),
    "top-k": ("Top-K", "#CC79A7", "*"),
    "powersgd": ("PowerSGD", "#009E73", "P"),
    "": ("number formats", "#000000", "+"),
}
_LINES = {"none": ":", "classic": "--", "step-ahead": "-", "step-ahead, averaged": "-."}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")


def draw(results: Results) -> None:
    """A line of panels for every kind of row that is there."""
    rows = results.record["rows"]
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    lines = [
        [
            (_error, name, found)
            for name, found in _groups(_last_steps(of.get("error", [])), lambda row: row["source"])
        ],
        [(_codec, name, found) for name, found in _groups(of.get("codec", []), lambda row: row["device"])],
        [(_link, name, found) for name, found in _groups(of.get("link", []), _place)],
        [(_crossover, name, found) for name, found in _groups(of.get("crossover", []), lambda row: row["ranks"])],
        [
            (panel, name, found)
            for name, found in _groups(of.get("quality", []), lambda row: row["task"])
            for panel in (_loss_by_step, _loss_by_bytes)
        ],
    ]
    lines[1] += [(_ratio, "", of["codec-ratio"])] if "codec-ratio" in of else []
    lines = [line for line in lines if line]
    if not lines:
        return
    figure = Figure(figsize=(17, 4.8 * len(lines)), layout="constrained")
    for line, place in zip(lines, figure.subfigures(len(lines), 1, squeeze=False)[:, 0], strict=True):
        for axes, (panel, name, found) in zip(place.subplots(1, len(line), squeeze=False)[0], line, strict=True):
            panel(axes, name, found)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            if panel is _error:
                axes.label_outer()  # all have the same axes
        labels = {}
        for axes in place.axes:
            labels |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        if labels:
            columns = min(len(labels), 8)
            place.legend(labels.values(), labels, frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
    figure.savefig(results.path.with_suffix(".png"), dpi=110)


def _groups(rows: list[dict], key) -> list[tuple]:
    names = dict.fromkeys(key(row) for row in rows)
    return [(name, [row for row in rows if key(row) == name]) for name in names if name is not None]


def _last_steps(rows: list[dict]) -> list[dict]:
    """Distributions, and each model at its last step."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["source"]] = max(last.get(row["source"], 0), row.get("step", 0))
    return [row for row in rows if row.get("step", 0) == last[row["source"]]]


def _place(row: dict) -> str | None:
    if row["bandwidth"] not in (1e8, 1e9):
        return None  # only for the crossover
    rate = "100 Mbit/s" if row["bandwidth"] == 1e8 else "1 Gbit/s"
    return f"{row['ranks']} ranks, {rate}, {row['network']}"


def _family(codec: str) -> tuple[str, str, str]:
    return next(family for start, family in _FAMILIES.items() if codec.startswith(start))


def _error(axes, source: str, rows: list[dict]) -> None:
    """Mean over the seeds, against bits; a tick below where the levels could be better."""
    for codec, found in _groups(rows, lambda row: row["codec"]):
        if codec in ("bf16", "fp8"):
            continue  # far to the right, and down
        label, colour, marker = _family(codec)
        bits, error = found[0]["bits"], statistics.mean(row["error"] for row in found)
        axes.plot(bits, error, marker, color=colour, linestyle="", label=label, markersize=6)
        if codec.startswith(("orq", "bingrad")):
            optimum = [row["optimum"] for row in found if row["optimum"]]
            axes.plot(bits, statistics.mean(optimum), "_", color="black", linestyle="", label="least of any levels")
    bits = [number / 4 for number in range(2, 21)]
    axes.plot(bits, [4.0**-number for number in bits], color="0.6", linewidth=1, label="2^(-2 bits), for Gaussian")
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_ylim(0.01, 10)
    axes.set(title=source, yscale="log", xlabel="bits per element", ylabel="squared error / squared norm")


def _codec(axes, device: str, rows: list[dict]) -> None:
    for offset, part, colour in ((0.2, "encode", "#0072B2"), (-0.2, "decode", "#999999")):
        at = [place + offset for place in range(len(rows))]
        axes.barh(at, [row[f"{part}_per_second"] for row in rows[::-1]], 0.38, color=colour, label=part)
    copied = statistics.median(row["copy_bytes_per_second"] for row in rows) / 8
    axes.axvline(copied, color="black", linestyle=":", label="a copy of float32")
    axes.set_yticks(range(len(rows)), [row["codec"] for row in rows[::-1]], fontsize=7)
    axes.set(title=f"codecs, {device}, {rows[0]['elements']:,} elements", xscale="log", xlabel="elements per second")


def _ratio(axes, _, rows: list[dict]) -> None:
    """Median and range over the pairs."""
    for place, row in enumerate(rows[::-1]):
        middle, low, high = (row[f"ratio_{key}"] for key in ("median", "min", "max"))
        axes.plot([low, high], [place] * 2, color="#0072B2")
        axes.plot(middle, place, "o", color="#0072B2")
        if row["claim_at_most"]:
            axes.plot([row["claim_at_most"]] * 2, [place - 0.4, place + 0.4], color="black", linestyle=":")
    names = [f"{row['codec']} / {row['baseline']}, {row['part']}" for row in rows[::-1]]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set(title="time against evenly spaced 4-bit codes; dotted: at most", xlabel="ratio")


def _link(axes, place: str, rows: list[dict]) -> None:
    """Median and range of a step."""
    for number, row in enumerate(rows[::-1]):
        if "error" in row:
            axes.text(0, number, " did not run", va="center", fontsize=7)
            continue
        middle, low, high = (row[f"step_seconds_{key}"] for key in ("median", "min", "max"))
        label, colour, _ = _family(row["codec"])
        spread = [[middle - low], [high - middle]]
        axes.barh(number, middle, 0.7, xerr=spread, color=colour, ecolor="0.4", label=label)
        if row["codec"] == "bf16":
            axes.axvline(middle, color="black", linestyle=":")
    axes.set_yticks(range(len(rows)), [row["codec"] for row in rows[::-1]], fontsize=7)
    axes.set(title=place, xlabel="seconds per step; dotted: bfloat16")


def _crossover(axes, ranks: int, rows: list[dict]) -> None:
    points = {
        "measured": ("#D55E00", "s"),
        "predicted": ("#0072B2", "o"),
        "predicted_with_hiding": ("#56B4E9", "o"),
    }
    for place, row in enumerate(rows[::-1]):
        for key, (colour, marker) in points.items():
            if row.get(key):
                label = key.replace("_", " ")
                axes.plot(row[key], place, marker, color=colour, linestyle="", label=label)
        if row["measured"] is None:
            axes.text(3e8, place + 0.15, f"measured: {row['beyond']}", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(rows)), [row["codec"] for row in rows[::-1]])
    axes.set(xlim=(5e7, 2e10), ylim=(-0.5, len(rows) - 0.5))
    axes.set(title=f"pays against bfloat16 below, {ranks} ranks", xscale="log", xlabel="bandwidth, bit/s")


def _loss_by_step(axes, task: str, rows: list[dict]) -> None:
    _losses(axes, rows, lambda row, step: step)
    axes.set(title=task, xlabel="steps", ylabel="loss on the test part")


def _loss_by_bytes(axes, task: str, rows: list[dict]) -> None:
    _losses(axes, rows, lambda row, step: step * row["bytes_per_step"])
    axes.set(title=task, xscale="log", xlabel="bytes that a rank sends, after the warm-up", ylabel="loss")


def _losses(axes, rows: list[dict], place) -> None:
    """Mean over the seeds that did not diverge."""
    rows = [row for row in rows if row["loss"] is not None]
    colours = dict(zip(dict.fromkeys(row["codec"] for row in rows), _COLOURS, strict=False))
    for mode, found in _groups(rows, lambda row: row["mode"]):
        curves = [dict(map(tuple, row.get("curve") or row["train_curve"])) for row in found]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        losses = [statistics.mean(curve[step] for curve in curves) for step in steps]
        feedback = mode.partition(" / ")[2] or "none"
        style = {"color": colours.get(found[0]["codec"], "black"), "linestyle": _LINES.get(feedback, "-")}
        axes.plot([place(found[0], step) for step in steps], losses, label=mode, **style)
    if rows:  # a run that nearly diverged would hide the others
        ends = sorted(row["loss"] for row in rows)
        axes.set_ylim(ends[0] - 0.05 * ends[0], 1.6 * statistics.median(ends))
