"""Tasks by name or file: what lm-eval is told of a local file so that stock `lm_eval` gives the same numbers."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.evaluation.task_files import SCHEMAS, SUFFIXES, read_rows


SUITE = "moe-pruner-suite"
# The nine tasks of MoE-Pruner (huggingface.co/papers/2410.12013), tables 3 and 4; metric `acc`.
SUITE_TASKS = (
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "piqa", "rte", "winogrande",
)  # fmt: skip

_ANSWER = "{{query.removesuffix('\\n')}}\nAnswer:"


@dataclass(frozen=True)
class Benchmark:
    """
    A task of lm-eval that a local file may hold, with its prompt.

    Args:
        rows (`int`): Rows of the split that is usually evaluated; a file with another number is labelled with its own.
        split (`str`): That split.
        prompt (`str`): Template over `query` that gives the prompt of lm-eval's own task.
        acc_norm (`bool`): Whether lm-eval reports `acc_norm`: the choices are texts of different length.
    """

    rows: int
    split: str
    prompt: str = _ANSWER
    acc_norm: bool = True


BENCHMARKS = {
    "arc_challenge": Benchmark(1172, "test"),
    "arc_easy": Benchmark(2376, "test"),
    "boolq": Benchmark(3270, "validation", _ANSWER.replace("query.", "query.removeprefix('Passage: ')."), False),
    "hellaswag": Benchmark(10042, "validation", "query"),
    "mmlu": Benchmark(14042, "test", acc_norm=False),
    "openbookqa": Benchmark(500, "test", "query"),
    "piqa": Benchmark(1838, "validation"),
    "rte": Benchmark(277, "validation", acc_norm=False),
    "winogrande": Benchmark(1267, "validation"),
}
_ALIASES = {"openbook_qa": "openbookqa"}

# How lm-eval reads a row. The bare name of a field gives it as it is, where a template would make a number of a text
# that is all digits. A number as `doc_to_text` means one continuation after each of several contexts.
_FORMS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metrics": ("acc", "acc_norm"),
    },
    "contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metrics": ("acc",),  # all choices are the same text: there is nothing to normalise
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metrics": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    },
}
_METRICS = {  # aggregation, whether higher is better
    "acc": ("mean", True),
    "acc_norm": ("mean", True),
    "word_perplexity": ("weighted_perplexity", False),
    "byte_perplexity": ("weighted_perplexity", False),
    "bits_per_byte": ("bits_per_byte", False),
}


@dataclass(frozen=True)
class LocalTask:
    """
    A task from a local file.

    Args:
        path (`Path`): The file.
        schema (`str`): A key of [`~task_files.SCHEMAS`].
        rows (`list[dict]`): Its rows, checked.
    """

    path: Path
    schema: str
    rows: list[dict] = field(repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> "LocalTask":
        """Reads and checks a file; raises what [`~task_files.read_rows`] raises."""
        schema, rows = read_rows(path)
        task = cls(Path(path).expanduser().resolve(), schema, rows)
        expected = "contexts" if task.name == "winogrande" else "choices"
        if task.benchmark and schema != expected:
            fields = ", ".join(SCHEMAS[expected])
            raise InputError(f"{path}:1: rows of {task.name} are {{{fields}}}; or give the file another name")
        return task

    @property
    def name(self) -> str:
        """The benchmark a file holds, such as `hellaswag` for `hellaswag_1000.jsonl`, or else its stem."""
        return name_of(self.path)

    @property
    def harness_name(self) -> str:
        """Its name in lm-eval, which overrides no task that comes with it."""
        return re.sub(r"\W+", "_", self.path.stem) + "_local"

    @property
    def benchmark(self) -> Benchmark | None:
        return BENCHMARKS.get(self.name)

    @property
    def label(self) -> str:
        """`name`, with the number of rows if these are not all of the benchmark."""
        partial = self.benchmark is not None and len(self.rows) != self.benchmark.rows
        return f"{self.name} ({len(self.rows)} rows)" if partial else self.name

    @property
    def config(self) -> dict:
        """lm-eval's configuration of the task but for where its rows are."""
        form = dict(_FORMS[self.schema])
        metrics = form.pop("metrics")
        if self.schema == "choices" and self.benchmark:
            form["doc_to_text"] = self.benchmark.prompt
            metrics = metrics if self.benchmark.acc_norm else ("acc",)
        return {
            "task": self.harness_name,
            "test_split": "test",
            "fewshot_split": "test",  # said to be the same, so that no row is an example for itself
            **form,
            "metric_list": [
                {"metric": name, "aggregation": _METRICS[name][0], "higher_is_better": _METRICS[name][1]}
                for name in metrics
            ],
            "metadata": {"version": 1.0},
        }

    def yaml(self) -> str:
        """The task as a YAML file for `lm_eval --include_path`."""
        # lm-eval reads `data_files` relative to the working directory, and a bare path would become a train split.
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(self.path)}}}
        return yaml.safe_dump({**self.config, **source}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Selection:
    """
    What a user asked for.

    Args:
        tasks (`list[LocalTask | str]`): Local tasks, and names that lm-eval is to know.
        suite (`tuple[str]`): Names of the tasks that are averaged and judged by `acc` as `moe-pruner-suite`; empty if
            the suite was not asked for.
        missing (`list[str]`): Tasks of the suite for which there is no file.
    """

    tasks: list[LocalTask | str]
    suite: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)

    @property
    def local(self) -> list[LocalTask]:
        return [task for task in self.tasks if isinstance(task, LocalTask)]


