"""The picture of `federated_medical.py`."""

import statistics
from collections import defaultdict
from functools import partial

from common import Results
from federated_medical_summary import latest
from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
_MARKERS = "osD^vPX*"
_SHOWN_SITES = {
    ("centralised", "global"): "centralised",
    ("FedAvg", "global"): "FedAvg",
    ("local only", "personal"): "local only",
    ("Ditto", "personal"): "Ditto",
    ("FedSM", "personal"): "FedSM, true site",
    ("FedSM", "super, learned"): "FedSM, learned",
    ("FedSM", "super, moments"): "FedSM, moments",
}


def draw(results: Results) -> None:
    """A panel for each part that has rows."""
    by_kind = defaultdict(list)
    for row in results.record["rows"]:
        by_kind[row["kind"]].append(row)
    panels = [
        (panel, by_kind[kind])
        for panel, kind in (
            (_methods, "nuclei"),
            (_sites, "nuclei summary"),
            (_thresholds, "threshold summary"),
            (_pulls, "pull summary"),
            (_left_out, "leave one out summary"),
            (partial(_tuned, metric="accuracy", title="CIFAR subset, eight sites, Dirichlet 0.5"), "auto_fedrl"),
            (partial(_tuned, metric="Dice, mean over sites", title="Nuclei, FedAvg"), "auto_fedrl on nuclei"),
        )
        if by_kind[kind]
    ]
    if not panels:
        return
    num_lines = -(-len(panels) // 3)
    figure = Figure(figsize=(17, 4.8 * num_lines), layout="constrained")
    places = figure.subplots(num_lines, 3, squeeze=False).flat
    for (panel, rows), axes in zip(panels, places, strict=False):
        panel(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(results.path.with_suffix(".png"), dpi=130)


def _methods(axes, rows: list[dict]) -> None:
    """Mean Dice over the five sites: a point a seed, a line at the mean."""
    values = defaultdict(list)
    for row in latest(rows):
        for model, dice in row["dice"].items():
            values[row["method"] if len(row["dice"]) == 1 else f"{row['method']}, {model}"].append(dice["mean"])
    names = sorted(values, key=lambda name: statistics.mean(values[name]))
    for place, name in enumerate(names):
        colour = _COLOURS[1] if name.startswith("FedSM, super") else _COLOURS[0]
        axes.plot(values[name], [place] * len(values[name]), "o", color=colour, alpha=0.6, markersize=5)
        axes.plot(statistics.mean(values[name]), place, "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(f"Dice, mean over five sites, {latest(rows)[0]['rounds']} rounds")
    axes.set_title("Nuclei")


def _sites(axes, rows: list[dict]) -> None:
    shown = [
        (label, row) for key, label in _SHOWN_SITES.items() for row in rows if (row["method"], row["model"]) == key
    ]
    sites = [site for site in rows[0]["dice"] if site != "mean"]
    for number, (label, row) in enumerate(shown):
        shift = 0.1 * (number - (len(shown) - 1) / 2)
        places = [place + shift for place in range(len(sites))]
        style = {"color": _COLOURS[number], "marker": _MARKERS[number], "linestyle": "", "markersize": 5}
        axes.plot(places, [row["dice"][site][0] for site in sites], label=label, **style)
        if row["unseen"]:
            axes.plot(len(sites) + shift, row["unseen"][0], **style)
    axes.set_xticks(range(len(sites) + 1), [*sites, "mixed,\nunseen"], rotation=25, fontsize=8)
    axes.set_ylabel("Dice, mean over seeds")
    axes.set_title("Nuclei by site")
    axes.legend(frameon=False, fontsize=8)


def _thresholds(axes, rows: list[dict]) -> None:
    for number, selector in enumerate(dict.fromkeys(row["selector"] for row in rows)):
        found = [row for row in rows if row["selector"] == selector]
        for key, line in (("dice", "-"), ("unseen", ":")):
            axes.errorbar(
                [row["threshold"] for row in found],
                [row[key][0] for row in found],
                [row[key][1] or 0 for row in found],
                color=_COLOURS[number],
                marker=_MARKERS[number],
                linestyle=line,
                capsize=3,
                label=f"{selector}, {'five sites' if key == 'dice' else 'mixed, unseen'}",
            )
    axes.set_xlabel("threshold (1: the global model always answers)")
    axes.set_ylabel("Dice of the super model")
    axes.set_title("FedSM's threshold")
    axes.legend(frameon=False, fontsize=8)


def _pulls(axes, rows: list[dict]) -> None:
    for number, model in enumerate(rows[0]["dice"]):
        style = {"color": _COLOURS[number], "marker": _MARKERS[number]}
        axes.plot([row["pull"] for row in rows], [row["dice"][model] for row in rows], label=model, **style)
    axes.set_xlabel("pull (own weight; 1: no pull)")
    axes.set_ylabel("Dice, mean over five sites, one seed")
    axes.set_title("FedSM's pull")
    axes.legend(frameon=False, fontsize=8)


def _left_out(axes, rows: list[dict]) -> None:
    for number, model in enumerate(rows[0]["dice"]):
        places = [place + 0.15 * (number - 1) for place in range(len(rows))]
        style = {"color": _COLOURS[number], "marker": _MARKERS[number], "linestyle": ""}
        axes.plot(places, [row["dice"][model] for row in rows], label=model, **style)
    axes.set_xticks(range(len(rows)), [row["without"] for row in rows], rotation=25, fontsize=8)
    axes.set_ylabel("Dice at the site left out, one seed")
    axes.set_title("Trained without a site")
    axes.legend(frameon=False, fontsize=8)


def _tuned(axes, rows: list[dict], metric: str, title: str) -> None:
    """Mean over the seeds by round; a search's begins where its trials end."""
    rows = latest(rows)
    curves = defaultdict(list)
    for row in rows:
        curves[row["method"]].append(row)
    for number, (method, found) in enumerate(curves.items()):
        shift = 3 * found[0]["rounds"] // 8 if method == "random search" else 0
        points = sorted(found[0]["accuracies"], key=int)
        axes.plot(
            [int(point) + shift for point in points],
            [statistics.mean(row["accuracies"][point] for row in found) for point in points],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="--" if method.startswith("fixed") else "-",
            markersize=4,
            label=method,
        )
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"test {metric}")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=7)
