"""Layer-wise distillation: against its literal twin, on every kind of layer, in its special cases and on bad input."""

import math

import pytest
import torch

from hf_mlopt.distillation import layerwise
from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.distillation.expert_inputs import ExpertInputs, ExpertInputsOnDisk
from hf_mlopt.distillation.expert_training import ExpertWeights, learning_rate_at, window_batches
from hf_mlopt.distillation.layerwise import distill_layerwise
from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers
from tests.families import make_family, token_ids
from tests.pruned import prune, routed_by, same, snapshot
from tests.reference import layerwise as twin


CONFIG = LayerwiseConfig(epochs=3.0, learning_rate=3e-3, batch_size=2)
IDS = token_ids(14)
BETA2, EPS = 0.95, 1e-15


def pair(name="mixtral", dtype=torch.float32, **overrides):
    """A student pruned by half, and its teacher."""
    student, teacher = (make_family(name, dtype, **overrides) for _ in range(2))
    prune(student)
    return student, teacher


def distill(student, teacher, config=CONFIG, ids=IDS, eval_samples=4, **settings):
    return distill_layerwise(student, teacher, ids, config, eval_samples=eval_samples, progress=False, **settings)


def expert_names(model):
    prefixes = tuple(f"{layer.name}." for layer in moe_layers(model))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


# hidden, expert width, experts, top-k, windows, tokens, batch: the second leaves experts without tokens in a step,
# the third is one token to one of two experts
@pytest.mark.parametrize(
    "H, I, E, K, N, S, B, weight_decay",
    [(12, 20, 4, 2, 5, 7, 2, 0.0), (8, 4, 6, 1, 3, 2, 1, 0.1), (8, 4, 2, 1, 1, 1, 1, 0.0)],
)
def test_every_step_is_the_twins(H, I, E, K, N, S, B, weight_decay):
    student, teacher = pair(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    ids = token_ids(N, S)
    config = LayerwiseConfig(epochs=4, learning_rate=0.01, batch_size=B, warmup_ratio=0.3, weight_decay=weight_decay)
    _, x, index, _ = routed_by(teacher, ids, 0)
    x, index = x.view(N, S, H), index.view(N, S, K)
    expected, target = (twin.matrices(moe_layers(model)[0].experts) for model in (student, teacher))
    batches = window_batches(N, config, layer=0)
    losses = twin.distill(target, expected, x, index, batches, 0.01, 0.3, weight_decay, 0.9, BETA2, EPS)
    report = distill(student, teacher, config, ids, eval_samples=0, logging_steps=1)
    assert report.layers[0].kept
    curve = report.layers[0].curve
    assert [row["step"] for row in curve] == list(range(1, len(batches) + 1)) and len(batches) > 3
    found = torch.tensor([row["mse"] for row in curve])
    torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-3, atol=1e-9)
    for found, wanted in zip(twin.matrices(moe_layers(student)[0].experts), expected, strict=True):
        for name, W in wanted.items():
            torch.testing.assert_close(found[name], W, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps, ratio", [(10, 0.3), (7, 0.0), (1, 0.0), (5, 0.99), (1, 0.5)])
def test_the_learning_rate_rises_and_falls(steps, ratio):
    config = LayerwiseConfig(learning_rate=2.0, warmup_ratio=ratio)
    rates = [learning_rate_at(step, steps, config) for step in range(steps)]
    assert rates == pytest.approx([twin.learning_rate(step + 1, steps, 2.0, ratio) for step in range(steps)])
    top = math.ceil(ratio * steps)
    assert all(0 < rate <= 2 for rate in rates) and sorted(rates[: top + 1]) == rates[: top + 1]
    assert sorted(rates[top:], reverse=True) == rates[top:] and (top == steps or rates[top] == 2)


def test_windows_of_every_epoch():
    config = LayerwiseConfig(epochs=2.5, batch_size=3)
    batches = window_batches(8, config, layer=1)
    order = sum(batches, [])
    assert [len(batch) for batch in batches] == [3] * 6 + [2]
    assert sorted(order[:8]) == sorted(order[8:16]) == list(range(8)) and len(set(order[16:])) == 4
    assert order[:8] != order[8:16] and batches == window_batches(8, config, layer=1)
    others = [window_batches(8, config, layer=2), window_batches(8, LayerwiseConfig(2.5, batch_size=3, seed=1), 1)]
    assert all(batches != other for other in others)
    assert window_batches(2, LayerwiseConfig(epochs=0.1), 0) != []


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("mixtral", torch.float32),
        ("qwen2_moe", torch.bfloat16),  # with a shared expert
        ("deepseek_v3", torch.float32),  # the first layer has no experts
        ("gpt_oss", torch.bfloat16),  # transposed, interleaved, with biases
        ("nemotron_h", torch.float32),  # no gate; a layer of attention alone
        ("olmoe", torch.float16),
    ],
)
def test_the_error_falls_zeros_stay_and_nothing_else_changes(name, dtype):
    student, teacher = pair(name, dtype)
    before, original = snapshot(student), snapshot(teacher)
    report = distill(student, teacher)
    after, trained = snapshot(student), expert_names(student)
    assert [layer.index for layer in report.layers] == [layer.index for layer in moe_layers(student)]
    for layer in report.layers:
        assert layer.kept and layer.mse_after < 0.9 * layer.mse_before
        assert layer.eval_mse_after < layer.eval_mse_before and layer.mask_violations == 0
    assert {key for key in after if not torch.equal(after[key], before[key])} == trained
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        if value.ndim == 3:
            assert torch.equal(value == 0, before[key] == 0), key
    assert all(torch.equal(value, original[key]) for key, value in snapshot(teacher).items())
    assert not any(next(layer.experts.parameters()).requires_grad for layer in moe_layers(student))
    assert (report.steps, report.tokens, report.samples, report.eval_samples) == (15, 3 * 10 * 24, 10, 4)


