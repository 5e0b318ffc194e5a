"""The picture of a distillation: what its losses and the errors of the experts did."""

from pathlib import Path

from matplotlib.figure import Figure


# Colour-blind safe (Okabe and Ito).
_BEFORE, _AFTER, _HELD_OUT = "#999999", "#0072B2", "#D55E00"
_LOSSES = {
    "ce": ("cross-entropy", "#0072B2"),
    "loss": ("loss", "#999999"),
    "eval_loss": ("loss, held-out text", "#D55E00"),
}
_OF_LAYER = "expert_mse_layer_"


def plot_distillation(report: dict, path: Path, title: str) -> None:
    """
    Draws what a distillation did: by layer where layers are trained one by one, else over the steps.

    Args:
        report (`dict`): What `distillation_report.json` holds.
        path (`Path`): PNG to write.
        title (`str`): Above the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if report["mode"] == "layerwise":
        _errors(left, report["layers"])
        _curves(right, {layer["index"]: layer["curve"] for layer in report["layers"]})
    else:
        _losses(left, report["loss"])
        _curves(right, _curves_of_layers(report["loss"]))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _errors(axes, layers: list[dict]) -> None:
    """Error of the experts per layer, before and after."""
    places = [layer["index"] for layer in layers]
    for key, name, colour, marker in (
        ("mse_before", "before", _BEFORE, "o"),
        ("mse_after", "after", _AFTER, "o"),
        ("eval_mse_before", "before, held out", _BEFORE, "x"),
        ("eval_mse_after", "after, held out", _HELD_OUT, "x"),
    ):
        values = [layer[key] for layer in layers]
        if all(value is not None for value in values):
            axes.plot(places, values, color=colour, marker=marker, linewidth=1, label=name)
    axes.set(xlabel="decoder layer", ylabel="squared error of the experts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _log_scale(axes, [layer[key] for layer in layers for key in ("mse_before", "mse_after")])
    axes.legend(frameon=False, fontsize=8)


def _losses(axes, rows: list[dict]) -> None:
    """Losses over the steps."""
    for key, (name, colour) in _LOSSES.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker="o" if len(points) < 20 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)


def _curves_of_layers(rows: list[dict]) -> dict[int, list[dict]]:
    """The error of each layer over the steps, out of the rows of a log."""
    names = sorted({key for row in rows for key in row if key.startswith(_OF_LAYER)}, key=_layer_of)
    return {
        _layer_of(name): [{"step": row["step"], "mse": row[name]} for row in rows if name in row] for name in names
    }


def _layer_of(name: str) -> int:
    return int(name.removeprefix(_OF_LAYER))


def _curves(axes, curves: dict[int, list[dict]]) -> None:
    """Error of the experts over the steps, a line a layer, from the first layer (dark) to the last (light)."""
    from matplotlib import colormaps

    for place, (index, curve) in enumerate(sorted(curves.items())):
        colour = colormaps["viridis"](0.9 * place / max(len(curves) - 1, 1))
        label = f"layer {index}" if place in (0, len(curves) - 1) or len(curves) <= 8 else None
        axes.plot([row["step"] for row in curve], [row["mse"] for row in curve], color=colour, label=label)
    axes.set(xlabel="step", ylabel="squared error of the experts, training")
    _log_scale(axes, [row["mse"] for curve in curves.values() for row in curve])
    if curves:
        axes.legend(frameon=False, fontsize=8)


def _log_scale(axes, values: list[float]) -> None:
    if values and min(values) > 0:
        axes.set_yscale("log")
