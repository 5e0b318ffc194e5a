"""`hf-mlopt evaluate`: numbers of the library side by side, what it refuses, and the warning on calibration text."""

import json
import math
import os
import subprocess
import sys

import pytest
import task_rows
from command_line import hf_mlopt, save, succeed
from network import no_network  # noqa: F401
from transformers import AutoModelForCausalLM

from hf_mlopt.cli.evaluate import table
from hf_mlopt.data import embedded_corpus, load_text, tokenize_corpus
from hf_mlopt.errors import InputError
from hf_mlopt.evaluation import evaluate_tasks, load_tasks, perplexity
from hf_mlopt.workflows.evaluate import EvaluationConfig, distinct_names, evaluate_models, recovery


pytestmark = pytest.mark.e2e

WARNING = "of the calibration text also stands in the evaluation text"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def source(work, tiny_mixtral, tiny_tokenizer):
    return save(tiny_mixtral(), tiny_tokenizer, work / "source")


@pytest.fixture(scope="module")
def texts(work):
    """Two files of English without a line in common."""
    paths = {}
    for split in ("train", "test"):
        paths[split] = work / f"{split}.txt"
        paths[split].write_text("\n\n".join(embedded_corpus(split))[:10_000], encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def pruned(work, source, texts):
    calibration = ("--calibration", texts["train"], "--samples", "16", "--sequence-length", "128")
    succeed("prune", source, "--output", work / "pruned", "--sparsity", "0.5", *calibration)
    return work / "pruned"


def evaluate(model, text, *words, output):
    outcome = succeed("evaluate", model, "--perplexity", text, "--window", "64", *words, "--output", output)
    (model,) = json.loads(output.read_text())["models"]
    return model["perplexity"], outcome


def refused(*words):
    outcome = hf_mlopt("evaluate", *words)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and outcome.err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("hf-mlopt evaluate: error: ")


@pytest.fixture
def no_weights(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded, though the input is refused")

    monkeypatch.setattr("hf_mlopt.workflows.evaluate.load_model", never)


def test_the_number_is_that_of_the_library(source, texts, tiny_tokenizer, tmp_path):
    record, outcome = evaluate(source, texts["test"], "--max-windows", "20", output=tmp_path / "result.json")
    documents, _ = load_text(str(texts["test"]))
    token_ids = tokenize_corpus(documents, tiny_tokenizer)[: 20 * 64]
    expected = perplexity(AutoModelForCausalLM.from_pretrained(source), token_ids, window=64)
    assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert record["nll"] == pytest.approx(math.log(record["perplexity"]))
    assert (record["windows"], record["window"], record["tokens"]) == (20, 64, 20 * 63)
    assert f"{record['perplexity']:.3f} ± {record['stderr']:.3f}" in outcome.out and expected.stderr is not None
    assert "split test, 20 windows of 64 tokens, not overlapping, tail dropped" in outcome.out


def test_the_batch_size_changes_no_number(source, texts, tmp_path):
    words = ("--max-windows", "10", "--batch-size")
    first, second = (
        evaluate(source, texts["test"], *words, size, output=tmp_path / f"{size}.json")[0] for size in (1, 7)
    )
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-6)


def test_layers_spread_over_devices(source, texts, tmp_path):
    first, second = (
        evaluate(source, texts["test"], "--max-windows", "5", *words, output=tmp_path / f"{len(words)}.json")[0]
        for words in ((), ("--parallelize",))
    )
    assert first == second


def test_the_record_says_on_what(source, tmp_path):
    words = ("--split", "test", "--max-windows", "4")
    record, _ = evaluate(source, "embedded", *words, output=tmp_path / "made" / "result.json")
    assert record["dataset"]["source"] == "embedded" and record["dataset"]["split"] == "test"
    assert record["calibration_overlap"] is None


def test_the_window_is_the_context_by_default(source, texts):
    outcome = succeed("evaluate", source, "--perplexity", texts["test"], "--max-windows", "2")
    assert "2 windows of 512 tokens" in outcome.out


def test_its_own_calibration_text_is_warned_about(pruned, texts, tmp_path):
    record, outcome = evaluate(pruned, texts["train"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] > 0.95
    assert f"WARNING: {100 * record['calibration_overlap']:.0f} % {WARNING}" in outcome.err
    assert "flatters the model pruned" in outcome.err


def test_another_text_is_not_warned_about(pruned, texts, tmp_path):
    record, outcome = evaluate(pruned, texts["test"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] == 0 and WARNING not in outcome.err


def test_an_unpruned_model_is_not_warned_about(source, texts, tmp_path):
    record, outcome = evaluate(source, texts["train"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] is None and WARNING not in outcome.err


def test_a_window_longer_than_the_context(source, texts, no_weights):
    line = refused(source, "--perplexity", texts["test"], "--window", "513")
    assert "window=513" in line and "context of 512 tokens" in line


def test_a_missing_tokenizer(tiny_mixtral, texts, no_weights, tmp_path):
    source = save(tiny_mixtral(), None, tmp_path / "source")
    line = refused(source, "--perplexity", texts["test"])
    assert str(source) in line and "no tokenizer" in line and "save one beside the weights" in line


def test_a_text_shorter_than_a_window(source, no_weights, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    line = refused(source, "--perplexity", text, "--window", "64")
    assert "9 tokens" in line and "one window of 64" in line


def test_an_earlier_result_is_kept(source, texts, no_weights, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("mine")
    assert "exists already" in refused(source, "--perplexity", texts["test"], "--output", result)
    assert result.read_text() == "mine"
    (tmp_path / "other.png").write_text("mine")
    line = refused(source, "--perplexity", texts["test"], "--output", tmp_path / "other.json")
    assert "other.png" in line and "exists already" in line


def test_weights_that_are_not_finite(tiny_mixtral, tiny_tokenizer, texts, tmp_path):
    model = tiny_mixtral()
    model.lm_head.weight.data[0, 0] = float("nan")
    source = save(model, tiny_tokenizer, tmp_path / "source")
    line = refused(source, "--perplexity", texts["test"], "--window", "64", "--output", tmp_path / "result.json")
    assert "NaN or Inf" in line and "in window 0" in line and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["perplexity=None", "is needed"]),
        (["--perplexity", "embedded", "--parallelize", "--device", "cpu"], ["device='cpu'", "parallelize chooses"]),
        (["--perplexity", "embedded", "--limit", "3"], ["limit=3", "tasks names none"]),
        (["--perplexity", "embedded", "--output", "plot.png"], ["plot.png", "is the JSON file"]),
        (["--tasks", "a.jsonl", "--window", "3"], ["window=3", "perplexity names no text"]),
        (["--tasks", "a.jsonl", "--limit", "0"], ["limit=0", "a number of documents, or a share"]),
        (["--tasks", "a.jsonl", "--limit", "1.5"], ["limit=1.5", "a number of documents, or a share"]),
        (["--tasks", "a.jsonl", "--num-fewshot", "-1"], ["num_fewshot=-1", "at least 0"]),
        (["--tasks", "a.jsonl"], ["a.jsonl: no such file"]),
        (["--tasks", "piqa", "--task-data", "none"], ["task_data='none'", "is not a folder"]),
        (["--perplexity", "embedded", "--window", "1"], ["window=1", "at least 2"]),
        (["--perplexity", "embedded", "--max-windows", "0"], ["max_windows=0", "at least 1"]),
        (["--perplexity", "embedded", "--batch-size", "0"], ["batch_size=0", "at least 1"]),
        (["--perplexity", "embedded", "--device", "tpu"], ["device='tpu'", "must be auto, cpu"]),
        (["--perplexity", "none.txt"], ["none.txt", "no such file"]),
        (["--perplexity", "wikitext"], ["wikitext", "--perplexity embedded"]),
    ],
)
def test_wrong_words(source, no_weights, words, parts):
    line = refused(source, *words)
    assert all(part in line for part in parts), line


def test_a_directory_that_is_not_a_checkpoint(texts, no_weights, tmp_path):
    assert "not a checkpoint" in refused(tmp_path, "--perplexity", texts["test"])


def test_a_model_is_needed():
    assert "MODEL" in refused("--perplexity", "embedded")


def test_the_reference_model_has_its_known_perplexity(shared_data, tmp_path):
    words = ("--window", "128", "--max-windows", "200")
    model, text = shared_data / "models" / "mixtral-8x-wiki", shared_data / "text" / "wikitext2-test.txt"
    succeed("evaluate", model, "--perplexity", text, *words, "--output", tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())["models"][0]["perplexity"]
    assert record["perplexity"] == pytest.approx(37.8, abs=0.1) and record["tokens"] == 200 * 127


@pytest.fixture(scope="module")
def tasks(work):
    folder = work / "tasks"
    task_rows.write(folder / "arc_easy.jsonl", task_rows.choices(10))
    task_rows.write(folder / "winogrande.jsonl", task_rows.contexts(8))
    task_rows.write(folder / "mine.jsonl", task_rows.choices(6, seed=3))
    return folder


@pytest.fixture(scope="module")
def both(work, source, pruned, tasks):
    """Two models, tasks and perplexity."""
    words = ("--tasks", "mine,arc_easy,winogrande", "--task-data", tasks, "--perplexity", "embedded", "--window", 64)
    output = work / "both" / "result.json"
    outcome = succeed("evaluate", source, pruned, *words, "--max-windows", 5, "--output", output)
    return json.loads(output.read_text()), outcome, output


def test_tasks_are_those_of_the_library(both, source, pruned, tasks, tiny_tokenizer):
    record, _, _ = both
    loaded = load_tasks("mine,arc_easy,winogrande", str(tasks))
    assert [model["model"] for model in record["models"]] == ["source", "pruned"]
    for model, directory in zip(record["models"], (source, pruned), strict=True):
        expected = evaluate_tasks(AutoModelForCausalLM.from_pretrained(directory), tiny_tokenizer, loaded)
        assert [{**row, "recovery": ...} for row in model["results"]] == [{**row, "recovery": ...} for row in expected]


def test_the_record_is_made_for_cards(both):
    record, _, output = both
    assert record["missing_tasks"] == [] and record["lm_eval"]
    assert {"hf_mlopt", "machine", "torch", "transformers"} <= set(record["environment"])
    row = record["models"][1]["results"][2]
    assert (row["task"], row["dataset"], row["split"]) == ("arc_easy (10 rows)", "arc_easy.jsonl", "test")
    assert (row["samples"], row["num_fewshot"], row["version"], row["filter"]) == (10, 0, 1.0, "none")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_recovery_is_the_share_of_the_first_model(both):
    dense, pruned = both[0]["models"]
    assert {row["recovery"] for row in dense["results"]} <= {1.0, None} and dense["perplexity"]["recovery"] == 1
    ratio = dense["perplexity"]["perplexity"] / pruned["perplexity"]["perplexity"]
    assert pruned["perplexity"]["recovery"] == pytest.approx(ratio) and ratio != 1
    accuracies = [[row["value"] for row in model["results"] if row["metric"] == "acc"] for model in (dense, pruned)]
    for model, values in zip((dense, pruned), accuracies, strict=True):
        errors = [row["stderr"] for row in model["results"] if row["metric"] == "acc"]
        assert model["average"]["value"] == pytest.approx(sum(values) / 3)
        assert model["average"]["stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 3)
    assert pruned["average"]["recovery"] == pytest.approx(sum(accuracies[1]) / sum(accuracies[0]))
    assert [recovery(3, 2, True), recovery(3, 2, False), recovery(0, 0, True)] == [1.5, 2 / 3, None]


def test_the_table(both):
    record, outcome, _ = both
    lines = outcome.out.splitlines()
    assert lines[: len(table(record))] == table(record)
    assert lines[0].split() == ["source", "pruned", "recovery"]
    assert len({len(line) for line in table(record)}) == 1
    row = next(row for row in record["models"][1]["results"] if row["task"] == "mine" and row["metric"] == "acc")
    (line,) = [line for line in lines if line.startswith("mine  acc ")]
    assert f"{100 * row['value']:.2f} ± {100 * row['stderr']:.2f}" in line
    assert any(line.startswith("average of 3 tasks  acc ") for line in lines)
    assert any("recovery: score / that of source" in line for line in lines)


def test_the_suite_is_not_averaged_over_fewer_tasks(source, tasks, tmp_path):
    words = ("--tasks", "moe-pruner-suite,mine", "--task-data", tasks, "--limit", 4, "--output", tmp_path / "r.json")
    outcome = succeed("evaluate", source, *words)
    missing = "boolq, hellaswag, mmlu, openbookqa, piqa, rte"
    assert f"missing of moe-pruner-suite: arc_challenge, {missing}" in outcome.out and "average of" not in outcome.out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["models"][0]["average"] is None and record["missing_tasks"] == [
        "arc_challenge",
        *missing.split(", "),
    ]
    metrics = [(row["task"], row["metric"]) for row in record["models"][0]["results"]]
    mine = [("mine", "acc"), ("mine", "acc_norm")]
    assert metrics == [("arc_easy (10 rows)", "acc"), ("winogrande (8 rows)", "acc"), *mine]
    assert "limit 4, not whole tasks" in outcome.out


def test_a_complete_suite_is_averaged_alone(source, tasks, tmp_path):
    from hf_mlopt.evaluation.tasks import SUITE_TASKS

    for name in SUITE_TASKS:
        row = task_rows.contexts(2) if name == "winogrande" else task_rows.choices(2)
        task_rows.write(tmp_path / "data" / f"{name}.jsonl", row)
    mine = str(tasks / "mine.jsonl")
    config = EvaluationConfig([str(source)], f"{mine},moe-pruner-suite", task_data=str(tmp_path / "data"))
    record = evaluate_models(config)
    average = record["models"][0]["average"]
    assert average["tasks"] == [f"{name} (2 rows)" for name in SUITE_TASKS] and record["missing_tasks"] == []
    values = [row["value"] for row in record["models"][0]["results"] if "(2 rows)" in row["task"]]
    assert average["value"] == pytest.approx(sum(values) / 9) and len(values) == 9


def test_nothing_touches_the_network(source, tasks, tmp_path, no_network):  # noqa: F811
    words = ("--tasks", "moe-pruner-suite", "--task-data", tasks, "--perplexity", "embedded", "--max-windows", 2)
    succeed("evaluate", source, *words, "--write-tasks", tmp_path / "yaml", "--output", tmp_path / "result.json")


def test_a_malformed_row(source, tasks, no_weights, tmp_path):
    rows = task_rows.choices(2)
    rows[1]["gold"] = 4
    task_rows.write(tmp_path / "bad.jsonl", rows)
    line = refused(source, "--tasks", f"{tasks / 'mine.jsonl'},{tmp_path / 'bad.jsonl'}")
    assert "bad.jsonl:2: 'gold' must be an index of 'choices', 0 to 3, not 4" in line


def test_more_examples_than_other_rows(source, tasks, no_weights):
    line = refused(source, "--tasks", tasks / "mine.jsonl", "--num-fewshot", 6)
    assert "num_fewshot=6: mine has only 5 other rows to choose from" in line


def test_tasks_that_need_the_network(source, no_weights, monkeypatch, tmp_path):
    """Names that come with lm-eval: one it does not know, and one whose rows are not here."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "arc_easy.yaml").write_text("task: arc_easy\ndataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy\n")
    # All 14,000 take ten seconds to look through.
    few = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("hf_mlopt.evaluation.harness.TaskManager", lambda **_: few)
    line = refused(source, "--tasks", "arc_easy")
    assert "tasks='arc_easy': its data cannot be loaded" in line and "--task-data DIR with arc_easy.jsonl" in line
    line = refused(source, "--tasks", "arc_easi")
    assert "tasks='arc_easi': lm-eval knows no such task; did you mean arc_easy?" in line


def test_a_chat_template_that_is_not_there(source, tasks, no_weights):
    line = refused(source, "--tasks", tasks / "mine.jsonl", "--apply-chat-template")
    assert "apply_chat_template=True: the tokenizer of source has no chat template" in line


def test_a_chat_template_is_applied(tiny_mixtral, tiny_tokenizer, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    model = tiny_mixtral()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that prompts matter
    source = save(model, tokenizer, tmp_path / "chat")
    many = task_rows.write(tmp_path / "many.jsonl", task_rows.choices(50))
    config = {"models": [str(source)], "tasks": str(many)}
    plain, chat = (evaluate_models(EvaluationConfig(**config, apply_chat_template=on)) for on in (False, True))
    assert plain["models"][0]["results"] != chat["models"][0]["results"]


def test_models_of_the_same_name_are_told_apart(tmp_path):
    for name in ("a/x/model", "b/x/model", "c"):
        (tmp_path / name).mkdir(parents=True)
    names = distinct_names([str(tmp_path / "a/x/model"), str(tmp_path / "b/x/model/"), str(tmp_path / "c"), "org/c"])
    assert names == ["a/x/model", "b/x/model", f"{tmp_path.name}/c", "org/c"]
    with pytest.raises(InputError, match="is given twice"):
        distinct_names([str(tmp_path / "c"), str(tmp_path / "b/../c")])


@pytest.mark.slow  # ten seconds to look through lm-eval's own tasks; test_evaluation_harness.py has it without them
def test_the_yaml_says_the_same_to_stock_lm_eval(both, source, tasks, tmp_path):
    """`lm_eval` as a user would type it, somewhere else on the disk."""
    written = tmp_path / "yaml"
    words = ("--tasks", "mine,arc_easy,winogrande", "--task-data", tasks, "--write-tasks", written)
    succeed("evaluate", source, *words, "--limit", 1)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={source}", "--include_path",
        written, "--tasks", "mine_local,arc_easy_local,winogrande_local", "--batch_size", "8", "--device", "cpu",
        "--output_path", tmp_path / "out",
    ]  # fmt: skip
    outcome = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    stock = json.loads(path.read_text())["results"]
    rows = both[0]["models"][0]["results"]
    assert len(rows) == 5
    for row in rows:
        found = stock[row["task"].partition(" (")[0] + "_local"]
        assert row["value"] == pytest.approx(found[f"{row['metric']},none"])
        assert row["stderr"] == pytest.approx(found[f"{row['metric']}_stderr,none"])
