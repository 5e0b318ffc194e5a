"""A plan of a distillation as a table in a terminal."""

from typing import TYPE_CHECKING

from hf_mlopt.planning.table import bytes_text, count_text


if TYPE_CHECKING:
    from hf_mlopt.planning.distillation import DistillationPlan
    from hf_mlopt.planning.ways import Way


_VERDICTS = {True: "fits", False: "does not fit", None: ""}


def as_table(plan: "DistillationPlan") -> str:
    """
    The plan as text, at most 100 columns wide but for long names: what each way takes and whether it fits, what that
    is made of, and what stands against the one that is asked for.
    """
    model, run = plan.model, plan.run
    lines = [
        f"{model['source']}: {model['model_type']}, {model['layers']} layers ({model['moe_layers']} with "
        f"{model['experts']} experts, top-{model['top_k']}), {count_text(model['parameters'])} parameters, "
        f"{model['dtype']}",
        f"{run['mode']}, {run['samples']} + {run['eval_samples']} windows of {run['sequence_length']} tokens, "
        f"{run['batch_size']} a step and process, {count_text(run['trained_parameters'])} weights trained",
        "",
        *_ways(plan),
        "",
        *_parts(plan.ways),
        "",
        *_disk(plan),
    ]
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    lines += ["", *(f"conflict: {conflict}" for conflict in plan.conflicts)] if plan.conflicts else []
    verdict = "would run"
    if plan.conflicts:
        verdict = f"would stop: {len(plan.conflicts)} conflict{'s' * (len(plan.conflicts) > 1)}"
    return "\n".join([*lines, "", f"hf-mlopt distill {verdict}."])


def _ways(plan: "DistillationPlan") -> list[str]:
    ways = plan.ways
    wide = max(len(way.label) for way in ways)
    known = next((way.gpu_available for way in ways if way.gpu_available), None)
    heading = f"GB per GPU{'' if known is None else f', of {known / 1e9:.0f}'}"
    lines = [f"{'':<{wide + 5}}  {heading:>18}  {'GB of memory':>12}"]
    for number, way in enumerate(ways, 1):
        of_gpu = _gigabytes(way.gpu.total if way.gpu is not None else 0)
        mark = ">" if way.label == plan.asked else " "
        row = f"{mark} {number}  {way.label:<{wide}}  {of_gpu:>18}  {_gigabytes(way.host_bytes):>12}"
        lines.append(f"{row}  {_VERDICTS[way.fits]}".rstrip())
    return lines


def _parts(ways: "list[Way]") -> list[str]:
    """GB of every part, a column for each way."""
    names = list(dict.fromkeys(name for way in ways for name, size in way.peak.parts.items() if size))
    wide = max(map(len, names))
    lines = [f"{'GB, by number':<{wide}}" + "".join(f"{number:>9}" for number in range(1, len(ways) + 1))]
    for name in names:
        sizes = [way.peak.parts.get(name, 0) for way in ways]
        lines.append(f"{name:<{wide}}" + "".join(f"{_gigabytes(size):>9}" for size in sizes))
    moments = dict.fromkeys(way.peak.moment for way in ways)
    for moment in moments:
        numbers = [str(number) for number, way in enumerate(ways, 1) if way.peak.moment == moment]
        lines.append(f"{', '.join(numbers)}: {moment}")
    return lines


def _gigabytes(size: int) -> str:
    digits = 2 if size >= 1e9 else 3
    return f"{size / 1e9:.{digits}f}" if size else "-"


def _disk(plan: "DistillationPlan") -> list[str]:
    words = {
        "output": "disk for the output",
        "beside": "disk beside it, to go on from",
        "states": "disk for the states of the windows",
    }
    rows = [(words[name], bytes_text(size)) for name, size in plan.disk_bytes.items() if size]
    wide = max(len(name) for name, _ in rows)
    return [f"{name:<{wide}}  {size:>10}" for name, size in rows]