def test_a_teacher_that_is_the_student():
    student, teacher = pair()
    teacher.load_state_dict(student.state_dict())
    report = distill(student, teacher)
    assert same(student, teacher)
    for layer in report.layers:
        assert layer.mse_before == layer.mse_after == layer.eval_mse_before == layer.eval_mse_after == 0
        assert layer.kept and {row["mse"] for row in layer.curve} == {0}


def test_each_layer_is_given_what_the_teacher_gives():
    student, teacher = pair(num_hidden_layers=3)

    class Inputs(ExpertInputs):
        seen = []

        def close(self):
            self.seen.append(self.read(list(range(len(IDS))), torch.device("cpu")))

        def write(self, first, hidden_BSH, index_BSK):
            if first == 0 and self._hidden_NSH.numel():
                self.close()
            super().write(first, hidden_BSH, index_BSK)

    distill(student, teacher, inputs=Inputs(len(IDS)))
    assert len(Inputs.seen) == 3
    for index, (hidden_TH, index_TK) in enumerate(Inputs.seen):
        _, expected_TH, expected_TK, _ = routed_by(teacher, IDS, index)
        torch.testing.assert_close(hidden_TH, expected_TH)
        assert torch.equal(index_TK, expected_TK.int())


def test_held_out_windows_are_not_trained_on():
    (one, teacher), (other, _) = pair(), pair()
    changed = IDS.clone()
    changed[-4:] = token_ids(4, seed=9)
    reports = distill(one, teacher), distill(other, teacher, ids=changed)
    assert same(one, other) and all(layer.kept for report in reports for layer in report.layers)
    assert reports[0].layers[0].eval_mse_before != reports[1].layers[0].eval_mse_before
    assert reports[0].layers[0].mse_before == reports[1].layers[0].mse_before


