"""Optimizers with two points in a Trainer: which one is saved, reloaded, resumed."""

import pytest
import torch
from safetensors.torch import load_file
from small_nets import Net, examples, make_trainer, state_of
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.optimizers import RSGD
from hf_mlopt.training.optimizer_table import OPTIMIZERS


class StopAt(TrainerCallback):
    """Ends training early, so that nothing is evaluated or saved after the step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def saved(folder):
    return {name: value.double().tolist() for name, value in load_file(folder / "model.safetensors").items()}


def x_of(trainer):
    """The average, from the training point and the residual, whatever the optimizer's view is."""
    group = trainer.optimizer.param_groups[0]
    points = {}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.optimizer.state.get(parameter, {})
        moved = group["view"] == "train" and "residual" in state
        points[name] = (
            parameter.detach() + state["residual"] * (group["detach"] * state["residual_scale"])
            if moved
            else parameter.detach()
        )
    return points


def test_a_checkpoint_without_an_evaluation_holds_the_evaluation_point(tmp_path):
    trainer = make_trainer(tmp_path, mlopt_optim="rsgdm", save_strategy="steps", save_steps=5)
    at_the_end = {}
    original = trainer.callback_handler.on_step_end

    def on_step_end(args, state, control):
        at_the_end[state.global_step] = {name: value.clone() for name, value in x_of(trainer).items()}
        return original(args, state, control)

    trainer.callback_handler.on_step_end = on_step_end
    trainer.train()
    for step in (5, 10):
        content = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for name, value in at_the_end[step].items():
            assert content[name].equal(value), (step, name)
    trainer.save_model(str(tmp_path / "final"))
    assert load_file(tmp_path / "final" / "model.safetensors")["first.weight"].equal(at_the_end[10]["first.weight"])
    # The model in memory is left there too, and training goes on from w.
    assert trainer.model.first.weight.detach().equal(at_the_end[10]["first.weight"])
    trainer.optimizer.train()
    assert not trainer.model.first.weight.detach().equal(at_the_end[10]["first.weight"])


@pytest.mark.parametrize("point", ["x", "y", "w"])
def test_the_best_model_is_what_was_evaluated(tmp_path, point):
    trainer = make_trainer(
        tmp_path, [StopAt(13)], mlopt_optim="rsgdm", mlopt_optim_args={"eval_point": point}, learning_rate=0.3,
        max_steps=20,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        lr_scheduler_type="constant", metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = max(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-12")  # or nothing would move
    assert trainer.state.global_step == 13
    assert saved(tmp_path / trainer.state.best_model_checkpoint.split("/")[-1]) == state_of(trainer.model)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    assert saved(tmp_path / "final") == state_of(trainer.model)


@pytest.mark.parametrize("point", ["x", "y"])
def test_the_best_model_of_an_optimizer_with_rounds(tmp_path, point):
    """Training stops within a round: the best weights must not be averaged with anything."""
    trainer = make_trainer(
        tmp_path, [StopAt(14)], mlopt_optim="domo", local_steps=4, learning_rate=0.01, max_steps=20,
        eval_strategy="steps",
        eval_steps=4, save_strategy="steps", save_steps=4, load_best_model_at_end=True,
        lr_scheduler_type="constant", mlopt_optim_args={"eval_point": point}, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 14
    assert saved(tmp_path / trainer.state.best_model_checkpoint.split("/")[-1]) == state_of(trainer.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name, dtype):
    settings = {"mlopt_optim": name, "learning_rate": 0.02, "max_steps": 8, "gradient_accumulation_steps": 2}
    if OPTIMIZERS[name].exchanges and dtype == torch.bfloat16:
        with pytest.raises(ConfigurationError, match="weights must be float32 or float64"):  # they hold a shift
            make_trainer(tmp_path, model=Net(dtype=dtype), **settings).train()
        return
    straight = make_trainer(tmp_path / "a", model=Net(dtype=dtype), save_strategy="steps", save_steps=4, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "b", model=Net(seed=5, dtype=dtype), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert state_of(straight.model) == state_of(resumed.model)
    steps = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert steps == [row["loss"] for row in resumed.state.log_history if "loss" in row]
    if OPTIMIZERS[name].target.startswith("hf_mlopt"):
        kept = [value for state in resumed.optimizer.optimizer.state.values() for value in state.values()]
        kept = [value for value in kept if isinstance(value, torch.Tensor)]
        assert kept and all(tensor.dtype == torch.float32 for tensor in kept)  # not that of the parameters


def test_the_learning_rate_of_the_arguments_reaches_every_optimizer(tmp_path):
    for name in OPTIMIZERS:
        trainer = make_trainer(tmp_path, mlopt_optim=name, learning_rate=0.0123, weight_decay=0.4)
        trainer.create_optimizer()
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0123, 0.0123]
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.4, 0.0]


def test_an_optimizer_that_is_passed_is_driven_the_same_way(tmp_path):
    model = Net()
    optimizer = RSGD(model.parameters(), lr=0.05)
    trainer = make_trainer(tmp_path, model=model)
    trainer.optimizer = optimizer
    trainer.train()
    assert optimizer.param_groups[0]["view"] == "eval"


def test_adam_arguments_reach_the_base(tmp_path):
    settings = {"mlopt_optim": "rsgd-adamw", "adam_beta2": 0.95, "mlopt_optim_args": {"base_args": {"eps": 1e-5}}}
    trainer = make_trainer(tmp_path, data=examples(8), **settings)
    trainer.create_optimizer()
    group = trainer.optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-5
