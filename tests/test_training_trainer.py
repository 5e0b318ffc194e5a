"""MLOptTrainer: what it keeps through a checkpoint, on one process and on two, and its optimizers by name."""

import json

import pytest
import torch
import torch.distributed as dist
from processes import together
from transformers import AutoConfig, TrainerCallback, TrainingArguments

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.training import KeepZerosCallback, MLOptTrainer, MLOptTrainingArguments
from hf_mlopt.training.optimizer_table import OPTIMIZERS, optimizer_cls_and_kwargs
from hf_mlopt.training.rank_state import load_rank_state, save_rank_state


SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


class Residual(TrainerCallback):
    """A state of the kind that methods keep per rank: it depends on the rank and on every step so far."""

    def __init__(self, rank=0):
        self.generator = torch.Generator().manual_seed(rank)
        self.memory = torch.zeros(3, dtype=torch.bfloat16)
        self.history = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.at_start = self.memory.clone()

    def on_step_end(self, args, state, control, **kwargs):
        self.memory = self.memory * 0.5 + torch.randn(3, generator=self.generator).bfloat16()
        self.history.append(self.memory.clone())

    def state_dict(self):
        return {"memory": self.memory, "generator": self.generator.get_state(), "steps": [len(self.history)]}

    def load_state_dict(self, state_dict):
        self.memory = state_dict["memory"]
        self.generator.set_state(state_dict["generator"])


def make_trainer(model, folder, callbacks=(), **settings):
    rows = torch.randint(0, 256, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = MLOptTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return MLOptTrainer(model, args, train_dataset=data, eval_dataset=data[:2], callbacks=list(callbacks))


def make_trainer_with_residual(model, folder, rank=0, **settings):
    residual = Residual(rank)
    trainer = make_trainer(model, folder, [residual], save_strategy="steps", save_steps=1, **settings)
    trainer.register_rank_state("residual", residual)
    return trainer, residual


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_is_saved_as_the_source_had_it(tiny_mixtral, tmp_path, use_cache):
    model = tiny_mixtral(use_cache=use_cache)
    trainer = make_trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    assert model.config.use_cache is False  # what Trainer does, and training needs
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-3", "final"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["use_cache"] is use_cache
        assert AutoConfig.from_pretrained(tmp_path / folder).use_cache is use_cache
    assert model.config.use_cache is False


def test_use_cache_of_a_model_made_by_model_init(tiny_mixtral, tmp_path):
    args = MLOptTrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    trainer = MLOptTrainer(args=args, model_init=lambda: tiny_mixtral(use_cache=True))
    trainer.save_model()
    assert AutoConfig.from_pretrained(tmp_path).use_cache is True


def test_a_model_without_use_cache_gets_none(tmp_path):
    class Linear(torch.nn.Linear):
        config = type("Config", (), {})()

    trainer = make_trainer(Linear(2, 2), tmp_path)
    assert trainer.model.config.use_cache is False
    trainer._save = lambda folder: setattr(trainer, "seen", dict(vars(trainer.model.config)))
    trainer.save_model()
    assert trainer.seen == {} and trainer.model.config.use_cache is False


@pytest.mark.parametrize("optim_args", [{"momentum": 0.9}, '{"momentum": 0.9}'])
def test_an_optimizer_by_name_gets_rate_decay_and_keywords(tiny_mixtral, tmp_path, optim_args):
    trainer = make_trainer(tiny_mixtral(), tmp_path, mlopt_optim="sgd", mlopt_optim_args=optim_args)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.SGD
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(group["lr"] == 1e-2 and group["momentum"] == 0.9 for group in optimizer.param_groups)
    assert {parameter.dim() for parameter in plain["params"]} == {1} and decayed["params"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.model.parameters()))


def test_adamw_by_name_is_the_trainers_own(tiny_mixtral, tmp_path):
    weights = []
    for settings in ({"mlopt_optim": "adamw"}, {"optim": "adamw_torch"}):
        model = tiny_mixtral()
        make_trainer(model, tmp_path, adam_beta2=0.9, adam_epsilon=1e-6, **settings).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["lm_head.weight"], tiny_mixtral().lm_head.weight)


