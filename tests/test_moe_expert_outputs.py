"""What experts give without the router's weight: captured in passing, for their own tokens and for others."""

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers
from hf_mlopt.moe.expert_outputs import expert_outputs, receive_expert_outputs, weighted_sum
from tests.families import FUSED_FAMILIES, make_family, token_ids
from tests.reference import distillation
from tests.reference.removal import expert_output


IDS = token_ids(3, 12)


def other_experts(model, tokens=36, k=None, seed=1):
    """Distinct random experts for every token of every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.index: torch.stack(
            [torch.randperm(layer.num_experts, generator=generator)[: k or layer.top_k] for _ in range(tokens)]
        )
        for layer in moe_layers(model)
    }


class Recorder:
    """Receives outputs, and sees what stock code gives the experts and gets from them."""

    def __init__(self, model):
        self.layers, self.received, self.stock = moe_layers(model), {}, {}
        self.handles = [
            layer.experts.register_forward_hook(lambda _, args, out, index=layer.index: self.note(index, args, out))
            for layer in self.layers
        ]

    def note(self, index, args, out):
        self.stock[index] = (*args, out)

    def __call__(self, layer, index_TK, output_TKH):
        self.received[layer.index] = index_TK, output_TKH


@torch.no_grad()
@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_weighed_and_summed_they_are_the_layers_output(name, dtype, implementation):
    model = make_family(name, dtype)
    model.set_experts_implementation(implementation)
    before = model(IDS, use_cache=False).logits
    recorder = Recorder(model)
    with receive_expert_outputs(recorder.layers, recorder):
        assert torch.equal(before, model(IDS, use_cache=False).logits)
    assert list(recorder.received) == [layer.index for layer in recorder.layers]
    for index, (index_TK, output_TKH) in recorder.received.items():
        hidden_TH, topk_index_TK, topk_weight_TK, output_TH = recorder.stock[index]
        assert torch.equal(index_TK, topk_index_TK) and output_TKH.shape == (36, 2, 32)
        assert torch.equal(weighted_sum(output_TKH.flatten(0, 1), topk_weight_TK, hidden_TH.dtype), output_TH)
    # The same experts asked for by number; then others, whose rows a matrix product may round otherwise.
    own = {index: index_TK.flip(1) for index, (index_TK, _) in recorder.received.items()}
    with receive_expert_outputs(recorder.layers, recorder, instead=own):
        assert torch.equal(before, model(IDS, use_cache=False).logits)
    with receive_expert_outputs(recorder.layers, recorder, instead=other_experts(model)):
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(before, model(IDS, use_cache=False).logits, **tolerance)
    assert model.config._experts_implementation == implementation


@torch.no_grad()
@pytest.mark.parametrize("k", (1, 2, 3))
@pytest.mark.parametrize("name", ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"))
def test_other_experts_give_what_they_would_have_given(name, k):
    model = make_family(name)
    recorder, instead = Recorder(model), other_experts(model, k=k)
    with receive_expert_outputs(recorder.layers, recorder, instead):
        model(IDS, use_cache=False)
    for layer in recorder.layers:
        index_TK, output_TKH = recorder.received[layer.index]
        hidden_TH, own_TK, *_ = recorder.stock[layer.index]
        assert torch.equal(index_TK, instead[layer.index])
        chosen = (index_TK.unsqueeze(2) == own_TK.unsqueeze(1)).any(dim=2)
        assert chosen.any() and not chosen.all()  # some are found among the router's own, some are not
        expected = [[expert_output(layer.experts, e, hidden_TH[t]) for e in row] for t, row in enumerate(index_TK)]
        expected_TKH = torch.stack([torch.stack(row) for row in expected]).float()
        torch.testing.assert_close(output_TKH, expected_TKH, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(expert_outputs(layer, hidden_TH, index_TK), expected_TKH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forced", (False, True), ids=("own", "others"))
def test_gradients_are_those_of_a_literal_loop(forced):
    model = make_family("mixtral").double()
    model.set_experts_implementation("batched_mm")  # grouped_mm knows no float64
    layer, generator = moe_layers(model)[0], torch.Generator().manual_seed(3)
    x = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    own_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    weight_TK = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    wanted_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)]) if forced else own_TK
    probes = torch.randn(2, 7, 2, 32, generator=generator, dtype=torch.float64)
    gradients = []
    for literal in (False, True):
        hidden_TH = x.clone().requires_grad_()
        model.zero_grad()
        if literal:
            rows = [[[distillation.expert_output(layer.experts, e, hidden_TH[t]) for e in row.tolist()] for t, row in
                     enumerate(index_TK)] for index_TK in (wanted_TK, own_TK)]  # fmt: skip
            captured, used = (torch.stack([torch.stack(row) for row in one]) for one in rows)
            output_TH = (used * weight_TK.unsqueeze(-1)).sum(dim=1)
        else:
            recorder = Recorder(model)
            with receive_expert_outputs([layer], recorder, {0: wanted_TK}):
                output_TH = layer.experts(hidden_TH, own_TK, weight_TK)
            captured = recorder.received[0][1]
        ((captured * probes[0]).sum() + (output_TH * probes[1, :, 0]).sum()).backward()
        weights = (layer.experts.gate_up_proj, layer.experts.down_proj)
        gradients.append([hidden_TH.grad, *(weight.grad.clone() for weight in weights)])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_implementation_is_restored_after_an_exception():
    model, registered = make_family("mixtral"), set(ALL_EXPERTS_FUNCTIONS)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), receive_expert_outputs(moe_layers(model), fail):
        model(IDS)
    assert model.config._experts_implementation == "grouped_mm" and set(ALL_EXPERTS_FUNCTIONS) == registered


@torch.no_grad()
def test_two_models_may_be_received_from_in_turn():
    first, second = make_family("mixtral"), make_family("mixtral", seed=1)
    one, two = Recorder(first), Recorder(second)
    with receive_expert_outputs(one.layers, one):
        with receive_expert_outputs(two.layers, two):
            second(IDS)
            first(IDS)
    assert set(one.received) == set(two.received) == {0, 1}
    assert not torch.equal(one.received[0][1], two.received[0][1])


@torch.no_grad()
def test_eager_is_received_from_through_batched_mm():
    model = make_family("mixtral")
    model.set_experts_implementation("batched_mm")
    expected = model(IDS).logits
    model.set_experts_implementation("eager")
    recorder = Recorder(model)
    with receive_expert_outputs(recorder.layers, recorder):
        assert torch.equal(model(IDS).logits, expected)
    assert model.config._experts_implementation == "eager" and len(recorder.received) == 2


def test_what_cannot_be_received_from_is_refused():
    model = make_family("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(InputError, match="'sonicmoe' cannot be observed.*set_experts_implementation"):
        with receive_expert_outputs(moe_layers(model), lambda *_: None):
            pass
    of_a_list = moe_layers(make_family("module_list"))
    with pytest.raises(InputError, match="ModuleList cannot be distilled; load the model without remote code"):
        with receive_expert_outputs(of_a_list, lambda *_: None):
            pass
    with pytest.raises(InputError, match="ModuleList"):
        expert_outputs(of_a_list[0], torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64))
