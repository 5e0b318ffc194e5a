"""Local steps in two real processes: what is equal when, what travels, what a checkpoint keeps, what is refused."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from processes import together
from small_nets import Net, Recorder, examples, make_trainer, state_of
from test_distillation_trainer_ranks import afresh
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.optimizers import DOMO
from hf_mlopt.training.local_steps import LocalStepsCallback


ranks = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
DOMO_4 = {"mlopt_optim": "domo", "local_steps": 4}


def in_two(function):
    answers = together(lambda rank: afresh({}) or function(rank))
    for answer in answers:
        assert not isinstance(answer, str) or "Traceback" not in answer, answer
    return answers


class Calls(TrainerCallback):
    """Collectives on tensors, counted while training."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.count, self.elements, original = 0, [], dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.count += 1
            self.elements.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}], ids=str)
@pytest.mark.distributed
def test_ranks_are_equal_after_a_round_and_differ_within(tmp_path, settings):
    def run(rank):
        recorder, calls = Recorder(), Calls()
        trainer = make_trainer(tmp_path, [recorder, calls], **DOMO_4, **settings)
        trainer.train()
        numbers = sum(p.numel() for p in trainer.model.parameters()) + 6 + 2  # mean and variance; an lr sum a group
        return {
            "world": trainer.args.world_size,
            "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
            "weights": recorder.weights,
            "means": recorder.means,
            "final": state_of(trainer.model),
            "elements": calls.elements,
            "numbers": numbers,
            "rounds": next(c for c in trainer.callback_handler.callbacks if isinstance(c, LocalStepsCallback)).rounds,
        }

    first, second = in_two(run)
    assert first["world"] == second["world"] == 2 and first["wrapped"]
    for step in range(1, 11):
        is_over = step in (4, 8, 10)  # the last round is shorter
        assert (first["weights"][step - 1] == second["weights"][step - 1]) is is_over, step
        assert (first["means"][step - 1] == second["means"][step - 1]) is is_over, step
    assert first["final"] == second["final"]
    # 10 steps, 3 rounds, and nothing else travels: every number of the model once a round.
    assert first["rounds"] == 3 and first["elements"] == [first["numbers"]] * 3


def twice(tmp_path, straight, resumed, save=4, **changes):
    """Trains straight through with a checkpoint on the way, then goes on from it; on two ranks."""

    def run(rank):
        data = examples(40, seed=rank, shift=float(rank)) if straight.get("per_rank_data") else None
        model = Net(dtype=straight.pop("dtype", torch.float32))
        trainer = make_trainer(
            tmp_path / "straight", model=model, data=data, save_strategy="steps", save_steps=save, **straight
        )
        trainer.train()
        other = Net(seed=9, dtype=next(model.parameters()).dtype)
        resumed.pop("dtype", None)
        again = make_trainer(tmp_path / "resumed", model=other, data=data, **{**resumed, **changes})
        again.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{save}"))
        return [trainer.args.world_size, state_of(trainer.model), state_of(again.model)]

    answers = in_two(run)
    assert [answer[0] for answer in answers] == [2, 2] and answers[0][1] == answers[1][1]
    return answers


@pytest.mark.parametrize(
    "settings",
    [
        DOMO_4,
        {**DOMO_4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "dtype": torch.bfloat16},
        {"mlopt_optim": "domo-s", "local_steps": 2, "lr_scheduler_type": "cosine"},
        {"mlopt_optim": "fedavg-slm", "local_steps": 4, "learning_rate": 0.01},
        {"mlopt_optim": "diloco", "local_steps": 4, "learning_rate": 0.01, "per_rank_data": True},
    ],
    ids=lambda settings: f"{settings['mlopt_optim']}-{len(settings)}",
)
@pytest.mark.distributed
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, settings):
    for _, straight, resumed in twice(tmp_path, dict(settings), dict(settings)):
        assert straight == resumed


