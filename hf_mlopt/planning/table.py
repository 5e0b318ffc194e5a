"""A plan as a table in a terminal."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_mlopt.planning.plan import Plan


def as_table(plan: "Plan") -> str:
    """
    The plan as text, at most 100 columns wide but for long names: what is done, what it takes, what stands against it.
    """
    model, run = plan.model, plan.run
    lines = [
        f"{model['source']}: {model['model_type']}, {model['layers']} layers ({model['moe_layers']} with "
        f"{model['experts']} experts, top-{model['top_k']}), {count_text(model['parameters'])} parameters, "
        f"{model['dtype']}",
        f"{run['method']} {run['pattern']}, scope {run['scope']}, "
        + (f"{run['samples']} x {run['sequence_length']} calibration tokens" if run["samples"] else "no calibration"),
        "",
    ]
    rows = [("", "amount", "time" if plan.seconds else ""), *_rows(plan)]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"{name:<{wide[0]}}  {amount:>{wide[1]}}  {rest}".rstrip() for name, amount, rest in rows]
    lines += [""] + [f"note: {note}" for note in plan.notes] if plan.notes else []
    if plan.conflicts:
        lines += ["", *(f"conflict: {conflict}" for conflict in plan.conflicts)]
    verdict = "hf-mlopt prune would run."
    if plan.conflicts:
        verdict = f"hf-mlopt prune would stop: {len(plan.conflicts)} conflict{'s' * (len(plan.conflicts) > 1)}."
    return "\n".join([*lines, "", verdict])


def _rows(plan: "Plan"):
    costs, run, seconds = plan.costs, plan.run, plan.seconds or {}
    took = {name: seconds_text(value) for name, value in seconds.items()}
    yield "runs", "streamed" if run["streamed"] else "in memory", run["why"]
    yield "peak memory", bytes_text(plan.peak.total), f"of {bytes_text(plan.available_memory)}, {plan.peak.moment}"
    yield from ((f"  {name}", bytes_text(size), "") for name, size in plan.peak.parts.items() if size)
    if plan.device_peak is not None:
        yield "peak memory of the GPU", bytes_text(plan.device_peak.total), plan.device_peak.moment
        yield from ((f"  {name}", bytes_text(size), "") for name, size in plan.device_peak.parts.items() if size)
    if plan.to_download:
        yield "to download", bytes_text(plan.to_download), ""
    yield "disk for the output", bytes_text(costs.disk_bytes), ""
    if costs.offloaded_bytes:
        yield "disk for the states", bytes_text(costs.offloaded_bytes), ""
    yield "read", bytes_text(costs.read_bytes), took.get("read", "")
    yield "written", bytes_text(costs.written_bytes), took.get("write", "")
    yield "calibration passes", flops_text(costs.forward_flops), took.get("calibrate", "")
    if costs.solve_flops:
        yield "Hessians and updates", flops_text(costs.solve_flops), took.get("solve", "")
    yield "weights scored", count_text(costs.scored_weights), took.get("score", "")
    if seconds:
        yield "all of it", "", f"{took['total']} on {plan.rates['device']} at {flops_text(plan.rates['flops'])}/s"
    result = plan.result
    yield "final size", bytes_text(result["bytes"]), f"{len(plan.files)} files; zeros take as much as other weights"
    yield "  zeros", f"{100 * result['sparsity']:.1f} %", f"of {count_text(result['parameters'])} parameters"
    yield "  packed", bytes_text(result["packed_bytes"]), "with hf-mlopt pack"


def bytes_text(count: float) -> str:
    """`"93.40 GB"`, `"12.3 MB"` or `"4 kB"`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def count_text(count: float) -> str:
    """`"46.70 B"`, `"4.7 M"` or `"512"`."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:.0f}"


def flops_text(flops: float) -> str:
    """Operations, `"13.40 PFLOP"`."""
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops / 1e6:.2f} MFLOP"


def seconds_text(seconds: float) -> str:
    """`"2 h 05 min"`, `"3 min 20 s"` or `"4.1 s"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
