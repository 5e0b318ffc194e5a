"""`hf-mlopt evaluate`: perplexity and lm-eval tasks of one or several checkpoints, side by side."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.data.overlap import overlap
from hf_mlopt.data.text import load_text, tokenize_corpus
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import Checkpoint, environment, resolve_checkpoint
from hf_mlopt.workflows.loading import (
    architecture_errors,
    choose_device,
    context_length,
    launched_processes,
    load_model,
    load_tokenizer,
)


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from hf_mlopt.evaluation import LoadedTasks

# Below this, shared boilerplate explains what the two texts have in common.
_OVERLAP_WARNING = 0.05
# Reports beside a checkpoint that tell which text made it what it is.
_SEEN_TEXT = (
    ("pruning_report.json", "calibration", "calibration"),
    ("distillation_report.json", "dataset", "distillation"),
)


@dataclass
class EvaluationConfig:
    """
    Evaluation of checkpoints.

    Args:
        models (`list[str]`): Local directories or Hub ids; the others are compared with the first.
        tasks (`str`, *optional*): Tasks with commas between them: names of lm-eval, `moe-pruner-suite` (the nine of
            the paper), or local .json and .jsonl files.
        perplexity (`str`, *optional*): Text to measure perplexity on. `wikitext` (WikiText-2 raw, the papers'
            choice), `embedded` (no network), a local .txt, .jsonl or .parquet file, or a data set on the Hub.
        task_data (`str`, *optional*): Folder of local task files. The names in `tasks` then mean files there, such
            as arc_easy.jsonl, and no network is needed.
        include_path (`str`, *optional*): Folder with more tasks in lm-eval's YAML.
        write_tasks (`str`, *optional*): Folder to write the local tasks to as YAML, for lm_eval --include_path.
        num_fewshot (`int`, *optional*): Examples before each question. By default what the task says, or 0.
        limit (`float`, *optional*): Only so many documents of each task; below 1, that share of them.
        apply_chat_template (`bool`, *optional*, defaults to `False`): Whether to put the tasks' prompts into the chat
            template of the tokenizer.
        split (`str`, *optional*, defaults to `"test"`): For perplexity: split of a data set or of the embedded corpus.
        window (`int`, *optional*): For perplexity: tokens per window. By default 2048, or the model's context if that
            is shorter.
        max_windows (`int`, *optional*): For perplexity: measure on this many windows only, from the start.
        batch_size (`int`, *optional*, defaults to 8): Windows or requests per forward pass.
        device (`str`, *optional*, defaults to `"auto"`): `auto` is the first GPU, else the CPU.
        parallelize (`bool`, *optional*, defaults to `False`): Whether to spread the layers of a model that fits no
            single GPU over all of them, and over the CPU's memory if it must be. Not under `accelerate launch`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run modeling code of the checkpoints.
        output (`str`, *optional*): JSON file to write the result to, with a plot (.png) beside it.
    """

    models: list[str] = field(default_factory=list)
    tasks: str | None = None
    perplexity: str | None = None
    task_data: str | None = None
    include_path: str | None = None
    write_tasks: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    split: str = "test"
    window: int | None = None
    max_windows: int | None = None
    batch_size: int = 8
    device: str = "auto"
    parallelize: bool = False
    trust_remote_code: bool = False
    output: str | None = None

    def __post_init__(self):
        if not self.models:
            raise ConfigurationError("models", self.models, "is needed")
        if not self.tasks and not self.perplexity:
            raise ConfigurationError("perplexity", None, "is needed, or tasks, or both; for instance embedded")
        for name in ("task_data", "include_path", "write_tasks", "num_fewshot", "limit"):
            if getattr(self, name) is not None and not self.tasks:
                raise ConfigurationError(name, getattr(self, name), "says how to run tasks, but tasks names none")
        for name in ("window", "max_windows"):
            if getattr(self, name) is not None and not self.perplexity:
                raise ConfigurationError(name, getattr(self, name), "is for perplexity, but perplexity names no text")
        for name, least in (("window", 2), ("max_windows", 1), ("batch_size", 1), ("num_fewshot", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigurationError(name, getattr(self, name), f"must be at least {least}")
        if self.parallelize and self.device != "auto":
            raise ConfigurationError("device", self.device, "leave it out: parallelize chooses the devices")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise ConfigurationError("limit", self.limit, "must be a number of documents, or a share between 0 and 1")


@dataclass
class _Subject:
    """A checkpoint with all that is known of it before its weights are loaded."""

    name: str
    checkpoint: Checkpoint
    tokenizer: "PreTrainedTokenizerBase"
    token_ids: "torch.LongTensor | None" = None
    window: int | None = None
    overlap: float | None = None


def evaluate_models(config: EvaluationConfig) -> dict | None:
    """
    Measures checkpoints one after the other. Whatever can be refused is refused before any weights are loaded.

    Under `accelerate launch` every process holds the model and takes its share of the documents and windows.

    Returns:
        `dict`: `models`, a list of `model` (its name), `source`, `results` (a row a task and metric, from
        [`~evaluation.evaluate_tasks`], with `recovery`), `perplexity` (a record, or None) and `average` (or None);
        `missing_tasks` of the suite; `environment`; `lm_eval`, its version. None in all processes but the first.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0  # before any process group, and before the first one writes
    output = _check_outputs(config) if is_first else None
    tasks = None
    if config.tasks:
        from hf_mlopt.evaluation.harness import check_examples, load_tasks

        tasks = load_tasks(config.tasks, config.task_data, config.include_path)
        check_examples(tasks, config.num_fewshot)
    subjects, dataset = _subjects(config)
    with launched_processes(config.device) as own_device:
        if config.parallelize and own_device is not None:
            raise ConfigurationError(
                "parallelize", True, "one process must have all GPUs: leave accelerate launch out"
            )
        if is_first and config.write_tasks:
            from hf_mlopt.evaluation import write_tasks

            write_tasks(tasks.selection.local, config.write_tasks)
        models = [_measure(subject, config, tasks, dataset, own_device) for subject in subjects]
    if not is_first:
        return None
    record = _record(models, tasks)
    if output is not None:
        from hf_mlopt.evaluation.plot import plot

        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(models, output.with_suffix(".png"))
    return record


