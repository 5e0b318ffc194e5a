import json

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers, observe
from hf_mlopt.moe.all_tokens import intermediate_on_all_tokens
from tests.families import ALL_FAMILIES, FUSED_FAMILIES, ListBlock, make_family, token_ids
from tests.reference.pruning import expert_intermediate
from tests.reference.removal import expert_output, norm


def ignore(_layer, _routed):
    pass


def list_output(experts, expert, x):
    y = experts[expert].double()(x)
    experts[expert].float()
    return y


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def list_intermediate(experts, expert, x):
    module = experts[expert].double()
    h = torch.nn.functional.silu(module.w1(x)) * module.w3(x)
    experts[expert].float()
    return h


@pytest.mark.parametrize("output_norms", (False, True), ids=("", "norms"))
@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_logits_are_bit_identical(name, dtype, implementation, output_norms):
    model, ids, seen = make_family(name, dtype), token_ids(3, 12), []
    model.set_experts_implementation(implementation)
    before = logits(model, ids)
    with observe(model, lambda layer, routed: seen.append(layer.index), output_norms) as observation:
        during = logits(model, ids)
    assert torch.equal(before, during) and moe_layers(model)[0].experts.down_proj.dtype == dtype
    assert torch.equal(before, logits(model, ids))
    assert seen == [layer.index for layer in moe_layers(model)]
    assert observation.implementation == implementation == model.config._experts_implementation


@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", ("qwen3_moe", "deepseek_v3", "gpt_oss"))
def test_four_experts_a_token_are_summed_as_the_model_does(name, dtype, implementation):
    """Two numbers have one sum in any order; with four the order shows."""
    model, ids = make_family(name, dtype, num_experts_per_tok=4), token_ids(3, 30)
    model.set_experts_implementation(implementation)
    before = logits(model, ids)
    with observe(model, ignore, output_norms=True):
        assert torch.equal(before, logits(model, ids))


@pytest.mark.parametrize("output_norms", (False, True), ids=("", "norms"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_logits_are_bit_identical_with_experts_in_a_list(dtype, output_norms):
    model, ids, seen = make_family("module_list", dtype), token_ids(3, 12), []
    before = logits(model, ids)
    with observe(model, lambda layer, routed: seen.append(layer.index), output_norms) as observation:
        assert torch.equal(before, logits(model, ids))
    assert seen == [0, 1] and observation.implementation == "module_list"


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "deepseek_v3"))
def test_eager_is_observed_through_batched_mm(name):
    model, ids = make_family(name), token_ids(2, 8)
    model.set_experts_implementation("batched_mm")
    batched = logits(model, ids)
    model.set_experts_implementation("eager")
    with observe(model, ignore) as observation:
        assert observation.implementation == "batched_mm"
        assert torch.equal(batched, logits(model, ids))
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(batched, logits(model, ids), rtol=1e-4, atol=1e-5)


def test_an_implementation_that_cannot_be_observed_is_refused():
    model = make_family("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts.*'sonicmoe'.*grouped_mm"):
        with observe(model, ignore):
            pass


def hook_counts(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "module_list"))
@pytest.mark.parametrize("implementation", ("grouped_mm", "eager"))
def test_everything_is_restored_after_an_exception(name, implementation):
    model, ids = make_family(name), token_ids(2, 8)
    if name != "module_list":
        model.set_experts_implementation(implementation)
    before = logits(model, ids)
    active, hooks, names = model.config._experts_implementation, hook_counts(model), set(ALL_EXPERTS_FUNCTIONS)

    def broken(_layer, _routed):
        raise RuntimeError("observer failed")

    with pytest.raises(RuntimeError, match="observer failed"):
        with observe(model, broken):
            logits(model, ids)
    assert model.config._experts_implementation == active
    assert hook_counts(model) == hooks and set(ALL_EXPERTS_FUNCTIONS) == names
    assert all("_apply_gate" not in vars(layer.experts) for layer in moe_layers(model))
    assert torch.equal(before, logits(model, ids))


def test_config_saved_during_observation_does_not_mention_it(tmp_path):
    model = make_family("mixtral")
    model.save_pretrained(tmp_path / "before")
    with observe(model, ignore):
        model.save_pretrained(tmp_path / "during")
    during = (tmp_path / "during" / "config.json").read_text()
    assert "observe" not in during and "experts_implementation" not in during
    assert json.loads(during) == json.loads((tmp_path / "before" / "config.json").read_text())


