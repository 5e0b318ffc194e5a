"""Measured results on their way into a card: `model-index`, tables with the dense model beside, `.eval_results/`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub.provenance import is_local_name


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

EVALUATION = "evaluation.json"  # where a pushed directory keeps what its card's results were taken from

# lm-eval task -> (benchmark on the Hub, its task there, metric, questions). The Hub shows `.eval_results/` only for
# data sets that are registered as benchmarks; a run on a part of the questions is none of that benchmark.
_BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match", 1319),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match", 12032),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond", "acc", 198),
}
_OVERLAP = 0.05  # below this, shared boilerplate explains what calibration and evaluation text have in common
_ROW = ("task", "metric", "value", "stderr", "samples", "num_fewshot", "version", "dataset", "split")
_PERPLEXITY = ("perplexity", "tokens", "window", "dataset")


def read_evaluation(path: str | Path) -> dict:
    """
    Reads what `hf-mlopt evaluate --output` wrote.

    Raises:
        InputError: If it is not that, or a field that a card needs is missing; the message names it.
    """
    try:
        evaluation = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it with `hf-mlopt evaluate --output`") from None
    check_evaluation(evaluation, str(path))
    return evaluation


def check_evaluation(evaluation: dict, origin: str) -> None:
    """
    Makes sure that an evaluation holds what a card needs of it.

    Args:
        evaluation (`dict`): What `hf-mlopt evaluate` wrote; the first model is the dense one.
        origin (`str`): Where it comes from, for messages.

    Raises:
        InputError: If fields are missing, it holds one model only, or the dense model lacks a number.
    """
    models = evaluation.get("models") if isinstance(evaluation, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) and "model" in model for model in models):
        raise InputError(f"{origin}: is no evaluation, it has no list `models`; write it with `hf-mlopt evaluate`")
    if len(models) < 2:
        raise InputError(
            f"{origin}: holds {len(models)} model; a card shows the dense model beside every number, so evaluate both "
            "in one call: hf-mlopt evaluate DENSE PRUNED ..."
        )
    for number, model in enumerate(models):
        place = f"{origin}: models[{number}]"
        for index, row in enumerate(model.get("results") or []):
            _require(row, _ROW, f"{place}.results[{index}]")
        if model.get("perplexity"):
            _require(model["perplexity"], _PERPLEXITY, f"{place}.perplexity")
        _require_same_as_dense(models[0], model, origin)
    if any(model.get("results") for model in models) and not evaluation.get("lm_eval"):
        raise InputError(f"{origin}: misses lm_eval, the version its tasks were run with")


def _require(record: dict, fields: tuple[str, ...], place: str) -> None:
    missing = [field for field in fields if field not in record]
    if missing:
        raise InputError(f"{place} misses {', '.join(missing)}; run `hf-mlopt evaluate` again")
    value = record.get("value", record.get("perplexity"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{place}: its value is {value!r}, which no card can state; evaluate again")


def _require_same_as_dense(dense: dict, model: dict, origin: str) -> None:
    held = {_key(row): row for row in dense.get("results") or []}
    for row in model.get("results") or []:
        if _key(row) not in held:
            raise InputError(
                f"{origin}: {model['model']} has {row['metric']} of {row['task']}, the dense model has not; "
                "evaluate both in one call"
            )
        other = held[_key(row)]
        for field in ("num_fewshot", "version", "samples"):
            if row[field] != other[field]:
                raise InputError(
                    f"{origin}: {row['task']} was run with {field} {row[field]!r}, for the dense model with "
                    f"{other[field]!r}: these numbers are not comparable; evaluate both in one call"
                )
    if model.get("perplexity") and not dense.get("perplexity"):
        raise InputError(f"{origin}: {model['model']} has a perplexity, the dense model has none; evaluate both")


def _key(row: dict) -> tuple:
    """What makes two numbers comparable; lm-eval's filter picks the answer out of a text, where a task has several."""
    return row["task"], row["metric"], row.get("filter")


def subject(evaluation: dict, name: str) -> int:
    """
    Which model of an evaluation a card is of.

    Args:
        evaluation (`dict`): Checked, see [`check_evaluation`]. What was collected into a card says so in `subject`.
        name (`str`): Repository or directory; of either the last part counts.

    Returns:
        `int`: Its place in `models`, after the first, which is the one compared with.

    Raises:
        ConfigurationError: If none is so called.
    """
    names = [model_name(model["model"]) for model in evaluation["models"]]
    wanted = evaluation.get("subject") or model_name(name)
    found = [index for index, known in enumerate(names) if index and known == wanted]
    if len(found) != 1:
        raise ConfigurationError("model", wanted, f"is not one of the models evaluated: {', '.join(names)}")
    return found[0]


def model_name(name: str) -> str:
    """The last part of a repository's id or of a directory."""
    return Path(name).name


def dataset_name(dataset: str | dict) -> str:
    """What an evaluation calls its data: an id on the Hub, or a bare name."""
    if isinstance(dataset, dict):
        dataset = dataset.get("dataset") or dataset["source"]
    return Path(dataset).name if is_local_name(dataset) else dataset


