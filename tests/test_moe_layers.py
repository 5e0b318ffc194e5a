import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_mlopt.errors import InputError
from hf_mlopt.moe import decoder_layers, moe_layers, observe
from tests.families import ALL_FAMILIES, FUSED_FAMILIES, make_family, token_ids


LLAMA4 = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 8,
}
JETMOE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "kv_channels": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


# Decoder layers with experts, number of experts, width inside an expert, and rows that read the hidden state.
LAYOUT = {
    "mixtral": ([0, 1], 4, 64, 128),
    "qwen2_moe": ([0, 1], 4, 32, 64),
    "qwen3_moe": ([0, 1], 8, 32, 64),
    "olmoe": ([0, 1], 8, 32, 64),
    "deepseek_v2": ([1, 2], 8, 32, 64),
    "deepseek_v3": ([1, 2], 8, 32, 64),
    "phimoe": ([0, 1], 4, 64, 128),
    "granitemoe": ([0, 1], 4, 32, 64),
    "gpt_oss": ([0, 1], 4, 64, 128),
    "glm4_moe": ([0, 1], 8, 32, 64),
    "nemotron_h": ([1, 2], 4, 32, 32),
    "module_list": ([0, 1], 4, 64, 64),
}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_finds_every_layer_with_its_sizes(name):
    model = make_family(name)
    layers = moe_layers(model)
    indices, experts, width, rows = LAYOUT[name]
    assert [layer.index for layer in layers] == indices
    assert all(layer.num_experts == experts and layer.top_k == 2 for layer in layers)
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.experts
        assert layer.input_size("hidden") == 32 and layer.input_size("intermediate") == width
        for projection, source in layer.projections.items():
            matrix = layer.weight(experts - 1, projection)
            assert matrix.shape == ((32, width) if source == "intermediate" else (rows, 32))


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_view_multiplies_as_the_model_does(name):
    """Σ_k g_k (W_down h_k + b) is the experts' output: fails for a transposed view and for rows of another expert."""
    model = make_family(name)
    seen, outputs = {}, {}
    for layer in moe_layers(model):
        if layer.is_fused:
            layer.experts.register_forward_hook(
                lambda _module, _args, output, index=layer.index: outputs.update({index: output})
            )
        else:
            layer.block.register_forward_hook(
                lambda _module, _args, output, index=layer.index: outputs.update({index: output.flatten(0, 1)})
            )
    with torch.no_grad(), observe(model, lambda layer, routed: seen.update({layer: routed})):
        model(token_ids(2, 8))
    assert len(seen) == len(moe_layers(model))
    for layer, routed in seen.items():
        down = next(key for key, source in layer.projections.items() if source == "intermediate")
        total_TH = torch.zeros_like(routed.hidden_TH)
        for slot in range(len(routed.expert_S)):
            expert, token = int(routed.expert_S[slot]), int(routed.token_S[slot])
            value_H = layer.weight(expert, down) @ routed.intermediate_SI[slot]
            if layer.is_fused and layer.experts.has_bias:
                value_H = value_H + layer.experts.down_proj_bias[expert]
            total_TH[token] += routed.gate_S[slot] * value_H
        torch.testing.assert_close(total_TH, outputs[layer.index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "module_list"))
def test_the_view_is_the_parameter_itself(name):
    model = make_family(name)
    layer = moe_layers(model)[0]
    for projection in layer.projections:
        before = {key: value.clone() for key, value in model.named_parameters()}
        layer.weight(1, projection)[3, 5] = 7.0
        changed = [(key, (value != before[key]).nonzero()) for key, value in model.named_parameters()
                   if not torch.equal(value, before[key])]  # fmt: skip
        [(key, places)] = changed
        assert key.startswith(layer.name) and projection in key
        place = [5, 3] if name == "gpt_oss" else [3, 5]  # gpt-oss stores [input, output]
        assert places.tolist() == [([1] if layer.is_fused else []) + place]


def test_experts_in_a_list_have_no_stacked_view():
    layer = moe_layers(make_family("module_list"))[0]
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts"):
        layer.stacked("w1")


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_decoder_layers_are_the_whole_stack(name):
    model = make_family(name)
    prefix, layers = decoder_layers(model, moe_layers(model))
    assert prefix == "model.layers" and layers is model.model.layers
    assert len(layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_needs_no_weights(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_family(name).config)
    assert [layer.name for layer in moe_layers(model)] == [layer.name for layer in moe_layers(make_family(name))]


@pytest.mark.parametrize(
    ("model_type", "settings", "module"),
    [
        ("llama4_text", LLAMA4, r"model\.layers\.0\.feed_forward\.experts \(Llama4TextExperts"),
        ("jetmoe", JETMOE, r"model\.layers\.0\.mlp\.input_linear \(JetMoeParallelExperts"),
    ],
)
def test_an_unknown_layout_is_refused_by_name(model_type, settings, module):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with pytest.raises(InputError, match=rf"{module}.*'{model_type}'.*unknown layout"):
        moe_layers(model)


class MergedExperts(nn.Module):
    """All experts in one matrix, as DBRX stores them."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.num_local_experts * config.intermediate_size, config.hidden_size))


def test_experts_in_one_matrix_are_refused_by_name():
    model = make_family("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = MergedExperts(model.config)
    with pytest.raises(InputError, match=r"layout that is not understood \(model\.layers\.0\.mlp\.experts\)"):
        moe_layers(model)


def test_one_unknown_layer_among_known_ones_is_refused():
    model = make_family("mixtral")
    for key in ("has_gate", "is_transposed"):
        delattr(model.model.layers[1].mlp.experts, key)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts \(MixtralExperts"):
        moe_layers(model)


def test_an_ambiguous_down_projection_is_refused():
    model = make_family("module_list", intermediate_size=32)
    assert moe_layers(model)[0].projections["w2"] == "intermediate"  # told by its name
    for expert in model.model.layers[0].mlp.experts:
        for old, new in (("w1", "a"), ("w2", "b"), ("w3", "c")):
            expert.add_module(new, expert._modules.pop(old))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts: cannot tell the down projection"):
        moe_layers(model)


def test_a_dense_model_is_refused():
    config = LlamaConfig(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(InputError, match="'llama'.*dense"):
        moe_layers(model)


def test_a_list_of_modules_that_is_no_mixture_is_left_alone():
    """A `ModuleList` beside a layer called gate, but of another size, is not taken for experts."""
    model = make_family("mixtral")
    layers = len(moe_layers(model))
    block = model.model.layers[0]
    block.gate = nn.Linear(32, 5)
    block.heads = nn.ModuleList(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)) for _ in range(3))
    assert len(moe_layers(model)) == layers
