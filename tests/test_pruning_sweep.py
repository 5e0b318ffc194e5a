import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mlopt.moe import decoder_layers, moe_layers
from hf_mlopt.pruning import METHODS, PruningConfig
from hf_mlopt.pruning.states import LayerCalls, States, embed
from hf_mlopt.pruning.sweep import InMemory, sweep
from tests.families import ALL_FAMILIES, make_family, token_ids
from tests.pruned import PATTERNS, prune, routed_by, same, snapshot
from tests.reference import pruning as reference


@pytest.mark.parametrize(("gated", "plain"), [("moe-pruner", "wanda"), ("sparsegpt-gated", "sparsegpt")])
@pytest.mark.parametrize("name", ("mixtral", "qwen2_moe", "module_list"))
def test_gate_power_zero_ignores_the_router(name, gated, plain):
    pruned = {}
    for key, settings in {"zero": {"method": gated, "gate_power": 0.0}, "plain": {"method": plain},
                          "one": {"method": gated}}.items():  # fmt: skip
        pruned[key] = make_family(name)
        prune(pruned[key], scope="all-linear", **settings)
    assert same(pruned["zero"], pruned["plain"])
    assert not same(pruned["one"], pruned["plain"])


@pytest.mark.parametrize("settings", PATTERNS, ids=("50%", "2:4"))
@pytest.mark.parametrize("constant", ("one expert", "all experts"))
def test_constant_gate_gives_the_mask_of_wanda(constant, settings):
    """Top-1 renormalised is 1; all of four experts chosen by a router of zeros are 1/4."""
    pruned = []
    for method in ("moe-pruner", "wanda"):
        model = make_family("mixtral", num_experts_per_tok=1 if constant == "one expert" else 4)
        if constant == "all experts":
            for layer in moe_layers(model):
                nn.init.zeros_(layer.router.weight)
        prune(model, method=method, **settings)
        pruned.append(model)
    assert same(*pruned)


def test_the_router_matters_otherwise():
    models = [make_family("mixtral"), make_family("mixtral")]
    for model, method in zip(models, ("moe-pruner", "wanda"), strict=True):
        prune(model, method=method)
    assert not same(*models)


def test_sum_to_one_changes_only_gates_that_do_not_sum_to_one():
    for name, changed in (("mixtral", False), ("phimoe", True)):
        models = [make_family(name), make_family(name)]
        for model, normalize in zip(models, ("as_model", "sum_to_one"), strict=True):
            report = prune(model, gate_normalize=normalize)
        assert same(*models) != changed
        # 6 x 24 tokens, whose gates sum to 1 each
        assert sum(report.layers[0].gate_mass) == pytest.approx(144, rel=1e-5)


@torch.no_grad()
def last_hidden(model, ids):
    """Output of the last decoder layer, before the final norm."""
    found = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids, use_cache=False)
    handle.remove()
    return found[0]


def sweep_states(model, batches, **settings):
    config = PruningConfig(sparsity=0.5, min_tokens=0, **settings)
    moe, device = moe_layers(model), torch.device("cpu")
    prefix, layers = decoder_layers(model, moe)
    last = copy.deepcopy(layers[-1])
    calls = LayerCalls()
    states = States(embed(model, layers, batches, device, calls))
    sweep(InMemory(prefix, layers, moe, device), states, calls, config, iter)
    # The sweep leaves the input of the last layer: nobody reads its output.
    last = layers[-1] if config.propagate == "pruned" else last
    with torch.no_grad():
        return [calls(len(layers) - 1, last, state) for state in states]


@pytest.mark.parametrize("propagate", ("pruned", "dense"))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_states_are_those_of_the_whole_model(name, propagate):
    """Layer by layer the sweep arrives at what the dense or the pruned model computes in one go."""
    model, dense = make_family(name), make_family(name)
    batches = [token_ids(2, 24), token_ids(3, 24, seed=1), token_ids(2, 16, seed=2)]
    states = sweep_states(model, batches, propagate=propagate)
    for state, batch in zip(states, batches, strict=True):
        expected, other = last_hidden(model, batch), last_hidden(dense, batch)
        if propagate == "dense":
            expected, other = other, expected
        assert torch.equal(state, expected)
        assert (state - other).norm() > 0.01 * state.norm()