def comparison(evaluation: dict, name: str) -> dict:
    """
    What a card's tables show: every number of the model with the dense one before it and other models between.

    Returns:
        `dict`: `headings`; `tasks`, rows with `task`, `metric`, `shots`, `version`, `samples`, `dataset` and `cells`
            (value and standard error by heading, or None); `perplexity`, a row as [`perplexity_row`] makes it, or
            None; `lm_eval`.
    """
    models, own = evaluation["models"], subject(evaluation, name)
    order = [0, *(index for index in range(1, len(models)) if index != own), own]
    names = [model_name(models[index]["model"]) for index in order]
    held = [{_key(row): row for row in models[index].get("results") or []} for index in order]
    tasks = [
        {
            **{key: row[key] for key in ("task", "metric", "version", "samples")},
            "shots": row["num_fewshot"],
            "dataset": dataset_name(row["dataset"]),
            "cells": [rows.get(key) for rows in held],
        }
        for key, row in held[-1].items()
    ]
    found, row = [models[index].get("perplexity") for index in order], None
    if found[-1]:
        values = [each and each["perplexity"] for each in found]
        of = found[-1]["dataset"]
        row = perplexity_row(
            dataset_name(of), of.get("split"), found[-1]["window"], found[-1]["tokens"], values,
            found[-1].get("calibration_overlap"),
        )  # fmt: skip
    headings = ["dense", *names[1:-1], "this model"]
    return {"headings": headings, "tasks": tasks, "perplexity": row, "lm_eval": evaluation.get("lm_eval")}


def perplexity_row(
    dataset: str, split: str | None, window: int, tokens: int, values: list, overlap: float | None = None
) -> dict:
    """One line of a table of perplexities; `values` go from the dense model to the one the card is of."""
    overlap = overlap if (overlap or 0) > _OVERLAP else None
    return {
        "dataset": dataset,
        "split": split,
        "window": window,
        "tokens": tokens,
        "values": values,
        "overlap": overlap,
    }


def report_tables(report: dict, stages: tuple[str, ...]) -> list[dict]:
    """
    The perplexities that a run put into its report.

    Args:
        report (`dict`): Of pruning or distillation.
        stages (`tuple[str]`): Keys of its rows, from `dense` to what the run made.
    """
    rows = [
        perplexity_row(
            row["dataset"], row["split"], row["window"], row["tokens"], [row[stage] for stage in stages],
            row.get("overlap"),
        )
        for row in report.get("evaluation") or []
    ]  # fmt: skip
    return [{"headings": [*stages[:-1], "this model"], "rows": rows}] if rows else []


def all_tables(tables: list[dict], found: dict | None) -> list[dict]:
    """Tables of perplexities of a report and of an evaluation; what the latter measured again is taken from there."""
    if not found or not found["perplexity"]:
        return tables
    row = found["perplexity"]
    again = ("dataset", "split", "window")
    kept = [
        {**table, "rows": left}
        for table in tables
        if (left := [each for each in table["rows"] if any(each[key] != row[key] for key in again)])
    ]
    return [*kept, {"headings": found["headings"], "rows": [row]}]


def perplexity_results(tables: list[dict]) -> "list[EvalResult]":
    """Perplexities as entries of `model-index`; the metric's name gives the dense model's."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row["split"],
            metric_type="perplexity",
            metric_name=f"perplexity, windows of {row['window']} tokens (dense model: {row['values'][0]:.2f})",
            metric_value=round(row["values"][-1], 4),
        )
        for table in tables
        for row in table["rows"]
    ]


def task_results(evaluation: dict, name: str) -> "list[EvalResult]":
    """
    The tasks of an evaluation as entries of `model-index`, values as they were measured.

    Entries of one data set are told apart by its configuration; where none is named, the task stands there.
    """
    from huggingface_hub import EvalResult

    models = evaluation["models"]
    dense = {_key(row): row["value"] for row in models[0].get("results") or []}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_name(row["dataset"]),
            dataset_name=row["task"],
            dataset_config=row.get("dataset_config") or row["task"],
            dataset_split=row["split"],
            metric_type=row["metric"],
            metric_name=_setting(row, evaluation["lm_eval"])
            + f", standard error {_number(row['stderr'])} (dense model: {dense[_key(row)]:.4f})",
            metric_value=row["value"],
        )
        for row in models[subject(evaluation, name)].get("results") or []
    ]


def _number(value: float | None) -> str:
    return "not given" if value is None else f"{value:.4f}"


def _setting(row: dict, lm_eval: str) -> str:
    return f"{row['metric']}, {row['num_fewshot']}-shot, lm-eval {lm_eval}, task version {row['version']}"


def eval_results_files(evaluation: dict, name: str) -> dict[str, str]:
    """
    The files of `.eval_results/`, for those results that are of a benchmark on the Hub, whole and by its metric.

    Args:
        evaluation (`dict`): Checked, see [`check_evaluation`].
        name (`str`): Repository or directory of the model.

    Returns:
        `dict[str, str]`: Path in the repository -> YAML. Values are per cent, as those leaderboards show them.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for row in evaluation["models"][subject(evaluation, name)].get("results") or []:
        benchmark, task, metric, questions = _BENCHMARKS.get(row["task"], (None,) * 4)
        if benchmark is None or (row["dataset"], row["metric"], row["samples"]) != (benchmark, metric, questions):
            continue
        entry = EvalResultEntry(
            dataset_id=benchmark,
            task_id=task,
            value=round(100 * row["value"], 4),
            notes=_setting(row, evaluation["lm_eval"]),
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        files.setdefault(f".eval_results/{row['task']}.yaml", text)
    return files


def same_result(left: "EvalResult", right: "EvalResult") -> bool:
    """Whether two entries of `model-index` give the same number of the same measurement; its name is free text."""
    keys = ("dataset_type", "dataset_config", "dataset_split", "metric_type", "metric_value")
    return all(getattr(left, key) == getattr(right, key) for key in keys)
