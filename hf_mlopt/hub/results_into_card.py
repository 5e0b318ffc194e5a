"""An evaluation made into the card of a directory: `README.md`, `evaluation.json` and `.eval_results/`."""

import json
import re
from copy import deepcopy
from pathlib import Path

from hf_mlopt.errors import InputError
from hf_mlopt.hub.card import pruning_card
from hf_mlopt.hub.card_distilled import distillation_card
from hf_mlopt.hub.push_checks import CARD, DISTILLATION, PRUNING, loading_from, read_report
from hf_mlopt.hub.results import (
    EVALUATION,
    check_evaluation,
    dataset_name,
    eval_results_files,
    model_name,
    read_evaluation,
    subject,
)


def collect_results(
    directory: Path, evaluation: dict, *, name: str | None = None, model: str | None = None, overwrite: bool = False
) -> dict[str, str]:
    """
    The files that put measured results into a checkpoint's card.

    The card is written anew from the reports beside it, by the template it came from.

    Args:
        directory (`Path`): Holds the card and the reports; no weights are needed.
        evaluation (`dict`): What `hf-mlopt evaluate` wrote.
        name (`str`, *optional*): What the card calls the model; by default what it calls it now.
        model (`str`, *optional*): Which of the models evaluated it is; by default the one of that name.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a card that was edited by hand.

    Returns:
        `dict[str, str]`: Path -> text.

    Raises:
        InputError: If there is no report, the evaluation lacks something, or the card was edited.
    """
    check_evaluation(evaluation, "results")
    pruning, distillation = read_report(directory, PRUNING), read_report(directory, DISTILLATION)
    if pruning is None and distillation is None:
        raise InputError(f"{directory}: holds no {PRUNING} and no {DISTILLATION}, from which a card is written")
    if not (directory / CARD).is_file():
        raise InputError(f"{directory / CARD}: is missing; take the one that was written with the model")
    text = (directory / CARD).read_text(encoding="utf-8")
    title, license, command = _given(text, directory / CARD)
    earlier = read_evaluation(directory / EVALUATION) if (directory / EVALUATION).is_file() else None
    written = _card(pruning, distillation, title, command, license, earlier)
    if not overwrite and loading_from(text, title).strip() != loading_from(written, title).strip():
        raise InputError(
            f"{directory / CARD}: was edited since it was written, or is of another version; --overwrite replaces it"
        )
    evaluation = _others_can_read(evaluation, model or name or title)
    card = _card(pruning, distillation, name or title, command, license, evaluation)
    return {
        CARD: card,
        EVALUATION: json.dumps(evaluation, indent=1) + "\n",
        **eval_results_files(evaluation, evaluation["subject"]),
    }


def _card(pruning, distillation, name, command, license, evaluation) -> str:
    given = {"command": command, "license": license, "results": evaluation}
    if distillation is None:
        return pruning_card(pruning, name, **given)
    return distillation_card(distillation, pruning, name, **given)


def _given(text: str, path: Path) -> tuple[str, str | None, str | None]:
    """What a card holds that no report does: its title, the license, and the command of its section on reproducing."""
    from huggingface_hub import ModelCard

    title = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    if title is None:
        raise InputError(f"{path}: has no title, so it is no card of hf_mlopt")
    command = re.search(r"^## Reproduce\n+```bash\n(.*?)\n```", text, flags=re.MULTILINE | re.DOTALL)
    return title[1].strip(), ModelCard(text).data.license, command and command[1]


def _others_can_read(evaluation: dict, name: str) -> dict:
    """The evaluation with models and data called by name, not by where they lay; and which model it is about."""
    evaluation = deepcopy(evaluation)
    own = subject(evaluation, name)
    for each in evaluation["models"]:
        each["model"] = model_name(each["model"])
        if each.get("source"):
            each["source"] = dataset_name(each["source"])
        for row in each.get("results") or []:
            row["dataset"] = dataset_name(row["dataset"])
    return evaluation | {"subject": evaluation["models"][own]["model"]}
