"""Adapters on expert matrices: zeros stay zero in every forward pass, and in the model that is left of them."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, TrainingArguments

from hf_mlopt.distillation import (
    DistillationArguments,
    ExpertDistillationTrainer,
    add_masked_lora,
    merge_masked_lora,
)
from hf_mlopt.distillation.lora import count_revived
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import moe_layers
from tests.distilled import SETTINGS, AtStep, logs, make_pair, make_trainer, zeros_of
from tests.families import FUSED_FAMILIES, make_family, token_ids
from tests.processes import together
from tests.pruned import prune, same, snapshot
from tests.reference import lora as literal


RANK = 3
# Matrices that are not square, so that the twin can tell which way they are stored.
TWINS = {"mixtral": {}, "gpt_oss": {}, "nemotron_h": {"moe_intermediate_size": 48}}


def pruned(name="mixtral", **overrides):
    model = make_family(name, **overrides)
    prune(model, method="magnitude")
    return model


@torch.no_grad()
def randomize_adapters(model):
    """As if trained: peft starts from B = 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapted(name="mixtral", alpha=None, **overrides):
    """A pruned model with adapters that do something."""
    model = add_masked_lora(pruned(name, **overrides), RANK, alpha)
    randomize_adapters(model)
    return model


def adapters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def let_go(model):
    """What a mask that fails would do."""
    for module in model.modules():
        vars(module).pop("get_delta_weight", None)  # in peft 0.19 forward passes come by here as well
        if hasattr(module, "zeros_hook"):
            module.zeros_hook.remove()


