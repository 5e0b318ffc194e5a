"""Cutting at all: what is held, what is refused, the self-test, tied weights, and where to cut."""

import copy
import gc
import itertools
import random
import weakref

import pytest
import torch
from tiny_models import DECODERS, IMAGES, TIED, WITH_AUX, make_model, token_batch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.partition import balance, even, layer_costs, merged_state_dict, num_layers, split
from hf_mlopt.pipeline.self_test import self_test
from hf_mlopt.pipeline.tied import add_to_owner, gradient_of_copy, owner_weight, refresh_copy


def test_blocks_share_the_parameters_of_the_model_and_hold_no_others():
    model = make_model(*DECODERS["llama"])
    parameters = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    blocks = split(model, [0, 1, 3, 4])
    names = [[name for name, _ in block.named_parameters()] for block in blocks]
    assert sorted(sum(names, [])) == sorted(parameters)
    assert all(parameter is parameters[name]() for block in blocks for name, parameter in block.named_parameters())
    assert {name.split(".")[2] for name in names[1]} == {"1", "2"}
    assert "lm_head.weight" in names[2] and "model.embed_tokens.weight" in names[0]
    mine = blocks[1]
    del model, blocks
    gc.collect()
    assert {name for name, parameter in parameters.items() if parameter() is not None} == set(names[1])
    assert mine.training


def test_the_model_is_not_changed():
    for table, family in ((DECODERS, "gpt2"), (TIED, "gpt2"), (WITH_AUX, "mixtral"), (IMAGES, "vit")):
        model = make_model(*table[family])
        before, config = list(model.named_modules()), model.config.to_dict()
        coefficient = getattr(model, "router_aux_loss_coef", None)
        split(model, [0, 2, 4])
        split(model, [0, 2, 4], tied="untie", moe_aux="block")
        split(model, [0, 4])
        assert all(module is other for (_, module), (_, other) in zip(before, model.named_modules(), strict=True))
        assert model.config.to_dict() == config and getattr(model, "router_aux_loss_coef", None) == coefficient


BAD_BOUNDS = ([0, 4, 2], [0, 2], [1, 4], [0, 2, 2, 4], [0, 5], [], [0], [0, 2.0, 4], [0, True, 4], [-1, 0, 4])


@pytest.mark.parametrize("bounds", BAD_BOUNDS, ids=str)
def test_bounds_must_rise_from_zero_to_the_number_of_layers(bounds):
    with pytest.raises(ConfigurationError, match="must be whole numbers that rise from 0 to 4"):
        split(make_model(*DECODERS["llama"]), bounds)


def test_other_wrong_arguments_are_refused():
    model = make_model(*DECODERS["llama"])
    with pytest.raises(ConfigurationError, match="moe_aux='none'.*exact"):
        split(model, [0, 4], moe_aux="none")
    with pytest.raises(ConfigurationError, match="tied='colocate'.*owner_lagged"):
        split(model, [0, 4], tied="colocate")
    with pytest.raises(ConfigurationError, match="model='Linear'.*transformers"):
        split(nn.Linear(2, 2), [0, 1])
    with pytest.raises(ConfigurationError, match="model='llama'.*head"):
        split(model.model, [0, 4])
    with pytest.raises(ConfigurationError, match="model='opt'.*OPTForCausalLM lacks layers, embed_tokens, norm"):
        sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 32}
        split(make_model("opt", sizes), [0, 2, 4])


def test_a_router_loss_of_another_form_is_refused():
    model = make_model(*WITH_AUX["mixtral"])
    del model.num_experts
    with pytest.raises(ConfigurationError, match="has no num_experts.*output_router_logits=False"):
        split(model, [0, 2, 4])
    model.config.output_router_logits = False
    split(model, [0, 2, 4])


def test_a_parameter_that_two_blocks_would_train_is_refused():
    model = make_model(*DECODERS["llama"])
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ConfigurationError, match=r"layers\.3\.mlp\.up_proj\.weight would be trained by blocks 0 and 1"
    ):
        split(model, [0, 2, 4])


def state_of(model):
    tensors = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return tensors, gradients, modes, torch.get_rng_state(), str(model.config)


@pytest.mark.parametrize(
    "table, family", [(DECODERS, "gpt2"), (TIED, "llama"), (WITH_AUX, "mixtral"), (IMAGES, "resnet")]
)
def test_the_self_test_leaves_no_trace(table, family):
    dropout = {"resid_pdrop": 0.5} if family == "gpt2" else {}
    model = make_model(*table[family], **dropout)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    next(model.children()).eval()
    before = state_of(model)
    for moe_aux, tied in itertools.product(("exact", "block"), ("owner_lagged", "untie")):
        self_test(model, [0, 1, 4], moe_aux=moe_aux, tied=tied)
    torch.testing.assert_close(state_of(model)[:4], before[:4], rtol=0, atol=0)
    assert state_of(model)[4] == before[4]
    split(model, [0, 1, 4])
    with pytest.raises(ConfigurationError, match="bounds"):
        self_test(model, [0, 9])


