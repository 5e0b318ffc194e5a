"""A picture of what the stages of a pipeline did, and when they waited."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
COLOURS = {"F": "#0072B2", "R": "#56B4E9", "B": "#E69F00", "step": "#009E73", "wait": "#DDDDDD"}
LABELS = {"F": "forward", "R": "repeated forward", "B": "backward", "step": "update", "wait": "waiting"}
_SHOWN = 16  # batches of the last stage


def plot_timeline(stages: list[list[tuple]], path: str | Path, title: str) -> None:
    """
    Draws the last batches of every stage as bars. Processes of several machines have clocks of their own, so that
    their rows may be shifted.

    Args:
        stages (`list[list[tuple]]`): Of every stage, in order: start, end (seconds of one clock), kind and batch.
        path (`str` or `Path`): PNG to write.
        title (`str`): Above the picture.
    """
    forwards = [event for event in stages[-1] if event[2] == "F"]
    begin = forwards[-min(_SHOWN, len(forwards))][0] if forwards else 0.0
    end = max((event[1] for events in stages for event in events), default=0.0)
    figure = Figure(figsize=(10, 1 + 0.5 * len(stages)), layout="constrained")
    axes = figure.subplots()
    for k, events in enumerate(stages):
        for kind, colour in COLOURS.items():
            bars = [(e[0] - begin, e[1] - e[0]) for e in events if e[2] == kind and e[1] > begin]
            axes.broken_barh(bars, (k - 0.4, 0.8), facecolors=colour, label=LABELS[kind] if k == 0 else None)
    axes.set(xlim=(0, max(end - begin, 1e-9)), xlabel="seconds", yticks=range(len(stages)))
    axes.set_yticklabels([f"stage {k}" for k in range(len(stages))])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
