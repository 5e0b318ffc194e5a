"""The picture of `pruning_scale.py`."""

import statistics

from common import Results
from matplotlib.figure import Figure


def plot(results: Results) -> None:
    """Memory by depth, cost against the peers, quality against what is left; a panel without rows is left out."""
    rows = results.record["rows"]
    panels = [
        (draw, found)
        for draw, kind in ((_depth, "depth"), (_peers, "peer"), (_quality, "quality"))
        if (found := [row for row in rows if row["kind"] == kind])
    ]
    if not panels:
        return
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (draw, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, found)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(results.path.with_suffix(".png"), dpi=130)


def _depth(axes, rows) -> None:
    layers = [str(row["layers"]) for row in rows]
    axes.bar(layers, [row["model_bytes"] / 1e9 for row in rows], color="0.85", label="weights of the model")
    axes.bar(layers, [row["peak_bytes"] / 1e9 for row in rows], color="#0072b2", width=0.5, label="peak memory")
    libraries = [row["peak_of_a_tiny_model"] / 1e9 for row in rows]
    axes.bar(layers, libraries, color="#56b4e9", width=0.5, label="of it, with a tiny model")
    axes.set(title="streamed pruning", xlabel="decoder layers", ylabel="GB")
    axes.legend(frameon=False)


def _peers(axes, rows) -> None:
    wanda = [row for row in rows if row.get("method") == "wanda" and not row.get("finding")]
    for tool in dict.fromkeys(row["tool"] for row in wanda):
        runs = [row for row in wanda if row["tool"] == tool]
        seconds, peaks = ([row[key] for row in runs] for key in ("seconds", "peak_bytes"))
        marker = "o" if tool.startswith("hf_mlopt") else "s"
        place = statistics.median(seconds), statistics.median(peaks) / 1e9
        axes.plot(*place, marker, label=tool)
        axes.plot(seconds, [place[1]] * len(seconds), color="0.6", linewidth=1, zorder=0)
    axes.set(title="Wanda, 50 %, 185 M parameters", xlabel="seconds, whole run", ylabel="peak memory, GB")
    axes.set_xlim(left=0), axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _quality(axes, rows) -> None:
    groups = {
        "removal, reap": lambda row: row.get("drop_score") == "reap" and "sparsity" not in row,
        "removal, reap, and 50 %": lambda row: row.get("drop_score") == "reap" and "sparsity" in row,
        "removal, frequency": lambda row: row.get("drop_score") == "frequency" and "sparsity" not in row,
        "uniform": lambda row: row.get("allocation") == "uniform" and row["method"] == "moe-pruner",
        "load": lambda row: row.get("allocation") == "load" and row["method"] == "moe-pruner",
        "owl": lambda row: row.get("allocation") == "owl" and row["method"] == "moe-pruner",
    }
    for name, belongs in groups.items():
        found = [row for row in rows if belongs(row)]
        by_size = {}
        for row in found:
            by_size.setdefault((row.get("drop_experts"), row.get("sparsity")), []).append(row)
        points = [
            [statistics.median(row[key] for row in same) for key in ("nonzero", "perplexity")]
            for same in by_size.values()
        ]
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set(title="reference model", xlabel="non-zero parameters", ylabel="perplexity", yscale="log")
    axes.legend(frameon=False, fontsize=8)
