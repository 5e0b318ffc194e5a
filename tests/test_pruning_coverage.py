import pytest
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers
from hf_mlopt.pruning import METHODS, MoEPruner, PruningConfig
from hf_mlopt.pruning.coverage import needs_all_tokens, policy, substitute, uncovered_experts
from hf_mlopt.pruning.patterns import select
from tests.families import make_family, token_ids
from tests.reference import pruning as reference


STARVED = 2
FAMILIES = ("mixtral", "gpt_oss", "module_list")
POLICIES = ("blend", "all_tokens", "magnitude", "skip")
CALIBRATED = tuple(name for name, method in METHODS.items() if method.calibrated)


@torch.no_grad()
def starving(name: str):
    """A model whose routers never choose expert `STARVED`: the first channel is large and speaks against it."""
    model = make_family(name)
    model.model.embed_tokens.weight[:, 0] = 20.0
    for layer in moe_layers(model):
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[STARVED] = 0.0
        layer.router.weight[STARVED, 0] = -100.0
    for decoder in model.model.layers:
        decoder.post_attention_layernorm.weight[0] = 1.0
    return model


def prune(model, **settings):
    settings = {**({} if "pattern" in settings else {"sparsity": 0.5}), "min_tokens": 1, **settings}
    return MoEPruner(PruningConfig(**settings)).prune(model, token_ids(), progress=False)


def matrices(model, index=0, expert=STARVED):
    layer = moe_layers(model)[index]
    return [layer.weight(expert, projection).clone() for projection in layer.projections]


def by_magnitude(matrix, **pattern):
    return select(matrix.abs(), pattern.get("sparsity"), (2, 4) if "pattern" in pattern else None)


@pytest.mark.parametrize("min_tokens", (0, 1, 40))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_starved_expert_is_listed_with_the_tokens_of_all(name, min_tokens):
    report = prune(starving(name), min_tokens=min_tokens)
    for layer in report.layers:
        tokens = layer.tokens_per_expert
        assert tokens[STARVED] == 0 and layer.gate_mass[STARVED] == 0 and sum(tokens) == 2 * token_ids().numel()
        assert layer.uncovered == [e for e, count in enumerate(tokens) if count < max(min_tokens, 1)]
        assert f"layer {layer.index}: experts {layer.uncovered}" in str(report)
    assert report.uncovered == {layer.index: layer.uncovered for layer in report.layers}
    assert report.to_dict()["layers"][0]["uncovered"] == report.layers[0].uncovered


