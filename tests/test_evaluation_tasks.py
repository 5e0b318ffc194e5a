"""Task files: what is read, what is refused with file and line, and how names and files find each other."""

import json
from pathlib import Path

import pytest
import task_rows
import yaml

from hf_mlopt.errors import InputError
from hf_mlopt.evaluation.task_files import read_rows
from hf_mlopt.evaluation.tasks import BENCHMARKS, SUITE, SUITE_TASKS, LocalTask, select_tasks, write_tasks


GOOD = {"query": "a", "choices": ["b", "c"], "gold": 1}
PAIR = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}


def test_rows_of_every_form(tmp_path):
    for schema, row in (("choices", GOOD), ("contexts", PAIR), ("text", {"text": "a b"})):
        lines = json.dumps({**row, "ind": 7}) + "\n\r\n" + json.dumps(row) + "\n"
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "rows.json").write_text(json.dumps([row, row], indent=2), encoding="utf-8")
        assert read_rows(tmp_path / "rows.jsonl") == read_rows(tmp_path / "rows.json") == (schema, [row, row])


@pytest.mark.parametrize("separator", ["\x85", "\u2028"])
def test_a_line_ends_where_json_lines_do(tmp_path, separator):
    row = {**GOOD, "query": f"one{separator}two"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl")[1] == [row]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"gold": 2}, "'gold' must be an index of 'choices', 0 to 1, not 2"),
        ({"gold": -1}, "0 to 1, not -1"),
        ({"gold": "1"}, "0 to 1, not '1'"),
        ({"gold": True}, "0 to 1, not True"),
        ({"gold": 1.0}, "0 to 1, not 1.0"),
        ({"query": 5}, "'query' must be text that is not empty, not 5"),
        ({"query": " "}, "'query' must be text"),
        ({"choices": ["b"]}, "'choices' must be a list of at least two texts"),
        ({"choices": ["b", ""]}, "none of them empty"),
        ({"choices": "bc"}, "'choices' must be a list"),
        ({"choices": None}, "'choices' must be a list"),
        ({"gold": ...}, "lacks 'gold', which earlier rows have"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, change, problem):
    bad = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    path = task_rows.write(tmp_path / "mine.jsonl", [GOOD, GOOD, bad])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ") and problem in str(caught.value)


@pytest.mark.parametrize(
    "change, problem",
    [({"context_options": []}, "'context_options' must be"), ({"continuation": ""}, "'continuation' must be text")],
)
def test_a_malformed_pair(tmp_path, change, problem):
    with pytest.raises(InputError, match=f"mine.jsonl:2: {problem}"):
        read_rows(task_rows.write(tmp_path / "mine.jsonl", [PAIR, {**PAIR, **change}]))


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "a.jsonl:3: not JSON"),
        (
            "a.jsonl",
            '{"question": "a"}\n',
            r"a.jsonl:1: has the fields \['question'\]; a row is {query, choices, gold}",
        ),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: must be an object"),
        ("a.jsonl", "\n \n", "a.jsonl: the file has no rows"),
        ("a.json", '[\n{"text": "a"},\n{"text" 1}]', "a.json:3: not JSON"),
        ("a.json", '[{"text": "a"}, {"text": ""}]', "a.json:row 2: 'text' must be"),
        ("a.json", '{"text": "a"}', "a.json: a .json file holds one list of rows"),
        ("a.json", "", "a.json: the file has no rows"),
        ("a.csv", "", "a.csv: a task file ends in .json or .jsonl"),
    ],
)
def test_a_file_that_is_no_task(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=problem):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there_or_not_utf_8(tmp_path):
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="a.jsonl: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "stem, name, rows, label",
    [
        ("hellaswag_1000", "hellaswag", 3, "hellaswag (3 rows)"),
        ("openbook_qa", "openbookqa", 500, "openbookqa"),
        ("openbookqa", "openbookqa", 499, "openbookqa (499 rows)"),
        ("arc_easy", "arc_easy", 2376, "arc_easy"),
        ("my_task_7", "my_task_7", 3, "my_task_7"),
    ],
)
def test_what_a_file_counts_as(tmp_path, stem, name, rows, label):
    task = LocalTask.from_file(task_rows.write(tmp_path / f"{stem}.jsonl", [GOOD] * rows))
    assert (task.name, task.label, task.harness_name) == (name, label, f"{stem}_local")


def test_a_benchmark_of_another_form_is_refused(tmp_path):
    with pytest.raises(InputError, match="rows of winogrande are {context_options, continuation, gold}"):
        LocalTask.from_file(task_rows.write(tmp_path / "winogrande.jsonl", [GOOD]))
    with pytest.raises(InputError, match="rows of piqa are {query, choices, gold}"):
        LocalTask.from_file(task_rows.write(tmp_path / "piqa.jsonl", [PAIR]))


@pytest.fixture
def folder(tmp_path):
    for name in SUITE_TASKS:
        if name not in ("mmlu", "rte"):
            row = PAIR if name == "winogrande" else GOOD
            task_rows.write(tmp_path / "data" / f"{name}.jsonl", [row])
    task_rows.write(tmp_path / "data" / "mine.jsonl", [GOOD])
    (tmp_path / "data" / "README.md").write_text("not a task")
    return tmp_path / "data"


