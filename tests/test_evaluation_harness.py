"""Tasks through lm-eval: its numbers, without the network, and without a trace in the process."""

import random
import socket

import numpy as np
import pytest
import task_rows
import torch
from command_line import save
from network import no_network  # noqa: F401

from hf_mlopt.errors import InputError
from hf_mlopt.evaluation import evaluate_tasks, load_tasks, write_tasks
from hf_mlopt.evaluation.undisturbed import undisturbed
from tests.reference.multiple_choice import accuracies


@pytest.fixture(scope="module")
def model(tiny_mixtral):
    model = tiny_mixtral()
    with torch.no_grad():  # so that one answer is clearly likelier than another
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    task_rows.write(folder / "mine.jsonl", task_rows.choices(11))
    task_rows.write(folder / "winogrande.jsonl", task_rows.contexts(9))
    passages = [{**row, "query": f"Passage: {row['query']}"} for row in task_rows.choices()]
    task_rows.write(folder / "boolq.jsonl", passages)
    task_rows.write(folder / "numbers.jsonl", [{"query": "12", "choices": ["1", "34 5"], "gold": 1}] * 3)
    task_rows.write(folder / "words.jsonl", [{"text": row["query"]} for row in task_rows.choices(5)])
    return folder


def test_the_blocker_blocks(no_network):  # noqa: F811
    direct, by_name = socket.socket(), ("localhost", 9)
    for touch in (lambda: socket.create_connection(by_name), lambda: direct.connect(("127.0.0.1", 9))):
        with pytest.raises(AssertionError, match="the network was touched"):
            touch()


def by_name(rows):
    return {(row["task"].partition(" (")[0], row["metric"]): row["value"] for row in rows}


ALL = ["mine", "winogrande", "boolq", "numbers", "words"]


def test_the_numbers_are_those_of_lm_eval_without_network(model, tiny_tokenizer, data, tmp_path, no_network):  # noqa: F811
    """Ours from rows in memory, and lm-eval's own `hf` model on the YAML, from the checkpoint."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = load_tasks(ALL, str(data))
    ours = evaluate_tasks(model, tiny_tokenizer, tasks, batch_size=4)
    write_tasks(tasks.selection.local, tmp_path / "yaml")
    stock = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(save(model, tiny_tokenizer, tmp_path / "model"))},
        tasks=[task.harness_name for task in tasks.selection.local],
        task_manager=TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False),
        device="cpu",
        batch_size=4,
    )
    assert len(ours) == 4 + 2 + 3  # accuracies of two tasks with and two without `acc_norm`; three of the texts
    for row in ours:
        name = row["task"].partition(" (")[0] + "_local"
        found = stock["results"][name]
        assert row["value"] == pytest.approx(found[f"{row['metric']},none"], rel=1e-6)
        error = found[f"{row['metric']}_stderr,none"]
        assert row["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-6))
        assert row["samples"] == stock["n-samples"][name]["effective"] and row["version"] == stock["versions"][name]
        assert row["num_fewshot"] == stock["n-shot"][name] == 0


def test_the_accuracies_are_those_of_the_reference(model, tiny_tokenizer, data):
    tasks = load_tasks(["mine", "winogrande"], str(data))
    found = by_name(evaluate_tasks(model, tiny_tokenizer, tasks, bootstrap_iters=0))
    acc, acc_norm = accuracies(model, tiny_tokenizer, tasks.selection.local[0].rows)
    partial, _ = accuracies(model, tiny_tokenizer, tasks.selection.local[1].rows)
    assert acc != acc_norm and 0 < partial < 1
    assert found == {("mine", "acc"): acc, ("mine", "acc_norm"): acc_norm, ("winogrande", "acc"): partial}


def test_a_query_of_digits_stays_a_text(model, tiny_tokenizer, data):
    tasks = load_tasks("numbers", str(data))
    found = by_name(evaluate_tasks(model, tiny_tokenizer, tasks, bootstrap_iters=0))
    assert (found["numbers", "acc"], found["numbers", "acc_norm"]) == accuracies(
        model, tiny_tokenizer, tasks.selection.local[0].rows
    )


def test_limit_and_examples(model, tiny_tokenizer, data):
    tasks = load_tasks(["mine", "boolq"], str(data))
    rows = evaluate_tasks(model, tiny_tokenizer, tasks, limit=5, num_fewshot=2, bootstrap_iters=0)
    assert {row["num_fewshot"] for row in rows} == {2} and {row["samples"] for row in rows} == {5}
    assert {row["stderr"] for row in rows} == {None}
    rows = evaluate_tasks(model, tiny_tokenizer, tasks, limit=0.5)
    assert {row["num_fewshot"] for row in rows} == {0}  # nothing is left of the call before
    assert [row["samples"] for row in rows] == [6, 6, 6] and None not in [row["stderr"] for row in rows]


def test_no_row_is_an_example_for_itself(data):
    """With all other rows as examples, each row's question stands in its own prompt once."""
    (task,) = load_tasks("mine", str(data)).loaded["tasks"].values()
    task.set_fewshot_seed(0)
    for doc in task.eval_docs:
        prompt = task.fewshot_context(doc, num_fewshot=10)
        assert prompt.count(doc["query"]) == 1 and prompt.endswith(doc["query"])


