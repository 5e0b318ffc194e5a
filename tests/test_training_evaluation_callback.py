"""Judging a model while it is trained: into the logs, and without a trace in the weights."""

import random

import numpy as np
import pytest
import task_rows
import torch
from transformers import Trainer, TrainingArguments

from hf_mlopt.errors import InputError
from hf_mlopt.evaluation import evaluate_tasks, load_tasks, perplexity
from hf_mlopt.training import EvaluationCallback


STEPS = 6


@pytest.fixture(scope="module")
def token_ids():
    return torch.randint(3, 260, (70,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    # Examples are drawn at random, from generators of its own.
    return load_tasks(str(task_rows.write(tmp_path_factory.mktemp("tasks") / "mine.jsonl", task_rows.choices(4))))


@pytest.fixture
def make_trainer(tiny_mixtral, tiny_tokenizer, tmp_path):
    def make(**settings):
        rows = torch.randint(3, 260, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
        data = [{"input_ids": row, "labels": row} for row in rows]
        args = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **{"save_strategy": "no", **settings},
        )  # fmt: skip
        model = tiny_mixtral(attention_dropout=0.3, router_jitter_noise=0.1)  # both draw in training
        return Trainer(model, args, train_dataset=data, eval_dataset=data[:2], processing_class=tiny_tokenizer)

    return make


def train(trainer):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    trainer.train()
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, drawn


def careless(*args, **kwargs):
    """As lm-eval does where it is not told otherwise."""
    random.seed(0), np.random.seed(1234), torch.manual_seed(1234)
    return perplexity(*args, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "steps", "eval_steps": 2}])
def test_training_goes_on_as_it_would_have_without(make_trainer, token_ids, tasks, settings, monkeypatch):
    monkeypatch.setattr("hf_mlopt.training.evaluation_callback.perplexity", careless)
    plain, watched = make_trainer(**settings), make_trainer(**settings)
    every = None if settings else 2
    watched.add_callback(EvaluationCallback(watched, token_ids=token_ids, window=10, tasks=tasks, every=every))
    expected, drawn = train(plain)
    found, drawn_then = train(watched)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and drawn == drawn_then
    names = {"eval_perplexity", "eval_nll", "eval_mine_acc", "eval_mine_acc_norm"}
    logged = {log["step"]: log for log in watched.state.log_history if "eval_perplexity" in log}
    assert list(logged) == [2, 4, 6] and all(names <= set(log) for log in logged.values())
    # What the Trainer logs of its own is all there.
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, watched)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_what_is_logged_is_what_is_measured_afterwards(make_trainer, tiny_tokenizer, token_ids, tasks):
    trainer = make_trainer()
    trainer.add_callback(
        EvaluationCallback(trainer, token_ids=token_ids, window=10, tasks=tasks, every=STEPS, limit=3)
    )
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "eval_perplexity" in log]
    assert log["eval_perplexity"] == perplexity(trainer.model, token_ids, 10).perplexity
    (acc, norm) = evaluate_tasks(trainer.model, tiny_tokenizer, tasks, limit=3)
    assert (log["eval_mine_acc"], log["eval_mine_acc_norm"]) == (acc["value"], norm["value"])


def test_the_best_model_is_picked_by_it(make_trainer, token_ids):
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_perplexity", greater_is_better=False,
    )  # fmt: skip
    trainer.add_callback(EvaluationCallback(trainer, token_ids=token_ids, window=10))
    trainer.train()
    values = [log["eval_perplexity"] for log in trainer.state.log_history if "eval_perplexity" in log]
    assert len(values) == 3 and trainer.state.best_metric == min(values)


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"every": 2}, "give tasks, or token_ids for perplexity"),
        ({"token_ids": torch.arange(9), "window": 10}, "9 tokens, less than one window of 10"),
        ({"token_ids": torch.arange(9), "window": 3, "every": 0}, "every=0: must be at least 1"),
    ],
)
def test_what_is_refused(make_trainer, settings, problem):
    with pytest.raises(InputError, match=problem):
        EvaluationCallback(make_trainer(), **settings)


def test_what_the_trainer_must_have(make_trainer, token_ids, tasks, monkeypatch):
    trainer = make_trainer()
    trainer.processing_class = None
    with pytest.raises(InputError, match="tasks need the Trainer to have the tokenizer"):
        EvaluationCallback(trainer, tasks=tasks)
    trainer.is_fsdp_enabled = True
    with pytest.raises(InputError, match="evaluate its checkpoints instead"):
        EvaluationCallback(trainer, token_ids=token_ids, window=10)
