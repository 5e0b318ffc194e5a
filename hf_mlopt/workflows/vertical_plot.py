"""The picture of a vertical simulation: the objective over time, and what each party did."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_COLOURS = {"sync": "#D55E00", "async": "#0072B2"}


def plot_course(results: dict, path: Path) -> None:
    """
    Args:
        results (`dict`): What `vertical_results.json` holds.
        path (`Path`): PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    modes = results["modes"]
    for mode, found in modes.items():
        points = [(seconds, gap) for seconds, gap in found["course"] if gap > 0]
        if points:
            left.plot(*zip(*points, strict=True), label=mode, color=_COLOURS[mode])
    left.axhline(results["gap"], color="#999999", linewidth=0.8, linestyle="--")
    left.set(xlabel="seconds", ylabel="objective above its optimum", yscale="log")
    left.legend(frameon=False, fontsize=8)
    names = list(results["parties"])
    for number, (mode, found) in enumerate(modes.items()):
        width = 0.8 / len(modes)
        rates = [found["parties"][name].get("updates_per_second") or 0.0 for name in names]
        places = [place + (number - (len(modes) - 1) / 2) * width for place in range(len(names))]
        right.bar(places, rates, width, color=_COLOURS[mode], label=mode)
    right.set_xticks(range(len(names)), names)
    right.set(xlabel="party", ylabel="updates a second")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    sleeps = ", ".join(f"{seconds:g}" for seconds in results["step_seconds"])
    words = f"{results['algorithm'].upper()}, {len(names)} processes, {results['transport']}, mask {results['mask']}"
    figure.suptitle(f"{words}; a step sleeps {sleeps} s", fontsize=10)
    figure.savefig(path, dpi=150, format="png")
