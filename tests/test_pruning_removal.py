import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import decoder_layers, moe_layers, observe
from hf_mlopt.pruning.moments import ExpertMoments
from hf_mlopt.pruning.removal import (
    adopt_config_,
    expert_scores,
    keep_experts_,
    kept_experts,
    refuse_removal,
    routing_groups,
    shrunk_config,
    smaller_model,
)
from tests.families import FAMILIES, FUSED_FAMILIES, ListBlock, make_family, randomize, token_ids
from tests.pruned import snapshot
from tests.reference import removal as reference


class ScaledBlock(ListBlock):
    """With a buffer that no file holds, an entry an expert."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale_E", torch.linspace(0.5, 2, config.num_local_experts), persistent=False)

    def weights(self, logits_TE):
        return super().weights(logits_TE * self.scale_E)


class ListMixtral(MixtralForCausalLM):
    """As remote code is: a class of its own whose experts are a `ModuleList`."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ScaledBlock(config)


def make(name, **overrides):
    if name != "list":
        return make_family(name, **overrides)
    model = ListMixtral(make_family("mixtral", **overrides).config)
    randomize(model, 0)
    return model.eval()


def choose(model, drop, seed=1):
    """Other experts in every layer, as a layer's scores would have it."""
    layers, generator = moe_layers(model), torch.Generator().manual_seed(seed)
    kept = refuse_removal(model, layers, drop)
    groups = routing_groups(model)
    return {
        layer.index: kept_experts(torch.rand(layer.num_experts, generator=generator), kept, groups) for layer in layers
    }


def remove(model, keep):
    """The whole procedure on a model in memory."""
    prefix, layers = decoder_layers(model, moe_layers(model))
    small = smaller_model(model, len(next(iter(keep.values()))))
    small_layers = small.get_submodule(prefix)
    for index in range(len(layers)):
        keep_experts_(layers[index], small_layers[index], keep.get(index, ()))
    adopt_config_(model, small)
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(token_ids(3, 12) if ids is None else ids, use_cache=False).logits


def expected_tensors(model, keep):
    """The state dict with the rows of the removed experts left out, literally."""
    tensors = snapshot(model)
    for layer in moe_layers(model):
        block = layer.name.rpartition(".")[0]
        for key in [
            key for key in tensors if key.startswith(tuple(f"{block}.{part}." for part in ("gate", "router")))
        ]:
            tensors[key] = tensors[key][keep[layer.index]]
        for key in [key for key in tensors if key.startswith(f"{layer.name}.")]:
            value, number = tensors.pop(key), key.removeprefix(f"{layer.name}.").split(".")[0]
            if not number.isdigit():
                tensors[key] = value[keep[layer.index]]
            elif int(number) in keep[layer.index]:
                place = keep[layer.index].index(int(number))
                tensors[key.replace(f"{layer.name}.{number}.", f"{layer.name}.{place}.")] = value
    return tensors


@pytest.mark.parametrize("name", (*FUSED_FAMILIES, "list"))
def test_what_is_left_reloads_and_is_what_was_kept(name, tmp_path):
    model = make(name)
    before, keep = moe_layers(model)[0].num_experts, choose(model, 0.25)
    expected = expected_tensors(model, keep)
    remove(model, keep)
    found = snapshot(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for layer in moe_layers(model):
        assert layer.num_experts == before * 3 // 4 == len(keep[layer.index])
        counts = [getattr(module, key, None) for module in layer.block.modules()
                  for key in ("num_experts", "n_routed_experts")]  # fmt: skip
        assert before not in counts
    assert not any(value.is_meta for _, value in (*model.named_parameters(), *model.named_buffers()))
    if name == "list":
        again = ListMixtral(model.config).eval()
        again.load_state_dict(expected)
        kept = [torch.linspace(0.5, 2, before)[keep[index]] for index in keep]
        assert [layer.mlp.scale_E.tolist() for layer in model.model.layers] == [row.tolist() for row in kept]
        for layer, row in zip(again.model.layers, kept, strict=True):
            layer.mlp.scale_E = row
    else:
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))


class Masked(TorchFunctionMode):
    """Sets the router logits of removed experts to minus infinity, where they are computed."""

    def __init__(self, removed):
        super().__init__()
        self.removed = removed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.removed:
            output = output.clone()
            output[..., self.removed[id(args[1])]] = -torch.inf
        return output


