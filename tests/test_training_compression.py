"""Compressed gradients by an argument of the Trainer, on real ranks: the log, checkpoints, evaluation, refusals."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from compressed import Layers, coded, digest, loss_of, sgd
from processes import together
from small_nets import SETTINGS, Recorder, examples, make_trainer
from test_distillation_trainer_ranks import afresh
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_mlopt import MLOptTrainer, MLOptTrainingArguments
from hf_mlopt.communication import compress
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.training import compression as module
from hf_mlopt.training.compression import CompressionCallback


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CODED = {"grad_codec": "bingrad-b", "grad_codec_args": {"block": 64}, "compress_min_bytes": 0}
AHEAD = {**CODED, "error_feedback": "step-ahead"}
STRAIGHT = {"lr_scheduler_type": "constant"}  # a resumed run would otherwise plan its own


class Wide(nn.Module):
    """As `small_nets.Net`, with more to code; `first` is what the recorder reads."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.middle = nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 1)
        self.to(dtype)

    def forward(self, x, labels):
        y = self.norm(self.first(x.to(self.last.weight.dtype))).relu()
        y = self.last(self.middle(y).tanh())[:, 0]
        return {"loss": ((y - labels.to(y.dtype)) ** 2).mean(), "logits": y}


def weights_of(trainer):
    return {name: value.detach().double().tolist() for name, value in trainer.model.named_parameters()}


def make(folder, callbacks=(), seed=0, dtype=torch.float32, **settings):
    return make_trainer(folder, callbacks, model=Wide(seed, dtype), **{**STRAIGHT, **settings})


def in_ranks(function, world=2):
    answers = together(lambda rank: afresh({}) or function(rank), world)
    for answer in answers:
        assert not isinstance(answer, str) or "Traceback" not in answer, answer
    return answers


class Ahead(TrainerCallback):
    """Whether the weights are shifted within an update, and at its end."""

    def __init__(self):
        self.within, self.after = [], []

    def on_substep_end(self, args, state, control, **kwargs):
        self.within.append(self.trainer._compression.compression.ahead.is_ahead)

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.trainer._compression.compression.ahead.is_ahead)


@pytest.mark.distributed
def test_the_log_says_what_travelled_and_replicas_are_equal(tmp_path):
    each = 1 / 8 + 2 * 4 / 64  # w = q/8 + Lβ/d

    def run(rank):
        recorder, ahead = Recorder(), Ahead()
        trainer = make(
            tmp_path, [recorder, ahead], gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=2,
            eval_strategy="steps", eval_steps=3, **AHEAD
        )  # fmt: skip
        ahead.trainer = trainer
        trainer.train()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
        assert not any("grad_bytes" in row for row in evaluated)
        names = ("grad_bytes", "grad_of_bf16", "grad_unsent", "grad_seconds", "grad_plain_buckets")
        wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
        return {
            "world": [trainer.args.world_size, wrapped],
            "weights": recorder.weights,
            "final": weights_of(trainer),
            "logs": [[row[name] for name in names] for row in logs],
            "ahead": [all(ahead.within), any(ahead.after), len(ahead.after)],
        }

    first, second = in_ranks(run)
    assert first["world"] == second["world"] == [2, True]
    assert first["weights"] == second["weights"] and first["final"] == second["final"]
    assert len(first["logs"]) == 5 and all(isinstance(number, float) for row in first["logs"] for number in row)
    exempt = sum(p.numel() for p in Wide().parameters() if p.dim() == 1)
    coded = sum(p.numel() for p in Wide().parameters()) - exempt
    expected = coded * each + 4 * exempt  # two ranks: all gather
    for row in first["logs"][1:]:  # the first has the step of the warm-up
        bytes_, of_bf16, unsent, seconds, plain = row
        assert bytes_ == pytest.approx(expected, rel=0.01)
        assert of_bf16 == pytest.approx(bytes_ / (2 * (coded + exempt)), rel=1e-6)
        assert 0.1 < unsent < 1 and seconds > 0 and plain == 0
    assert first["logs"][0][0] == pytest.approx((expected + 4 * (coded + exempt)) / 2, rel=0.01)
    assert first["ahead"] == [True, False, 10]


def straight(folder, rank, settings):
    """Ten steps, with a checkpoint after five."""
    trainer = make(folder, save_strategy="steps", save_steps=5, **settings)
    trainer.train()
    return weights_of(trainer)


