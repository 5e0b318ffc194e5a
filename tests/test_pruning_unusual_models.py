"""Models that a sweep over layers could get wrong without a word."""

import pytest
import torch

from hf_mlopt import MoEPruner, PruningConfig, moe_layers, observe
from hf_mlopt.errors import InputError
from hf_mlopt.pruning.moments import ExpertMoments
from tests.families import make_family, token_ids
from tests.pruned import prune, same


def hand_content_to_layers(model, make):
    """Gives every decoder layer a keyword argument made from the token ids, as models with per-layer inputs do."""
    handed = {}

    def remember(_module, args, kwargs):
        handed["ids"] = kwargs.get("input_ids", args[0] if args else None)

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    for layer in model.base_model.layers:
        call = type(layer).__call__

        class Wrapped(type(layer)):
            def __call__(self, *args, _call=call, **kwargs):
                return _call(self, *args, per_layer_input=make(handed["ids"]), **kwargs)

        layer.__class__ = Wrapped
    return model


@pytest.mark.parametrize("make", (lambda ids: ids.float(), lambda ids: {}), ids=("tensor", "mutable dict"))
def test_content_beside_the_hidden_states_is_refused(make):
    model = hand_content_to_layers(make_family("mixtral"), make)
    with pytest.raises(InputError, match="decoder layer 0.*'per_layer_input'"):
        prune(model)
    assert same(model, make_family("mixtral"))


def test_two_mixtures_in_one_layer_are_refused():
    model = make_family("mixtral")
    model.model.layers[1].second = make_family("mixtral", seed=1).model.layers[1].mlp
    with pytest.raises(
        InputError, match=r"layers\.1\.second\.experts and model\.layers\.1\.mlp\.experts|one decoder layer"
    ):
        prune(model)


def test_a_patched_forward_survives():
    model = make_family("mixtral")
    layer = model.model.layers[0]
    calls, forward = [], layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    patched = layer.forward
    prune(model)
    assert layer.forward is patched and calls


def test_training_modes_survive():
    model = make_family("mixtral").train()
    model.model.layers[0].mlp.eval()
    prune(model)
    assert model.training and not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = type(make_family("mixtral"))(make_family("mixtral").config)
    with pytest.raises(InputError, match="without device_map"):
        prune(model)


def test_eager_that_would_gather_too_much_is_refused(monkeypatch):
    model = make_family("mixtral")
    model.set_experts_implementation("eager")
    monkeypatch.setattr("hf_mlopt.pruning.pruner._MAX_GATHERED", 1000)
    with pytest.raises(InputError, match="grouped_mm"):
        prune(model)
    model.set_experts_implementation("grouped_mm")
    prune(model)


def test_a_linear_that_is_never_reached_is_named():
    model = make_family("mixtral")
    model.model.layers[1].spare = torch.nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"model\.layers\.1\.spare\.weight.*never reached"):
        prune(model, scope="all-linear")


def test_the_layer_is_handed_back_when_something_fails(monkeypatch):
    stored = []
    monkeypatch.setattr(
        "hf_mlopt.pruning.sweep.InMemory.store", lambda self, index, changed=True: stored.append((index, changed))
    )
    with pytest.raises(InputError, match="min_tokens"):
        prune(make_family("mixtral"), min_tokens=10_000, on_uncovered="error")
    assert stored == [(0, False)]


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss"))
def test_ria_takes_gate_and_up_as_two_matrices(name):
    """Scaling the gate matrix as a whole changes neither mask of the first layer; in one sum with up it would."""
    plain, scaled = make_family(name), make_family(name)
    layer = moe_layers(scaled)[0]
    layer.stacked("gate_up_proj")[:, layer.matrices("gate_up_proj")[0]] *= 32
    for model in (plain, scaled):
        prune(model, method="ria")
    masks = [moe_layers(model)[0].stacked("gate_up_proj") == 0 for model in (plain, scaled)]
    assert torch.equal(*masks)


@torch.no_grad()
def test_decoding_with_a_cache_counts_only_new_tokens():
    model, layer = make_family("mixtral"), moe_layers(make_family("mixtral"))[0]
    sizes = {source: layer.input_size(source) for source in ("hidden", "intermediate")}
    moments = {index: ExpertMoments(layer.num_experts, sizes) for index in range(2)}
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with observe(model, lambda layer, routed: moments[layer.index].update(layer, routed)):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # 10 real tokens of the prompt and two new ones of each sequence, in two places each
    assert int(moments[0].sums["tokens"].sum()) == 2 * (10 + 2 * 2)


def test_config_refuses_a_number_in_quotes():
    with pytest.raises(InputError, match="sparsity='0.5'"):
        PruningConfig(sparsity="0.5")


def test_the_report_names_the_policy_in_force():
    report = MoEPruner(PruningConfig(sparsity=0.5, min_tokens=0)).prune(
        make_family("mixtral"), token_ids(), progress=False
    )
    assert report.to_dict()["on_uncovered"] == "magnitude" and report.config.on_uncovered == "blend"