def _check_outputs(config: EvaluationConfig) -> Path | None:
    if not config.output:
        return None
    output = Path(config.output)
    if output.suffix == ".png":
        raise ConfigurationError("output", config.output, "is the JSON file; the plot is written beside it as .png")
    for path in (output, output.with_suffix(".png")):
        if path.exists():
            raise ConfigurationError("output", str(path), "exists already; name a new file")
    existing = next(parent for parent in output.expanduser().resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError("output", config.output, f"cannot be written: {existing} takes no files")
    return output


def _subjects(config: EvaluationConfig) -> tuple[list[_Subject], dict | None]:
    """All checkpoints, each with the evaluation text in its own tokens, and the record of that text."""
    from transformers import AutoConfig

    from hf_mlopt.evaluation.perplexity import check_windows

    choose_device(config.device)  # refuses one that is not there
    subjects = []
    for model, name in zip(config.models, distinct_names(config.models), strict=True):
        checkpoint = resolve_checkpoint(model)
        tokenizer = load_tokenizer(checkpoint, config.trust_remote_code)
        if tokenizer is None:
            raise InputError(f"model={checkpoint.name!r} has no tokenizer; save one beside the weights.")
        if config.apply_chat_template and tokenizer.chat_template is None:
            raise ConfigurationError("apply_chat_template", True, f"the tokenizer of {name} has no chat template")
        subjects.append(_Subject(name, checkpoint, tokenizer))
    if not config.perplexity:
        return subjects, None
    documents, dataset = load_text(config.perplexity, config.split)
    for subject in subjects:
        checkpoint = subject.checkpoint
        token_ids = tokenize_corpus(documents, subject.tokenizer)
        subject.overlap = _calibration_overlap(subject.name, checkpoint.directory, token_ids)
        with architecture_errors(checkpoint):
            model_config = AutoConfig.from_pretrained(
                checkpoint.name, revision=checkpoint.revision, trust_remote_code=config.trust_remote_code
            )
        context = context_length(model_config)
        subject.window = window = config.window or min(2048, context or 2048)
        if context is not None and window > context:
            raise ConfigurationError("window", window, f"is longer than the model's context of {context} tokens")
        subject.token_ids = token_ids[: window * config.max_windows] if config.max_windows else token_ids
        check_windows(len(token_ids), window)
    return subjects, dataset


def distinct_names(models: list[str]) -> list[str]:
    """
    The last part of each path or Hub id, and as many parts before it as it takes to tell them apart.

    Raises:
        InputError: If a model is given twice.
    """
    paths = [Path(model).expanduser().resolve() if Path(model).is_dir() else Path(model) for model in models]
    for path, model in zip(paths, models, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"models: {model!r} is given twice")
    names = [path.name for path in paths]
    for count in range(2, max(len(path.parts) for path in paths) + 1):
        repeated = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.parts[-count:]) if name in repeated else name
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def _measure(
    subject: _Subject,
    config: EvaluationConfig,
    tasks: "LoadedTasks | None",
    dataset: dict | None,
    own_device: "torch.device | None",
) -> dict:
    from hf_mlopt.evaluation import evaluate_tasks, perplexity

    distributed = own_device is not None
    if config.parallelize:
        model = load_model(subject.checkpoint, config.trust_remote_code, device_map="auto")
    else:
        device = own_device or choose_device(config.device, subject.checkpoint.weight_bytes or 0)
        model = load_model(subject.checkpoint, config.trust_remote_code).to(device)
    record, rows = None, []
    if config.perplexity:
        found = perplexity(model, subject.token_ids, subject.window, config.batch_size, distributed=distributed)
        record = {**asdict(found), "dataset": dataset, "calibration_overlap": subject.overlap}
    if tasks is not None:
        rows = evaluate_tasks(
            model,
            subject.tokenizer,
            tasks,
            batch_size=config.batch_size,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.apply_chat_template,
            distributed=distributed,
        )
    return {"model": subject.name, "source": subject.checkpoint.name, "results": rows, "perplexity": record}


