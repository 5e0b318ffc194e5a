"""PNG of what `federated.py` has measured."""

from common import Results
from matplotlib.figure import Figure


def draw(results: Results) -> None:
    """Test accuracy after a quarter, half and all of the rounds, a panel a task; peak memory by the sites."""
    rows = results.record["rows"]
    summaries = [row for row in rows if row["kind"] == "quality summary"]
    tasks = list(dict.fromkeys(row["task"] for row in summaries))
    figure = Figure(figsize=(4.5 * (len(tasks) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
    methods = sorted({row["method"] for row in summaries})
    colours = {method: f"C{number}" for number, method in enumerate(methods)}
    for panel, task in zip(axes, tasks, strict=False):
        for row in (row for row in summaries if row["task"] == task):
            rounds = [int(number) for number in row["accuracy"]]
            means, spreads = zip(*row["accuracy"].values(), strict=True)
            label = f"{row['method']} ({row['seeds']} seed{'s' * (row['seeds'] > 1)})"
            spreads = [spread or 0 for spread in spreads]
            panel.errorbar(rounds, means, spreads, marker="o", capsize=3, label=label, color=colours[row["method"]])
        panel.set(title=task, xlabel="rounds", ylabel="test accuracy")
        panel.legend(fontsize=7)
    scale = [row for row in rows if row["kind"] == "scale"]
    axes[-1].plot([row["sites"] for row in scale], [row["peak_gigabytes"] for row in scale], marker="o")
    axes[-1].set(title="10 million parameters", xlabel="sites", ylabel="peak memory, GB", ylim=(0, 1))
    figure.savefig(results.path.with_suffix(".png"), dpi=120)