@pytest.mark.parametrize("propagate", ("pruned", "dense"))
def test_the_next_layer_is_calibrated_on_what_propagates(propagate):
    ids, dense, half = token_ids(), make_family("mixtral"), make_family("mixtral")
    prune(half, ids)
    half.model.layers[1].load_state_dict(dense.model.layers[1].state_dict())  # only the first layer is pruned
    counts = {}
    for key, model in (("pruned", half), ("dense", dense)):
        counts[key] = torch.bincount(routed_by(model, ids, 1)[2].flatten(), minlength=4).tolist()
    assert counts["pruned"] != counts["dense"]
    report = prune(make_family("mixtral"), ids, propagate=propagate)
    assert report.layers[1].tokens_per_expert == counts[propagate]
    assert sum(report.layers[1].gate_mass) == pytest.approx(ids.numel(), rel=1e-5)


def brute_force_moments(layer, hidden_TH, topk_index_TK, topk_weight_TK, min_tokens, gate_power):
    """Q of both inputs of every expert, blended by §3 where it saw too few tokens."""
    everyone = [1.0] * len(hidden_TH)
    for expert in range(layer.num_experts):
        pairs = reference.routed_tokens(topk_index_TK, topk_weight_TK, expert)
        gates = [g for _, g in pairs]
        h = [reference.expert_intermediate(layer.experts, expert, x).tolist() for x in hidden_TH]
        for X in (hidden_TH.tolist(), h):
            Q = reference.second_moment([X[t] for t, _ in pairs], gates, gate_power)
            if len(pairs) < min_tokens:
                Q = reference.blend(Q, len(pairs), reference.second_moment(X, everyone), min_tokens)
            yield Q


@pytest.mark.parametrize("min_tokens", (0, 70), ids=("covered", "blend"))
@pytest.mark.parametrize("settings", PATTERNS, ids=("50%", "2:4"))
@pytest.mark.parametrize("method", reference.SCORES)
def test_final_weights_equal_a_literal_sweep(method, settings, min_tokens):
    """Whole-model forwards, plain loops and float64 against the sweep: every weight of both layers."""
    ids, model, twin = token_ids(4, 32), make_family("mixtral"), make_family("mixtral")
    report = prune(model, ids, method=method, min_tokens=min_tokens, **settings)
    assert bool(report.uncovered) == bool(min_tokens and METHODS[method].calibrated)
    score, gate_power = reference.SCORES[method], float(METHODS[method].gated)
    for index in range(2):
        layer, *routing = routed_by(twin, ids, index)
        moments = brute_force_moments(layer, *routing, min_tokens, gate_power)
        removed = []
        for expert in range(layer.num_experts):
            for parameter, matrices in ((layer.experts.gate_up_proj, 2), (layer.experts.down_proj, 1)):
                Q = next(moments)  # one for gate and up, which are matrices of their own
                S = [row for W in parameter[expert].chunk(matrices) for row in score(W.tolist(), Q)]
                mask = reference.mask_rows(S, 0.5) if "sparsity" in settings else reference.mask_n_of_m(S, 2, 4)
                removed.append((parameter, expert, torch.tensor(mask)))
        for parameter, expert, mask in removed:
            parameter.data[expert][mask] = 0.0
    for layer, literal in zip(moe_layers(model), moe_layers(twin), strict=True):
        assert torch.equal(layer.experts.gate_up_proj, literal.experts.gate_up_proj)
        assert torch.equal(layer.experts.down_proj, literal.experts.down_proj)


