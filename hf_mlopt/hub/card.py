"""Model cards from what a run measured."""

import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import median

from hf_mlopt.errors import InputError
from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.hub.results import (
    all_tables,
    check_evaluation,
    comparison,
    perplexity_results,
    report_tables,
    task_results,
)
from hf_mlopt.resources import resource_dir


_PAPERS = "https://huggingface.co/papers"
# Method -> its name with a link, and what ranks the weights.
_METHODS = {
    "magnitude": ("magnitude pruning", "their absolute value"),
    "wanda": (f"[Wanda]({_PAPERS}/2306.11695)", "|weight| times the norm of its input over the routed tokens"),
    "moe-pruner": (
        f"[MoE-Pruner]({_PAPERS}/2410.12013)",
        "|weight| times the norm of its input, each routed token weighted by the router's weight for the expert",
    ),
    "ria": (
        "[RIA](https://openreview.net/forum?id=Tr0lPx9woF)",
        "|weight| relative to its row and column, times the square root of the norm of its input",
    ),
    "sparsegpt": (
        f"[SparseGPT]({_PAPERS}/2301.00774)",
        "the error that removal adds to the output; the weights that stay are updated to make up for it",
    ),
    "sparsegpt-gated": (
        f"[SparseGPT]({_PAPERS}/2301.00774) on tokens weighted by the router",
        "the error that removal adds to the output, each routed token weighted by the router's weight for the expert; "
        "the weights that stay are updated to make up for it",
    ),
}
_NEEDED = (
    *("method", "pattern", "sparsity", "scope", "propagate", "model.source", "layers", "seconds"),
    *("totals.parameters", "totals.pruned_parameters", "totals.zeros"),
    *("totals.sparsity_of_scope", "totals.sparsity_of_model"),
    *("environment.hf_mlopt", "environment.transformers", "environment.torch", "environment.python"),
    "environment.machine",
)
_ABSENT = object()
_LISTED_LAYERS = 12  # a card names so many layers with starved experts; pruning_report.json has them all