@pytest.mark.parametrize("kind, num_labels", [("multi_label_classification", 5), ("regression", 5), (None, 1)])
def test_the_self_test_knows_other_kinds_of_labels(kind, num_labels):
    model = make_model(*IMAGES["vit"], problem_type=kind, num_labels=num_labels)
    self_test(model, [0, 2, 4])
    assert model.config.problem_type == kind


def test_the_self_test_normalizes_by_the_batch_as_training_does():
    model, modes = make_model(*IMAGES["resnet"]).eval(), set()
    norm = model.resnet.embedder.embedder.normalization
    norm.register_forward_hook(lambda module, *_: modes.add(module.training))
    self_test(model, [0, 2, 4])
    assert modes == {True} and not norm.training


def test_the_self_test_takes_a_batch_of_ones_own():
    self_test(make_model(*DECODERS["llama"]), [0, 2, 4], token_batch(left=True))
    with pytest.raises(InputError, match="labels is missing"):
        self_test(make_model(*DECODERS["llama"]), [0, 2, 4], {"input_ids": torch.ones(1, 4, dtype=torch.long)})


class ScaledModel(LlamaModel):
    """Scales what it is given, as Gemma did: a block would do so again."""

    scale = 1.25

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=embedded * self.scale, **kwargs)


def scaled(scale):
    model = make_model(*DECODERS["llama"])
    model.model.__class__ = ScaledModel
    model.model.scale = scale
    return model


def test_the_self_test_finds_a_cut_that_changes_the_model():
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM cannot be cut into a pipeline: the loss differs"):
        self_test(scaled(1.25), [0, 2, 4])
    with pytest.raises(ConfigurationError, match="model='llama'.*differs"):
        self_test(scaled(1 + 2**-20), [0, 2, 4])  # bit for bit
    self_test(scaled(1.0), [0, 2, 4])
    self_test(scaled(1.25), [0, 4])


