"""Methods together, through the command line, and what holds where they meet."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import hf_mlopt, save, succeed, weights
from compressed import Layers, backward, loss_of, wrap
from distilled import make_pair, rows, zeros_of
from distilled import make_trainer as make_distiller
from families import make_family, token_ids
from loopback_hub import LoopbackHub, connect
from processes import together
from pruned import prune
from test_distillation_trainer_ranks import afresh, assert_resumed_exactly, two_ranks
from torch import nn

from hf_mlopt import RSGD, RSGDWrapper
from hf_mlopt.communication import compress
from hf_mlopt.communication.step_ahead import reach
from hf_mlopt.resources import resource_dir


pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

ROOT = Path(__file__).resolve().parent.parent
RECIPES = resource_dir("recipes") / "combinations"
# peft asks for attributes by older names, huggingface_hub calls httpx its own way
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
hub_warns = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def quick_to_fork():
    """What training imports is there, and not copied when a fork collects its garbage."""
    import hf_mlopt.training.trainer  # noqa: F401
    import hf_mlopt.workflows.distill_end_to_end  # noqa: F401
    import hf_mlopt.workflows.train_data  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_tokenizer):
    """`teacher/`, `student/` pruned by half, with a tokenizer; a text, and token ids."""
    work = tmp_path_factory.mktemp("combinations")
    teacher, student = make_family("mixtral"), make_family("mixtral")
    prune(student)
    save(teacher, tiny_tokenizer, work / "teacher")
    save(student, tiny_tokenizer, work / "student")
    (work / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    ids = token_ids(12, length=16, seed=0).tolist()
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return work


def distil(work, output, *more):
    """At a small size: twelve windows, of which four are evaluated on."""
    return (
        *("distill", work / "student", "--teacher", work / "teacher", "--output", output, "--mode", "end-to-end"),
        *("--dataset", work / "ids.jsonl", "--samples", 8, "--eval-samples", 4, "--sequence-length", 16),
        *("--batch-size", 1, "--epochs", 2, "--logging-steps", 1, "--device", "cpu", *more),
    )


def in_ranks(words, world=2):
    """One command in several processes, as a launcher starts it."""

    def run(rank):
        afresh({})
        outcome = hf_mlopt(*words)
        return outcome.status, outcome.err

    answers = together(run, world, group=False)
    assert [status for status, _ in answers] == [0] * world, answers


def assert_zeros_stayed(student, output, names=(".experts.",)):
    before, after = weights(student), weights(output)
    experts = [name for name in before if any(part in name for part in names)]
    assert experts and any(not torch.equal(after[name], before[name]) for name in experts)
    for name in experts:
        zeros = before[name] == 0
        assert 0.4 < zeros.float().mean() < 0.6 and not after[name][zeros].any(), name


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# The five combinations.


@pytest.mark.distributed
def test_a_pruned_model_is_distilled_by_rsgdm_with_orq_and_step_ahead_in_two_processes(work, tmp_path):
    """What is saved is x of RSGD, under its mask, after steps whose gradients travelled in five levels."""
    output = tmp_path / "output"
    more = ("--config", RECIPES / "distil_rsgdm_orq.yaml", "--compress-min-bytes", 0, "--learning-rate", 0.005)
    in_ranks(distil(work, output, *more))
    assert_zeros_stayed(work / "student", output)
    report = read(output / "distillation_report.json")
    assert (report["processes"], report["steps"], report["mask_violations"]) == (2, 8, 0)
    logged = [row for row in report["loss"] if "ce" in row]
    assert all(row["mask_violations"] == 0 for row in logged)
    assert [row["grad_plain_buckets"] for row in logged] == [1] + [0] * 7
    assert all(row["grad_bytes"] < 0.5 * logged[0]["grad_bytes"] and 0 < row["grad_unsent"] < 1 for row in logged[1:])
    evaluated = [row["eval_expert_mse"] for row in report["loss"] if "eval_expert_mse" in row]
    assert evaluated[-1] < evaluated[0]


@peft_warns
@hub_warns
def test_adapters_on_a_pruned_model_are_merged_masked_and_pushed(work, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "output"
    succeed(*distil(work, output, "--config", RECIPES / "distil_lora.yaml", "--batch-size", 2))
    assert_zeros_stayed(work / "student", output)
    assert read(output / "distillation_report.json")["mask_violations"] == 0
    with LoopbackHub(tmp_path / "hub") as hub:
        connect(monkeypatch, hub, tmp_path / "home")
        succeed("push", output, "someone/adapted")
        there = hub.files("someone/adapted")
    assert there["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert not any("adapter" in name for name in there)
    (tmp_path / "there").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "there" / name).write_bytes(there[name])
    assert zeros_of(
        AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    )  # an ordinary checkpoint, experts and all


TINY = {
    **{"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True},
}


@pytest.mark.distributed
def test_two_replicas_of_two_stages_send_codes(work, tmp_path):
    """By RSGDm, too, which is evaluated and saved elsewhere than it trains."""
    output = tmp_path / "output"
    words = ("train", "--use-cpu", "--ddp-backend", "gloo", "--config", RECIPES / "pipeline_replicas.yaml")
    words += ("--output-dir", output, "--dataset", work / "text.txt", "--model-config", json.dumps(TINY))
    words += ("--sequence-length", 16, "--vocab-size", 300, "--max-steps", 4, "--logging-steps", 1, "--disable-tqdm")
    words += ("--mlopt-optim", "rsgdm", "--pipeline-predict", "momentum", "--compress-min-bytes", 0, "--plot", "false")
    in_ranks((*words, "--eval-strategy", "steps", "--eval-steps", 2), world=4)
    results = read(output / "train_results.json")
    assert (results["world_size"], results["steps"]) == (4, 4) and results["pipeline"]["mode"].startswith("dsp:")
    losses = [row["loss"] for row in results["log"] if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert results["eval_loss_elsewhere"]["w"] != results["eval_loss"]


@peft_warns
def test_sites_train_adapters_of_a_pruned_model_by_domo_and_send_codes(work, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hf_mlopt.training.adapters import mask_adapters

    output = tmp_path / "output"
    words = ("federate", RECIPES / "federated_lora.yaml", "--output-dir", output, "--model", work / "student")
    words += (
        "--dataset",
        work / "text.txt",
        "--sequence-length",
        16,
        "--rounds",
        2,
        "--local-steps",
        3,
        "--disable-tqdm",
    )
    succeed(*words)
    results = read(output / "federated_results.json")
    assert (results["algorithm"]["name"], len(results["rounds"])) == ("domo", 2)
    assert results["exchanged_parameters"] < results["parameters"] / 2
    assert results["bytes_up"] < 0.5 * 2 * 2 * 4 * results["exchanged_parameters"]  # two rounds, two sites, float32
    base = AutoModelForCausalLM.from_pretrained(work / "student")
    held = zeros_of(base)
    merged = mask_adapters(PeftModel.from_pretrained(base, output)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert all((now | ~zeros).all() for now, zeros in zip(zeros_of(merged), held, strict=True))
    assert_zeros_stayed(work / "student", tmp_path / "merged")


def federate(name, output, *more):
    return ("federate", RECIPES / f"{name}.yaml", "--output-dir", output, "--disable-tqdm", "--use-cpu", *more)


def test_a_policy_tunes_fedsm(tmp_path):
    output = tmp_path / "output"
    small = ("--model-config", '{"width": 2}', "--dataset", "discs:10", "--image-size", 16, "--rounds", 3)
    succeed(*federate("auto_fedrl_fedsm", output, *small, "--per-device-train-batch-size", 4, "--overlay-every", 0))
    results = read(output / "federated_results.json")
    assert results["algorithm"]["name"] == "fedsm" and len(results["trace"]) == 3 * 3
    assert len({row["learning_rate"] for row in results["trace"]}) == 3  # a draw a round
    assert {"global", "personal", "super"} <= results["segmentation"]["mean"].keys()


# Further pairs that run.


@pytest.mark.distributed
@peft_warns
@pytest.mark.parametrize(
    "more",
    [
        ("--mlopt-optim", "domo", "--local-steps", 2, "--save-steps", 2),
        ("--lora-rank", 4, "--mlopt-optim", "domo", "--local-steps", 2, "--save-steps", 2),
        ("--lora-rank", 4, "--mlopt-optim", "rsgdm", "--grad-codec", "bingrad-b", "--error-feedback", "step-ahead"),
        ("--mlopt-optim", "rsgd-adamw", "--grad-codec", "bingrad-b", "--error-feedback", "step-ahead"),
        ("--lora-rank", 4, "--mlopt-optim", "saef"),
    ],
    ids=["domo", "lora, domo", "lora, rsgdm, codec", "rsgd-adamw, codec", "lora, saef"],
)
def test_a_pruned_model_is_distilled_in_two_processes_by_other_means(work, tmp_path, more):
    output = tmp_path / "output"
    in_ranks(distil(work, output, *more, "--compress-min-bytes", 0, "--learning-rate", 1e-3, "--epochs", 1))
    assert_zeros_stayed(work / "student", output)
    report = read(output / "distillation_report.json")
    assert (report["processes"], report["mask_violations"]) == (2, 0)


VIT = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
ADAPTERS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
SEARCH = {"learning_rate": [1e-3, 1e-1], "local_epochs": None, "local_steps": [1, 3], "guard": None}
DIGITS = (
    *(
        "--task",
        "image-classification",
        "--model-type",
        "vit",
        "--model-config",
        json.dumps(VIT),
        "--dataset",
        "digits",
    ),
    *("--num-sites", 3, "--rounds", 2, "--per-device-train-batch-size", 16, "--mlopt-optim", "rsgdm", "--use-cpu"),
    *("--learning-rate", 0.01, "--disable-tqdm"),
)
WITH_ADAPTERS, TUNED, CODED = (
    ("--lora", json.dumps(ADAPTERS)),
    ("--auto-fedrl", json.dumps(SEARCH)),
    ("--update-codec", "orq-9"),
)
SHORT = ("--local-steps", 2)


@peft_warns
@pytest.mark.parametrize(
    "more",
    [
        (*WITH_ADAPTERS, *TUNED, *CODED, "--algorithm", "fedavg"),
        (*WITH_ADAPTERS, *SHORT, "--secure-sum", "--algorithm", "fedavg"),
        (*WITH_ADAPTERS, *TUNED, "--algorithm", "fedsm", "--algorithm-args", '{"selector": "moments"}'),
        (*SHORT, "--secure-sum", "--algorithm", "fedsm", "--algorithm-args", '{"selector": "none"}'),
        (*TUNED, *CODED, "--algorithm", "domo"),
        (*SHORT, "--secure-sum", "--algorithm", "domo"),
    ],
    ids=["rl, codec", "secure sum", "fedsm, rl", "fedsm, secure sum", "domo, rl, codec", "domo, secure sum"],
)
def test_sites_combine(tmp_path, more):
    """All of them by RSGDm, which leaves a site at x."""
    (tmp_path / "given.yaml").write_text("{}")
    outcome = succeed("federate", tmp_path / "given.yaml", *DIGITS, "--output-dir", tmp_path / "output", *more)
    results = read(tmp_path / "output" / "federated_results.json")
    assert results["optimizer"]["name"] == "rsgdm" and len(results["rounds"]) == 2, outcome.out
    assert len({row["digest"] for row in results["rounds"]}) == 2
    assert not any(row["absent"] for row in results["rounds"])


@pytest.mark.parametrize("more", [TUNED, (*SHORT, "--secure-sum")], ids=["rl", "secure sum"])
def test_sites_hold_the_zeros_of_a_whole_pruned_model(work, tmp_path, more):
    output = tmp_path / "output"
    words = ("--model", work / "student", "--dataset", work / "text.txt", "--sequence-length", 16, "--lora", "null")
    words += ("--rounds", 2, "--num-sites", 3, "--algorithm", "fedavg", "--update-codec", "null")
    words += ("--no-update-feedback", "--mlopt-optim", "adamw", "--weight-decay", 0.1)
    if "--local-steps" not in more:
        words += ("--local-steps", "null")
    succeed(*federate("federated_lora", output, *words, *more))
    assert_zeros_stayed(work / "student", output)


@pytest.mark.parametrize("held", [True, False])
def test_training_on_fills_the_zeros_of_a_pruned_model_unless_it_is_told_to_hold_them(work, tmp_path, held):
    output = tmp_path / "output"
    words = (
        "train",
        "--model",
        work / "student",
        "--dataset",
        work / "text.txt",
        "--sequence-length",
        16,
        "--use-cpu",
    )
    words += ("--max-steps", 2, "--output-dir", output, "--mlopt-optim", "rsgdm", "--learning-rate", 0.1)
    outcome = succeed(*words, "--plot", "false", "--disable-tqdm", *(("--keep-zeros",) if held else ()))
    assert ("training fills its zeros; --keep-zeros holds them" in outcome.err) != held
    if held:
        assert_zeros_stayed(work / "student", output)
    else:
        with pytest.raises(AssertionError):
            assert_zeros_stayed(work / "student", output)


# How they meet.


@pytest.mark.distributed
def test_no_residual_is_left_under_a_mask_after_a_hundred_steps(tmp_path):
    """Nor momentum, nor what RSGD holds back; the replicas are the same bits, and the zeros of w and of x stay."""
    codec = {"grad_codec": "orq-5-optimal", "error_feedback": "step-ahead", "compress_min_bytes": 0}

    pair = make_pair()

    def run(rank):
        afresh({})
        settings = {"max_steps": 100, "logging_steps": 50, "mlopt_optim": "rsgdm", "learning_rate": 1e-3}
        trainer = make_distiller(*pair, tmp_path, rows(16), **{**settings, **codec})
        held = dict(zip(names_of(trainer.model), zeros_of(trainer.model), strict=True))
        trainer.train()
        residuals = trainer._compression.compression.state.residuals
        optimizer = trainer.optimizer.optimizer
        found = {"under": 0.0, "beside": 0.0, "bits": 0.0}
        for name, parameter in trainer.model.named_parameters():
            if name in held:
                kept = [residuals.get(name).view(parameter.shape), parameter.detach()]
                kept += [optimizer.state[parameter][key] for key in ("residual", "momentum_buffer")]
                found["under"] += sum(float(value[held[name]].abs().sum()) for value in kept)
                found["beside"] += float(kept[0].abs().sum())
            found["bits"] += float(parameter.detach().double().sum())
        return found | {"held": sum(int(zeros.sum()) for zeros in held.values())}

    first, second = together(run)
    assert first["held"] > 1000 and first["under"] == second["under"] == 0
    assert first["beside"] > 0 and second["beside"] > 0 and first["bits"] == second["bits"]


@pytest.mark.distributed
def test_a_coded_distillation_goes_on_bit_by_bit(tmp_path):
    """What RSGD holds back, what each rank has not sent, and lmbda come back."""
    codec = {"grad_codec": "orq-5-optimal", "error_feedback": "step-ahead", "compress_min_bytes": 0}
    answers = two_ranks(tmp_path, {}, mlopt_optim="rsgdm", learning_rate=1e-3, **codec)
    for answer in answers:  # but for what travelled, with its times
        for log in (answer["logs"], answer["resumed"]):
            log[:] = [{name: value for name, value in row.items() if not name.startswith("grad_")} for row in log]
    assert_resumed_exactly(tmp_path, answers)


def names_of(model):
    from hf_mlopt.moe import moe_layers

    return [f"{layer.name}.{projection}" for layer in moe_layers(model) for projection in layer.projections]


@pytest.mark.distributed
@pytest.mark.parametrize("world, average", [(2, 0), (3, 0), (2, 3)])
def test_a_mask_holds_on_both_ways_and_in_averages(world, average):
    """Plain DDP, one bit, which knows no zero; with three ranks shards of the mean lose something too."""

    def run(rank):
        model = Layers()
        zeros = {
            f"layers.{n}.weight": torch.rand(16, 16, generator=torch.Generator().manual_seed(n)) < 0.5 for n in (0, 3)
        }
        for name, held in zeros.items():
            weight = model.get_parameter(name)
            weight.data.masked_fill_(held, 0)  # and its gradient is not masked: that is left to the codec
        ddp, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        settings = {"grad_codec_args": {"block": 64}, "min_bytes": 0, "error_average_period": average}
        settings["error_average_codec"] = "bingrad-b"
        compression = compress(ddp, optimizer, grad_codec="bingrad-b", error_feedback="step-ahead", **settings)
        late = average == 0  # as well when training has begun already
        if not late:
            compression.hold_zeros(zeros)
        under = beside = 0.0
        for step in range(12):
            if late and step == 4:
                compression.hold_zeros(zeros)
                for name, held in zeros.items():  # what was decoded before has moved them
                    model.get_parameter(name).data.masked_fill_(held, 0)
                    optimizer.state[model.get_parameter(name)]["momentum_buffer"].masked_fill_(held, 0)
            optimizer.zero_grad()
            backward(ddp, rank, step)
            shifted = {name: model.get_parameter(name).detach().clone() for name in zeros}
            optimizer.step()
            if step < 4 and late:
                continue
            for name, held in zeros.items():
                parameter, state = model.get_parameter(name), compression.state
                seen = (parameter.grad, parameter.detach(), shifted[name])
                under += sum(float(value[held].abs().sum()) for value in seen)
                for residuals in (state.residuals, state.down_residuals):
                    if residuals.get(name) is not None:
                        kept = residuals.get(name).view(held.shape)
                        under, beside = under + float(kept[held].abs().sum()), beside + float(kept.abs().sum())
        return under, beside

    for under, beside in together(run, world):
        assert under == 0 and beside > 0


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "residual": 0.99}])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_injected_residual_finally_moves_y_by_the_exported_preconditioner(settings, is_wrapped):
    """A gradient e that comes late moves y, and x after it, by lr / (1 - momentum) e, whatever RSGD holds back."""
    lr, late = 0.1, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    if is_wrapped:
        residual = {name: value for name, value in settings.items() if name == "residual"}
        of_base = {name: value for name, value in settings.items() if name == "momentum"}
        optimizer = RSGDWrapper([weight], lr, base="SGD", base_args=of_base, **residual)
    else:
        optimizer = RSGD([weight], lr, **settings)
    exported = None
    for step in range(3000):
        weight.grad = late.clone() if step == 1 else torch.zeros_like(late)
        if step == 1:
            exported = reach(late, optimizer.param_groups[0], optimizer.state[weight])
        optimizer.step()
    assert exported == pytest.approx(lr / (1 - settings["momentum"]))
    for point in ("y", "x"):
        optimizer.param_groups[0]["eval_point"] = point
        optimizer.eval()
        torch.testing.assert_close(weight.detach(), -exported * late, rtol=1e-6, atol=1e-9)
        optimizer.train()


def test_the_preconditioner_of_rsgd_around_adam_is_that_of_adam():
    optimizers = []
    for make in (torch.optim.AdamW, lambda params, lr: RSGDWrapper(params, lr, base="AdamW", weight_decay=0.01)):
        weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        optimizer = make([weight], lr=0.1)
        weight.grad = torch.tensor([0.5, -1.0, 0.0])
        optimizer.step()
        optimizers.append((optimizer.param_groups[0], optimizer.state[weight]))
    unsent = torch.tensor([0.1, 0.2, 0.3])
    plain, wrapped = (reach(unsent, *one) for one in optimizers)
    assert torch.equal(plain, wrapped)
    assert reach(unsent, optimizers[1][0], {}) == 0.0  # before the first step


@pytest.mark.distributed
def test_the_shift_is_of_w_and_undone_before_the_optimizer_moves_to_another_point():
    """An evaluation between a backward pass and its step changes nothing, and sees x, not x and a shift."""

    def run(rank):
        ends = []
        for is_interrupted in (False, True):
            model = Layers(dtype=torch.float64)
            ddp, optimizer = wrap(model), RSGD(model.parameters(), 0.01, momentum=0.9)
            settings = {"step_ahead": 1.0, "grad_codec_args": {"block": 64}, "min_bytes": 0}
            ahead = compress(ddp, optimizer, grad_codec="bingrad-b", error_feedback="step-ahead", **settings).ahead
            for step in range(6):
                clean = [parameter.detach().clone() for parameter in model.parameters()]
                optimizer.zero_grad()
                loss_of(ddp, rank, step).backward()
                moved = [bool((now != then).any()) for now, then in zip(model.parameters(), clean, strict=True)]
                assert any(moved) == (step > 1) and ahead.is_ahead
                if is_interrupted:
                    optimizer.eval()
                    model.eval()(torch.ones(1, 16, dtype=torch.float64))
                    assert not ahead.is_ahead
                    for parameter, then in zip(model.parameters(), clean, strict=True):
                        state, group = optimizer.state.get(parameter, {}), optimizer.param_groups[0]
                        e = state.get("residual", 0.0) * state.get("residual_scale", 0.0)
                        torch.testing.assert_close(parameter.detach(), then + group["detach"] * e, rtol=0, atol=1e-12)
                    model.train()
                    optimizer.train()
                optimizer.step()
            ends.append([parameter.detach().clone() for parameter in model.parameters()])
        return max(float((one - other).abs().max()) for one, other in zip(*ends, strict=True))

    assert max(together(run)) < 1e-9
