import re

import pytest
import torch
from torch import nn

from hf_mlopt.moe import moe_layers
from hf_mlopt.pruning import METHODS
from tests.families import ALL_FAMILIES, make_family, token_ids
from tests.pruned import PATTERNS, assert_pattern, expert_matrices, prune, snapshot
from tests.reference import pruning as reference


# `make_family` leaves no weight at zero, so every zero was put there by pruning.
ROUTED = r"\.experts\."


@pytest.mark.parametrize("settings", PATTERNS, ids=("50%", "2:4"))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_experts_scope_zeroes_the_experts_and_nothing_else(name, settings):
    model = make_family(name)
    before = snapshot(model)
    report = prune(model, **settings)
    for matrix_name, matrix in expert_matrices(model):
        assert_pattern(matrix_name, matrix, **settings)
    for key, value in model.state_dict().items():
        if not re.search(ROUTED, key) or key.endswith("_bias"):
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value[value != 0], before[key][value != 0]), key  # survivors keep their value
    assert report.sparsity == 0.5
    assert {layer.name for layer in report.layers} == {layer.name for layer in moe_layers(model)}
    assert {t["sparsity"] for layer in report.layers for t in layer.tensors} == {0.5}


# What `all-linear` prunes besides the routed experts, by family; everything else stays.
ATTENTION = r"self_attn\.(q|k|v|o)_proj\.weight"
LATENT_ATTENTION = r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight"
SHARED = r"shared_experts?\.(gate|up|down)_proj\.weight"
DENSE_MLP = r"layers\.0\.mlp\.(gate|up|down)_proj\.weight"
ALL_LINEAR = {
    **dict.fromkeys(ALL_FAMILIES, ATTENTION),
    "qwen2_moe": f"{ATTENTION}|{SHARED}",
    "nemotron_h": r"mixer\.((q|k|v|o)_proj|shared_experts\.(up|down)_proj)\.weight",
    "glm4_moe": f"{ATTENTION}|{SHARED}",
    "deepseek_v2": f"{LATENT_ATTENTION}|{SHARED}|{DENSE_MLP}",
    "deepseek_v3": f"{LATENT_ATTENTION}|{SHARED}|{DENSE_MLP}",
}


@pytest.mark.parametrize("settings", PATTERNS, ids=("50%", "2:4"))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_all_linear_scope_never_touches_router_embedding_norm_and_head(name, settings):
    model = make_family(name)
    before = snapshot(model)
    report = prune(model, scope="all-linear", **settings)
    for matrix_name, matrix in expert_matrices(model):
        assert_pattern(matrix_name, matrix, **settings)
    pruned = set()
    for key, value in model.state_dict().items():
        if re.search(ALL_LINEAR[name], key):
            pruned.add(key)
            assert_pattern(key, value, **settings)
        elif not re.search(ROUTED, key):
            assert torch.equal(value, before[key]), key
    attention = 1 if name == "nemotron_h" else model.config.num_hidden_layers
    assert len(pruned) >= 4 * attention
    named = {tensor["name"] for layer in report.layers for tensor in layer.tensors}
    assert pruned == {key for key in named if not re.search(ROUTED, key)}
    untouched = r"embed|lm_head|norm|\.(mlp|mixer)\.gate\.|router|shared_expert_gate"
    assert not [key for key in named if re.search(untouched, key)]


@pytest.mark.parametrize("settings", (*PATTERNS, {"pattern": "4:8"}, {"sparsity": 0.3}), ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "module_list"))
def test_every_method_reaches_the_pattern(name, method, settings):
    model = make_family(name)
    before = snapshot(model)
    prune(model, method=method, **settings)
    for matrix_name, matrix in expert_matrices(model):
        assert_pattern(matrix_name, matrix, **settings)
    updated = [key for key, value in model.state_dict().items()
               if not torch.equal(value[value != 0], before[key][value != 0])]  # fmt: skip
    assert bool(updated) == method.startswith("sparsegpt")
    assert all(re.search(ROUTED, key) for key in updated)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_weights_stay_bfloat16_and_keep_the_pattern(method):
    model = make_family("mixtral", torch.bfloat16)
    prune(model, method=method, pattern="2:4")
    for matrix_name, matrix in expert_matrices(model):
        assert matrix.dtype == torch.bfloat16
        assert_pattern(matrix_name, matrix, pattern="2:4")


def plain_copy(model):
    """gpt-oss with the layout of Mixtral: [output, input], all gate rows before all up rows."""

    class Plain(type(model.model.layers[0].mlp.experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
            return (up + 1) * gate * torch.sigmoid(gate * self.alpha)

    def halves(value):  # interleaved last dimension to gate, then up
        return torch.cat([value[..., 0::2], value[..., 1::2]], dim=-1)

    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.__class__, experts.is_transposed, experts.is_concatenated = Plain, False, True
        gate_up = halves(experts.gate_up_proj.data).transpose(-1, -2).contiguous()
        experts.gate_up_proj = nn.Parameter(gate_up)
        experts.gate_up_proj_bias = nn.Parameter(halves(experts.gate_up_proj_bias.data))
        experts.down_proj = nn.Parameter(experts.down_proj.data.transpose(-1, -2).contiguous())
    return model


@pytest.mark.parametrize("settings", PATTERNS, ids=("50%", "2:4"))
@pytest.mark.parametrize("method", ("moe-pruner", "ria", "magnitude"))
def test_a_transposed_interleaved_layout_gives_the_mask_of_its_plain_copy(method, settings):
    stored, plain, ids = make_family("gpt_oss"), plain_copy(make_family("gpt_oss")), token_ids()
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    for model in (stored, plain):
        prune(model, ids, method=method, **settings)
    for layer, copy in zip(moe_layers(stored), moe_layers(plain), strict=True):
        gate_up = layer.experts.gate_up_proj == 0  # [E, H, 2I], gate and up alternate
        rows = torch.cat([gate_up[..., 0::2], gate_up[..., 1::2]], dim=-1).transpose(-1, -2)
        assert torch.equal(rows, copy.experts.gate_up_proj == 0)
        assert torch.equal((layer.experts.down_proj == 0).transpose(-1, -2), copy.experts.down_proj == 0)


@pytest.mark.parametrize("gate_power", (0.0, 1.0))
@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "deepseek_v3"))
def test_linear_layers_are_scored_by_their_own_inputs(name, gate_power):
    """Plain Wanda for attention, dense MLP and shared experts; Qwen2-MoE gates its shared expert."""
    model, ids, inputs = make_family(name), token_ids(3, 16), {}
    linears = {key: module for key, module in model.named_modules() if re.search(ALL_LINEAR[name], f"{key}.weight")}
    for module in linears.values():
        module.register_forward_hook(lambda module, args, _output: inputs.update({module: args[0].flatten(0, -2)}))
    with torch.no_grad():
        model(ids, use_cache=False)
    expected = {}
    for key, module in linears.items():
        gate_T = torch.ones(ids.numel())
        if "shared_expert." in key:
            block = model.get_submodule(key.rpartition(".shared_expert.")[0])
            gate_T = torch.sigmoid(block.shared_expert_gate(inputs[block.shared_expert.gate_proj]))[:, 0]
        Q = reference.second_moment(inputs[module].tolist(), gate_T.tolist(), gate_power)
        expected[key] = reference.mask_rows(reference.wanda_score(module.weight.tolist(), Q), 0.5)
        module._forward_hooks.clear()
    prune(model, ids, scope="all-linear", gate_power=gate_power, propagate="dense")
    assert len(linears) >= 8
    for key, module in linears.items():
        assert (module.weight == 0).tolist() == expected[key], key
