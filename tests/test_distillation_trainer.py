"""ExpertDistillationTrainer on one process: its loss, its trajectory, its zeros, what it saves, what it refuses."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import moe_layers
from hf_mlopt.training import KeepZerosCallback, MLOptTrainer, MLOptTrainingArguments
from tests.distilled import (
    SETTINGS,
    AtStep,
    assert_same_trajectory,
    float64_pair,
    logs,
    make_pair,
    make_trainer,
    record_batches,
    rows,
    seen_by_both,
    zeros_of,
)
from tests.families import FUSED_FAMILIES
from tests.pruned import same, snapshot
from tests.reference import distillation


def experts_of(model):
    return [layer.experts for layer in moe_layers(model)]


# The loss


@pytest.mark.parametrize("lmbda", (None, 2.5))
def test_a_step_is_the_literal_twins(tmp_path, lmbda):
    student, teacher = float64_pair()
    before = copy.deepcopy(student)
    settings = {"lmbda": lmbda, "logit_weight": 0.3, "temperature": 2.0, "gradient_accumulation_steps": 3}
    trainer = make_trainer(student, teacher, tmp_path, rows(6, length=7), max_steps=1, **settings)
    batches = record_batches(trainer)
    trainer.train()

    with torch.no_grad():
        twin = distillation.step(
            seen_by_both(before, teacher, batches), experts_of(before), experts_of(teacher), 32, top_k=2, T=2.0
        )
    assert len(batches) == 3 and min(min(counts) for counts in twin["tokens"]) == 0  # one expert has no token
    mse_L = [float(mse) for mse in twin["mse"]]
    expected_lmbda = twin["ce"] / sum(mse_L) if lmbda is None else lmbda
    loss = twin["ce"] + expected_lmbda * sum(mse_L) + 0.3 * twin["kl"] + 0.001 * twin["aux"]
    (logged,) = logs(trainer)
    expected = {
        "loss": loss,
        "ce": twin["ce"],
        "expert_mse": sum(mse_L),
        "expert_mse_layer_0": mse_L[0],
        "expert_mse_layer_1": mse_L[1],
        "lmbda": expected_lmbda,
        "logit_kl": twin["kl"],
        "aux_loss": twin["aux"],
        "mask_violations": 0,
    }
    for name, value in expected.items():
        # The divergence is a small difference of logarithms in float32.
        assert logged[name] == pytest.approx(value, rel=1e-5 if name == "logit_kl" else 1e-6, abs=1e-9), name


def test_its_gradient_is_that_of_the_literal_loss(tmp_path):
    student, teacher = float64_pair()
    literal = copy.deepcopy(student)
    settings = {"lmbda": 2.5, "gradient_accumulation_steps": 2, "router_aux_loss": False, "max_steps": 1}
    gradients = {}
    keep = AtStep("on_pre_optimizer_step", lambda model: gradients.update(_gradients(model)))
    trainer = make_trainer(student, teacher, tmp_path, rows(4, length=7), [keep], max_grad_norm=0.0, **settings)
    batches = record_batches(trainer)
    trainer.train()

    found = seen_by_both(literal, teacher, batches)
    mse_L = distillation.step(found, experts_of(literal), experts_of(teacher), 32, top_k=2, T=1.0)["mse"]
    pairs = [(batch["student"]["logits"][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()) for batch in found]
    ce = F.cross_entropy(torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs]))
    (ce + 2.5 * sum(mse_L)).backward()
    for layer in moe_layers(literal):  # the zeros are held
        for name in layer.projections:
            parameter = getattr(layer.experts, name)
            parameter.grad[parameter == 0] = 0
    expected = _gradients(literal)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: n + text)


def _gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_every_family_is_distilled(tmp_path, name):
    # phimoe adds noise to the experts' input while it trains, and none when the first ratio is measured.
    noise = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if name == "phimoe" else {}
    student, teacher = make_pair(name, **noise)
    before, zeros = snapshot(teacher), zeros_of(student)
    trainer = make_trainer(student, teacher, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    for line in logs(trainer):
        coefficient = student.config.router_aux_loss_coef if "aux_loss" in line else 0.0
        terms = line["ce"] + line["lmbda"] * line["expert_mse"] + coefficient * line.get("aux_loss", 0.0)
        assert line["loss"] == pytest.approx(terms, rel=1e-5) and line["mask_violations"] == 0
    with torch.no_grad():  # granitemoe has none before transformers 5.2x
        balance = getattr(student(torch.tensor([[3, 4]]), output_router_logits=True), "aux_loss", None)
    assert ("aux_loss" in line) == torch.is_tensor(balance)
    assert line["lmbda"] * logs(trainer)[0]["expert_mse"] == pytest.approx(logs(trainer)[0]["ce"], rel=1e-5)
    assert all(map(torch.equal, zeros_of(student), zeros)) and any(zero.any() for zero in zeros)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_collator_of_transformers(tiny_tokenizer, tmp_path):
    student, teacher = make_pair()
    data = [{"input_ids": row["input_ids"][: 12 - number % 5]} for number, row in enumerate(rows())]
    args = DistillationArguments(output_dir=str(tmp_path), **SETTINGS)
    collator = DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False)
    trainer = ExpertDistillationTrainer(student, teacher, args, train_dataset=data, data_collator=collator)
    trainer.train()
    assert [line["step"] for line in logs(trainer)] == [1, 2, 3]


# Trajectories


@pytest.mark.parametrize("logit_weight", (0.0, 0.5))
def test_batch_times_accumulation_is_one_trajectory(tmp_path, logit_weight):
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        student, teacher = make_pair()
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        settings |= {"router_aux_loss": False, "logit_weight": logit_weight, "max_steps": 6}
        trainer = make_trainer(student, teacher, tmp_path, rows(32), **settings)
        trainer.train()
        runs.append((logs(trainer), snapshot(student)))
    for run in runs[1:]:
        assert_same_trajectory(runs[0], run)
    start, _ = make_pair()
    assert (runs[0][1]["lm_head.weight"] - start.lm_head.weight).abs().max() > 0.01  # it went somewhere


def test_with_the_load_balancing_loss_all_else_of_the_first_step_is_equal(tmp_path):
    first = []
    for batch, accumulation in ((4, 1), (1, 4)):
        student, teacher = make_pair()
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = make_trainer(student, teacher, tmp_path, **settings)
        trainer.train()
        first.append(logs(trainer)[0])
    for name in ("ce", "expert_mse", "lmbda"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-6)
    one, other = (line["loss"] - 0.001 * line["aux_loss"] for line in first)
    assert one == pytest.approx(other, rel=1e-6)
    assert first[0]["aux_loss"] != pytest.approx(first[1]["aux_loss"], rel=1e-3)  # of the batch; of a mean row


@pytest.mark.parametrize("aux, accumulation", [(False, 2), (True, 1)])
def test_lmbda_zero_is_fine_tuning_with_a_mask(tmp_path, aux, accumulation):
    settings = {**SETTINGS, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-8}
    distilled, _ = make_pair()
    args = DistillationArguments(output_dir=str(tmp_path), lmbda=0, router_aux_loss=aux, **settings)
    trainer = ExpertDistillationTrainer(distilled, args=args, train_dataset=rows())
    trainer.train()

    tuned, _ = make_pair()
    tuned.config.output_router_logits = aux
    args = MLOptTrainingArguments(output_dir=str(tmp_path), **settings)
    plain = MLOptTrainer(tuned, args, train_dataset=rows(), callbacks=[KeepZerosCallback()])
    plain.train()
    assert same(distilled, tuned) and not same(distilled, make_pair()[0])
    for ours, theirs in zip(logs(trainer), logs(plain), strict=True):
        assert {name: ours[name] for name in theirs} == theirs
        assert "expert_mse" not in ours and "lmbda" not in ours and ours["mask_violations"] == 0


@pytest.mark.parametrize("bf16", (False, True), ids=("fp32", "bf16"))
@pytest.mark.parametrize("lmbda", (None, 1.0))
def test_a_student_that_is_its_teacher_has_no_error(tmp_path, monkeypatch, lmbda, bf16):
    warnings = []
    monkeypatch.setattr("hf_mlopt.distillation.trainer.logger.warning", warnings.append)
    student, _ = make_pair()
    trainer = make_trainer(student, copy.deepcopy(student), tmp_path, lmbda=lmbda, bf16=bf16, max_steps=1)
    trainer.train()
    (line,) = logs(trainer)
    assert line["expert_mse"] == 0 and line["expert_mse_layer_1"] == 0 and line["lmbda"] == (lmbda or 0)
    assert len(warnings) == (lmbda is None) and all("nothing to distil" in text for text in warnings)


def test_frozen_routers_do_not_move(tmp_path):
    for frozen in (True, False):
        student, teacher = make_pair()
        before = [layer.router.weight.detach().clone() for layer in moe_layers(student)]
        make_trainer(student, teacher, tmp_path, freeze_router=frozen).train()
        after = [layer.router.weight for layer in moe_layers(student)]
        assert all(torch.equal(*pair) == frozen for pair in zip(before, after, strict=True))


# Zeros


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.0}, {"mlopt_optim": "adamw"}],
    ids=str,
)
def test_zeros_stay_zero_and_the_rest_trains(tmp_path, settings):
    student, teacher = make_pair()
    before, zeros = snapshot(student), zeros_of(student)
    trainer = make_trainer(student, teacher, tmp_path, adam_epsilon=1e-8, **settings)
    trainer.train()
    assert all(map(torch.equal, zeros_of(student), zeros))
    assert [line["mask_violations"] for line in logs(trainer)] == [0, 0, 0]
    for layer in moe_layers(student):
        for name in layer.projections:
            moved = layer.stacked(name) != before[f"{layer.name}.{name}"]
            assert 0.9 < moved[layer.stacked(name) != 0].float().mean()


def test_a_zero_that_does_not_stay_is_counted(tmp_path):
    student, teacher = make_pair()

    @torch.no_grad()
    def revive(model):
        weight = moe_layers(model)[0].experts.down_proj
        weight.view(-1)[(weight.view(-1) == 0).nonzero()[:3]] = 1.0

    trainer = make_trainer(student, teacher, tmp_path, callbacks=[AtStep("on_step_end", revive)], max_steps=2)
    trainer.train()
    assert [line["mask_violations"] for line in logs(trainer)] == [3, 3]


def test_bf16_runs_as_autocast_and_near_float32(tmp_path):
    lines, kinds = {}, set()
    for bf16 in (False, True):
        student, teacher = make_pair()
        trainer = make_trainer(student, teacher, tmp_path, bf16=bf16, max_steps=1)
        for model in (student, teacher):
            model.model.layers[0].self_attn.register_forward_hook(lambda _, args, out: kinds.add(out[0].dtype))
        trainer.train()
        lines[bf16] = logs(trainer)[0]
        assert kinds == {torch.bfloat16 if bf16 else torch.float32}  # of student and teacher
        kinds.clear()
    assert student.lm_head.weight.dtype == torch.float32
    for name in ("ce", "expert_mse", "lmbda", "grad_norm"):
        assert lines[True][name] == pytest.approx(lines[False][name], rel=0.05)


def checkpointing(**kwargs):
    """The argument has another name since transformers 5.2x."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, **({f"{name}_kwargs": kwargs} if kwargs else {})}