@pytest.mark.parametrize("name", ("mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "list"))
def test_a_router_that_cannot_choose_the_removed_experts_does_the_same(name):
    """Softmax over the experts left equals softmax over all where those removed have no weight."""
    model = make(name)
    keep = choose(model, 0.5)
    removed = {
        id(layer.router.weight): [e for e in range(layer.num_experts) if e not in keep[layer.index]]
        for layer in moe_layers(model)
    }
    dense = logits(model)
    with Masked(removed):
        expected = logits(model)
    assert not torch.allclose(dense, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(remove(model, keep)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", ({"num_local_experts": 32}, {"num_local_experts": 8, "intermediate_size": 6}))
def test_a_width_equal_to_a_number_of_experts_is_no_matter(settings):
    model = make_family("mixtral", **settings)
    keep = choose(model, 0.25)
    assert model.config.hidden_size == 32 and len(keep[0]) in (24, 6)
    expected = expected_tensors(model, keep)
    found = snapshot(remove(model, keep))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_one_tensor_exists_twice_at_most(monkeypatch):
    model = make("list")
    keep = choose(model, 0.5)
    layer = model.model.layers[0]
    small = smaller_model(model, 2).model.layers[0]
    attention, first = layer.self_attn.q_proj.weight, layer.mlp.experts[keep[0][0]].w1.weight
    going = [weakref.ref(value) for value in layer.parameters()]
    cut, cut_before = torch.Tensor.index_select, []

    def index_select(value, *args):
        assert [ref() for ref in cut_before] == [None] * len(cut_before)
        cut_before.append(weakref.ref(value))
        return cut(value, *args)

    monkeypatch.setattr(torch.Tensor, "index_select", index_select)
    keep_experts_(layer, small, keep[0])
    assert len(cut_before) == 2  # router and buffer; what is in a list stays as it is
    assert layer.self_attn.q_proj.weight is attention and layer.mlp.experts[0].w1.weight is first
    alive = {id(ref()) for ref in going} - {id(None)}
    assert alive == {id(value) for name, value in layer.named_parameters() if name != "mlp.gate.weight"}


def test_modules_and_their_hooks_stay():
    """A model that records router logits does so through hooks that are made at its first forward pass."""
    model = make_family("mixtral", output_router_logits=True)
    logits(model)
    experts = [layer.mlp.experts for layer in model.model.layers]
    remove(model, choose(model, 0.25))
    assert [layer.mlp.experts for layer in model.model.layers] == experts
    found = model(token_ids(3, 12), use_cache=False).router_logits
    assert [tuple(value.shape) for value in found] == [(36, 3)] * 2


def test_frozen_parameters_stay_frozen():
    model = make_family("mixtral")
    model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    remove(model, choose(model, 0.25))
    assert [layer.mlp.gate.weight.requires_grad for layer in model.model.layers] == [False, True]


@pytest.mark.parametrize("name", ("mixtral", "deepseek_v3", "granitemoe"))
def test_a_smaller_model_is_like_the_model(name):
    model = make_family(name, torch.bfloat16)
    model.set_experts_implementation("batched_mm")
    model.set_attn_implementation("eager")
    config, experts = model.config.to_dict(), moe_layers(model)[0].num_experts
    small = smaller_model(model, experts // 2)
    assert model.config.to_dict() == config and moe_layers(model)[0].num_experts == experts
    assert type(small) is type(model) and not small.training
    assert all(value.is_meta for _, value in (*small.named_parameters(), *small.named_buffers()))
    assert small.lm_head.weight.dtype == small.config.dtype == torch.bfloat16
    assert small.config._experts_implementation == "batched_mm" and small.config._attn_implementation == "eager"
    assert [layer.num_experts for layer in moe_layers(small)] == [experts // 2] * len(moe_layers(model))


def test_the_names_in_the_files_stay(tmp_path):
    """A checkpoint saved in fused form is saved in fused form again."""
    make_family("mixtral").save_pretrained(tmp_path, save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert smaller_model(model, 3)._weight_conversions is model._weight_conversions


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_every_name_of_the_count_changes_in_a_copy_of_the_configuration(name):
    config = make_family(name).config
    written = next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in FAMILIES[name])
    before = config.to_dict()
    smaller = shrunk_config(config, 3)
    assert config.to_dict() == before
    changed = {key for key in before if before[key] != smaller.to_dict()[key]}
    aliases = {key for key in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(config, key)}
    assert written in aliases and changed <= aliases and changed
    assert all(getattr(smaller, key) == 3 for key in aliases)


def test_the_text_part_of_a_multimodal_configuration_changes():
    config = AutoConfig.for_model("qwen3_vl_moe", text_config={"num_experts": 16, "num_hidden_layers": 2})
    smaller = shrunk_config(config, 12)
    assert config.text_config.num_experts == 16 and smaller.text_config.num_experts == 12
    assert smaller.get_text_config() is smaller.text_config
    again = type(config).from_dict(smaller.to_dict())
    assert again.text_config.num_experts == 12


def test_a_model_in_memory_has_one_configuration_and_trains():
    model = remove(make_family("mixtral", router_aux_loss_coef=0.1, output_router_logits=True), {0: [0, 2], 1: [1, 3]})
    assert model.num_experts == model.config.num_local_experts == 2
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    ids = token_ids(2, 8)
    before = logits(model, ids)
    model.set_experts_implementation("eager")
    assert {layer.experts.config._experts_implementation for layer in moe_layers(model)} == {"eager"}
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-5)
    output = model.train()(ids, labels=ids)
    assert output.aux_loss > 0
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.layers.parameters())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_groups", (1, 2, 4))
def test_the_best_of_every_group_are_kept(num_groups, seed):
    scores = torch.randint(0, 5, (16,), generator=torch.Generator().manual_seed(seed)).double()  # with ties
    for number in range(num_groups, 17, num_groups):
        assert kept_experts(scores, number, num_groups) == reference.kept(scores.tolist(), number, num_groups)
    assert kept_experts(torch.zeros(8), 3) == [5, 6, 7]


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_what_is_refused_is_what_the_model_cannot_run(name):
    """The most that may be removed leaves a model that runs; one expert less in every group does not."""
    model = make_family(name)
    layers, groups = moe_layers(model), routing_groups(model)
    experts = layers[0].num_experts
    least = 2 * groups if name != "deepseek_v2" else 4
    assert refuse_removal(model, layers, 1 - least / experts) == least
    with pytest.raises(ConfigurationError, match="drop_experts=.*at most"):
        refuse_removal(model, layers, 1 - (least - groups) / experts)
    keep = {layer.index: kept_experts(torch.rand(experts), least, groups) for layer in layers}
    assert torch.isfinite(logits(remove(model, keep))).all()


def test_layers_with_different_counts_are_refused():
    model = make_family("mixtral")
    model.model.layers[1].mlp = make_family("mixtral", num_local_experts=6).model.layers[1].mlp
    with pytest.raises(ConfigurationError, match="drop_experts=0.5: the layers have 4 or 6 experts"):
        refuse_removal(model, moe_layers(model), 0.5)


def test_a_count_that_the_configuration_does_not_say_is_refused():
    model = make_family("mixtral")
    layers = moe_layers(model)
    model.config.num_local_experts = 5
    with pytest.raises(
        ConfigurationError, match="drop_experts=0.5: the configuration of MixtralForCausalLM.*num_local"
    ):
        refuse_removal(model, layers, 0.5)


def test_numbers_of_experts_in_a_table_are_refused():
    """As DeepSeek-V4's hash layers have: which experts a token of the vocabulary goes to."""
    model = make_family("mixtral")
    model.model.layers[1].mlp.gate.register_buffer("tid2eid", torch.zeros(260, 2, dtype=torch.long))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate\.tid2eid holds torch.int64"):
        refuse_removal(model, moe_layers(model), 0.5)


def test_a_model_whose_class_makes_other_experts_is_refused():
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj: .* experts cannot be removed"
    ):
        smaller_model(make_family("module_list"), 2)


@pytest.mark.parametrize("where", ("both", "old", "count"))
def test_a_tensor_that_does_not_fit_is_named_and_nothing_changes(where):
    model = make_family("mixtral")
    small, layer = smaller_model(model, 3).model.layers[0], model.model.layers[0]
    layer.mlp.gate.register_buffer("table", torch.zeros(4, 4))
    if where != "old":
        small.mlp.gate.register_buffer("table", torch.zeros((3, 3) if where == "both" else (2, 4), device="meta"))
    before = snapshot(layer)
    with pytest.raises(InputError, match=r"^mlp\.gate\.table: "):
        keep_experts_(layer, small, [0, 1, 3])
    after = snapshot(layer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def scored(model, normalize=False, masks=None):
    """Moments and raw routing of every layer."""
    moments, seen = {}, {}

    def add(layer, routed):
        sizes = {source: layer.input_size(source) for source in ("hidden", "intermediate")}
        moments[layer] = ExpertMoments(layer.num_experts, sizes, output_norms=True, normalize_gate=normalize)
        moments[layer].update(layer, routed)
        seen[layer] = routed

    with torch.no_grad(), observe(model, add, output_norms=True):
        model(token_ids(3, 16), attention_mask=masks)
    return moments, seen


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"))
def test_scores_are_those_of_the_paper(name, normalize):
    model = make_family(name)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 10:] = 0
    padding = set(range(26, 32))
    moments, seen = scored(model, normalize, mask)
    for layer, routed in seen.items():
        weight_TK = routed.topk_weight_TK
        if normalize:
            weight_TK = weight_TK.double() / weight_TK.double().sum(dim=-1, keepdim=True)
        expected = reference.reap_scores(
            layer.experts, routed.hidden_TH, routed.topk_index_TK, weight_TK, layer.num_experts, padding
        )
        found = expert_scores(moments[layer].sums, "reap")
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
        tokens = moments[layer].sums["tokens"]
        assert int(tokens.sum()) == 42 * 2
        assert expert_scores(moments[layer].sums, "frequency").tolist() == tokens.tolist()


def test_an_expert_without_tokens_scores_nothing():
    sums = {"tokens": torch.tensor([0, 4]), "output_norm": torch.tensor([0.0, 2.0], dtype=torch.float64)}
    assert expert_scores(sums, "reap").tolist() == [0.0, 0.5]


def test_the_meta_device_is_enough():
    """A plan or a streamed run has no weights yet."""
    source = make_family("deepseek_v3").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source)
    assert refuse_removal(model, moe_layers(model), 0.5) == 4
    small = smaller_model(model, 4)
    keep_experts_(model.model.layers[1], small.model.layers[1], [0, 1, 4, 7])
    down = model.model.layers[1].mlp.experts.down_proj
    assert down.is_meta and len(down) == 4 and isinstance(down, nn.Parameter)