@pytest.mark.parametrize("pattern", ({"sparsity": 0.5}, {"pattern": "2:4"}), ids=("50%", "2:4"))
@pytest.mark.parametrize("on_uncovered", POLICIES)
@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_starved_expert_is_neither_wiped_out_nor_pruned_by_index(name, method, on_uncovered, pattern):
    model = starving(name)
    before = matrices(model)
    prune(model, method=method, on_uncovered=on_uncovered, **pattern)
    for old, new in zip(before, matrices(model), strict=True):
        if on_uncovered == "skip":
            assert torch.equal(old, new)
            continue
        zeros = new == 0
        assert (zeros.sum(dim=-1) == old.shape[-1] // 2).all()
        by_index = select(torch.zeros_like(old), pattern.get("sparsity"), (2, 4) if "pattern" in pattern else None)
        assert (zeros == by_index).float().mean() < 0.7  # chance is a half
        # What is left is larger than what is gone, whichever statistics decided.
        assert old[~zeros].abs().mean() > 1.5 * old[zeros].abs().mean()
    covered = matrices(model, expert=0)
    assert all((matrix == 0).float().mean() == 0.5 for matrix in covered)


@pytest.mark.parametrize("settings", ({"min_tokens": 1, "on_uncovered": "magnitude"}, {"min_tokens": 0}),
                         ids=("policy", "guard off"))  # fmt: skip
@pytest.mark.parametrize("method", ("wanda", "moe-pruner", "sparsegpt", "sparsegpt-gated"))
@pytest.mark.parametrize("name", FAMILIES)
def test_magnitude_decides_under_that_policy_and_with_the_guard_off(name, method, settings):
    model = starving(name)
    before = matrices(model)
    prune(model, method=method, **settings)
    for old, new in zip(before, matrices(model), strict=True):
        assert torch.equal(new, old.masked_fill(by_magnitude(old, sparsity=0.5), 0))


@torch.no_grad()
def inputs_of_experts(model):
    """Input of the first layer's experts on the calibration tokens."""
    layer, found = moe_layers(model)[0], []
    watched = layer.experts if layer.is_fused else layer.router
    handle = watched.register_forward_pre_hook(lambda _module, args: found.append(args[0].reshape(-1, 32)))
    model(token_ids(), use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("on_uncovered", ("blend", "all_tokens"))
@pytest.mark.parametrize("method", ("wanda", "moe-pruner"))
@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_without_tokens_is_pruned_by_the_tokens_of_the_layer(name, method, on_uncovered):
    """Its w2 by what it would make of all tokens, in float64 and loops."""
    model = starving(name)
    before, hidden_TH = matrices(model), inputs_of_experts(model)
    experts = moe_layers(model)[0].experts
    if name == "module_list":
        with torch.no_grad():
            expert = experts[STARVED]
            inner = torch.nn.functional.silu(expert.w1(hidden_TH)) * expert.w3(hidden_TH)
    else:
        inner = torch.stack([reference.expert_intermediate(experts, STARVED, x) for x in hidden_TH])
    Q = {width: reference.second_moment(X.tolist(), [1.0] * len(X)) for width, X in ((32, hidden_TH), (64, inner))}
    prune(model, method=method, on_uncovered=on_uncovered)
    for old, new in zip(before, matrices(model), strict=True):
        S = reference.wanda_score(old.tolist(), Q[old.shape[-1]])
        assert (new == 0).tolist() == reference.mask_rows(S, 0.5)


def test_the_policy_error_names_layer_experts_and_counts_and_changes_nothing():
    model = starving("mixtral")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp\.experts.*min_tokens=1 \({STARVED}: 0\)"):
        prune(model, on_uncovered="error")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(make_family("mixtral"), on_uncovered="error")  # all covered: nothing to complain about


@pytest.mark.parametrize("on_uncovered", (*POLICIES, "error"))
def test_the_guard_off_changes_nothing_for_experts_with_tokens(on_uncovered):
    """Any number of tokens above zero counts as covered, and no policy applies."""
    off, reference_model = make_family("olmoe"), make_family("olmoe")
    report = prune(off, min_tokens=0, on_uncovered=on_uncovered)
    prune(reference_model, min_tokens=1)
    assert report.uncovered == {} and min(report.layers[0].tokens_per_expert) < 40
    assert all(torch.equal(a, b) for a, b in zip(off.parameters(), reference_model.parameters(), strict=True))


def test_with_the_guard_off_even_the_policy_error_only_falls_back():
    report = prune(starving("mixtral"), min_tokens=0, on_uncovered="error")
    assert report.uncovered[0] == [STARVED] and STARVED in report.uncovered[1] and report.sparsity == 0.5


@pytest.mark.parametrize("on_uncovered", ("blend", "all_tokens", "magnitude", "skip"))
def test_only_uncovered_experts_are_treated(on_uncovered):
    models = {}
    for key, min_tokens in (("guard", 70), ("off", 0)):
        models[key] = make_family("mixtral")
        report = prune(models[key], min_tokens=min_tokens, on_uncovered=on_uncovered, propagate="dense")
        if key == "guard":
            uncovered = report.uncovered
    assert 0 < len(uncovered[0]) < 4  # some are covered, some are not
    for index in range(2):
        for expert in range(4):
            pairs = zip(*(matrices(models[key], index, expert) for key in models), strict=True)
            same = all(torch.equal(guarded, unguarded) for guarded, unguarded in pairs)
            assert same == (expert not in uncovered.get(index, []))


def moments(seed: int, width=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(2 * torch.randn(width, generator=generator, dtype=torch.float64))


def blending(min_tokens=100, **settings):
    return PruningConfig(sparsity=0.5, min_tokens=min_tokens, **settings)


@pytest.mark.parametrize("tokens", (0, 1, 37, 99))
def test_blend_equals_its_twin(tokens):
    own, layer = moments(0) * (tokens > 0), moments(1)
    expected = reference.blend(own.tolist(), tokens, layer.tolist(), 100)
    found = substitute(own, tokens, layer, blending())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    # Hessians blend by the same rule, in units of their mean diagonal.
    full = substitute(torch.diag(own), tokens, torch.diag(layer), blending())
    torch.testing.assert_close(full, torch.diag(found), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", (1e-4, 2.5, 1e4))
def test_blend_is_invariant_to_scaling_the_gate(scale):
    own, layer = moments(0), moments(1)
    for left, right in ((own, layer), (torch.diag(own), torch.diag(layer))):
        found = substitute(left, 50, right, blending())
        torch.testing.assert_close(substitute(left * scale**2, 50, right, blending()), found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", (4.0, 2.5, 1e-3))
@pytest.mark.parametrize("method", ("moe-pruner", "sparsegpt-gated"))
@pytest.mark.parametrize("min_tokens", (0, 40), ids=("covered", "blend"))
def test_the_routed_scaling_factor_changes_no_mask_of_a_layer(method, factor, min_tokens):
    """DeepSeek multiplies all gates by a constant; the first layer with experts is calibrated on the same input."""
    found = []
    for scaling in (1.0, factor):
        model = make_family("deepseek_v3", routed_scaling_factor=scaling)
        report = prune(model, method=method, min_tokens=min_tokens)
        assert bool(report.layers[0].uncovered) == bool(min_tokens)
        found.append([matrix == 0 for expert in range(8) for matrix in matrices(model, expert=expert)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blend_is_continuous_at_the_threshold():
    """One token short of enough is, up to one part in min_tokens, the expert's own statistics."""
    own, layer = moments(0), moments(1)
    for min_tokens in (10, 1000, 100000):
        found = substitute(own, min_tokens - 1, layer, blending(min_tokens))
        gap = found - own / own.mean()
        torch.testing.assert_close(gap, (layer / layer.mean() - own / own.mean()) / min_tokens, rtol=1e-4, atol=1e-12)
    assert uncovered_experts(torch.tensor([9, 10, 11, 0]), 10) == [0, 3]


@pytest.mark.parametrize(
    ("on_uncovered", "min_tokens", "in_force", "all_tokens"),
    [
        ("blend", 256, "blend", True),
        ("all_tokens", 1, "all_tokens", True),
        ("magnitude", 256, "magnitude", False),
        ("skip", 256, "skip", False),
        ("error", 256, "error", False),
        ("blend", 0, "magnitude", False),
        ("error", 0, "magnitude", False),
    ],
)
def test_which_policy_is_in_force(on_uncovered, min_tokens, in_force, all_tokens):
    config = blending(min_tokens, on_uncovered=on_uncovered)
    assert policy(config) == in_force and needs_all_tokens(config) == all_tokens


def test_the_guard_is_on_by_default():
    report = MoEPruner(PruningConfig(sparsity=0.5)).prune(make_family("mixtral"), token_ids(), progress=False)
    assert report.uncovered == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}  # 144 tokens are less than 256
