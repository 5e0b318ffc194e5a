"""PipelineTrainer on real processes: back-propagation as a special case, checkpoints, replicas, resuming, refusals."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import together
from reference.pipeline import simulate
from test_distillation_trainer_ranks import afresh
from tiny_models import TIED, WITH_AUX, make_model
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline import PipelineTrainer, PipelineTrainingArguments, parse, split


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_grad_norm": 0.0,
}
MODELS = {
    "llama": ("llama", {**TIED["llama"][1], "tie_word_embeddings": False}),
    "gpt2, tied": TIED["gpt2"],
    "mixtral, aux": WITH_AUX["mixtral"],
}


def model_of(name, **overrides):
    torch.manual_seed(0)
    return make_model(*MODELS[name], **overrides)


def rows(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 61, (count, 12), generator=generator)
    for number, row in enumerate(tokens):
        row[number % 5 + 7 :] = 2  # padding, of which the loss is not
    masks = (tokens != 2).long()
    return [
        {"input_ids": row, "labels": row.where(row != 2, -100), "attention_mask": mask}
        for row, mask in zip(tokens, masks, strict=True)
    ]


def trainer_of(folder, pipeline, model="llama", model_settings=None, **settings):
    args = PipelineTrainingArguments(str(folder), pipeline=pipeline, **{**SETTINGS, **settings})
    made = model_of(model, **(model_settings or {})) if isinstance(model, str) else model
    return PipelineTrainer(made, args, train_dataset=rows(), eval_dataset=rows(7, seed=2))


def weights(path):
    return {name: value.tolist() for name, value in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}


def in_ranks(function, world=2):
    def run(rank):
        afresh({})
        answer = function(rank)
        dist.barrier()  # the first holds the store through which the others may still find one another
        return answer

    answers = together(run, world)
    for answer in answers:
        assert not isinstance(answer, str), answer
    return answers


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


def plain(folder, model, **settings):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    args = TrainingArguments(str(folder), **{**SETTINGS, **settings})
    trainer = Trainer(model_of(model), args, train_dataset=rows(), eval_dataset=rows(7, seed=2))
    trainer.train()
    return trainer


def test_options_of_codecs_without_effect_are_refused(tmp_path):
    def run(rank):
        told = []
        for settings in (
            {"grad_collective": "two-phase"},
            {"compress_auto_off": True},
            {"error_feedback": "classic", "error_average_period": 4},
            {"error_feedback": "step-ahead"},
        ):
            try:
                trainer_of(tmp_path, "lag1", stages=1, grad_codec="bingrad-b", **settings)
            except ConfigurationError as error:
                told.append(str(error).split("=")[0])
        return told

    fields = ["grad_collective", "compress_auto_off", "error_average_period", "error_feedback"]
    assert in_ranks(run) == [fields] * 2


@pytest.mark.parametrize("name", MODELS)
def test_without_staleness_it_is_a_trainer(tmp_path, name):
    """Weights and losses of every step; evaluated in between; the last batch is a short one."""
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    if name != "llama":  # AdamW makes much of the last bits of gradients that ought to be zero
        settings |= {"optim": "sgd", "learning_rate": 0.1}

    def run(rank):
        trainer = trainer_of(tmp_path, "bp", name, **settings)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        return [trainer.args.world_size, losses(trainer), losses(trainer, "eval_loss")]

    first, second = in_ranks(run)
    assert first[0] == 2 and first == second
    alone = plain(tmp_path / "plain", name, **settings)
    ours, theirs = weights(tmp_path / "final"), alone.model.state_dict()
    if name == "llama":
        assert first[1] == losses(alone)
        assert ours == {key: value.tolist() for key, value in theirs.items()}
    else:  # the tied gradient, and the sums of the auxiliary loss, are added in another order
        assert first[1] == pytest.approx(losses(alone), rel=1e-6)
        for key, value in theirs.items():
            assert torch.allclose(torch.tensor(ours[key]), value, atol=2e-6), key
    # Trainer counts the last, shorter batch as a whole one, and so does this.
    assert first[2] == pytest.approx(losses(alone, "eval_loss"), rel=1e-6)


@pytest.mark.parametrize("mode", ["lag1", "dsp:1,1,0;4,2,0"])
def test_stale_stages_follow_the_index_form(tmp_path, mode):
    """Three stages in the Trainer against the literal simulator, on the batches that the Trainer draws."""
    settings = {"pipeline_predict": "none", "mlopt_optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0}
    bounds = [0, 1, 3, 4]

    def run(rank):
        seen = []
        trainer = trainer_of(tmp_path, mode, pipeline_bounds=bounds, **settings)
        advance = PipelineTrainer.training_step

        def recorded(self, model, inputs, items=None):
            seen.append([inputs["input_ids"].tolist(), int(items)])
            return advance(self, model, inputs, items)

        PipelineTrainer.training_step = recorded
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        return seen, losses(trainer)

    answers = in_ranks(run, 3)
    assert answers[0] == answers[1] == answers[2]
    seen, found = answers[0]
    batches = []
    for tokens, items in seen:
        tokens = torch.tensor(tokens)
        labels = tokens.where(tokens != 2, -100)
        mask = (tokens != 2).long()
        batches.append({"input_ids": tokens, "labels": labels, "attention_mask": mask, "num_items_in_batch": items})
    blocks = split(model_of("llama"), bounds)
    for block in blocks:
        block.train()
    sgd = [lambda parameters: torch.optim.SGD(parameters, lr=0.01)] * 3
    m = parse(mode, 3).m
    expected, their_losses = simulate(blocks, sgd, m, batches, 2, is_counted=True)
    pairs = [sum(their_losses[n : n + 2]) for n in range(0, 12, 2)]
    assert found == pytest.approx(pairs, rel=1e-6)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    for block in expected:
        for name, value in block.state_dict().items():
            assert torch.allclose(ours[name], value, atol=1e-6), name


@pytest.mark.parametrize("drains", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2, tied"])
def test_it_resumes_bit_by_bit(tmp_path, name, drains):
    """With dropout, momentum prediction and clipping; the checkpoint is a model that transformers loads."""
    settings = {"save_strategy": "steps", "save_steps": 3, "pipeline_drain": drains, "max_grad_norm": 0.1}
    settings |= {"mlopt_optim": "sgd", "mlopt_optim_args": {"momentum": 0.9}, "lr_scheduler_type": "constant"}
    dropout = {"attention_dropout": 0.2} if name == "llama" else {"resid_pdrop": 0.2}

    def run(rank):
        trainer = trainer_of(tmp_path, "dsp", name, dropout, **settings)
        trainer.train()
        trainer.save_model(str(tmp_path / "straight"))
        resumed = trainer_of(tmp_path, "dsp", name, dropout, **{**settings, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        resumed.save_model(str(tmp_path / "resumed"))
        return losses(trainer)[3:], losses(resumed)[3:], trainer.worker.updates.drains

    first, second = in_ranks(run)
    assert first == second and first[0] == first[1] and first[2] == ([6, 12] if drains else [12])
    assert weights(tmp_path / "straight") == weights(tmp_path / "resumed") != weights(tmp_path / "checkpoint-3")


def test_replicas_are_a_larger_batch(tmp_path):
    """Two pipelines of two stages, each with half of every batch; then with coded gradients."""

    sgd = {"optim": "sgd", "learning_rate": 0.1}

    def run(rank):
        trainer = trainer_of(tmp_path, "bp", stages=2, **sgd)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        coded = trainer_of(
            tmp_path,
            "lag1",
            stages=2,
            grad_codec="bingrad-b",
            grad_codec_args={"block": 64},
            error_feedback="classic",
            compress_min_bytes=0,
        )
        coded.train()
        sent = coded.replicas.bytes_sent / coded.replicas.steps
        numel = sum(parameter.numel() for parameter in coded.model.parameters())
        exempt = sum(parameter.numel() for parameter in coded.replicas.plain)
        # Two ranks all-gather codes of 1 bit and their levels; one step of six, and what is exempt, is in float32.
        each = 5 / 6 * (numel - exempt) * (1 / 8 + 2 * 4 / 64) + (1 / 6 * (numel - exempt) + exempt) * 4
        assert sent == pytest.approx(each, rel=0.02)
        digest = [float(p.double().sum()) for p in coded.model.parameters()]
        return losses(trainer), [trainer.stage, trainer.replica], exempt / numel, digest

    answers = in_ranks(run, 4)
    assert [where for _, where, *_ in answers] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert answers[0][3] == answers[2][3] and answers[1][3] == answers[3][3]  # the replicas of a block are the same
    assert all(0 < exempt < 0.6 for *_, exempt, _ in answers)  # norms, and embedding or head
    alone = plain(tmp_path / "plain", "llama", per_device_train_batch_size=4, **sgd)
    assert answers[0][0] == pytest.approx(losses(alone), rel=1e-5)
    ours = weights(tmp_path / "final")
    for name, value in alone.model.state_dict().items():
        assert torch.allclose(torch.tensor(ours[name]), value, atol=2e-6), name


def test_images_metrics_and_what_auto_has_chosen(tmp_path):
    from tiny_models import IMAGES

    generator = torch.Generator().manual_seed(0)
    images = [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": number % 5} for number in range(24)
    ]
    settings = {**SETTINGS, "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 12}

    def make(folder, **more):
        args = PipelineTrainingArguments(str(folder), **{**settings, "pipeline": "auto", **more})
        torch.manual_seed(0)
        return PipelineTrainer(
            make_model(*IMAGES["vit"]), args, train_dataset=images, eval_dataset=images[:7],
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
        )  # fmt: skip

    def run(rank):
        trainer = make(tmp_path)
        trainer.train()
        resumed = make(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        told = None
        try:
            make(tmp_path / "other", pipeline="dsp:7,0").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        except InputError as error:
            told = str(error)
        same = trainer.assembly == resumed.assembly
        return [losses(trainer, "eval_accuracy"), losses(trainer, "eval_loss"), same, told, trainer.assembly.to_dict()]

    first, second = in_ranks(run)
    assert first == second and first[2]
    assembly = first[4]
    assert json.loads((tmp_path / "checkpoint-6" / "pipeline.json").read_text()) == assembly
    assert f"pipeline='dsp:{7},0;7,0'" in first[3].replace("4,0;", "7,0;") and assembly["mode"] in first[3]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-12").eval()
    with torch.no_grad():
        logits = loaded(torch.stack([row["pixel_values"] for row in images[:7]])).logits
    right = [int(row.argmax()) == image["labels"] for row, image in zip(logits, images[:7], strict=True)]
    assert first[0][-1] == pytest.approx(sum(right) / 7)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: does not go with pipeline"),
        ({"stages": 3}, "stages=3: there is 1 process; start as many"),
        ({"stages": 1, "pipeline_bounds": [0, 2, 4]}, "pipeline_bounds="),
        ({"pipeline": "dsp:1,2"}, "pipeline='dsp:1,2'"),
        ({"pipeline": "fast"}, "pipeline='fast': must be one of auto, bp, fr"),
        ({"pipeline": None, "stages": 2}, "stages=2: needs pipeline"),
        ({"pipeline_predict": "sgd"}, "pipeline_predict='sgd'"),
    ],
)
def test_arguments_that_cannot_hold_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError) as told:
        PipelineTrainingArguments(str(tmp_path), **{**SETTINGS, "pipeline": "lag1", **settings})
    assert message in str(told.value)


def test_models_and_codecs_that_cannot_be_are_refused(tmp_path):
    def run(rank):
        told = []
        for model, settings in (
            ("llama", {"grad_codec": "orq-9"}),
            (torch.nn.Linear(2, 2), {}),
            ("llama", {"stages": 2, "pipeline_bounds": [0, 5, 4]}),
        ):
            try:
                trainer_of(tmp_path, "lag1", model, **settings).train()
            except ConfigurationError as error:
                told.append(str(error))
        return told

    for told in in_ranks(run):
        assert len(told) == 3 and "grad_codec='orq-9': codes gradients between replicas: there is one" in told[0]
        assert "Linear" in told[1] and "[0, 5, 4]" in told[2]


def test_one_stage_is_a_trainer_in_one_process(tmp_path):
    trainer = trainer_of(tmp_path, "lag1")
    trainer.train()
    alone = plain(tmp_path / "plain", "llama")
    assert losses(trainer) == losses(alone)


def test_evaluating_before_training_and_training_twice(tmp_path):
    def run(rank):
        trainer = trainer_of(tmp_path, "lag1")
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        once = trainer.evaluate()["eval_loss"]
        trainer.train()
        twice = trainer.evaluate()["eval_loss"]
        trainer.close()
        trainer.close()
        return before, once, twice

    first, second = in_ranks(run)
    assert first == second
    before, once, twice = first
    assert before > once > twice
    alone = plain(tmp_path / "plain", "llama", max_steps=1, learning_rate=0.0)
    assert before == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)


class OwnDropout(torch.nn.Module):
    """Draws from a generator of its own, which nobody can seed."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.generator = inner, torch.Generator().manual_seed(0)

    def forward(self, hidden):
        return self.inner(hidden) * (torch.rand(hidden.shape, generator=self.generator) > 0.1)


def test_a_module_that_cannot_be_repeated_is_refused_before_training(tmp_path):
    def run(rank):
        told = []
        for recompute in ("auto", "no"):
            model = model_of("llama", attention_dropout=0.1)
            model.model.layers[2].mlp = OwnDropout(model.model.layers[2].mlp)
            trainer = trainer_of(tmp_path, "lag1", model, pipeline_recompute=recompute, pipeline_bounds=[0, 2, 4])
            try:
                trainer.train()
                told.append(len(losses(trainer)))
            except ConfigurationError as error:
                told.append(str(error))
        return told

    for refused, steps in in_ranks(run):
        assert "LlamaForCausalLM" in refused and "block 1 gives other numbers" in refused and steps == 6


def test_autocast_to_bfloat16(tmp_path):
    def run(rank):
        trainer = trainer_of(tmp_path, "bp", bf16=True)
        trainer.train()
        return losses(trainer)

    first, second = in_ranks(run)
    alone = plain(tmp_path / "plain", "llama", bf16=True)
    exact = plain(tmp_path / "exact", "llama")
    assert first == second == pytest.approx(losses(alone), rel=1e-4)
    assert first != pytest.approx(losses(exact), rel=1e-6)