def test_the_suite_names_what_is_missing(folder):
    selection = select_tasks([SUITE], str(folder))
    assert selection.missing == ["mmlu", "rte"] and selection.suite == SUITE_TASKS
    assert [task.name for task in selection.tasks] == [name for name in SUITE_TASKS if name not in ("mmlu", "rte")]


def test_the_suite_without_a_folder_is_that_of_lm_eval():
    assert select_tasks([SUITE]).tasks == list(SUITE_TASKS) and not select_tasks([SUITE]).missing
    assert set(SUITE_TASKS) == set(BENCHMARKS) and len(SUITE_TASKS) == 9


def test_names_and_files_together(folder, tmp_path):
    other = task_rows.write(tmp_path / "other.json", [])
    other.write_text(json.dumps([GOOD]))
    selection = select_tasks(["mine", str(other), "piqa"], str(folder))
    assert [task.name for task in selection.tasks] == ["mine", "other", "piqa"] and selection.suite == ()


@pytest.mark.parametrize(
    "words, problem",
    [
        (["rte"], "tasks='rte': .* has no rte.jsonl, only arc_challenge, "),
        ([SUITE, "piqa"], "names piqa twice"),
        (["piqa", "piqa"], "names piqa twice"),
        (["piqa", "{folder}/piqa.jsonl"], "two files with the name piqa"),
    ],
)
def test_names_that_are_refused(folder, words, problem):
    with pytest.raises(InputError, match=problem):
        select_tasks([word.format(folder=folder) for word in words], str(folder))


def test_two_files_of_one_benchmark(folder):
    task_rows.write(folder / "piqa_100.jsonl", [GOOD])
    assert select_tasks(["piqa"], str(folder)).tasks[0].path.name == "piqa.jsonl"
    (folder / "piqa.jsonl").rename(folder / "piqa_50.jsonl")
    with pytest.raises(InputError, match="has piqa_100.jsonl and piqa_50.jsonl; give the file itself"):
        select_tasks(["piqa"], str(folder))
    assert select_tasks(["piqa_50"], str(folder)).tasks[0].path.name == "piqa_50.jsonl"


def test_folders_that_are_refused(tmp_path):
    for folder, problem in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no file that ends in .json")):
        with pytest.raises(InputError, match=problem):
            select_tasks(["piqa"], str(folder))
    task_rows.write(tmp_path / "mine.jsonl", [GOOD])
    with pytest.raises(InputError, match="no file of moe-pruner-suite"):
        select_tasks([SUITE], str(tmp_path))


def test_the_yaml_finds_its_rows_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    tasks = select_tasks(["mine.jsonl"]).local
    (path,) = write_tasks(tasks, tmp_path / "yaml")
    written = yaml.safe_load(path.read_text())
    assert path.name == "mine_local.yaml" and written["task"] == "mine_local"
    assert written["dataset_kwargs"] == {"data_files": {"test": str(folder.resolve() / "mine.jsonl")}}


def test_what_is_written_before_is_kept(folder, tmp_path):
    tasks = select_tasks(["mine", "piqa"], str(folder)).local
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "piqa_local.yaml").write_text("mine")
    with pytest.raises(InputError, match="holds piqa_local.yaml already"):
        write_tasks(tasks, tmp_path / "yaml")
    assert [path.name for path in (tmp_path / "yaml").iterdir()] == ["piqa_local.yaml"]
    with pytest.raises(InputError, match="no local file is among the tasks"):
        write_tasks([], tmp_path / "none")


STOCK = {  # file of lm-eval, a document of its data set, the same as a query
    "arc_easy": ("arc/arc_easy", {"question": "Why?"}, "Question: Why?"),
    "piqa": ("piqa/piqa", {"goal": "Win "}, "Question: Win \n"),
    "boolq": ("super_glue/boolq/default", {"passage": "P: q", "question": "is"}, "Passage: P: q\nQuestion: is?"),
    "rte": ("glue/rte/default", {"sentence1": "A", "sentence2": "B."}, "A\nQuestion: B. True or False?"),
    "openbookqa": ("openbookqa/openbookqa", {"question_stem": "Why"}, "Why"),
}


@pytest.mark.parametrize("name", STOCK)
def test_prompt_and_metrics_are_those_of_lm_eval(name, tmp_path):
    import lm_eval
    from lm_eval.utils import apply_template

    path, doc, query = STOCK[name]
    stock = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / f"{path}.yaml").read_text())
    config = LocalTask.from_file(task_rows.write(tmp_path / f"{name}.jsonl", [{**GOOD, "query": query}])).config
    prompts = []
    for template, fields in ((config["doc_to_text"], {"query": query}), (stock["doc_to_text"], doc)):
        prompts.append(fields[template] if template in fields else apply_template(template, fields))
    assert prompts[0] == prompts[1]
    metrics = [[metric["metric"] for metric in task["metric_list"]] for task in (config, stock)]
    assert metrics[0] == metrics[1]
    assert BENCHMARKS[name].split == (stock.get("test_split") or stock["validation_split"])
