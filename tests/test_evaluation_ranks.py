"""Evaluation shared between two processes, forks of this one that speak gloo, gives what one process gives."""

import json
import os

import pytest
import task_rows
import torch
import torch.distributed as dist
from command_line import hf_mlopt, save, succeed
from test_workflow_stream_ranks import together

from hf_mlopt.errors import InputError
from hf_mlopt.evaluation import evaluate_tasks, load_tasks, perplexity


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_mixtral, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("ranks")
    save(tiny_mixtral(), tiny_tokenizer, folder / "model")
    task_rows.write(folder / "data" / "mine.jsonl", task_rows.choices(9))
    task_rows.write(folder / "data" / "winogrande.jsonl", task_rows.contexts(4))
    return folder


def count_requests(language_model, counts):
    """Notes how many requests this process answers, and of how many processes it is one."""
    original = language_model._loglikelihood_tokens

    def counting(self, requests, *args, **kwargs):
        counts.append([len(requests), self.rank, self.world_size])
        return original(self, requests, *args, **kwargs)

    language_model._loglikelihood_tokens = counting


def test_the_command_in_two_processes(work, tmp_path):
    words = (
        "evaluate", work / "model", "--tasks", "mine,winogrande", "--task-data", work / "data",
        "--perplexity", "embedded", "--window", 32, "--max-windows", 7, "--device", "cpu", "--batch-size", 1,
    )  # fmt: skip
    succeed(*words, "--output", tmp_path / "alone.json")

    def run(rank):
        from accelerate import PartialState
        from lm_eval.models.huggingface import HFLM

        PartialState._reset_state()  # of an earlier test in the process that this one is a copy of
        counts = []
        count_requests(HFLM, counts)
        outcome = hf_mlopt(*words, "--output", tmp_path / "both.json", "--write-tasks", tmp_path / "yaml")
        return [outcome.status, outcome.out, outcome.err, counts]

    first, second = together(run, group=False)
    assert (first[0], second[0]) == (0, 0), (first, second)
    # Five of nine and two of four documents, with 4 and 2 requests each, filled up to the same number.
    assert first[3] == [[5 * 4 + 2 * 2, 0, 2]] and second[3] == [[5 * 4 + 2 * 2, 1, 2]]
    assert "perplexity" in first[1] and second[1] == ""
    alone, both = (json.loads((tmp_path / f"{name}.json").read_text())["models"][0] for name in ("alone", "both"))
    assert both["perplexity"] == alone["perplexity"]
    for row, expected in zip(both["results"], alone["results"], strict=True):
        assert row == {**expected, "stderr": pytest.approx(expected["stderr"], rel=1e-9)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone.json", "alone.png", "both.json", "both.png", "yaml",
    ]  # fmt: skip


def test_in_a_group_only_who_says_so_shares(work, tiny_mixtral, tiny_tokenizer):
    """The first process may evaluate a model while the others do something else."""

    def run(rank):
        tasks = load_tasks("mine", str(work / "data"))
        if rank == 1:
            return dist.get_world_size()
        rows = evaluate_tasks(tiny_mixtral(), tiny_tokenizer, tasks, bootstrap_iters=0)
        return [dist.get_world_size(), *(row["samples"] for row in rows)]

    assert together(run) == [[2, 9, 9], 2]


def test_fewer_documents_or_windows_than_processes(work, tiny_mixtral, tiny_tokenizer):
    def run(rank):
        tasks = load_tasks("mine", str(work / "data"))
        with pytest.raises(InputError, match="1 documents for 2 processes; start fewer"):
            evaluate_tasks(tiny_mixtral(), tiny_tokenizer, tasks, limit=1, distributed=True)
        ids = torch.arange(3, 40)
        assert perplexity(tiny_mixtral(), ids, 20, distributed=True) == perplexity(tiny_mixtral(), ids, 20)
        return dist.get_world_size()

    assert together(run) == [2, 2]


def test_all_stop_where_one_finds_nan(tiny_mixtral):
    """Nobody is left waiting for it."""

    def run(rank):
        model = tiny_mixtral()
        if rank == 1:
            model.lm_head.weight.data[7, 0] = torch.nan
        with pytest.raises(InputError, match="loss is nan in window 1"):
            perplexity(model, torch.arange(3, 43), 10, distributed=True)
        return dist.get_world_size()

    assert together(run) == [2, 2]


def test_while_a_model_is_trained(work, tiny_mixtral, tiny_tokenizer, tmp_path):
    ids = torch.arange(3, 73)

    def run(rank):
        from accelerate import PartialState
        from transformers import Trainer, TrainingArguments

        from hf_mlopt.training import EvaluationCallback

        PartialState._reset_state()
        data = [{"input_ids": [number] * 8, "labels": [number] * 8} for number in range(10, 26)]
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(tiny_mixtral(), args, train_dataset=data, processing_class=tiny_tokenizer)
        tasks = load_tasks("mine", str(work / "data"))
        trainer.add_callback(EvaluationCallback(trainer, token_ids=ids, window=10, tasks=tasks, every=2, batch_size=1))
        trainer.train()
        logged = next(log for log in trainer.state.log_history if "eval_perplexity" in log)
        alone = perplexity(trainer.model, ids, 10, 1).perplexity
        rows = evaluate_tasks(trainer.model, tiny_tokenizer, tasks, batch_size=1)
        logged = [logged[name] for name in ("eval_perplexity", "eval_mine_acc", "eval_mine_acc_norm")]
        return [args.world_size, logged, [alone, *(row["value"] for row in rows)]]

    first, second = together(run, group=False)
    assert first == second and first[0] == 2, (first, second)
    assert first[1] == first[2]
