"""Model cards from what a run measured."""

import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.resources import resource_dir


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

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


def pruning_card(report: dict, name: str, *, command: str | None = None, license: str | None = None) -> str:
    """
    The card of a pruned model. It states what the report holds; a section without data is left out.

    Args:
        report (`dict`): `PruningReport.to_dict()`. Rows of its list `evaluation`, if any, hold `dataset`, `split`,
            `window`, `tokens` and the perplexities `dense` and `pruned`, both measured in this run.
        name (`str`): Repository of the pruned model, or its directory, of which the card shows the last part.
        command (`str`, *optional*): Command that wrote it.
        license (`str`, *optional*): License of the original, as the Hub spells it.

    Returns:
        `str`: The text of `README.md`.
    """
    name = Path(name).name if is_local_name(name) else name
    model, calibration = report["model"], report.get("calibration") or {}
    evaluation = report.get("evaluation") or []
    # The Hub resolves nothing but its own ids; a directory's name holds no slash.
    base_model = model["source"] if "/" in (model["source"] or "") else None
    prunes = report["pattern"] is not None or report["sparsity"] is not None
    method, ranking = _METHODS.get(report["method"], (report["method"], None))
    card_data = {
        "base_model": base_model,
        "library_name": "transformers",
        "license": license,
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "pruning", *(["sparse", report["method"]] if prunes else []), "hf_mlopt"],
        "datasets": [calibration["dataset"]] if calibration.get("dataset") else None,
        "eval_results": [_eval_result(row) for row in evaluation] or None,
        "model_name": name.split("/")[-1] if evaluation else None,  # belongs to the results
    }
    data = {
        "report": report,
        "name": name,
        "command": command,
        "license": license,
        "base": f"[{base_model}](https://huggingface.co/{base_model})" if base_model else model["source"],
        "method": method,
        "ranking": ranking,
        "pattern": _pattern(report),
        "projections": _projections(report["layers"]),
        "experts": _experts(report["layers"]),
        "coverage": _coverage(report["layers"]),
        "calibration": calibration,
        "evaluation": evaluation,
    }
    return render_card("pruned", data, card_data)


def _eval_result(row: dict) -> "EvalResult":
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=row["dataset"],
        dataset_name=row["dataset"],
        dataset_split=row["split"],
        metric_type="perplexity",
        metric_name=f"perplexity, windows of {row['window']} tokens (dense model: {row['dense']:.2f})",
        metric_value=round(row["pruned"], 4),
    )


def _experts(layers: list[dict]) -> dict | None:
    """How many experts of a layer stay of how many, and which; None if none was removed."""
    shrunk = [layer for layer in layers if layer.get("kept_experts")]
    if not shrunk:
        return None
    first = shrunk[0]
    return {"kept": len(first["kept_experts"]), "all": len(first["expert_scores"]), "layers": shrunk}


def _pattern(report: dict) -> str | None:
    if report["pattern"] is None and report["sparsity"] is None:
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