def render_card(template: str, data: dict, card_data: dict) -> str:
    """
    Fills in a card template of `model_cards/`.

    Args:
        template (`str`): Name of the template, without `.md`.
        data (`dict`): What the template reads; a name it needs and does not get is an error.
        card_data (`dict`): Arguments of [`~huggingface_hub.ModelCardData`]; `None` values are left out.

    Returns:
        `str`: Markdown with a YAML header that [`~huggingface_hub.ModelCard`] reads back.
    """
    # ModelCard.from_template renders undefined names as nothing and cannot trim the lines of its tags.
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(resource_dir("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "count": _count, "duration": _duration, "gigabytes": _gigabytes}
    header = ModelCardData(**card_data).to_yaml()
    content = environment.get_template(f"{template}.md").render(card_data=header, **data)
    return str(ModelCard(content))


def pruning_card(
    report: dict, name: str, *, command: str | None = None, license: str | None = None, results: dict | None = None
) -> str:
    """
    The card of a pruned model. It states what the report holds; a section without data is left out.

    Args:
        report (`dict`): `PruningReport.to_dict()`. Rows of its list `evaluation`, if any, hold `dataset`, `split`,
            `window`, `tokens` and the perplexities `dense` and `pruned`, both measured in this run.
        name (`str`): Repository of the pruned model, or its directory, of which the card shows the last part.
        command (`str`, *optional*): Command that wrote it.
        license (`str`, *optional*): License of the original, as the Hub spells it.
        results (`dict`, *optional*): What `hf-mlopt evaluate` wrote about the dense model and this one.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        InputError: If the report or the results lack what the card has to state.
    """
    sections = pruning_sections(report)
    base_model = hub_id(report["model"]["source"])
    prunes = _prunes(report)
    tags = ["mixture-of-experts", "pruning", *(["sparse", report["method"]] if prunes else []), "hf_mlopt"]
    data = {**sections, "base": base_link(report["model"]["source"]), "command": command}
    return finished_card(
        "pruned", data, report_tables(report, ("dense", "pruned")), name, license, results,
        base_model=base_model, tags=tags, datasets=hub_datasets(report.get("calibration")),
    )  # fmt: skip


def finished_card(
    template: str, data: dict, tables: list[dict], name: str, license: str | None, results: dict | None, **card_data
) -> str:
    """
    What all cards of models have in common: names, and measured results in tables and header.

    Args:
        template (`str`), data (`dict`): As in [`render_card`].
        tables (`list[dict]`): Perplexities from the reports, see [`~hub.results.report_tables`].
        name (`str`), license (`str`, *optional*), results (`dict`, *optional*): As in [`pruning_card`].
        **card_data: The other arguments of [`~huggingface_hub.ModelCardData`].
    """
    name = Path(name).name if is_local_name(name) else name
    found = None
    if results is not None:
        check_evaluation(results, "results")
        found = comparison(results, name)
    tables = all_tables(tables, found)
    measured = perplexity_results(tables) + (task_results(results, name) if found else [])
    header = {
        "library_name": "transformers",
        "license": license,
        "pipeline_tag": "text-generation",
        "eval_results": measured or None,
        "model_name": name.split("/")[-1] if measured else None,  # belongs to the results
    }
    tasks = found if found and found["tasks"] else None
    shown = {"name": name, "license": license, "tables": tables, "tasks": tasks}
    return render_card(template, data | shown, card_data | header)


def require_fields(report: dict, fields: tuple[str, ...], file: str) -> None:
    """
    Makes sure that a report has what a card states of it. `a.b` stands for a field inside a field.

    Raises:
        InputError: Names every field that is missing.
    """
    missing = []
    for field in fields:
        place = report
        for key in field.split("."):
            place = place.get(key, _ABSENT) if isinstance(place, dict) else _ABSENT
        if place is _ABSENT:
            missing.append(field)
    if missing:
        raise InputError(f"{file}: misses {', '.join(missing)}, which its card states; run the command again")


def hub_id(source: str | None) -> str | None:
    """The source if the Hub resolves it; a directory's name, as reports hold it, has no slash."""
    return source if "/" in (source or "") else None


def base_link(source: str | None) -> str | None:
    """How a card's text names the original."""
    return f"[{source}](https://huggingface.co/{source})" if hub_id(source) else source


def hub_datasets(*sources: dict | None) -> list[str] | None:
    """Ids of the data sets on the Hub among some records of provenance."""
    found = [source["dataset"] for source in sources if source and source.get("dataset")]
    return list(dict.fromkeys(found)) or None


def pruning_sections(report: dict) -> dict:
    """What the parts of a card that tell of pruning read; `InputError` if the report lacks it."""
    require_fields(report, _NEEDED, "pruning_report.json")
    method, ranking = _METHODS.get(report["method"], (report["method"], None))
    return {
        "report": report,
        "method": method,
        "ranking": ranking,
        "pattern": _pattern(report),
        "projections": _projections(report["layers"]),
        "experts": _experts(report["layers"]),
        "coverage": _coverage(report["layers"]),
        "calibration": report.get("calibration") or {},
    }


def _prunes(report: dict) -> bool:
    return report["pattern"] is not None or report["sparsity"] is not None


def _experts(layers: list[dict]) -> dict | None:
    """How many experts of a layer stay of how many, and which; None if none was removed."""
    shrunk = [layer for layer in layers if layer.get("kept_experts")]
    if not shrunk:
        return None
    first = shrunk[0]
    return {"kept": len(first["kept_experts"]), "all": len(first["expert_scores"]), "layers": shrunk}


def _pattern(report: dict) -> str | None:
    if not _prunes(report):
        return None
    if report["pattern"]:
        kept, group = map(int, report["pattern"].split(":"))
        return f"{group - kept} of every {group} consecutive inputs of a row ({report['pattern']})"
    by_expert = {"load": " on average over the experts of a layer", "owl": " on average over the layers"}
    return f"{_percent(report['sparsity'])} of every row{by_expert.get(report.get('allocation'), '')}"


def _projections(layers: list[dict]) -> list[dict]:
    """Totals over layers and experts, one row per kind of matrix."""
    totals = defaultdict(lambda: {"tensors": 0, "weights": 0, "zeros": 0.0})
    for tensor in (tensor for layer in layers for tensor in layer["tensors"]):
        # "model.layers.3.mlp.experts.5.w1.weight" and "model.layers.0.mlp.experts.w1[2]" are both "mlp.experts.w1"
        kind = re.sub(r"^.*?layers\.\d+\.|\.\d+(?=\.|$)|\[\d+\]|\.weight$", "", tensor["name"])
        weights = math.prod(tensor["shape"])
        totals[kind]["tensors"] += 1
        totals[kind]["weights"] += weights
        totals[kind]["zeros"] += weights * tensor["sparsity"]
    return [{"name": kind, "sparsity": row["zeros"] / row["weights"], **row} for kind, row in totals.items()]


def _coverage(layers: list[dict]) -> dict | None:
    """How many calibration tokens the experts saw, and which saw too few; None if nothing was counted."""
    tokens = [count for layer in layers for count in layer.get("tokens_per_expert") or []]
    if not tokens:
        return None
    starved = [layer for layer in layers if layer.get("uncovered")]
    return {
        "experts": len(tokens),
        "fewest": min(tokens),
        "median": round(median(tokens)),
        "most": max(tokens),
        "num_starved": sum(len(layer["uncovered"]) for layer in starved),
        "starved": starved[:_LISTED_LAYERS],
        "more_layers": len(starved[_LISTED_LAYERS:]),
    }


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _count(number: float) -> str:
    return f"{round(number):,}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