def test_the_suite_counts_accuracy_alone(model, tiny_tokenizer, tmp_path):
    for name in ("arc_easy", "piqa"):
        task_rows.write(tmp_path / f"{name}.jsonl", task_rows.choices(3))
    tasks = load_tasks(["moe-pruner-suite"], str(tmp_path))
    rows = evaluate_tasks(model, tiny_tokenizer, tasks, bootstrap_iters=0)
    assert [(row["task"], row["metric"], row["split"]) for row in rows] == [
        ("arc_easy (3 rows)", "acc", "test"),
        ("piqa (3 rows)", "acc", "validation"),
    ]


def test_nothing_else_in_the_process_notices(tiny_mixtral, tiny_tokenizer, data):
    model = tiny_mixtral(attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    tasks = load_tasks("mine", str(data))
    drawn = []
    for measure in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if measure:
            evaluate_tasks(model, tiny_tokenizer, tasks, num_fewshot=1, bootstrap_iters=0)
            with undisturbed(model):  # a task of lm-eval may draw
                torch.rand(1), random.random(), np.random.rand(), model.train()
        drawn.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert [module.training for module in model.modules()] == modes


def test_tasks_of_ones_own_in_yaml(model, tiny_tokenizer, data, tmp_path):
    """And a group of them, judged as a whole; what a task says of examples stands if it says none."""
    write_tasks(load_tasks(["mine", "boolq"], str(data)).selection.local, tmp_path)
    group = "group: both\ntask: [mine_local, boolq_local]\nmetadata: {version: 3.0}\n"
    (tmp_path / "both.yaml").write_text(group + "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    tasks = load_tasks("both", include_path=str(tmp_path))
    (row,) = evaluate_tasks(model, tiny_tokenizer, tasks)
    members = load_tasks(["mine", "boolq"], str(data))
    single = by_name(evaluate_tasks(model, tiny_tokenizer, members, bootstrap_iters=0))
    assert row["value"] == pytest.approx((11 * single["mine", "acc"] + 12 * single["boolq", "acc"]) / 23)
    assert (row["task"], row["samples"], float(row["version"])) == ("both", 23, 3.0) and row["stderr"] > 0
    for own, asked, used in ((0, 2, 0), (1, None, 1), (1, 2, 2)):
        (tmp_path / "own.yaml").write_text(f"include: mine_local.yaml\ntask: own\nnum_fewshot: {own}\n")
        tasks = load_tasks("own", include_path=str(tmp_path))
        rows = evaluate_tasks(model, tiny_tokenizer, tasks, num_fewshot=asked, limit=2, bootstrap_iters=0)
        assert {row["num_fewshot"] for row in rows} == {used}


def test_prompts_that_are_cut_are_counted(tiny_mixtral, tiny_tokenizer, data, caplog):
    model = tiny_mixtral(max_position_embeddings=30)
    evaluate_tasks(model, tiny_tokenizer, load_tasks("mine", str(data)), bootstrap_iters=0)
    (record,) = [record for record in caplog.records if "requests were longer" in record.getMessage()]
    assert 1 <= int(record.getMessage().split()[0]) <= 44
    caplog.clear()
    evaluate_tasks(tiny_mixtral(), tiny_tokenizer, load_tasks("mine", str(data)), bootstrap_iters=0)
    assert not caplog.records


def test_a_choice_that_does_not_fit(tiny_mixtral, tiny_tokenizer, tmp_path):
    model = tiny_mixtral(max_position_embeddings=30).train()
    rows = [{"query": "a", "choices": ["b", "c" * 40], "gold": 0}]
    tasks = load_tasks(str(task_rows.write(tmp_path / "long.jsonl", rows)))
    with pytest.raises(InputError, match="a choice is longer than the model's context of 30 tokens"):
        evaluate_tasks(model, tiny_tokenizer, tasks)
    assert model.training


def test_as_many_examples_as_there_are_other_rows(model, tiny_tokenizer, tmp_path):
    rows = task_rows.choices(3)
    tasks = load_tasks(str(task_rows.write(tmp_path / "few.jsonl", [*rows, rows[0]])))
    evaluate_tasks(model, tiny_tokenizer, tasks, num_fewshot=2, bootstrap_iters=0)
    with pytest.raises(InputError, match="num_fewshot=3: few has only 2 other rows"):
        evaluate_tasks(model, tiny_tokenizer, tasks, num_fewshot=3)


def test_a_task_whose_rows_cannot_be_fetched(tmp_path):
    (tmp_path / "away.yaml").write_text("task: away\ndataset_path: someone/nothing\noutput_type: multiple_choice\n")
    with pytest.raises(InputError, match="tasks='away': its data cannot be loaded .* --task-data DIR with away.jsonl"):
        load_tasks("away", include_path=str(tmp_path))


@pytest.mark.parametrize("words", ["", " , "])
def test_no_task_at_all(words):
    with pytest.raises(InputError, match="names no task"):
        load_tasks(words)
