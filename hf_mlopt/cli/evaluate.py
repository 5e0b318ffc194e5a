"""`hf-mlopt evaluate MODEL [MODEL2 ...] --tasks TASKS --perplexity SOURCE`."""

import argparse
from pathlib import Path

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.evaluate import EvaluationConfig, evaluate_models


HELP = "Measure checkpoints side by side: perplexity as the pruning papers do, and tasks of lm-eval."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="Local directory or Hub id; the first is compared to."
    )
    add_fields(parser, EvaluationConfig, exclude=("models",))


def run(args: argparse.Namespace) -> None:
    config = load_config(EvaluationConfig, overrides=arguments_given(args, EvaluationConfig))
    record = evaluate_models(config)
    if record is None:  # another process prints
        return
    print("\n".join(table(record)))
    print("\n".join(["", *_notes(record, config)]))
    if config.write_tasks:
        print(f"tasks written to {config.write_tasks}, for lm_eval --include_path {config.write_tasks}")
    if config.output:
        print(f"written to {config.output}, plot {Path(config.output).with_suffix('.png')}")


def table(record: dict) -> list[str]:
    """
    A line for each metric, a column for each model, and beside all but the first what is recovered of the first.

    Args:
        record (`dict`): Of [`~workflows.evaluate.evaluate_models`].
    """
    models = record["models"]
    header = [""]
    for model in models:
        header += [model["model"], "recovery"]
    lines = [header]
    if models[0]["perplexity"]:
        lines.append(["perplexity", *_cells([model["perplexity"] for model in models], "perplexity")])
    for rows in zip(*(model["results"] for model in models), strict=True):
        selected = rows[0]["filter"]
        metric = rows[0]["metric"] + (f" ({selected})" if selected != "none" else "")
        lines.append([f"{rows[0]['task']}  {metric}", *_cells(rows, "value")])
    if models[0]["average"]:
        averages = [model["average"] for model in models]
        lines.append([f"average of {len(averages[0]['tasks'])} tasks  acc", *_cells(averages, "value")])
    lines = [line[:2] + line[3:] for line in lines]  # the first model is compared with no other
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]


def _cells(rows: list[dict], key: str) -> list[str]:
    cells = []
    for row in rows:
        # Accuracies in per cent, as papers quote them.
        scale, digits = (100, 2) if row.get("metric", "").startswith("acc") else (1, 3)
        error = "" if row["stderr"] is None else f" ± {scale * row['stderr']:.{digits}f}"
        recovered = "-" if row["recovery"] is None else f"{100 * row['recovery']:.1f} %"
        cells += [f"{scale * row[key]:.{digits}f}{error}", recovered]
    return cells


def _notes(record: dict, config: EvaluationConfig) -> list[str]:
    """What the numbers are, in words."""
    models, notes = record["models"], []
    shapes = {}
    for model in models:
        if model["perplexity"]:
            shape = (model["perplexity"]["windows"], model["perplexity"]["window"])
            shapes.setdefault(shape, []).append(model["model"])
    for (windows, window), names in shapes.items():
        whose = f" ({', '.join(names)})" if len(shapes) > 1 else ""
        notes.append(
            f"perplexity: {config.perplexity}, split {config.split}, {windows} windows of {window} tokens, "
            f"not overlapping, tail dropped{whose}"
        )
    if models[0]["results"]:
        shots = sorted({row["num_fewshot"] for row in models[0]["results"]})
        notes.append(f"tasks: lm-eval {record['lm_eval']}, accuracies in %, {' and '.join(map(str, shots))} examples")
    if config.limit is not None:
        notes.append(f"tasks: limit {config.limit:g}, not whole tasks: these scores are for trying out, not to quote")
    if record["missing_tasks"]:
        notes.append(
            f"missing of moe-pruner-suite: {', '.join(record['missing_tasks'])} (no file in {config.task_data}); "
            "without them there is no average. Add the files, or leave --task-data out to fetch all tasks."
        )
    if len(models) > 1:
        notes.append(
            f"recovery: score / that of {models[0]['model']}; where lower is better, such as perplexity, that of "
            f"{models[0]['model']} / its own. Differences of less than two standard errors are noise."
        )
    return notes
