"""lm-eval on a loaded model: its own tasks and local ones, in one process or shared between several."""

import difflib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_mlopt import ranks
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.evaluation.tasks import LocalTask, Selection, select_tasks
from hf_mlopt.evaluation.undisturbed import undisturbed


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWSHOT_SEED = 1234  # lm-eval's own default, so that its command line draws the same examples
# They warn of a loaded model, of rows in memory, of another number of examples than a task's own: all meant here.
_TALKATIVE = ("lm_eval.models.huggingface", "lm_eval.api.task")


@dataclass(frozen=True)
class LoadedTasks:
    """
    Tasks that are ready to run, on any number of models.

    Args:
        selection (`Selection`): What they were made from.
        names (`dict[str, LocalTask | str]`): For each row of the result, its name in lm-eval and what it stands for.
        loaded (`dict`): As [`lm_eval.tasks.TaskManager.load`] returns it.
        num_fewshot (`dict[str, int | None]`): Examples that each task asks for by itself.
    """

    selection: Selection
    names: "dict[str, LocalTask | str]"
    loaded: dict
    num_fewshot: dict[str, int | None]


def load_tasks(tasks: str | list[str], task_data: str | None = None, include_path: str | None = None) -> LoadedTasks:
    """
    Finds and loads tasks, with their rows, before any model.

    Args:
        tasks (`str` or `list[str]`): Names and files; as one string, with commas between them.
        task_data (`str`, *optional*): Folder of local task files that the names mean.
        include_path (`str`, *optional*): Folder with more tasks in lm-eval's YAML.

    Raises:
        InputError: As [`~tasks.select_tasks`], and if a name is unknown or the rows of a task cannot be loaded.
    """
    words = [word.strip() for word in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    words = [word for word in words if word]
    if not words:
        raise ConfigurationError("tasks", tasks, "names no task")
    if include_path and task_data:
        raise ConfigurationError("include_path", include_path, "leave out task_data: with it, names are files there")
    selection = select_tasks(words, task_data)
    manager = _manager([task for task in selection.tasks if isinstance(task, str)], include_path)
    names, loaded = {}, {"tasks": {}, "groups": {}, "group_map": {}}
    for task in selection.tasks:
        with _quiet():
            found = manager.load([_in_memory(task)]) if isinstance(task, LocalTask) else _load_known(manager, task)
        for part, content in found.items():
            twice = sorted(set(content) & set(loaded[part]))
            if twice and part == "tasks":
                raise ConfigurationError("tasks", ",".join(words), f"more than one of them contains {twice[0]}")
            loaded[part].update(content)
        if isinstance(task, LocalTask):
            names[task.harness_name] = task
        elif task in found["groups"]:
            names[task] = task
        else:  # a task, or a tag that stands for several
            names.update({name: name for name in found["tasks"]})
    num_fewshot = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
    return LoadedTasks(selection, names, loaded, num_fewshot)


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: LoadedTasks,
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 100_000,
    distributed: bool = False,
) -> list[dict]:
    """
    Runs lm-eval on a model. Nothing else in the process notices: modules keep their mode, generators their state.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        tasks (`LoadedTasks`): From [`load_tasks`].
        batch_size (`int`, *optional*, defaults to 8): Requests per forward pass.
        num_fewshot (`int`, *optional*): Examples before each question. By default what the task says, or 0.
        limit (`float`, *optional*): Only so many documents of each task; below 1, that share of them.
        apply_chat_template (`bool`, *optional*, defaults to `False`): Whether to put prompts into the chat template.
        bootstrap_iters (`int`, *optional*, defaults to 100,000): Resamples for the standard errors that have no
            formula (that of an accuracy has one); with 0 there are no standard errors at all.
        distributed (`bool`, *optional*, defaults to `False`): Whether the processes of the default group, each of
            which holds the whole model, share the documents. All of them must call this, and get the same result.

    Returns:
        `list[dict]`: A row for each task and metric: `task`, `metric`, `filter` (of lm-eval; `none` where it has no
            choice), `value`, `stderr` (None if unknown), `samples`, `num_fewshot`, `version`, `dataset`, `split`,
            `higher_is_better`. Accuracies are in [0, 1].

    Raises:
        InputError: If a task has too few documents for the examples or the processes, or a choice does not fit into
            the model's context.
    """
    check_examples(tasks, num_fewshot)
    for name, task in tasks.loaded["tasks"].items():
        own = tasks.num_fewshot[name]
        asked = num_fewshot if num_fewshot is not None and own != 0 else own  # lm-eval's rule: a task's own 0 stands
        task.set_config("num_fewshot", asked or 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
        if distributed:
            _check_documents(task, limit)
    with _quiet(), undisturbed(model):
        harness = (_SharedLM if distributed else HFLM)(model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = evaluate(
                harness,
                tasks.loaded,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                log_samples=False,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
        except AssertionError as error:  # of the tokens to score, lm-eval's check has no message
            if str(error):
                raise
            raise InputError(
                f"a choice is longer than the model's context of {harness.max_length} tokens, or no token at all"
            ) from error
    rows = None if found is None else [row for name in tasks.names for row in _rows(name, tasks, found)]
    return ranks.from_first(rows) if distributed else rows


def check_examples(tasks: LoadedTasks, num_fewshot: int | None) -> None:
    """Raises `InputError` if a local task has too few rows to give each of them this many others as examples."""
    for task in tasks.selection.local:
        others = len(task.rows) - max(Counter(map(json.dumps, task.rows)).values())
        if num_fewshot is not None and num_fewshot > others:
            raise ConfigurationError(
                "num_fewshot", num_fewshot, f"{task.name} has only {others} other rows to choose from"
            )


class _SharedLM(HFLM):
    """
    `HFLM` over a loaded model that shares the requests with the other ranks.

    `HFLM` itself does so only where it loads the model and sees several GPUs: on the CPU each process would do all
    the work, and on several machines it takes the local rank for the global one.
    """

    @property
    def rank(self) -> int:
        return ranks.rank()

    @property
    def world_size(self) -> int:
        return ranks.world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _manager(names: list[str], include_path: str | None) -> TaskManager:
    """Knows all names asked for; the 14,000 tasks that come with lm-eval are looked through only if need be."""
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them."
            raise InputError(
                f"tasks={name!r}: lm-eval knows no such task; {hint} A local file ends in .json or .jsonl"
            )
    return manager


def _load_known(manager: TaskManager, name: str) -> dict:
    try:
        return manager.load([name])
    except Exception as error:  # of the network, of datasets, of huggingface_hub, of the task's own code
        reason = shorten(str(error.__cause__ or error), 300) or type(error).__name__
        raise InputError(
            f"tasks={name!r}: its data cannot be loaded ({reason}). Without network give the rows of {name} as a "
            f"local file: --task-data DIR with {name}.jsonl in it, or --tasks FILE.jsonl; see docs/evaluate.md"
        ) from error


def _in_memory(task: LocalTask) -> dict:
    from datasets import Dataset

    rows = Dataset.from_list(task.rows)
    return {**task.config, "custom_dataset": lambda **_: {"test": rows}}


def _check_documents(task: "Task", limit: float | None) -> None:
    size = len(task.eval_docs)
    if limit is not None:
        size = min(size, int(limit) if limit >= 1 else -int(-size * limit // 1))
    if size < ranks.world_size():
        raise InputError(f"{task.task_name}: {size} documents for {ranks.world_size()} processes; start fewer")


def _rows(name: str, tasks: LoadedTasks, found: dict) -> Iterator[dict]:
    """The rows of one name in what lm-eval has found: those of a task, or of a group as a whole."""
    group, members = tasks.loaded["groups"].get(name), [name]
    if group is not None:
        members = [task.task_name for task in group.get_all_tasks()]
        if name not in found.get("groups", {}):  # a group that says nothing of how to average
            for member in members:
                yield from _rows(member, tasks, found)
            return
    source, first = tasks.names.get(name, name), tasks.loaded["tasks"][members[0]].config
    is_local = isinstance(source, LocalTask)
    common = {
        "samples": sum(found["n-samples"][member]["effective"] for member in members),
        "num_fewshot": found["n-shot"][members[0]],
        "version": found["versions"].get(name),
        "dataset": source.path.name if is_local else first.dataset_path,
        "split": _local_split(source) if is_local else first.test_split or first.validation_split,
    }
    values = found["results" if group is None else "groups"][name]
    in_suite = (source.name if is_local else source) in tasks.selection.suite
    for key, value in values.items():
        metric, _, selected = key.partition(",")
        if not selected or metric.endswith("_stderr") or (in_suite and metric != "acc"):
            continue
        stderr = values.get(f"{metric}_stderr,{selected}")
        yield {
            "task": source.label if is_local else source,
            "metric": metric,
            "filter": selected,
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "higher_is_better": found["higher_is_better"].get(members[0], {}).get(metric, True),
            **common,
        }


def _local_split(task: LocalTask) -> str | None:
    return task.benchmark.split if task.benchmark else None


class _Quiet(logging.Filter):
    """Holds back lm-eval's remarks on what is meant here, and a line for every prompt that is cut, which it counts."""

    cut = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.cut += "Truncating" in record.getMessage()
        return record.levelno >= logging.ERROR


@contextmanager
def _quiet() -> Iterator[None]:
    quiet, loggers = _Quiet(), [logging.getLogger(name) for name in _TALKATIVE]
    for talkative in loggers:
        talkative.addFilter(quiet)
    try:
        yield
    finally:
        for talkative in loggers:
            talkative.removeFilter(quiet)
    if quiet.cut:
        logger.warning(
            f"{quiet.cut} requests were longer than the model's context and lost their beginning: their scores are "
            "not comparable with those of a model with a longer one."
        )