def factors_of(model):
    """`A, B` of every expert tensor by the name it has in a model without adapters."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{own}.{module.parameter_name}"] = module.lora_A.default.weight, module.lora_B.default.weight
    return found


@pytest.mark.parametrize("name", TWINS)
def test_the_merged_weights_are_the_literal_twins(name):
    before = pruned(name, **TWINS[name])
    model = adapted(name, alpha=None if name == "mixtral" else 5, **TWINS[name])
    factors = {key: tuple(value.detach().clone() for value in pair) for key, pair in factors_of(model).items()}
    logits = model(token_ids()).logits
    merged = merge_masked_lora(model)
    assert torch.equal(merged(token_ids()).logits, logits)
    scaling = 2 if name == "mixtral" else 5 / RANK
    for layer in moe_layers(merged):
        for projection in layer.projections:
            key = f"{layer.name}.{projection}"
            W = before.get_parameter(key)
            expected = torch.tensor(
                literal.effective(W.tolist(), *(m.tolist() for m in factors[key]), RANK, scaling), dtype=torch.float64
            )
            torch.testing.assert_close(merged.get_parameter(key).double(), expected, rtol=0, atol=1e-6)
            assert torch.equal(merged.get_parameter(key) == 0, W == 0) and not torch.equal(
                merged.get_parameter(key), W
            )


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_gradients_are_the_literal_twins(name):
    model = adapted(name).double()
    model.base_model.model.set_experts_implementation("batched_mm")  # grouped_mm does not know float64
    base = pruned(name)
    model(token_ids(), labels=token_ids()).loss.backward()
    factors, found = factors_of(model), {}
    for key, pair in factors.items():
        found[key] = [matrix.detach().tolist() for matrix in pair], [matrix.grad for matrix in pair]
    merged = merge_masked_lora(model).requires_grad_(True)
    merged(token_ids(), labels=token_ids()).loss.backward()
    for key, (matrices, gradients) in found.items():
        G, W = merged.get_parameter(key).grad.tolist(), base.get_parameter(key).tolist()
        for gradient, expected in zip(gradients, literal.gradients(G, W, *matrices, RANK, 2.0), strict=True):
            torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_every_family_keeps_zeros_logits_and_all_other_weights(name, dtype):
    before = pruned(name, dtype=dtype)
    model = add_masked_lora(copy.deepcopy(before), RANK)
    ids = token_ids(2)
    assert torch.equal(model(ids).logits, before(ids).logits)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    projections = [key for layer in moe_layers(before) for key in layer.projections]
    assert len(trained) == 2 * len(projections) and all(".experts." in key for key in trained)
    assert {value.dtype for value in trained.values()} == {torch.float32}
    randomize_adapters(model)
    assert count_revived(model) == 0
    logits = model(ids).logits
    assert not torch.equal(logits, before(ids).logits)

    merged = merge_masked_lora(model)
    assert type(merged) is type(before) and torch.equal(merged(ids).logits, logits)
    names = {f"{layer.name}.{projection}" for layer in moe_layers(before) for projection in layer.projections}
    for key, value in before.state_dict().items():
        now = merged.state_dict()[key]
        assert (now[value == 0] == 0).all() and torch.equal(now, value) is (key not in names), key
    assert [type(module) for module in merged.modules()] == [type(module) for module in before.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.modules())


def test_other_implementations_of_experts():
    for implementation in ("eager", "batched_mm"):
        model = adapted()
        model.base_model.model.set_experts_implementation(implementation)
        logits = model(token_ids()).logits
        assert count_revived(model) == 0
        assert torch.equal(merge_masked_lora(model)(token_ids()).logits, logits)


def test_what_is_merged_saves_reloads_and_generates(tmp_path):
    model = adapted()
    generated = model.generate(token_ids(2), max_new_tokens=4, do_sample=False)
    copied = copy.deepcopy(model)
    merged = merge_masked_lora(model)
    assert torch.equal(merged.generate(token_ids(2), max_new_tokens=4, do_sample=False), generated)
    assert torch.equal(copied.generate(token_ids(2), max_new_tokens=4, do_sample=False), generated)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert same(type(merged).from_pretrained(tmp_path), merged)
    assert same(merge_masked_lora(copied), merged)
    again = add_masked_lora(merged, RANK)  # a model can be adapted a second time
    randomize_adapters(again)
    assert count_revived(again) == 0


def test_pefts_own_merging_keeps_zeros_too():
    model = adapted()
    zeros, logits = zeros_of(pruned()), model(token_ids()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(token_ids()).logits, logits, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(token_ids()).logits, logits, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(token_ids()).logits, logits, rtol=0, atol=1e-5)
    assert all(map(torch.equal, zeros_of(merged), zeros))


def test_a_disabled_adapter_leaves_the_pruned_model():
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(token_ids()).logits, pruned()(token_ids()).logits)
    assert count_revived(model) == 0


def test_without_the_hook_zeros_are_revived_and_counted():
    model = adapted()
    masked = model(token_ids()).logits
    let_go(model)
    zeros = sum(int(zeros.sum()) for zeros in zeros_of(pruned()))
    assert count_revived(model) == zeros  # noise changes every one
    assert not torch.equal(model(token_ids()).logits, masked)


def test_an_interrupted_forward_pass_leaves_nothing_behind():
    model = adapted()
    logits = model(token_ids()).logits
    experts = moe_layers(pruned())[0].name
    act = model.get_submodule(f"base_model.model.{experts}.base_layer.base_layer").act_fn
    for error in (KeyboardInterrupt, ValueError):

        def fail(*_, error=error):
            raise error

        failing = act.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(token_ids())
        failing.remove()
        assert torch.equal(model(token_ids()).logits, logits) and count_revived(model) == 0


# Training


@pytest.mark.parametrize("name", TWINS)
def test_a_trainer_trains_adapters_only(tmp_path, name):
    student, teacher = make_pair(name)
    before, with_gradient = copy.deepcopy(student), set()

    def look(model):
        with_gradient.update(key for key, value in model.named_parameters() if value.grad is not None)

    trainer = make_trainer(
        student, teacher, tmp_path, callbacks=[AtStep("on_pre_optimizer_step", look)], lora_rank=RANK
    )
    start = adapters(trainer.model)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert with_gradient == set(start)
    assert not any(torch.equal(start[key], value) for key, value in adapters(trainer.model).items())
    assert [line["mask_violations"] for line in logs(trainer)] == [0, 0, 0]
    expected = trainer.evaluate()
    merged = merge_masked_lora(trainer.model)
    assert isinstance(merged, PreTrainedModel)
    assert all(map(torch.equal, zeros_of(merged), zeros_of(before)))
    now = merged.state_dict()
    changed = {key for key, value in snapshot(before).items() if not torch.equal(now[key], value)}
    assert changed == {f"{layer.name}.{name}" for layer in moe_layers(before) for name in layer.projections}

    plain = make_trainer(merged, teacher, tmp_path / "plain", lmbda=trainer.lmbda).evaluate()
    for key in ("eval_loss", "eval_expert_mse"):
        assert plain[key] == expected[key]


def test_adapters_start_from_the_seed_of_the_arguments(tmp_path):
    started = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        started.append(adapters(make_trainer(*make_pair(), tmp_path, lora_rank=RANK, seed=seed).model))
    one, same_seed, other_seed = started
    assert all(torch.equal(value, same_seed[key]) for key, value in one.items())
    assert all(torch.equal(value, other_seed[key]) is ("lora_B" in key) for key, value in one.items())


def test_a_revived_weight_is_logged(tmp_path):
    student, teacher = make_pair()
    let = AtStep("on_step_begin", let_go)
    trainer = make_trainer(student, teacher, tmp_path, callbacks=[let], lora_rank=RANK)
    trainer.train()
    assert all(line["mask_violations"] > 0 for line in logs(trainer))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    # Its name until transformers 5.2x, and since.
    names = ("gradient_checkpointing", "activation_checkpointing")
    name = next(name for name in names[::-1] if name in TrainingArguments.__dataclass_fields__)
    runs = []
    for settings in ({}, {name: True}):
        trainer = make_trainer(*make_pair(), tmp_path, lora_rank=RANK, gradient_accumulation_steps=2, **settings)
        trainer.train()
        runs.append((logs(trainer), adapters(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


class FewTokens(torch.utils.data.IterableDataset):
    """One token only in the first steps: their experts' adapters learn, those of the others stay as they began."""

    def __iter__(self):
        for number, ids in enumerate(token_ids(16, 12)):
            ids = torch.full_like(ids, 7) if number < 6 else ids
            yield {"input_ids": ids, "labels": ids}