def select_tasks(words: list[str], task_data: str | None = None) -> Selection:
    """
    Finds tasks by name or file.

    Args:
        words (`list[str]`): Files, names and `moe-pruner-suite`.
        task_data (`str`, *optional*): A folder of task files. With it, every name means a file there; without it,
            a task that comes with lm-eval.

    Raises:
        InputError: If a file is malformed, a name has no file in the folder or several, or a task is named twice.
    """
    files = _files_in(task_data) if task_data else None
    names, suite = [], ()
    for word in words:
        if word == SUITE:
            suite = SUITE_TASKS
        names += suite if word == SUITE else [word]
    missing = [name for name in suite if files is not None and name not in files]
    if len(missing) == len(SUITE_TASKS):
        raise InputError(f"task_data={task_data!r}: no file of {SUITE}; name them {SUITE_TASKS[0]}.jsonl and so on")
    chosen = [name for name in names if name not in missing]
    repeated = sorted({name for name in chosen if chosen.count(name) > 1})
    if repeated:
        raise ConfigurationError("tasks", ",".join(words), f"names {', '.join(repeated)} twice")
    tasks = [_find(name, task_data, files) for name in chosen]
    local = [task.harness_name for task in tasks if isinstance(task, LocalTask)]
    for task in tasks:
        if isinstance(task, LocalTask) and local.count(task.harness_name) > 1:
            raise ConfigurationError("tasks", ",".join(words), f"has two files with the name {task.path.stem}")
    return Selection(tasks, suite, missing)


def name_of(path: Path) -> str:
    """The benchmark that a file holds by its name, or else the stem of the file."""
    stem = re.sub(r"_\d+$", "", path.stem)
    stem = _ALIASES.get(stem, stem)
    return stem if stem in BENCHMARKS else path.stem


def write_tasks(tasks: list[LocalTask], directory: str | Path) -> list[Path]:
    """
    Writes local tasks for `lm_eval --include_path DIRECTORY`.

    Raises:
        InputError: If there is none, or a file of that name exists.
    """
    if not tasks:
        raise ConfigurationError("write_tasks", str(directory), "no local file is among the tasks; nothing to write")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise ConfigurationError("write_tasks", str(directory), "is a file; name a folder")
    paths = [Path(directory) / f"{task.harness_name}.yaml" for task in tasks]
    for path in paths:
        if path.exists():
            raise ConfigurationError("write_tasks", str(directory), f"holds {path.name} already; name a new folder")
    Path(directory).mkdir(parents=True, exist_ok=True)
    for path, task in zip(paths, tasks, strict=True):
        path.write_text(task.yaml(), encoding="utf-8")
    return paths


def _files_in(folder: str) -> dict[str, list[Path]]:
    if not Path(folder).is_dir():
        raise ConfigurationError("task_data", folder, "is not a folder")
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in SUFFIXES:
            for name in {name_of(path), path.stem}:
                files.setdefault(name, []).append(path)
    if not files:
        raise ConfigurationError("task_data", folder, f"holds no file that ends in {' or '.join(SUFFIXES)}")
    return files


def _find(name: str, folder: str | None, files: dict[str, list[Path]] | None) -> LocalTask | str:
    if name.endswith(SUFFIXES):
        return LocalTask.from_file(name)
    if files is None:
        return name
    found = files.get(name, [])
    if len(found) > 1:
        found = [path for path in found if path.stem == name]
    if len(found) != 1:
        several = " and ".join(path.name for path in files.get(name, []))
        has = f"has {several}; give the file itself" if several else f"has no {name}.jsonl, only {', '.join(files)}"
        raise InputError(f"tasks={name!r}: {folder} {has}")
    return LocalTask.from_file(found[0])