@pytest.mark.parametrize("eval_samples", (4, 0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_layer_that_got_worse_is_left_as_it_was(caplog, monkeypatch, dtype, eval_samples):
    monkeypatch.setattr(layerwise.logger, "propagate", True)
    student, teacher = pair(dtype=dtype)
    before = snapshot(student)
    report = distill(student, teacher, LayerwiseConfig(epochs=1, learning_rate=5.0), eval_samples=eval_samples)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(student).items())
    assert [layer.kept for layer in report.layers] == [False, False]
    for layer in report.layers:
        assert layer.mse_after == layer.mse_before > 0 and layer.eval_mse_after == layer.eval_mse_before
        assert f"{layer.name}: training made the error of the experts worse" in caplog.text
    assert str(report).count("left as it was") == 2


def test_held_out_windows_decide(monkeypatch):
    measured = iter([2.0, 1.0, 1.0, 1.5, 2.0, 1.0, 3.0, 0.5])  # before and after: trained on, held out
    monkeypatch.setattr(layerwise, "measure", lambda *_: next(measured))
    student, teacher = pair()
    before = snapshot(student)
    worse, better = distill(student, teacher).layers
    assert not worse.kept and (worse.mse_after, worse.eval_mse_after) == (2.0, 1.0)
    assert better.kept and (better.mse_after, better.eval_mse_after) == (3.0, 0.5)
    changed = [name for name, value in snapshot(student).items() if not torch.equal(value, before[name])]
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_zeros_are_held_in_the_weights_and_in_the_moments(dtype):
    student, _ = pair(dtype=dtype)
    layer = moe_layers(student)[0]
    weights = ExpertWeights(layer, weight_decay=0.0)
    zeros = {name: parameter == 0 for name, parameter in layer.experts.named_parameters()}
    with torch.no_grad():
        for master in weights._masters:
            master += 1  # as if an optimizer had moved them
    for parameter in layer.experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.step(0.1)
    for (name, parameter), master in zip(layer.experts.named_parameters(), weights._masters, strict=True):
        moment = weights._optimizer.state[master]["exp_avg"]
        assert torch.equal(parameter == 0, zeros[name]) and torch.equal(moment == 0, zeros[name])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_no_weight_becomes_zero_and_none_that_was_is_revived(dtype):
    student, _ = pair(dtype=dtype)
    layer = moe_layers(student)[0]
    before = layer.experts.down_proj.detach().clone()
    weights = ExpertWeights(layer, weight_decay=0.0)
    for parameter in layer.experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.step(0.1)
    assert weights.violations() == 0
    place = tuple((before != 0).nonzero()[0])
    with torch.no_grad():
        layer.experts.down_proj[place] = 0 if dtype != torch.float16 else 1e-9  # which rounds to 0
    weights.finish()
    assert torch.equal(layer.experts.down_proj == 0, before == 0) and weights.violations() == 0
    assert layer.experts.down_proj[place] == before[place]
    with torch.no_grad():
        layer.experts.down_proj[tuple((before == 0).nonzero()[0])] = 1
    assert weights.violations() == 1


def test_float32_masters_take_steps_that_bfloat16_cannot():
    student, _ = pair(dtype=torch.bfloat16)
    layer = moe_layers(student)[0]
    before = layer.experts.down_proj.detach().clone()
    weights = ExpertWeights(layer, weight_decay=0.0)
    for _ in range(100):
        for parameter in layer.experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        weights.step(1e-4)  # a hundredth of what moves a weight of 1 or more
    moved = (layer.experts.down_proj - before)[before.abs() > 0.05].float()
    assert moved.mean().item() == pytest.approx(-0.01, rel=0.05)


@pytest.mark.parametrize("kind", ("memory", "disk"))
def test_inputs_are_read_back(tmp_path, kind):
    inputs = ExpertInputs(5) if kind == "memory" else ExpertInputsOnDisk(5, tmp_path)
    for layer, (H, dtype) in enumerate(((3, torch.float32), (3, torch.float32), (6, torch.bfloat16))):
        torch.manual_seed(layer)
        hidden_NSH, index_NSK = torch.randn(5, 4, H).to(dtype), torch.randint(0, 9, (5, 4, 2), dtype=torch.int32)
        for first in (0, 2, 4):
            inputs.write(first, hidden_NSH[first : first + 2], index_NSK[first : first + 2])
        for windows in ([3, 0], [4], [1, 2, 1]):
            hidden_TH, index_TK = inputs.read(windows, torch.device("cpu"))
            assert hidden_TH.dtype == dtype and torch.equal(hidden_TH, hidden_NSH[windows].flatten(0, 1))
            assert torch.equal(index_TK, index_NSK[windows].flatten(0, 1))
    inputs.close()
    assert list(tmp_path.iterdir()) == []


def test_models_keep_their_mode():
    student, teacher = pair(num_hidden_layers=1)
    student.train()
    student.model.layers[0].mlp.gate.eval()
    distill(student, teacher)
    assert student.training and not student.model.layers[0].mlp.gate.training and not teacher.training


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"vocab_size": 300}, "vocabulary of 260 and 300"),
        ({"num_hidden_layers": 3}, "decoder layers 2 and 3"),
        ({"num_local_experts": 8}, "experts per layer 4 and 8"),
        ({"num_experts_per_tok": 1}, "experts per token 2 and 1"),
        ({"hidden_size": 48}, "hidden size 32 and 48"),
    ],
)
def test_a_teacher_that_does_not_fit(overrides, named):
    student, _ = pair()
    before = snapshot(student)
    with pytest.raises(InputError, match=named):
        distill(student, make_family("mixtral", **overrides))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(student).items())


def test_a_dense_student():
    student, teacher = make_family("mixtral"), make_family("mixtral", seed=1)
    with pytest.raises(InputError, match="--allow-dense"):
        distill(student, teacher)
    assert distill(student, teacher, allow_dense=True).layers[0].kept
    prune(teacher)
    later, _ = pair()  # zeros in the last layer alone
    later.model.layers[0].load_state_dict(student.model.layers[0].state_dict())
    assert len(distill(later, make_family("mixtral")).layers) == 2


@pytest.mark.parametrize(
    "ids, eval_samples, named",
    [
        (IDS, 14, "eval_samples=14: leaves none of 14 windows"),
        ([[3, 4, 5], [3, 4]], 0, "windows have 2 to 3 tokens"),
        (IDS + 300, 0, "outside the model's vocabulary"),
    ],
)
def test_windows_that_cannot_be_used(ids, eval_samples, named):
    with pytest.raises(InputError, match=named):
        distill(*pair(), ids=ids, eval_samples=eval_samples)


def test_several_processes_are_refused(monkeypatch):
    models = pair()
    monkeypatch.setattr(layerwise.ranks, "world_size", lambda: 2)
    with pytest.raises(InputError, match="runs in one process"):
        distill(*models)


@pytest.mark.parametrize("where", ("weights", "output"))
def test_numbers_that_are_not_finite(where):
    student, teacher = pair()
    with torch.no_grad():
        if where == "weights":
            teacher.model.layers[1].mlp.experts.down_proj[0, 0, 0] = math.nan
        else:
            teacher.model.layers[0].mlp.experts.down_proj *= 3e38
    with pytest.raises(InputError, match="holds NaN or Inf|hold NaN or Inf"):
        distill(student, teacher)