def test_keywords_win_over_arguments_and_every_entry_loads(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, adam_beta1=0.8, learning_rate=0.5)
    _, kwargs = optimizer_cls_and_kwargs("adamw", {"eps": 1e-3}, args)
    assert kwargs == {"lr": 0.5, "betas": (0.8, 0.999), "eps": 1e-3}
    for name in OPTIMIZERS:
        optimizer_cls, kwargs = optimizer_cls_and_kwargs(name, None, args)
        assert optimizer_cls([torch.nn.Parameter(torch.ones(1))], **kwargs).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mlopt_optim": "sdg"}, "mlopt_optim='sdg': must be one of adamw, diloco, domo, domo-s, fedavg"),
        ({"mlopt_optim": "sgd", "mlopt_optim_args": "momentum=1"}, "must be a dict or a JSON object"),
        ({"mlopt_optim": "sgd", "mlopt_optim_args": "[1]"}, "must be a dict or a JSON object"),
        ({"mlopt_optim_args": {"momentum": 0.9}}, "needs mlopt_optim"),
        ({"mlopt_optim": "sgd", "mlopt_optim_args": {"lr": 1.0}}, "mlopt_optim_args.lr=1.0: set learning_rate"),
        ({"mlopt_optim": "sgd", "mlopt_optim_args": {"betas": 1}}, "mlopt_optim_args.betas=1: sgd takes dampening"),
    ],
)
def test_a_bad_optimizer_is_refused_before_training(tiny_mixtral, tmp_path, settings, message):
    with pytest.raises(ConfigurationError) as error:
        make_trainer(tiny_mixtral(), tmp_path, **settings)
    assert message in str(error.value)


def test_an_optimizer_by_name_and_one_passed_is_refused(tiny_mixtral, tmp_path):
    args = MLOptTrainingArguments(output_dir=str(tmp_path), mlopt_optim="sgd", **SETTINGS)
    with pytest.raises(ConfigurationError, match="leave it out when passing an optimizer"):
        MLOptTrainer(tiny_mixtral(), args, optimizer_cls_and_kwargs=(torch.optim.Adam, {}))


def test_arguments_do_not_print_tokens(tmp_path):
    args = MLOptTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="secret-token")
    assert "secret-token" not in repr(args) and "mlopt_optim" in repr(args)


def test_rank_state_is_bit_exact_after_resuming(tiny_mixtral, tmp_path):
    straight, residual = make_trainer_with_residual(tiny_mixtral(), tmp_path)
    straight.train()
    assert len(residual.history) == 3 and not residual.memory.equal(torch.zeros(3))

    resumed, again = make_trainer_with_residual(tiny_mixtral(seed=1), tmp_path / "resumed", rank=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.at_start, residual.history[1]) and again.at_start.dtype is torch.bfloat16
    assert torch.equal(again.memory, residual.history[2]) and len(again.history) == 1
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_checkpoint_is_loaded_with_its_experts(tiny_mixtral, tmp_path):
    # "Best" is the largest loss here, so that the first checkpoint wins and differs from the final weights.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every_step = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = make_trainer(tiny_mixtral(), tmp_path, **best, **every_step)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_no_rank_state_is_written_without_need(tiny_mixtral, tmp_path):
    make_trainer(tiny_mixtral(), tmp_path, save_strategy="steps", save_steps=3).train()
    only_model, _ = make_trainer_with_residual(tiny_mixtral(), tmp_path / "only", save_only_model=True)
    only_model.train()
    assert (tmp_path / "only" / "checkpoint-3").is_dir()
    assert not list(tmp_path.rglob("mlopt_rank_state_*"))


def test_a_name_is_registered_once(tiny_mixtral, tmp_path):
    trainer, residual = make_trainer_with_residual(tiny_mixtral(), tmp_path)
    with pytest.raises(ValueError, match="'residual' is registered"):
        trainer.register_rank_state("residual", residual)