@pytest.mark.distributed
def test_silos_weigh_by_their_examples(tmp_path):
    """Two steps of plain averaging in rank 0 and 1 with 8 and 24 examples of their own."""

    def run(rank):
        data = examples(8 if rank == 0 else 24, seed=rank, shift=3.0 * rank)
        seen = []

        class Seen(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                seen.append(model.last.bias.item())

        trainer = make_trainer(
            tmp_path, [Seen()], data=data, mlopt_optim="fedavg", local_steps=2, max_steps=2, per_rank_data=True,
            local_weights="examples", lr_scheduler_type="constant"
        )  # fmt: skip
        original = DOMO.sync
        local = []

        def sync(self, *args, **kwargs):
            local.append(trainer.model.last.bias.item())
            original(self, *args, **kwargs)

        DOMO.sync = sync
        loader = trainer.get_train_dataloader()
        labels = [label for batch in loader for label in batch["labels"].tolist()]
        trainer.train()
        return [
            local[0],
            trainer.model.last.bias.item(),
            sorted(labels) == sorted(row["labels"].item() for row in data),
        ]

    (one, mean, whole_one), (two, same, whole_two) = in_two(run)
    assert whole_one and whole_two  # each rank goes through all of its own
    assert mean == same == pytest.approx(0.25 * one + 0.75 * two, rel=1e-5) and one != two


@pytest.mark.distributed
def test_evaluation_in_a_round_sees_the_server_model_and_changes_nothing(tmp_path):
    def run(rank):
        plain, evaluated = Recorder(), Recorder()
        make_trainer(tmp_path, [plain], **DOMO_4).train()
        trainer = make_trainer(tmp_path, [evaluated], eval_strategy="steps", eval_steps=3, **DOMO_4)
        points = []
        original = trainer.evaluation_loop

        def loop(*args, **kwargs):
            output = original(*args, **kwargs)
            points.append(trainer.model.first.weight.flatten().tolist())
            return output

        trainer.evaluation_loop = loop
        trainer.train()
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        return [plain.weights == evaluated.weights, points, losses]

    first, second = in_two(run)
    assert first[0] and second[0]
    assert len(first[1]) == 4 and first[1] == second[1] and first[2] == second[2]


@pytest.mark.parametrize(
    "rank_1, message",
    [
        ({"local_steps": 2}, r"local_steps: the ranks disagree \(\[4, 2\]\)"),
        ({"max_steps": 12}, r"max_steps: the ranks disagree \(\[10, 12\]\)"),
        ({"mlopt_optim": "fedavg"}, "variant: the ranks disagree"),
    ],
)
@pytest.mark.distributed
def test_ranks_that_disagree_are_refused_together(tmp_path, rank_1, message):
    def run(rank):
        try:
            make_trainer(tmp_path, **{**DOMO_4, **(rank_1 if rank else {})}).train()
        except InputError as error:
            return str(error)

    for answer in in_two(run):
        assert re.search(message, answer)


@pytest.mark.parametrize("changes, message", [({"local_steps": 2}, "written with 4")])
@pytest.mark.distributed
def test_another_length_of_rounds_is_refused_unless_reset(tmp_path, changes, message):
    def run(rank):
        make_trainer(tmp_path / "a", save_strategy="steps", save_steps=4, **DOMO_4).train()
        settings = {**DOMO_4, **changes}
        try:
            make_trainer(tmp_path / "b", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
        except ConfigurationError as error:
            refusal = str(error)
        trainer = make_trainer(tmp_path / "c", reset_local_state=True, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
        return [refusal, trainer.state.global_step]

    for refusal, steps in in_two(run):
        assert refusal.startswith("local_steps=2: ") and message in refusal and "reset_local_state" in refusal
        assert steps == 10


@pytest.mark.distributed
def test_one_process_goes_on_from_two_when_reset(tmp_path):
    def run(rank):
        make_trainer(tmp_path / "two", save_strategy="steps", save_steps=4, **DOMO_4).train()
        return rank

    in_two(run)
    checkpoint = str(tmp_path / "two" / "checkpoint-4")
    with pytest.raises(InputError, match="written by 2 processes, resumed by 1"):
        make_trainer(tmp_path / "one", **DOMO_4).train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(tmp_path / "one", reset_local_state=True, **DOMO_4)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.optimizer.param_groups[0]["round"] == 3


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_other_with_a_message(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def run(rank):
        try:
            make_trainer(tmp_path, [Die()], ddp_timeout=30, logging_steps=100, **DOMO_4).train()
        except RuntimeError as error:
            return str(error)

    survivor, killed = together(lambda rank: afresh({}) or run(rank))
    assert killed is None
    assert survivor.startswith("rank 0, round 1: the local models were not averaged; another process has ended")


@pytest.mark.distributed
def test_a_model_that_diverges_is_named_on_every_rank(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5 and args.process_index == 1:
                model.first.weight.data[0, 0] = float("nan")

    def run(rank):
        try:
            make_trainer(tmp_path, [Spoil()], **DOMO_4).train()
        except RuntimeError as error:
            return str(error)

    for rank, answer in enumerate(in_two(run)):
        assert answer.startswith(f"rank {rank}, round 1: the model of rank 1 is not finite")


def test_what_cannot_be_averaged_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"save_steps=6: must be a multiple of local_steps=4"):
        make_trainer(tmp_path, save_strategy="steps", save_steps=6, **DOMO_4)
    model = Net()
    model.norm = torch.nn.SyncBatchNorm(3)
    with pytest.raises(ConfigurationError, match="model='norm': SyncBatchNorm"):
        make_trainer(tmp_path, model=model, **DOMO_4)
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = make_trainer(tmp_path, **DOMO_4)
        setattr(trainer, name, True)
        with pytest.raises(ConfigurationError, match="average whole models"):
            LocalStepsCallback(trainer)
    trainer = make_trainer(tmp_path, **DOMO_4)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigurationError, match="n_gpu=2: local steps average whole models.*accelerate launch"):
        LocalStepsCallback(trainer)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mlopt_optim": "domo", "local_steps": 0}, "local_steps=0: must be at least 1"),
        ({"mlopt_optim": "rsgdm", "local_steps": 4}, "local_steps=4: needs mlopt_optim to be one of diloco, domo"),
        ({"mlopt_optim": "domo", "local_weights": "n"}, "local_weights='n': must be equal or examples"),
        ({"mlopt_optim": "fedavg", "mlopt_optim_args": {"variant": "domo"}}, "mlopt_optim_args.variant='domo'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, **settings)


def test_an_optimizer_without_rounds_is_refused_when_training_begins(tmp_path):
    with pytest.raises(ConfigurationError, match="local_steps=4: needs an optimizer with rounds, not AdamW"):
        make_trainer(tmp_path, local_steps=4).train()


def test_one_process_is_a_lookahead_with_momentum(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=40, **{**DOMO_4, "learning_rate": 0.01})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.optimizer.param_groups[0]["round"] == 10
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