def _record(models: list[dict], tasks: "LoadedTasks | None") -> dict:
    """Adds to the measurements what follows from them: averages, and what share of the first model's is left."""
    from importlib.metadata import version

    selection = None if tasks is None else tasks.selection
    first = models[0]
    for model in models:
        for row, reference in zip(model["results"], first["results"], strict=True):
            row["recovery"] = recovery(row["value"], reference["value"], row["higher_is_better"])
        if model["perplexity"]:
            values = (entry["perplexity"]["perplexity"] for entry in (model, first))
            model["perplexity"]["recovery"] = recovery(*values, higher_is_better=False)
        model["average"] = _average(model["results"], selection)
        if model["average"]:
            model["average"]["recovery"] = recovery(model["average"]["value"], first["average"]["value"], True)
    return {
        "models": models,
        "missing_tasks": selection.missing if selection else [],
        "environment": environment(),
        "lm_eval": version("lm_eval"),
    }


def recovery(value: float, reference: float, higher_is_better: bool) -> float | None:
    """The share of the reference's quality that is left: the ratio of scores, of losses the other way round."""
    above, below = (value, reference) if higher_is_better else (reference, value)
    return above / below if below else None


def _average(rows: list[dict], selection) -> dict | None:
    """
    The mean accuracy: of the suite, if it was asked for and is complete, or else of the tasks that were named.

    Its standard error is that of a mean of independent measurements.
    """
    accuracies = [row for row in rows if row["metric"] == "acc"]
    if selection is not None and selection.suite:
        if selection.missing:
            return None
        of_suite = set(selection.suite)
        accuracies = [row for row in accuracies if row["task"].partition(" (")[0] in of_suite]
    if len(accuracies) < 2:
        return None
    count, errors = len(accuracies), [row["stderr"] for row in accuracies]
    return {
        "metric": "acc",
        "tasks": [row["task"] for row in accuracies],
        "value": sum(row["value"] for row in accuracies) / count,
        "stderr": None if None in errors else sum(error**2 for error in errors) ** 0.5 / count,
    }


def _calibration_overlap(name: str, directory: Path, token_ids) -> float | None:
    from transformers.utils import logging

    found = []
    for file, key, text in _SEEN_TEXT:
        sketch = _read_report(directory / file).get(key, {}).get("sketch")
        if sketch:
            found.append(overlap([int(number) for number in sketch.split()], token_ids))
            if found[-1] > _OVERLAP_WARNING:
                logging.get_logger(__name__).warning(
                    f"{100 * found[-1]:.0f} % of the {text} text also stands in the evaluation text: this perplexity "
                    f"flatters the model {name}. Evaluate on another text, or read it as a training figure."
                )
    return max(found, default=None)


def _read_report(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again, or remove it") from None
