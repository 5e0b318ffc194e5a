"""PNG of what `vertical.py` has measured."""

from common import Results
from matplotlib.figure import Figure


def draw(results: Results) -> None:
    """Speed-ups over training in step, and seconds of an epoch by the number of parties."""
    rows = results.record["rows"]
    stragglers = [row for row in rows if row["kind"] == "straggler"]
    epochs = [row for row in rows if row["kind"] == "wire" and row["mask"] == "pairwise" and row["tls"]]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{row['data']}, {row['algorithm']}" for row in stragglers]
    for shift, kind in ((-0.2, "async"), (0.2, "compensated")):
        for place, row in enumerate(stragglers):
            ratios = [a / b for a, b in zip(row["sync"], row[kind], strict=True)]
            colour = "tab:blue" if kind == "async" else "tab:orange"
            left.scatter([place + shift] * len(ratios), ratios, color=colour, s=14, label=None if place else kind)
    left.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    left.set(title="One of 8 parties 3 × slower", ylabel="times as fast as in step, to 1e-3", ylim=(0, None))
    left.legend()
    right.plot([row["parties"] for row in epochs], [row["seconds_per_epoch"] for row in epochs], marker="o")
    right.set(xscale="log", yscale="log", xlabel="parties, all on this machine", ylabel="seconds an epoch")
    right.set_title("100,000 × 330, masks and mTLS")
    figure.savefig(results.path.with_suffix(".png"), dpi=120)