@pytest.mark.parametrize("rank", [0, 3])
def test_another_number_of_processes_is_refused(tmp_path, rank):
    save_rank_state({"residual": Residual()}, tmp_path, rank=0, world_size=2)
    with pytest.raises(
        InputError, match="written by 2 processes, resumed by 4; start 2, or begin .* reset_local_state"
    ):
        load_rank_state({"residual": Residual()}, tmp_path, rank=rank, world_size=4)


def test_a_state_that_the_checkpoint_lacks_starts_afresh(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_mlopt.training.rank_state.logger.warning", warnings.append)
    save_rank_state({"other": Residual()}, tmp_path, rank=0, world_size=2)
    fresh = Residual()
    for rank in (0, 1):  # rank 1 must not take what rank 0 kept
        load_rank_state({"residual": fresh}, tmp_path, rank=rank, world_size=2)
    assert fresh.memory.equal(torch.zeros(3, dtype=torch.bfloat16))
    assert len(warnings) == 2 and "'residual' for rank 0" in warnings[0]


def test_a_state_that_could_not_be_loaded_safely_is_refused_when_saved(tmp_path):
    class Unsafe:
        def state_dict(self):
            return {"device": Residual()}

    with pytest.raises(TypeError, match=r"\['unsafe'\] must hold tensors"):
        save_rank_state({"unsafe": Unsafe()}, tmp_path, rank=0, world_size=1)
    assert not list(tmp_path.iterdir())


def test_zeros_stay_zero_and_the_rest_trains(tiny_mixtral, tmp_path):
    model = tiny_mixtral()
    pruned = model.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        pruned[torch.rand(pruned.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
        model.model.layers[0].input_layernorm.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    before = pruned.detach().clone()
    make_trainer(model, tmp_path, [KeepZerosCallback()]).train()
    assert torch.equal(pruned == 0, before == 0) and not torch.equal(pruned, before)
    assert model.model.layers[1].self_attn.o_proj.weight.count_nonzero() > 0  # all zero: not pruned, only new
    assert model.model.layers[0].input_layernorm.weight.count_nonzero() > 0

    model = tiny_mixtral()
    model.model.layers[0].mlp.experts.down_proj.data.copy_(before)
    make_trainer(model, tmp_path).train()
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj == 0, before == 0)


def _run_rank(rank, make_model, folder):
    """One of two ranks: trains straight through, then resumes from the middle with fresh objects."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
        state._reset_state()
    settings = {"ddp_find_unused_parameters": False, "ddp_backend": "gloo"}
    straight, residual = make_trainer_with_residual(make_model(), folder, rank, **settings)
    straight.train()
    resumed, again = make_trainer_with_residual(make_model(seed=1), folder / "resumed", rank=9, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    results = {
        "world_size": straight.args.world_size,
        "backend": dist.get_backend(),
        "saved": residual.history[1],
        "restored": again.at_start,
        "straight_end": residual.memory,
        "resumed_end": again.memory,
        "straight_weights": list(straight.model.state_dict().values()),
        "resumed_weights": list(resumed.model.state_dict().values()),
    }
    torch.save(results, folder / f"results_{rank}.pt")


@pytest.mark.distributed
def test_two_ranks_each_restore_their_own_state(tiny_mixtral, tmp_path):
    assert together(lambda rank: _run_rank(rank, tiny_mixtral, tmp_path), group=False) == [None, None]
    ranks = [torch.load(tmp_path / f"results_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for results in ranks:
        assert results["world_size"] == 2 and results["backend"] == "gloo"
        assert torch.equal(results["restored"], results["saved"])
        assert torch.equal(results["resumed_end"], results["straight_end"])
        assert all(map(torch.equal, results["resumed_weights"], results["straight_weights"]))
    assert not torch.equal(ranks[0]["restored"], ranks[1]["restored"])
    assert all(map(torch.equal, ranks[0]["straight_weights"], ranks[1]["straight_weights"]))
    names = sorted(path.name for path in (tmp_path / "checkpoint-2").glob("mlopt_rank_state_*.pt"))
    assert names == ["mlopt_rank_state_0.pt", "mlopt_rank_state_1.pt"]