@pytest.mark.parametrize("kwargs", ({}, {"use_reentrant": False}), ids=str)
def test_gradient_checkpointing_changes_nothing(tmp_path, kwargs):
    runs, passes = [], []
    for settings in ({}, checkpointing(**kwargs)):
        student, teacher = make_pair()
        count = []
        student.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer = make_trainer(student, teacher, tmp_path, gradient_accumulation_steps=2, **settings)
        trainer.train()
        runs.append((logs(trainer), student))
        passes.append(len(count))
    assert passes == [6 + 2, 12 + 2]  # three steps of two micro-batches; two more for lmbda
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert all(map(torch.equal, zeros_of(runs[1][1]), zeros_of(make_pair()[0])))


# Resuming


def test_resuming_is_bit_exact(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    settings |= {"adam_epsilon": 1e-8, "lr_scheduler_type": "linear", "logit_weight": 0.1}
    student, teacher = make_pair(attention_dropout=0.2)  # the state of the random generator counts
    straight = make_trainer(student, teacher, tmp_path / "straight", **settings)
    straight.train()
    lmbda = logs(straight)[0]["lmbda"]
    state = json.loads((tmp_path / "straight" / "checkpoint-2" / "distillation.json").read_text())
    assert state["lmbda"] == lmbda and state["seconds"] > 0

    other, _ = make_pair(seed=1, attention_dropout=0.2)  # other weights, and other zeros
    resumed = make_trainer(other, teacher, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.seconds_before == state["seconds"]  # a report tells the time of both parts
    assert logs(resumed) == logs(straight) and [line["lmbda"] for line in logs(resumed)] == [lmbda] * 4
    assert same(student, other) and all(map(torch.equal, zeros_of(other), zeros_of(make_pair()[0])))
    folders = [tmp_path / name / "checkpoint-4" for name in ("straight", "resumed")]
    one, two = (torch.load(folder / "optimizer.pt")["state"] for folder in folders)
    for index, state in one.items():
        assert all(torch.equal(value, two[index][name]) for name, value in state.items())
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in one


def test_a_given_lmbda_wins_over_that_of_the_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(*make_pair(), tmp_path, **settings).train()
    resumed = make_trainer(*make_pair(), tmp_path, lmbda=0.5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logs(resumed)[0]["lmbda"] > 1 and logs(resumed)[1]["lmbda"] == 0.5


# Evaluation


def test_evaluation_is_cross_entropy_alone_and_the_experts_error(tmp_path):
    student, teacher = float64_pair()
    settings = {"logit_weight": 0.3, "per_device_eval_batch_size": 2}
    trainer = make_trainer(student, teacher, tmp_path, rows(8, length=7), **settings)
    metrics = trainer.evaluate()
    made = [trainer.data_collator(rows(8, length=7)[:5][start : start + 2]) for start in (0, 2, 4)]
    found = seen_by_both(student, teacher, made)
    with torch.no_grad():
        twin = distillation.step(found, experts_of(student), experts_of(teacher), 32, top_k=2, T=1.0)
    assert metrics["eval_expert_mse"] == pytest.approx(float(sum(twin["mse"])), rel=1e-6)
    # Trainer weighs the mean of every batch by its rows.
    sums = [distillation.cross_entropy(batch["student"]["logits"], batch["labels"]) for batch in found]
    means = [total / count for total, count in sums]
    assert metrics["eval_loss"] == pytest.approx((2 * means[0] + 2 * means[1] + means[2]) / 5, rel=1e-6)
    again = trainer.evaluate()
    assert all(again[name] == metrics[name] for name in ("eval_loss", "eval_expert_mse"))
    assert trainer.lmbda is None  # not set by it


def test_evaluation_of_a_run_without_teacher_has_no_expert_error(tmp_path):
    student, _ = make_pair()
    metrics = make_trainer(student, None, tmp_path, lmbda=0).evaluate()
    assert metrics["eval_loss"] > 0 and "eval_expert_mse" not in metrics


def test_evaluation_does_not_disturb_training(tmp_path):
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}):
        student, teacher = make_pair(attention_dropout=0.2)
        trainer = make_trainer(student, teacher, tmp_path, gradient_accumulation_steps=2, **settings)
        trainer.train()
        runs.append((logs(trainer), student, logs(trainer, "eval_expert_mse")))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert len(runs[1][2]) == 3 and not runs[0][2]


def test_predictions_are_the_models_logits(tmp_path):
    student, teacher = make_pair()
    trainer = make_trainer(student, teacher, tmp_path, per_device_eval_batch_size=2)
    output = trainer.predict(rows()[:4])
    with torch.no_grad():
        expected = student(**{name: value for name, value in trainer.data_collator(rows()[:4]).items()}).logits
    torch.testing.assert_close(torch.tensor(output.predictions), expected, rtol=1e-4, atol=1e-4)
    assert output.metrics["test_expert_mse"] > 0


# What is refused


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"vocab_size": 300}, "a vocabulary of 260 and 300"),
        ({"num_hidden_layers": 3}, r"decoder layers 2 and 3; mixture-of-experts layers at \[0, 1\] and \[0, 1, 2\]"),
        ({"num_local_experts": 8}, "experts per layer 4 and 8"),
        ({"num_experts_per_tok": 3}, "experts per token 2 and 3"),
        ({"hidden_size": 64}, "hidden size 32 and 64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, overrides, message):
    student, _ = make_pair()
    with pytest.raises(InputError, match=f"teacher: does not fit.*{message}.*that the student was pruned from"):
        make_trainer(student, make_pair(**overrides)[1], tmp_path)


@pytest.mark.parametrize("name", ("module_list", "qwen3_moe"))
def test_a_teacher_of_another_kind_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="ModuleList cannot be distilled|experts per layer 4 and 8"):
        make_trainer(make_pair()[0], make_pair(name)[1], tmp_path)