@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm"))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_rows_pair_with_expert_token_and_gate(name, implementation):
    """Every row is what its expert makes of its token, slot by slot: the intermediate activations, and the norms."""
    model, seen = make_family(name), {}
    if name != "module_list":
        model.set_experts_implementation(implementation)
    with observe(model, lambda layer, routed: seen.update({layer: routed}), output_norms=True):
        logits(model, token_ids(2, 6))
    for layer, routed in seen.items():
        slots = sorted(zip(routed.token_S.tolist(), routed.expert_S.tolist(), routed.gate_S.tolist(), strict=True))
        tokens = range(len(routed.hidden_TH))
        expected = [(t, int(e), float(g)) for t in tokens
                    for e, g in zip(routed.topk_index_TK[t], routed.topk_weight_TK[t], strict=True)]  # fmt: skip
        assert slots == sorted(expected) and len(slots) == 2 * 6 * 2
        with torch.no_grad():
            for slot in range(len(slots)):
                expert, x = int(routed.expert_S[slot]), routed.hidden_TH[int(routed.token_S[slot])].double()
                brute = list_intermediate if name == "module_list" else expert_intermediate
                h = brute(layer.experts, expert, x)
                torch.testing.assert_close(routed.intermediate_SI[slot].double(), h, rtol=1e-4, atol=1e-5)
                y = (list_output if name == "module_list" else expert_output)(layer.experts, expert, x)
                assert float(routed.output_norm_S[slot]) == pytest.approx(norm(y), rel=1e-5)
        assert routed.output_norm_S.dtype == torch.float32 and len(routed.output_norm_S) == len(slots)


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_gates_are_those_the_block_hands_over(name):
    model, given, seen = make_family(name), {}, {}
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda _m, args, index=layer.index: given.update({index: args}))
    with observe(model, lambda layer, routed: seen.update({layer.index: routed})):
        logits(model, token_ids(2, 6))
    for index, routed in seen.items():
        hidden_TH, topk_index_TK, topk_weight_TK = given[index]
        assert (
            torch.equal(routed.topk_weight_TK, topk_weight_TK) and routed.topk_weight_TK.dtype == topk_weight_TK.dtype
        )
        assert torch.equal(routed.topk_index_TK, topk_index_TK) and torch.equal(routed.hidden_TH, hidden_TH)


@pytest.mark.parametrize("normalized", (True, False))
def test_routing_of_a_list_is_recognised_with_and_without_normalisation(normalized, monkeypatch):
    monkeypatch.setattr(ListBlock, "normalized", normalized)
    model, seen = make_family("module_list"), []
    with observe(model, lambda layer, routed: seen.append(routed)):
        logits(model, token_ids(2, 8))
    sums = torch.cat([routed.topk_weight_TK.sum(dim=-1) for routed in seen])
    assert bool((sums - 1).abs().max() < 1e-5) == normalized


@pytest.mark.parametrize("rule", ("sigmoid", "other tokens"))
def test_routing_of_a_list_that_is_not_understood_is_refused(rule, monkeypatch):
    def weights(block, logits_TE):
        if rule == "sigmoid":
            return torch.topk(torch.sigmoid(logits_TE), block.top_k, dim=-1)
        weight_TK, index_TK = torch.topk(torch.softmax(-logits_TE, dim=-1), block.top_k, dim=-1)
        return weight_TK / weight_TK.sum(dim=-1, keepdim=True), index_TK

    monkeypatch.setattr(ListBlock, "weights", weights)
    model = make_family("module_list")
    with observe(model, ignore), pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts.*ListBlock"):
        logits(model, token_ids(2, 8))


def test_a_list_that_drops_tokens_later_is_refused(monkeypatch):
    """As with an expert capacity: the rule that explained the first batch does not explain the second."""
    model, weights = make_family("module_list"), ListBlock.weights

    def dropping(block, logits_TE):
        weight_TK, index_TK = weights(block, logits_TE)
        return weight_TK[:, :1], index_TK[:, :1]

    with observe(model, ignore):
        logits(model, token_ids(2, 8))
        monkeypatch.setattr(ListBlock, "weights", dropping)
        with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts.*ListBlock"):
            logits(model, token_ids(2, 8))


@pytest.mark.parametrize("name", ALL_FAMILIES)
@pytest.mark.parametrize("positional", (True, False))
def test_padding_is_marked(name, positional):
    model, ids, seen = make_family(name), token_ids(3, 8), []
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with observe(model, lambda layer, routed: seen.append(routed.token_mask_T)) as observation:
        with torch.no_grad():
            model(ids, mask) if positional else model(input_ids=ids, attention_mask=mask)
            padded = list(seen)
            model(ids)
    assert all(torch.equal(mask_T, mask.flatten().bool()) for mask_T in padded) and padded
    assert seen[len(padded) :] == [None] * len(padded) and observation.token_mask is None


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "module_list"))
def test_an_expert_on_all_tokens(name):
    layer = moe_layers(make_family(name))[0]
    hidden_TH = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    brute = list_intermediate if name == "module_list" else expert_intermediate
    with torch.no_grad():
        expected_TI = torch.stack([brute(layer.experts, 2, x.double()) for x in hidden_TH])
        actual_TI = intermediate_on_all_tokens(layer, hidden_TH, 2)
    torch.testing.assert_close(actual_TI.double(), expected_TI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_norms", (False, True))
def test_gradients_flow_through_an_observed_model(output_norms):
    """Observation is also used while a model trains."""
    model, ids, norms = make_family("mixtral").train(), token_ids(2, 8), []
    with observe(model, lambda layer, routed: norms.append(routed.output_norm_S), output_norms):
        model(ids, labels=ids).loss.backward()
    assert [value is not None and not value.requires_grad for value in norms] == [output_norms] * 2
    assert all(layer.experts.down_proj.grad.abs().sum() > 0 for layer in moe_layers(model))
