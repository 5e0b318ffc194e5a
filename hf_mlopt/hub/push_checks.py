"""What is looked at before a directory goes to the Hub, as far as its small files tell; and what goes changed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.errors import InputError
from hf_mlopt.hub.card import hub_id
from hf_mlopt.hub.push import PlannedFile
from hf_mlopt.hub.results import (
    EVALUATION,
    comparison,
    perplexity_results,
    read_evaluation,
    report_tables,
    same_result,
    task_results,
)


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

CARD, RECIPE = "README.md", "recipe.yaml"
PRUNING, DISTILLATION = "pruning_report.json", "distillation_report.json"
_CARD_FIELDS = ("library_name", "pipeline_tag", "tags")
# Searched for paths of this machine: what people and this package write. A vocabulary holds any string.
_DOCUMENTS = (".md", ".json", ".yaml", ".yml", ".txt")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_PATH = re.compile(
    r"(?:(?<![\w:/.~@-])|(?<=file://))/(?:[\w.@+-]+/)+[\w.@+-]*\w|\b[A-Za-z]:\\+(?:Users|[\w.-]+\\)[\w.\\-]*"
)
_PRIVATE = ("home", "Users", "root", "tmp", "var", "mnt", "media", "private", "scratch")
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib64", "etc", "dev", "proc", "sys", "opt", "run", "boot")


def read_report(directory: Path, name: str) -> dict | None:
    """
    A JSON report of the directory; None if it has none.

    Raises:
        InputError: If it is not JSON, or no mapping.
    """
    path = directory / name
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again from where it was written") from None
    if not isinstance(report, dict):
        raise InputError(f"{path}: is no report; copy it again from where it was written")
    return report


def check_config(config: dict, directory: Path, pruning: dict | None, distillation: dict | None) -> None:
    """
    Compares `config.json` with the reports beside it.

    Raises:
        InputError: If it orders a loader to misread plain weights, or says otherwise than the reports.
    """
    path = directory / "config.json"
    for key in ("quantization_config", "sparsity_config"):
        if key in config:
            raise InputError(f"{path}: holds {key}, by which loaders would misread plain weights; remove it")
    record = config.get("hf_mlopt") or {}
    made_by_us = record.get("method") not in (None, "mask") or record.get("drop_experts")
    if made_by_us and pruning is None and distillation is None:
        raise InputError(
            f"{path}: says the model was pruned ({record.get('method') or 'experts removed'}), but there is no "
            f"{PRUNING} to say how; copy it from where the model was written"
        )
    if pruning is None or distillation is not None:  # what distillation did is the later record
        return
    for key in ("method", "sparsity", "pattern", "scope"):
        if key in record and record[key] != pruning.get(key):
            raise InputError(
                f"{path}: hf_mlopt.{key} is {record[key]!r}, in {PRUNING} it is {pruning.get(key)!r}: one of them is "
                "of another run; copy both from where the model was written"
            )


def check_card(directory: Path, source: str | None) -> "ModelCard":
    """
    Reads the card and makes sure that the Hub can do with it what it is for.

    Args:
        directory (`Path`): The checkpoint.
        source (`str`, *optional*): The original, as the report or the configuration names it.

    Raises:
        InputError: If there is none, its header cannot be read, or a field is missing.
    """
    from huggingface_hub import ModelCard

    path = directory / CARD
    if not path.is_file():
        raise InputError(f"{path}: is missing; a model without a card says nothing of where it comes from, write one")
    try:
        card = ModelCard.load(path)
    except Exception as error:  # yaml's errors, and ValueErrors of the library
        raise InputError(f"{path}: its header cannot be read ({' '.join(str(error).split())}); mend it") from None
    needed = (*_CARD_FIELDS, "base_model") if hub_id(source) else _CARD_FIELDS
    missing = [field for field in needed if not getattr(card.data, field, None)]
    if missing:
        hint = f" (base_model: {source})" if "base_model" in missing else ""
        raise InputError(f"{path}: its header misses {', '.join(missing)}{hint}; add it")
    if hub_id(source) and source not in (base := card.data.base_model) and source != base:
        raise InputError(f"{path}: base_model is {base!r}, the model was made from {source!r}; correct it")
    return card


def check_results(card: "ModelCard", directory: Path, pruning: dict | None, distillation: dict | None) -> None:
    """
    Makes sure that every result in the card's header was measured, by a record in the directory.

    Raises:
        InputError: Names the result, and what the records hold instead.
    """
    measured: list[EvalResult] = []
    own = pruning if distillation is None else None  # of a distilled model it tells what the student measured
    for report, stages in ((own, ("dense", "pruned")), (distillation, ("dense", "pruned", "distilled"))):
        if report:
            measured += perplexity_results(report_tables(report, stages))
    if (directory / EVALUATION).is_file():
        evaluation = read_evaluation(directory / EVALUATION)
        name = directory.resolve().name
        row = comparison(evaluation, name)["perplexity"]
        measured += task_results(evaluation, name) + perplexity_results([{"rows": [row]}] if row else [])
    for result in card.data.eval_results or []:
        if any(same_result(result, other) for other in measured):
            continue
        found = [
            str(other.metric_value)
            for other in measured
            if (other.dataset_type, other.metric_type) == (result.dataset_type, result.metric_type)
        ]
        instead = f"the records here say {', '.join(found)}" if found else "no record here has it"
        raise InputError(
            f"{directory / CARD}: {result.metric_type} {result.metric_value} on {result.dataset_type} was not "
            f"measured: {instead}; write the card from an evaluation: python hub_scripts/collect_results.py"
        )


def published(
    files: list[PlannedFile], repo: str, known: dict[str, str | None], base: str | None
) -> list[PlannedFile]:
    """
    The files with what is only true on this machine replaced.

    A recipe names the original by its id on the Hub, or by its bare name where it has none; so does the card. The
    card's snippet loads the model from the repository.

    Args:
        files (`list[PlannedFile]`): What goes.
        repo (`str`): Where it goes.
        known (`dict[str, str]`): Keys of a recipe, and what the reports call the models there.
        base (`str`, *optional*): Id of the original on the Hub, from the card.
    """
    texts = {file.path: file.source.read_text(encoding="utf-8") for file in files if file.path in (RECIPE, CARD)}
    names = local_names(texts[RECIPE], known, base) if RECIPE in texts else {}
    if RECIPE in texts:
        texts[RECIPE] = renamed(texts[RECIPE], names)
    for old, new in names.values():
        if is_path(old):  # anything else may be a word of the text
            texts[CARD] = texts[CARD].replace(old, new)
    texts[CARD] = loading_from(texts[CARD], repo)
    return [replace(file, content=texts[file.path].encode("utf-8")) if file.path in texts else file for file in files]


def loading_from(card: str, repo: str) -> str:
    """The text of a card with a snippet that loads the model from a repository."""
    return re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{repo}"', card)


def local_names(recipe: str, known: dict[str, str | None], base: str | None) -> dict[str, tuple[str, str]]:
    """
    What a recipe calls by a name of this machine.

    Returns:
        `dict[str, tuple[str, str]]`: Key -> the name there, and the one for others.

    Raises:
        InputError: If it is no mapping.
    """
    import yaml

    try:
        fields = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise InputError(f"{RECIPE}: not valid YAML: {' '.join(str(error).split())}; copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{RECIPE}: must hold a mapping of field names to values; copy it again")
    found = {}
    for key, value in fields.items():
        called = known.get(key)
        if not isinstance(value, str) or not (is_path(value) or called not in (None, value)):
            continue
        new = called or Path(value).name
        found[key] = (value, base if key == "model" and base and not hub_id(new) else new)
    return found


def renamed(recipe: str, names: dict[str, tuple[str, str]]) -> str:
    """The text of a recipe with some values replaced; everything else stays to the letter."""
    import yaml

    for key, (_, new) in names.items():
        line = yaml.safe_dump({key: new}, allow_unicode=True).rstrip("\n")
        field = rf"^{re.escape(key)}:.*(?:\n[ \t]+.*)*$"
        recipe = re.sub(field, lambda _, line=line: line, recipe, flags=re.MULTILINE)
    return recipe


def is_path(value: str) -> bool:
    """Whether a name can only be a path; a relative one without dots could be an id."""
    return value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:\\", value) is not None


def check_paths(files: list[PlannedFile]) -> None:
    """
    Makes sure that no document names a place on this machine: it helps nobody, and tells more than it should.

    Raises:
        InputError: Names file, line and path.
    """
    for file in files:
        name = Path(file.path).name
        if Path(name).suffix not in _DOCUMENTS or name in _VOCABULARY:
            continue
        raw = file.source.read_bytes() if file.content is None else file.content
        for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), start=1):
            for found in _PATH.findall(line):
                if _is_of_this_machine(found):
                    raise InputError(
                        f"{file.source}:{number}: names a place on this machine, {found}; replace it by a name that "
                        "others can use"
                    )


def _is_of_this_machine(path: str) -> bool:
    first, *rest = path.strip("/").split("/")
    if not path.startswith("/") or first in _PRIVATE:
        return True
    return first not in _SYSTEM and (Path(path).exists() or bool(rest) and Path("/", first, rest[0]).exists())