def test_the_self_test_names_the_gradient_that_differs():
    model = make_model(*DECODERS["llama"])

    class HalfGradient(nn.Module):
        """Right in the forward, and in the backward only of the model that was not cut."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, *args, **kwargs):
            y = self.layer(x, *args, **kwargs)
            if x.is_leaf and x.requires_grad:
                y = y / 2 + (y / 2).detach()
            return y

    model.model.layers[2] = HalfGradient(model.model.layers[2])
    with pytest.raises(ConfigurationError, match=r"the gradient of model\.embed_tokens\.weight differs"):
        self_test(model, [0, 2, 4])


def test_an_unknown_family_must_pass_the_self_test():
    class NewModel(ScaledModel):
        scale = 1.0

    model = make_model(*DECODERS["llama"])
    model.config.model_type, model.model.__class__ = "new_model", NewModel
    assert len(split(model, [0, 2, 4])) == 2
    NewModel.scale = 1.25
    with pytest.raises(ConfigurationError, match="model='new_model'.*the loss differs.*train it without one"):
        split(model, [0, 2, 4])
    model.model.__class__ = type("Broken", (NewModel,), {"forward": _only_input_ids})
    with pytest.raises(ConfigurationError, match="model='new_model'.*its blocks fail with ValueError"):
        split(model, [0, 2, 4])
    olmo = make_model("olmo2", DECODERS["llama"][1])
    assert len(split(olmo, [0, 1, 2, 4])) == 3


def _only_input_ids(self, input_ids=None, inputs_embeds=None, **kwargs):
    return LlamaModel.forward(self, input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("family", TIED)
def test_training_with_owner_and_copy_at_no_lag_is_training_the_tied_model(family):
    whole = make_model(*TIED[family])
    blocks = split(copy.deepcopy(whole), [0, 1, 4])
    copied, owned = blocks[0].tied
    assert blocks[1].tied == (copied, owned)
    assert blocks[0].get_parameter(copied) is not blocks[1].get_parameter(owned)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for block in blocks]
    reference = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    first, last = blocks
    for step in range(3):
        batch = token_batch(left=step == 1)
        whole(**batch, use_cache=False).loss.backward()
        reference.step()
        reference.zero_grad()
        (hidden,) = first((), batch)
        leaf = hidden.detach().requires_grad_()
        last((leaf,), batch)[0].backward()
        hidden.backward(leaf.grad)
        add_to_owner(last, gradient_of_copy(first))
        assert first.get_parameter(copied).grad is None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        refresh_copy(first, owner_weight(last))
        merged = merged_state_dict([block.state_dict() for block in blocks], first.tied)
        torch.testing.assert_close(merged, dict(whole.state_dict()), rtol=1e-5, atol=1e-6)


def test_the_pieces_of_a_tied_weight():
    first, last = split(make_model(*TIED["llama"]), [0, 2, 4])
    weight = last.get_parameter("lm_head.weight")
    assert not gradient_of_copy(first).any()  # none yet
    ones = torch.ones(61, 16)
    add_to_owner(last, ones)
    add_to_owner(last, torch.full((61, 16), 2.0, dtype=torch.float64))
    assert torch.equal(weight.grad, torch.full((61, 16), 3.0))
    assert torch.equal(ones, torch.ones(61, 16))
    sent = owner_weight(last)
    with torch.no_grad():
        weight.zero_()
    refresh_copy(first, sent)
    assert torch.equal(first.get_parameter("model.embed_tokens.weight"), sent) and sent.any()
    merged = merged_state_dict([first.state_dict(), last.state_dict()], last.tied)
    assert not merged["model.embed_tokens.weight"].any()  # the owner's, not the copy


def test_an_untied_embedding_is_saved_as_such(tmp_path):
    model = make_model(*TIED["gpt2"])
    blocks = split(model, [0, 2, 4], tied="untie")
    assert [block.tied for block in blocks] == [None, None]
    with torch.no_grad():
        blocks[0].get_parameter("transformer.wte.weight").add_(1.0)
    merged = merged_state_dict([block.state_dict() for block in blocks])
    assert all(block.config.tie_word_embeddings is False for block in blocks) and model.config.tie_word_embeddings
    saved = AutoModelForCausalLM.from_config(blocks[1].config)
    saved.load_state_dict(merged)
    saved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.transformer.wte.weight, loaded.lm_head.weight + 1.0)


def test_a_tied_model_in_one_block_stays_tied():
    (block,) = split(make_model(*TIED["llama"]), [0, 4])
    assert block.tied is None
    assert block.get_parameter("lm_head.weight") is block.get_parameter("model.embed_tokens.weight")


def test_blocks_that_overlap_do_not_merge():
    blocks = split(make_model(*DECODERS["llama"]), [0, 2, 4])
    with pytest.raises(InputError, match="block 1 and one before it both have"):
        merged_state_dict([blocks[0].state_dict(), blocks[0].state_dict()])


def slowest(costs, bounds, recompute):
    times = []
    for start, stop in itertools.pairwise(bounds):
        again = recompute and stop < len(costs)
        times.append(sum(f + b + (f if again else 0) for f, b in costs[start:stop]))
    return max(times)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_balance_is_the_best_of_all(recompute):
    random.seed(0)
    for layers, stages in itertools.product(range(1, 8), range(1, 6)):
        if stages > layers:
            continue
        costs = [(random.randint(1, 9), random.randint(1, 9)) for _ in range(layers)]
        bounds = balance(costs, stages, recompute)
        assert bounds[0] == 0 and bounds[-1] == layers and len(bounds) == stages + 1
        assert all(start < stop for start, stop in itertools.pairwise(bounds))
        every = [[0, *cuts, layers] for cuts in itertools.combinations(range(1, layers), stages - 1)]
        assert slowest(costs, bounds, recompute) == min(slowest(costs, other, recompute) for other in every)


def test_recomputing_stages_get_fewer_layers_than_the_last():
    assert balance([(1, 1)] * 5, 2, recompute=False) in ([0, 2, 5], [0, 3, 5])
    assert balance([(1, 1)] * 5, 2, recompute=True) == [0, 2, 5]
    assert balance([(1, 2), (1, 2), (1, 2), (9, 18)], 2, recompute=True) == [0, 3, 4]
    assert balance([(0, 0), (0, 0), (1, 1)], 3, recompute=True) == [0, 1, 2, 3]


def test_even_bounds():
    assert (
        even(4, 2) == [0, 2, 4] and even(7, 3) == [0, 3, 5, 7] and even(3, 3) == [0, 1, 2, 3] and even(3, 1) == [0, 3]
    )


@pytest.mark.parametrize("stages", [0, 5])
def test_stages_must_fit_the_layers(stages):
    for function in (lambda: even(4, stages), lambda: balance([(1, 1)] * 4, stages, True)):
        with pytest.raises(ConfigurationError, match=f"stages={stages}.*between 1 and 4"):
            function()


@pytest.mark.parametrize("table, family, shape", [(TIED, "llama", (2, 6)), (IMAGES, "resnet", (2, 3, 32, 32))])
def test_costs_are_measured_for_every_layer_and_leave_no_trace(table, family, shape):
    model = make_model(*table[family])
    before = state_of(model)
    costs = layer_costs(model, shape, repeats=2)
    assert len(costs) == num_layers(model) == 4 and all(f > 0 and b > 0 for f, b in costs)
    torch.testing.assert_close(state_of(model)[:4], before[:4], rtol=0, atol=0)
    assert state_of(model)[4] == before[4]
    with pytest.raises(ConfigurationError, match="repeats=0"):
        layer_costs(model, shape, repeats=0)


def test_costs_feel_a_slow_layer():
    """A layer repeated two hundred times; no figure is compared with a clock."""
    model = make_model(*DECODERS["llama"])
    layer = model.model.layers[1]

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, *args, **kwargs):
            return sum(self.layer(x, *args, **kwargs) for _ in range(200)) / 200

    model.model.layers[1] = Slow()
    costs = layer_costs(model, (1, 4), repeats=1)
    assert max(range(4), key=lambda i: sum(costs[i])) == 1