def resumed(folder, rank, settings):
    """On from there: the weights, those after every step, the bytes of every step."""
    recorder = Recorder()
    trainer = make(folder / "resumed", [recorder], seed=9, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    logs = [row.get("grad_bytes", 0) for row in trainer.state.log_history if row["step"] > 5 and "loss" in row]
    return [weights_of(trainer), recorder.weights, logs]


@pytest.mark.distributed
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    cases = [
        {**AHEAD, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.005, "error_average_period": 6},
        {**AHEAD, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "ddp_find_unused_parameters": False},
        {**CODED, "grad_codec": "bingrad-pb", "learning_rate": 1e-3},
    ]

    def run(rank):
        ends = []
        for number, settings in enumerate(cases):
            once = straight(tmp_path / str(number), rank, settings)
            again, _, logs = resumed(tmp_path / str(number), rank, settings)
            assert once == again
            # Each of them per step; residuals are averaged in the first.
            assert len(logs) == 5 and len(set(logs[1:])) == 1
            assert (logs[0] > logs[1]) is ("error_average_period" in settings)
            ends.append(again)
        return ends

    one, two = in_ranks(run)
    assert one == two and len(one) == 3


@pytest.mark.parametrize("world, others", [(2, (1, 3)), (1, (2,))])
@pytest.mark.distributed
def test_another_number_of_ranks_goes_on(tmp_path, world, others):
    settings = {**AHEAD, "learning_rate": 1e-3}
    in_ranks(lambda rank: straight(tmp_path, rank, settings), world)
    for other in others:
        first, *rest = in_ranks(lambda rank: resumed(tmp_path, rank, settings), other)
        assert len(rest) == other - 1 and all(answer[:2] == first[:2] for answer in rest)
        assert len(first[1]) == 5 and any(first[2]) is (other > 1)


@pytest.mark.distributed
def test_what_ranks_have_kept_is_refused_for_another_model_and_dropped_on_request(tmp_path):
    def run(rank):
        settings = {**AHEAD, "learning_rate": 1e-3}
        make(tmp_path / "a", save_strategy="steps", save_steps=5, max_steps=5, **settings).train()
        path = tmp_path / "a" / "checkpoint-5" / f"mlopt_rank_state_{rank}.pt"
        content = torch.load(path, weights_only=True)
        values = content["states"]["gradient_compression"]["residuals"]["values"]
        assert set(values) == {"first.weight", "middle.weight", "last.weight"} and values["middle.weight"].shape == (
            32,
            32,
        )
        values["middle.weight"] = values["middle.weight"].view(16, 64)
        torch.save(content, path)
        trainer = make(tmp_path / "b", **settings)
        try:
            trainer.train(resume_from_checkpoint=str(path.parent))
        except InputError as error:
            message = str(error)
        trainer = make(tmp_path / "c", reset_local_state=True, **settings)
        trainer.train(resume_from_checkpoint=str(path.parent))
        return [message, trainer.state.global_step]

    for message, steps in in_ranks(run):
        assert message == "middle.weight: the checkpoint holds [16, 64] unsent numbers, the model has [32, 32]"
        assert steps == 10


@pytest.mark.distributed
def test_training_twice_goes_on_or_begins_afresh_with_the_model(tmp_path):
    """With `model_init`, a second `train()` wraps another model, whose gradients are coded as well."""

    def run(rank):
        settings = {**SETTINGS, **STRAIGHT, **AHEAD, "learning_rate": 1e-3, "max_steps": 4}
        args, recorder = MLOptTrainingArguments(output_dir=str(tmp_path), **settings), Recorder()
        trainer = MLOptTrainer(model_init=lambda: Wide(), args=args, train_dataset=examples(), callbacks=[recorder])
        trainer.train()
        once = trainer._compression.compression
        trainer.train()
        anew = trainer._compression.compression
        assert anew is not once and recorder.weights[:4] == recorder.weights[4:]

        trainer = make(tmp_path, **{**AHEAD, "learning_rate": 1e-3, "max_steps": 4})
        trainer.train()
        hooks, once = len(trainer.model._forward_pre_hooks), trainer._compression.compression
        trainer.train()
        assert trainer._compression.compression is once and len(trainer.model._forward_pre_hooks) <= hooks
        assert once.state.step == 8 and trainer.state.log_history[-2]["grad_bytes"] > 0
        trainer.model_wrapped = trainer.model  # wrapped once more
        trainer.train()
        assert trainer._compression.compression is not once and len(trainer.model._forward_pre_hooks) <= hooks
        assert once.state.step == 8 and trainer.state.log_history[-2]["grad_bytes"] > 0
        return weights_of(trainer)

    one, two = in_ranks(run)
    assert one == two


@pytest.mark.distributed
def test_two_lines_in_a_loop_of_accelerate_are_those_of_a_plain_one():
    def run(rank):
        settings = {"grad_codec": "bingrad-b", "grad_codec_args": {"block": 64}, "error_feedback": "step-ahead"}
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = Layers()
        model, optimizer = accelerator.prepare(net, sgd(net, momentum=0.9))
        compression = compress(model, optimizer, min_bytes=0, **settings)
        for number in range(8):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, rank, *divmod(number, 2)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e9)
                optimizer.step()
                optimizer.zero_grad()
        other, *_ = coded(
            rank, 4, Layers(), lambda model: sgd(model, momentum=0.9), 2, ddp={"bucket_cap_mb": 25}, **settings
        )
        assert compression.take_traffic().steps == 4
        return [digest(net), digest(other)]

    one, two = in_ranks(run)
    assert one == two and one[0] == one[1]


