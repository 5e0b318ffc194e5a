"""SAEFOptimizer by an argument of the Trainer, on real ranks: the same weights, the log, checkpoints, refusals."""

import copy
import os

import pytest
import torch
from compressed import SETTINGS as HOOK
from small_nets import Recorder
from test_training_compression import in_ranks, make, weights_of
from transformers import TrainerCallback

from hf_mlopt.errors import ConfigurationError, InputError


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
SIGN = {"codec": "sign", "codec_down": "sign"}
SAEF = {"mlopt_optim": "saef", "mlopt_optim_args": {**SIGN, "average_period": 3}}
UNAVERAGED = {"mlopt_optim": "saef", "mlopt_optim_args": SIGN}


class Loaded(TrainerCallback):
    """What training goes on with."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = copy.deepcopy(self.trainer._compression.state_dict()["state"])


def kept(trainer):
    state = trainer._compression.state_dict()["state"]
    return [[tensor.tolist() for name, tensor in sorted(of.items())] for _, of in sorted(state.items())]


def test_ranks_end_alike_say_what_travelled_and_go_on_exactly(tmp_path):
    def run(rank):
        recorder = Recorder()
        trainer = make(tmp_path, [recorder], save_strategy="steps", save_steps=5, **SAEF)
        trainer.train()
        state = kept(trainer)
        trainer.to_evaluation_point()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        resumed = make(tmp_path / "resumed", seed=9, **SAEF)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        again = kept(resumed)
        resumed.to_evaluation_point()
        buffers = [buffer.tolist() for buffer in trainer.model.buffers()]
        return {
            "world": trainer.args.world_size,
            "clean": weights_of(trainer),
            "training": recorder.weights,
            "buffers": buffers,
            "exact": weights_of(resumed) == weights_of(trainer) and again == state,
            "logs": [[row["grad_bytes"], row["grad_of_bf16"], row["grad_unsent"]] for row in logs],
            "state": state,
        }

    first, second = in_ranks(run)
    assert first["world"] == 2 and first["clean"] == second["clean"] and first["buffers"] == second["buffers"]
    assert first["training"] != second["training"] and first["state"] != second["state"]  # each at its own y
    assert first["exact"] and second["exact"]
    for _bytes, of_bf16, unsent in first["logs"]:
        assert 0 < of_bf16 < 0.5 or _bytes > 0
        assert 0 < unsent < 1


def test_another_number_of_ranks_goes_on_with_the_means(tmp_path):
    def run(rank):
        trainer = make(tmp_path, max_steps=5, save_strategy="steps", save_steps=5, **UNAVERAGED)
        trainer.train()
        return None

    in_ranks(run)
    files = [torch.load(tmp_path / f"checkpoint-5/mlopt_rank_state_{rank}.pt") for rank in range(2)]
    states = [file["states"]["saef"]["state"] for file in files]
    seen = Loaded()
    alone = make(tmp_path / "alone", [seen], max_steps=6, seed=9, **UNAVERAGED)
    seen.trainer = alone
    alone.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    loaded = seen.state
    assert loaded.keys() == states[0].keys()
    for index, of in loaded.items():
        for name in ("residual", "momentum_buffer"):
            mean = (states[0][index][name].double() + states[1][index][name].double()) / 2
            assert torch.allclose(of[name].double(), mean, atol=1e-7)
            assert not torch.equal(states[0][index][name], states[1][index][name])


def test_one_process_codes_without_sending(tmp_path):
    trainer = make(tmp_path, **SAEF)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert logs[-1]["grad_bytes"] == 0 and logs[-1]["grad_unsent"] > 0


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="grad_codec='bingrad-b': codes gradients, and saef updates"):
        make(tmp_path, **SAEF, grad_codec=HOOK["grad_codec"])
    with pytest.raises(ConfigurationError, match="codec='five'"):
        trainer = make(tmp_path, mlopt_optim="saef", mlopt_optim_args={"codec": "five"})
        trainer.create_optimizer()
    with pytest.raises(ConfigurationError, match="local_steps=4: needs mlopt_optim to be one of"):
        make(tmp_path, **SAEF, local_steps=4)
    shards = {"state": {0: {"server_residual": torch.zeros(1)}}, "in_shards": True}
    with pytest.raises(InputError, match="reset_local_state"):
        make(tmp_path, **SAEF)._compression.merge([shards, shards])