def test_resuming_is_bit_exact(tmp_path):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "lora_rank": RANK, "adam_epsilon": 1e-8}
    runs = []
    for folder, checkpoint in (("straight", None), ("resumed", str(tmp_path / "straight" / "checkpoint-2"))):
        torch.manual_seed(len(runs))  # another state of the random generator does not count
        student, teacher = make_pair()
        args = DistillationArguments(output_dir=str(tmp_path / folder), **SETTINGS | settings)
        trainer = ExpertDistillationTrainer(student, teacher, args, train_dataset=FewTokens())
        if checkpoint:
            randomize_adapters(trainer.model)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append((logs(trainer), adapters(trainer.model)))
    (one, ours), (other, theirs) = runs
    assert one == other and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    saved = tmp_path / "straight" / "checkpoint-2"
    fresh = [value for key, value in load_file(saved / "adapter_model.safetensors").items() if "lora_B" in key]
    assert all(0.05 < (value == 0).float().mean() < 1 for value in fresh)  # not zeros that are to be kept
    assert not list(saved.glob("model*.safetensors")) and (saved / "adapter_model.safetensors").is_file()


@pytest.mark.distributed
def test_two_processes_are_one(tmp_path):
    pair = make_pair()

    def train(rank=None):
        for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
            state._reset_state()
        torch.manual_seed(rank or 0)  # what adapters start from is drawn with the seed of the arguments
        size = 4 if rank is None else 2
        settings = {"per_device_train_batch_size": size, "lora_rank": RANK, "router_aux_loss": False}
        trainer = make_trainer(*copy.deepcopy(pair), tmp_path / str(rank), **settings)
        trainer.train()
        merged = merge_masked_lora(trainer.model)
        torch.save(snapshot(merged), tmp_path / f"{rank}.pt")
        return [trainer.args.world_size, logs(trainer)]

    expected = train()
    for rank, answer in enumerate(together(train)):
        assert answer[0] == 2, answer
        for ours, theirs in zip(answer[1], expected[1], strict=True):
            assert ours["mask_violations"] == 0
            for key in ("loss", "grad_norm", "expert_mse"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        one, two = (torch.load(tmp_path / f"{name}.pt") for name in (None, rank))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
            assert torch.equal(two[key] == 0, value == 0)


@pytest.mark.distributed
def test_masks_hold_in_the_shards_of_fsdp(tmp_path):
    """Weights are counted whole, on all ranks together; what could not be written back is not merged."""
    whole = adapted()
    logits = whole(token_ids()).logits

    def run(rank):
        model, mesh = adapted(), init_device_mesh("cpu", (2,))
        for unit in [*model.base_model.model.model.layers, model]:
            fully_shard(unit, mesh=mesh)
        close = torch.allclose(model(token_ids()).logits, logits, atol=1e-5)
        with pytest.raises(InputError, match="sharded by FSDP; gather its state dict"):
            merge_masked_lora(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        held = count_revived(model)
        let_go(model)
        revived = count_revived(model)
        if rank == 0:
            gathered = add_masked_lora(pruned(), RANK)
            gathered.load_state_dict(state)
            close &= same(merge_masked_lora(gathered), merge_masked_lora(adapted()))
        return [close, held, revived]

    zeros = sum(int(zeros.sum()) for zeros in zeros_of(pruned()))
    assert together(run) == [[True, 0, zeros]] * 2


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_rank": 0}, "lora_rank=0: must be at least 1"),
        ({"lora_alpha": 4.0}, "lora_alpha=4.0: needs lora_rank"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(*make_pair(), tmp_path, **settings)


def test_experts_that_are_not_fused_are_refused():
    with pytest.raises(InputError, match="experts in a ModuleList cannot be distilled"):
        add_masked_lora(make_family("module_list"), RANK)
