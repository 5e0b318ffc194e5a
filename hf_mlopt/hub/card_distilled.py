"""The card of a model that was distilled after it was pruned."""

from hf_mlopt.hub.card import (
    base_link,
    finished_card,
    hub_datasets,
    hub_id,
    pruning_sections,
    require_fields,
)
from hf_mlopt.hub.results import report_tables


_LISTED_LAYERS = 64  # a card names so many layers; distillation_report.json has them all
_NEEDED = (
    *("mode", "teacher.source", "student.source", "dataset.source", "tokens", "steps", "learning_rate", "trained"),
    *("mask_violations", "seconds", "environment.hf_mlopt", "environment.transformers", "environment.torch"),
    *("environment.python", "environment.machine"),
)
_NO_PRUNING = {"report": None, "pattern": None, "experts": None, "coverage": None, "calibration": {}}
_LOSSES = {
    "loss": "loss (nats per token)",
    "ce": "cross-entropy (nats per token)",
    "expert_mse": "error of the experts",
    "eval_loss": "loss on held-out text (nats per token)",
}


def distillation_card(
    report: dict,
    pruning_report: dict | None,
    name: str,
    *,
    command: str | None = None,
    license: str | None = None,
    results: dict | None = None,
) -> str:
    """
    The card of a distilled model. It states what the reports hold; a section without data is left out.

    Args:
        report (`dict`): What `distillation_report.json` holds. Rows of its list `evaluation`, if any, hold `dataset`,
            `split`, `window`, `tokens` and the perplexities `dense`, `pruned` and `distilled`, measured in one run.
        pruning_report (`dict`, *optional*): That of the student, if hf_mlopt pruned it.
        name (`str`): Repository of the model, or its directory, of which the card shows the last part.
        command (`str`, *optional*): Command that wrote it.
        license (`str`, *optional*): License of the original, as the Hub spells it.
        results (`dict`, *optional*): What `hf-mlopt evaluate` wrote about the dense model, this one and others.

    Returns:
        `str`: The text of `README.md`.

    Raises:
        InputError: If a report or the results lack what the card has to state.
    """
    require_fields(report, _NEEDED, "distillation_report.json")
    sections = pruning_sections(pruning_report) if pruning_report else _NO_PRUNING
    student, teacher = report["student"]["source"], report["teacher"]["source"]
    sources = ((pruning_report or {}).get("model", {}).get("source"), teacher, student)
    base = next((source for source in sources if hub_id(source)), sources[0] or teacher)
    data = {
        **sections,
        "run": report,
        # of the windows some may be held out: those that were trained on
        "text": report["dataset"] | {key: report[key] for key in ("samples", "sequence_length") if report.get(key)},
        "base": base_link(base),
        "teacher": base_link(teacher),
        "student": base_link(student),
        "trained": _trained(report),
        "losses": _losses(report.get("loss") or []),
        "layers": report.get("layers") or [],
        "listed": _LISTED_LAYERS,
        "command": command,
    }
    pruned = ["pruning"] if sections["pattern"] or sections["experts"] else []
    sparse = ["sparse", pruning_report["method"]] if sections["pattern"] else []
    tags = ["mixture-of-experts", "distillation", *pruned, *sparse, "hf_mlopt"]
    return finished_card(
        "distilled",
        data,
        report_tables(report, ("dense", "pruned", "distilled")),
        name,
        license,
        results,
        base_model=hub_id(base),
        tags=tags,
        datasets=hub_datasets(report["dataset"], sections["calibration"]),
    )


def _trained(report: dict) -> str:
    what = "all weights" if report["trained"] == "all" else "the routed experts"
    if report["trained"] != "lora":
        return what
    rank = report.get("lora_rank")
    return f"{what}, by a LoRA {f'of rank {rank} ' if rank else ''}that was merged"


def _losses(course: list[dict]) -> list[dict]:
    """The first and the last value of everything that was logged more than once."""
    found = []
    for key, name in _LOSSES.items():
        rows = [row for row in course if row.get(key) is not None]
        if len(rows) > 1:
            first, last = rows[0], rows[-1]
            found.append(
                {
                    "name": name,
                    "first": first[key],
                    "first_step": first["step"],
                    "last": last[key],
                    "last_step": last["step"],
                }
            )
    return found
