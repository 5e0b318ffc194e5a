"""
Distillation in two processes is that of one with the same batch, whether they hold the models (DDP) or shards (FSDP2).

accelerate shards on GPUs only; here it is told that the two processes, which speak gloo, are such. The rest is real.
"""

import os

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from distilled import assert_same_trajectory, logs, make_pair, make_trainer, record_batches, rows, zeros_of
from processes import together
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_mlopt.moe import moe_layers
from hf_mlopt.resources import resource_dir
from hf_mlopt.training.callbacks import KeepZerosCallback, sparsity_of


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logit_weight": 0.1, "eval_strategy": "steps"}
STEPS |= {"eval_steps": 2, "per_device_eval_batch_size": 1, "per_device_train_batch_size": 1}
THREE = {"num_local_experts": 3}  # which two processes cannot share evenly


def environment_of(recipe, **overrides):
    """What `accelerate launch --config_file` puts into the environment of every process."""
    path = resource_dir("recipes") / "accelerate" / f"{recipe}.yaml"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if value != os.environ.get(name)} | (
        overrides
    )


def afresh(environment):
    for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
        state._reset_state()
    os.environ.update(environment)
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        begin = PartialState.__init__

        def begin_as_gpu(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = begin_as_gpu


def trainer_of(pair, folder, **settings):
    trainer = make_trainer(*pair, folder, rows(16), **{**STEPS, **settings})
    trainer.eval_dataset = rows(4)
    return trainer


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def local_experts(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    weight = model.model.layers[0].mlp.experts.down_proj
    return len(weight.to_local()) if isinstance(weight, DTensor) else len(weight)


@torch.no_grad()
def held_again(model):
    """Weights that a second training would hold, after a forward pass that leaves FSDP's weights whole."""
    model.eval()(torch.tensor([[3, 4, 5]]))
    callback = KeepZerosCallback()
    callback.on_train_begin(None, None, None, model=model)
    held = sum(int(zeros.sum()) for _, zeros in callback._zeros)
    callback.on_train_end(None, None, None)
    return held


def two_ranks(folder, environment, **settings):
    """Two processes train straight through, then go on from the middle with another student."""
    pair, another = make_pair(**THREE), (make_pair(seed=1, **THREE)[0], make_pair(**THREE)[1])

    def run(rank):
        afresh(environment)
        straight = trainer_of(pair, folder / "straight", gradient_accumulation_steps=2, **settings)
        batches = record_batches(straight)
        straight.train()
        straight.save_model(str(folder / "final"))
        resumed = trainer_of(another, folder / "resumed", gradient_accumulation_steps=2, **settings)
        resumed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-2"))
        resumed.save_model(str(folder / "resumed_final"))
        return {
            "world_size": straight.args.world_size,
            "type": straight.accelerator.distributed_type,
            "predicted": [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches],
            "logs": logs(straight),
            "eval": logs(straight, "eval_expert_mse"),
            "resumed": logs(resumed),
            "student_experts": local_experts(straight.model),
            "teacher_experts": local_experts(straight.teacher.model),
            "held_twice": held_again(straight.model),
            "sparsity": [sparsity_of(layer.experts.down_proj) for layer in moe_layers(straight.model)],
        }

    answers = together(run)
    for answer in answers:
        assert isinstance(answer, dict), answer
        assert answer["world_size"] == 2
    return answers


def one_process(folder, **settings):
    """The same four rows a step, one at a time, as the two processes take them."""
    trainer = trainer_of(make_pair(**THREE), folder / "one", gradient_accumulation_steps=4, **settings)
    trainer.train()
    trainer.save_model(str(folder / "one_final"))
    return trainer


def assert_two_are_one(folder, answers, alone):
    first, second = answers
    # Their shares of the first step differ, so that a mean of the processes' means would be another number.
    assert sum(first["predicted"][:2]) != sum(second["predicted"][:2])
    final, expected = weights_of(folder / "final"), weights_of(folder / "one_final")
    assert final.keys() == expected.keys()
    for answer in answers:
        assert_same_trajectory((logs(alone), expected), (answer["logs"], final))
        for ours, theirs in zip(answer["logs"], logs(alone), strict=True):
            assert ours.keys() == theirs.keys() and ours["mask_violations"] == 0
            for name in ("aux_loss", "logit_kl", "lmbda", "expert_mse_layer_1"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        for ours, theirs in zip(answer["eval"], logs(alone, "eval_expert_mse"), strict=True):
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
            assert ours["eval_expert_mse"] == pytest.approx(theirs["eval_expert_mse"], rel=1e-5)
    student, _ = make_pair(**THREE)
    trained, _ = make_pair(**THREE)
    trained.load_state_dict(final)
    assert all(map(torch.equal, zeros_of(trained), zeros_of(student)))


def assert_resumed_exactly(folder, answers):
    for answer in answers:
        assert answer["resumed"] == answer["logs"] and len(answer["logs"]) == 4
    final, resumed = weights_of(folder / "final"), weights_of(folder / "resumed_final")
    assert all(torch.equal(final[name], value) for name, value in resumed.items())


def test_two_processes_are_one(tmp_path):
    answers = two_ranks(tmp_path, environment_of("ddp", ACCELERATE_MIXED_PRECISION="no"))
    assert [answer["type"] for answer in answers] == ["MULTI_CPU"] * 2
    assert_two_are_one(tmp_path, answers, one_process(tmp_path))
    assert_resumed_exactly(tmp_path, answers)


def check_shards(tmp_path, **overrides):
    answers = two_ranks(tmp_path, environment_of("fsdp2", ACCELERATE_MIXED_PRECISION="no", **overrides))
    assert [answer["type"] for answer in answers] == ["FSDP"] * 2
    assert [answer["student_experts"] for answer in answers] == [2, 1] == [a["teacher_experts"] for a in answers]
    assert answers[0]["sparsity"] == answers[1]["sparsity"] == [0.5, 0.5]
    assert sum(answer["held_twice"] for answer in answers) == sum(
        int(z.sum()) for z in zeros_of(make_pair(**THREE)[0])
    )
    assert_two_are_one(tmp_path, answers, one_process(tmp_path))
    assert_resumed_exactly(tmp_path, answers)


def test_shards_in_two_processes_are_one(tmp_path):
    check_shards(tmp_path)
    assert not list((tmp_path / "straight" / "checkpoint-2").glob("*.safetensors"))  # in shards, as the recipe says


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [{"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {"FSDP_ACTIVATION_CHECKPOINTING": "false"},
     {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, {"FSDP_RESHARD_AFTER_FORWARD": "false"}],
    ids=str,
)  # fmt: skip
def test_other_settings_of_fsdp_give_the_same(tmp_path, overrides):
    check_shards(tmp_path, **overrides)


@pytest.mark.slow
def test_shards_in_bfloat16_hold_their_zeros(tmp_path):
    """The recipe as it is: what is trained stays in float32, what is computed with is bfloat16."""
    answers = two_ranks(tmp_path, environment_of("fsdp2"))
    assert_resumed_exactly(tmp_path, answers)
    alone = logs(one_process(tmp_path))
    for ours, theirs in zip(answers[0]["logs"], alone, strict=True):
        assert ours["mask_violations"] == 0
        for name in ("loss", "expert_mse", "lmbda"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05) and ours[name] != theirs[name]
    final = weights_of(tmp_path / "final")
    assert {value.dtype for value in final.values()} == {torch.float32}
    trained, _ = make_pair(**THREE)
    trained.load_state_dict(final)
    assert all(map(torch.equal, zeros_of(trained), zeros_of(make_pair(**THREE)[0])))
