"""Coded gradients in the Trainer under FSDP2. accelerate shards on GPUs only; here it is told that ranks are such."""

import os

import pytest
from processes import together
from small_nets import make_trainer
from test_distillation_trainer_ranks import afresh, environment_of
from test_training_compression import AHEAD, CODED, STRAIGHT, Wide
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_mlopt.communication import ShardedCompression
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.training.compression import CompressionCallback


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
OWN = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
CLASSIC = {**CODED, "error_feedback": "classic"}


def make(folder, seed=0, **settings):
    return make_trainer(
        folder, model=Wide(seed), **{**STRAIGHT, "save_strategy": "steps", "save_steps": 5, **settings}
    )


def shards_of(trainer):
    return {name: p.to_local().tolist() for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)}


def in_ranks(function):
    def run(rank):
        afresh(environment_of("fsdp2", **OWN))
        return function(rank)

    answers = together(run)
    for answer in answers:
        assert not isinstance(answer, str), answer
    return answers


def test_shards_are_coded_logged_and_resumed(tmp_path):
    def run(rank):
        trainer = make(tmp_path, **CLASSIC)
        trainer.train()
        resumed = make(tmp_path / "resumed", seed=9, **CLASSIC)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        logs = [row for row in trainer.state.log_history if "loss" in row]
        names = ("grad_bytes", "grad_of_bf16", "grad_unsent")
        return {
            "kind": [trainer.args.world_size, isinstance(trainer.model_wrapped, FSDPModule)],
            "compression": isinstance(trainer._compression.compression, ShardedCompression),
            "logs": [[row[name] for name in names] for row in logs],
            "weights": [shards_of(trainer), shards_of(resumed)],
        }

    for answer in in_ranks(run):
        assert answer["kind"] == [2, True] and answer["compression"]
        whole, again = answer["weights"]
        assert whole and whole == again
        for _bytes, of_bf16, unsent in answer["logs"][1:]:
            assert 0.05 < of_bf16 < 0.3 and 0.1 < unsent < 1


def test_what_cannot_be_is_refused_before_training(tmp_path):
    def run(rank):
        told = []
        for settings in (AHEAD, {**CODED, "grad_codec_down": "orq-9"}, {**CLASSIC, "keep_zeros": True}):
            try:
                make(tmp_path, **settings)
            except ConfigurationError as error:
                told.append(str(error).split(":")[0])
        return told

    fields = ["error_feedback='step-ahead'", "grad_codec_down='orq-9'", "error_feedback='classic'"]
    assert in_ranks(run) == [fields] * 2


def test_shards_are_not_divided_among_other_ranks(tmp_path):
    callback = CompressionCallback(make_trainer(tmp_path, **CODED), None)
    with pytest.raises(InputError, match="2 ranks have not sent under FSDP .* reset_local_state"):
        callback.merge([{"units": []}, {"units": []}])