def test_a_dense_student_is_refused_unless_allowed(tmp_path):
    _, student = make_pair()
    _, teacher = make_pair()
    with pytest.raises(InputError, match=r"its experts are dense \(0.0 % zeros at most\).*allow_dense=True"):
        make_trainer(student, teacher, tmp_path)
    trainer = make_trainer(student, teacher, tmp_path, allow_dense=True, lmbda=1.0, max_steps=1)
    trainer.train()
    assert logs(trainer)[0]["mask_violations"] == 0


def test_a_missing_or_identical_teacher_is_refused(tmp_path):
    student, _ = make_pair()
    for settings in ({}, {"lmbda": 0, "logit_weight": 0.1}, {"lmbda": 1.0}):
        with pytest.raises(ConfigurationError, match="teacher=None: is needed unless lmbda and logit_weight are 0"):
            make_trainer(student, None, tmp_path, **settings)
    with pytest.raises(InputError, match="teacher: is the student itself"):
        make_trainer(student, student, tmp_path)


def test_data_without_labels_are_refused(tmp_path):
    student, teacher = make_pair()
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    with pytest.raises(InputError, match="train_dataset: its batches have no labels; use a collator"):
        make_trainer(student, teacher, tmp_path, data).train()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lmbda": -1.0}, "lmbda=-1.0: must be at least 0"),
        ({"lmbda": float("nan")}, "lmbda=nan: must be at least 0"),
        ({"logit_weight": float("inf")}, "logit_weight=inf: must be at least 0"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False: must be True"),
        (checkpointing(use_reentrant=True), 'must hold "use_reentrant": false'),
        (checkpointing(determinism_check="none"), 'must hold "use_reentrant": false'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError) as error:
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert message in str(error.value)


def test_arguments_of_another_trainer_are_refused(tmp_path):
    student, teacher = make_pair()
    with pytest.raises(ConfigurationError, match="args='TrainingArguments': must be DistillationArguments"):
        ExpertDistillationTrainer(student, teacher, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="one process sees 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        make_trainer(*make_pair(), tmp_path)