@pytest.mark.parametrize("method", ("sparsegpt", "sparsegpt-gated"))
def test_sparsegpt_in_the_first_layer_equals_its_twin(method):
    ids, model, twin = token_ids(4, 32), make_family("mixtral"), make_family("mixtral")
    prune(model, ids, method=method)
    layer, hidden_TH, topk_index_TK, topk_weight_TK = routed_by(twin, ids, 0)
    for expert in range(2):
        pairs = reference.routed_tokens(topk_index_TK, topk_weight_TK, expert)
        X = [hidden_TH[t].tolist() for t, _ in pairs]
        H = reference.full_second_moment(X, [g for _, g in pairs], 1.0 if method == "sparsegpt-gated" else 0.0)
        W, removed = reference.sparsegpt(layer.experts.gate_up_proj[expert].data, H, p=0.5)
        pruned = model.model.layers[0].mlp.experts.gate_up_proj[expert].data
        assert torch.equal(pruned == 0, removed)
        torch.testing.assert_close(pruned.double(), W, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_warns_and_changes_nothing(method, caplog):
    model = make_family("mixtral", torch.bfloat16)
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "hf_mlopt"):
        report = prune(model, method=method, sparsity=0.0, scope="all-linear")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    [warning] = [record.message for record in caplog.records if record.name.startswith("hf_mlopt")]
    assert "sparsity=0 removes nothing" in warning and report.sparsity == 0


def test_the_same_seed_gives_the_same_weights_and_batches_hardly_matter():
    models = [make_family("qwen3_moe") for _ in range(3)]
    for model, batch_size in zip(models, (8, 8, 2), strict=True):
        prune(model, batch_size=batch_size)
    assert same(*models[:2])
    zeros = [[value == 0 for value in snapshot(model).values()] for model in models]
    assert all(torch.equal(*pair) for pair in zip(zeros[0], zeros[2], strict=True))


@pytest.mark.parametrize("form", ("lists", "ragged", "rows", "dataset"))
def test_every_form_of_calibration_gives_the_same_mask(form):
    ids = token_ids()
    forms = {
        "lists": lambda: ids.tolist(),
        "ragged": lambda: [[], *ids.tolist()],
        "rows": lambda: [
            {"input_ids": [*row, 2, 2], "attention_mask": [1] * len(row) + [0, 0]} for row in ids.tolist()
        ],  # fmt: skip
        "dataset": lambda: __import__("datasets").Dataset.from_dict({"input_ids": ids.tolist()}),
    }
    models = [make_family("mixtral"), make_family("mixtral")]
    prune(models[0], ids)
    prune(models[1], forms[form]())
    assert same(*models)


@pytest.mark.parametrize("training", (True, False))
def test_training_mode_and_hooks_are_left_as_found(training):
    model = make_family("mixtral", router_jitter_noise=0.5).train(training)
    twin = make_family("mixtral")
    for each in (model, twin):
        prune(each)
    assert model.training == training and same(model, twin)  # no jitter while calibrating
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_the_pruned_model_still_speaks():
    model = make_family("mixtral")
    prune(model, scope="all-linear")
    output = model.generate(token_ids(1, 4), max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 8)
    assert torch.isfinite(F.log_softmax(model(output).logits, dim=-1)).all()


def test_the_report_adds_up():
    model = make_family("deepseek_v3")
    report = prune(model, scope="all-linear", pattern="2:4")
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    assert report.layers[0].tokens_per_expert == []  # a dense layer
    for layer in report.layers[1:]:
        assert sum(layer.tokens_per_expert) == 2 * token_ids().numel()
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report.totals["zeros"] == zeros and report.totals["parameters"] == parameters
    assert report.totals["sparsity_of_model"] == zeros / parameters and report.sparsity == 0.5
    assert report.experts_implementation == "grouped_mm" and report.seconds > 0 and report.peak_memory_bytes > 2**20
    shapes = {tensor["name"]: tensor["shape"] for layer in report.layers for tensor in layer.tensors}
    assert all(list(model.state_dict()[name].shape) == shape[-model.state_dict()[name].ndim :]
               for name, shape in shapes.items())  # fmt: skip


@pytest.mark.parametrize(
    ("active", "reported"), [("eager", "batched_mm"), ("batched_mm", "batched_mm"), ("grouped_mm", "grouped_mm")]
)
def test_the_report_names_the_implementation(active, reported):
    model = make_family("mixtral")
    model.set_experts_implementation(active)
    assert prune(model).experts_implementation == reported
    assert model.config._experts_implementation == active
    assert prune(make_family("module_list")).experts_implementation == "module_list"