@pytest.mark.distributed
def test_the_best_model_is_loaded_as_it_was_saved(tmp_path):
    def run(rank):
        trainer = make(
            tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.01,
            load_best_model_at_end=True, **AHEAD
        )  # fmt: skip
        trainer.train()
        best = min(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
        return [best, trainer.evaluate()["eval_loss"]]

    for best, now in in_ranks(run):
        assert now == pytest.approx(best, rel=1e-6)


@pytest.mark.distributed
def test_pure_bfloat16_trains_and_replicas_are_equal(tmp_path):
    def run(rank):
        trainer = make(tmp_path, dtype=torch.bfloat16, learning_rate=0.01, **AHEAD)
        before = weights_of(trainer)
        trainer.train()
        return [weights_of(trainer), weights_of(trainer) != before]

    one, two = in_ranks(run)
    assert one == two and one[1]


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_other_with_a_message(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def run(rank):
        model = Wide()
        model.norm = nn.LayerNorm(32)  # else DDP, with the statistics of a batch, is the first to miss the other
        settings = {**AHEAD, "logging_steps": 100, "ddp_find_unused_parameters": False}
        trainer = make_trainer(tmp_path, [Die()], model=model, **settings)
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error)

    survivor, killed = together(lambda rank: afresh({}) or run(rank))
    assert killed is None
    assert "rank 0: gradients were not exchanged; another process has ended" in survivor


def test_one_process_is_told_that_nothing_is_coded(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(module.logger, "warning", warned.append)
    trainer = make(tmp_path, max_steps=2, **AHEAD)
    trainer.train()
    assert warned == ["grad_codec='bingrad-b': one process sends no gradients; nothing is coded."]
    assert not any("grad_bytes" in row for row in trainer.state.log_history)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grad_codec": "gzip"}, "grad_codec='gzip': must be one of none"),
        ({"grad_codec": "orq-5", "grad_codec_args": "{"}, "grad_codec_args='{': must be a dict or a JSON object"),
        (
            {"grad_codec": "orq-5", "grad_codec_args": '{"size": 1}'},
            "grad_codec_args.size=1: orq-5 has no such setting",
        ),
        ({"error_feedback": "classic"}, "error_feedback='classic': needs grad_codec"),
        ({"grad_codec_down": "bf16"}, "grad_codec_down='bf16': needs grad_codec"),
        ({"error_average_period": 3}, "error_average_period=3: needs grad_codec"),
        ({"grad_collective": "hierarchical"}, "grad_collective='hierarchical': needs grad_codec"),
        ({**CODED, "grad_collective": "hierarchical", "compress_auto_off": True}, "compress_auto_off=True: measures"),
        (
            {**CODED, "mlopt_optim": "domo", "local_steps": 4},
            "grad_codec='bingrad-b': codes gradients, and domo sends",
        ),
        ({**CODED, "mlopt_optim": "diloco"}, "grad_codec='bingrad-b': codes gradients, and diloco sends models"),
        ({"grad_codec": "terngrad", "error_feedback": "classic"}, "grad_codec='terngrad': errs by more"),
        ({**CODED, "step_ahead": -1.0}, "step_ahead=-1.0: must be between 0 and 1"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError) as refused:
        make_trainer(tmp_path, **settings)
    assert str(refused.value).startswith(message)


def test_deepspeed_is_refused(tmp_path):
    trainer = make(tmp_path, **CODED)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ConfigurationError, match="grad_codec='bingrad-b': does not act under DeepSpeed.*DDP or FSDP"):
        CompressionCallback(trainer, trainer._compression.config)
