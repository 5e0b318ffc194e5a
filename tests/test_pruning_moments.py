import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_mlopt.errors import InputError
from hf_mlopt.moe import RoutedTokens, moe_layers, observe
from hf_mlopt.pruning.moments import ExpertMoments, add_grouped_outer, sum_by_expert
from hf_mlopt.pruning.patterns import select
from hf_mlopt.pruning.scores import wanda
from tests.families import ALL_FAMILIES, make_family, token_ids
from tests.reference import pruning as reference


# One batch is summed in float32 (2^-24 a step), batches and ranks in float64.
FLOAT32 = {"rtol": 1e-6, "atol": 0}


def empty(layer, **settings):
    sizes = {source: layer.input_size(source) for source in ("hidden", "intermediate")}
    return ExpertMoments(layer.num_experts, sizes, **settings)


def observed(model, batches, masks=None, **settings):
    """Moments of every layer, by index."""
    moments = {layer.index: empty(layer, **settings) for layer in moe_layers(model)}
    norms = settings.get("output_norms", False)
    with torch.no_grad(), observe(model, lambda layer, routed: moments[layer.index].update(layer, routed), norms):
        for number, batch in enumerate(batches):
            model(batch, attention_mask=None if masks is None else masks[number])
    return moments


def recorded(model, batch):
    seen = {}
    with torch.no_grad(), observe(model, lambda layer, routed: seen.update({layer: routed})):
        model(batch)
    return seen


def assert_sums_close(left, right, rtol=1e-6):
    assert left.sums.keys() == right.sums.keys()
    for key, value in left.sums.items():
        scale = 0 if value.ndim < 2 else float(value.abs().max()) * rtol  # off-diagonal sums cancel
        torch.testing.assert_close(
            value, right.sums[key], rtol=rtol, atol=scale, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("gate_power", (0.0, 0.5, 1.0, 2.0))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_moments_equal_brute_force(name, gate_power, dtype):
    """Q of both inputs against loops over the tokens each expert was sent."""
    for layer, routed in recorded(make_family(name, dtype), token_ids(4, 16)).items():
        moments = empty(layer, gate_power=gate_power)
        moments.update(layer, routed)
        intermediate = {}
        for slot in range(len(routed.expert_S)):
            key = (int(routed.expert_S[slot]), int(routed.token_S[slot]))
            intermediate[key] = routed.intermediate_SI[slot].tolist()
        for expert in range(layer.num_experts):
            pairs = reference.routed_tokens(routed.topk_index_TK, routed.topk_weight_TK, expert)
            assert int(moments.sums["tokens"][expert]) == len(pairs)
            assert float(moments.sums["gate_mass"][expert]) == pytest.approx(sum(g for _, g in pairs), rel=1e-6)
            if not pairs:
                assert not moments.sums["hidden"][expert].any() and not moments.sums["intermediate"][expert].any()
                continue
            gates = [g for _, g in pairs]
            hidden = reference.second_moment([routed.hidden_TH[t].tolist() for t, _ in pairs], gates, gate_power)
            inner = reference.second_moment([intermediate[expert, t] for t, _ in pairs], gates, gate_power)
            torch.testing.assert_close(moments.sums["hidden"][expert], torch.tensor(hidden).double(), **FLOAT32)
            torch.testing.assert_close(moments.sums["intermediate"][expert], torch.tensor(inner).double(), **FLOAT32)
        everyone = reference.second_moment(routed.hidden_TH.tolist(), [1.0] * 64)
        torch.testing.assert_close(moments.sums["layer_hidden"], torch.tensor(everyone).double(), **FLOAT32)
        assert int(moments.sums["layer_tokens"]) == 64


def test_the_error_against_brute_force_is_that_of_float32():
    """At most 2e-7 of the norm of Q, over 2 000 tokens."""
    [(layer, routed)] = recorded(make_family("mixtral", num_hidden_layers=1), token_ids(20, 100)).items()
    moments = empty(layer, gate_power=1.0)
    moments.update(layer, routed)
    gate_TE = torch.zeros(2000, 4, dtype=torch.float64)
    gate_TE.scatter_(1, routed.topk_index_TK, routed.topk_weight_TK.double())
    exact_ED = gate_TE.square().T @ routed.hidden_TH.double().square()
    assert (moments.sums["hidden"] - exact_ED).norm() <= 2e-7 * exact_ED.norm()


@pytest.mark.parametrize("gate_power", (0.0, 1.0))
@pytest.mark.parametrize("name", ("mixtral", "gpt_oss", "deepseek_v3", "module_list"))
def test_hessians_equal_brute_force_and_hold_the_moments(name, gate_power):
    for layer, routed in recorded(make_family(name), token_ids(3, 16)).items():
        full, diagonal = empty(layer, gate_power=gate_power, hessian=True), empty(layer, gate_power=gate_power)
        full.update(layer, routed)
        diagonal.update(layer, routed)
        for source in ("hidden", "intermediate", "layer_hidden"):
            found = full.sums[source].diagonal(dim1=-2, dim2=-1).double()
            torch.testing.assert_close(found, diagonal.sums[source], rtol=2e-6, atol=1e-9)
        for expert in range(layer.num_experts):
            pairs = reference.routed_tokens(routed.topk_index_TK, routed.topk_weight_TK, expert)
            if pairs:
                X = [routed.hidden_TH[t].tolist() for t, _ in pairs]
                H = reference.full_second_moment(X, [g for _, g in pairs], gate_power)
                torch.testing.assert_close(full.sums["hidden"][expert].double(), H, rtol=1e-5, atol=1e-5)
        everyone = reference.full_second_moment(routed.hidden_TH.tolist(), [1.0] * 48)
        torch.testing.assert_close(full.sums["layer_hidden"].double(), everyone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hessian", (False, True))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_splitting_batches_changes_nothing_but_rounding(name, hessian):
    model, ids = make_family(name), token_ids(6, 16)
    settings = {"gate_power": 1.0, "hessian": hessian, "output_norms": True}
    whole, split = (observed(model, ids.split(size), **settings) for size in (6, 1))
    assert len(whole) == 2
    for index in whole:
        assert_sums_close(whole[index], split[index], rtol=2e-5)  # the forward passes differ in their last bits
        assert torch.equal(whole[index].sums["tokens"], split[index].sums["tokens"])


@pytest.mark.parametrize("hessian", (False, True))
def test_two_halves_merge_to_the_whole(hessian):
    model, halves = make_family("mixtral"), token_ids(6, 16).split(3)
    settings = {"gate_power": 1.0, "hessian": hessian, "output_norms": True}
    whole = observed(model, halves, **settings)
    first, second = (observed(model, [half], **settings) for half in halves)
    for index in whole:
        untouched = copy.deepcopy(second[index].sums)
        merged = first[index].merge(second[index])
        assert merged is first[index]
        assert_sums_close(whole[index], merged, rtol=1e-6 if hessian else 1e-14)
        assert all(torch.equal(value, untouched[key]) for key, value in second[index].sums.items())


def rank_moments(rank: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    torch.set_num_threads(1)
    moments = observed(make_family("mixtral"), [token_ids(6, 16).split(3)[rank]], gate_power=1.0)
    for layer_moments in moments.values():
        for value in layer_moments.sums.values():
            dist.all_reduce(value)
    torch.save({index: value.sums for index, value in moments.items()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_sum_to_one(tmp_path):
    mp.spawn(rank_moments, (str(tmp_path),), nprocs=2)
    alone = observed(make_family("mixtral"), token_ids(6, 16).split(3), gate_power=1.0)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for index, moments in alone.items():
        for key, value in moments.sums.items():
            assert torch.equal(ranks[0][index][key], ranks[1][index][key])
            torch.testing.assert_close(ranks[0][index][key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hessian", (False, True))
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_what_stands_in_padding_never_changes_the_moments(name, hessian):
    model, ids = make_family(name), token_ids(4, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[2, 3:] = 0, 0
    other = torch.where(mask.bool(), ids, 2)
    settings = {"gate_power": 1.0, "hessian": hessian, "output_norms": True}
    left, right = (observed(model, [each], [mask], **settings) for each in (ids, other))
    counted = {index: int(moments.sums["tokens"].sum()) for index, moments in left.items()}
    assert set(counted.values()) == {2 * int(mask.sum())}
    # Without padding, one sequence at a time
    bare = observed(model, [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)], **settings)
    for index in left:
        # Padding is routed too, and the size of a group moves the last bit of its product.
        assert_sums_close(left[index], right[index], rtol=2e-6)
        assert_sums_close(left[index], bare[index], rtol=2e-5)


def synthetic(gate, tokens=200, experts=4, seed=0):
    """Routed tokens with router weights of our choice, in the order of `batched_mm`."""
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    weight_TK = gate(torch.rand(tokens, 2, generator=generator) + 0.01, index_TK)
    token_S = torch.arange(tokens).repeat_interleave(2)
    return RoutedTokens(
        hidden_TH=torch.randn(tokens, 24, generator=generator),
        topk_index_TK=index_TK,
        topk_weight_TK=weight_TK,
        expert_S=index_TK.flatten(),
        token_S=token_S,
        gate_S=weight_TK.flatten(),
        intermediate_SI=torch.randn(tokens * 2, 16, generator=generator),
        output_norm_S=torch.rand(tokens * 2, generator=generator),
    )


def sums(routed, **settings):
    moments = ExpertMoments(4, {"hidden": 24, "intermediate": 16}, **settings)
    moments.update(None, routed)
    return moments.sums


def masks(found):
    generator = torch.Generator().manual_seed(5)
    chosen = []
    for source, width in (("hidden", 24), ("intermediate", 16)):
        score = wanda(torch.randn(4, 12, width, generator=generator), found[source])
        chosen += [select(score, 0.5, None), select(score, None, (2, 4))]
    return chosen


@pytest.mark.parametrize("gate_power", (0.5, 1.0, 3.0))
def test_a_constant_gate_gives_the_mask_of_wanda(gate_power):
    routed = synthetic(lambda weight, index: torch.full_like(weight, 0.37))
    gated, plain = sums(routed, gate_power=gate_power), sums(routed, gate_power=0.0)
    torch.testing.assert_close(gated["hidden"], plain["hidden"] * 0.37 ** (2 * gate_power), rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(masks(gated), masks(plain), strict=True))
    varied = masks(sums(synthetic(lambda weight, index: weight), gate_power=gate_power))
    assert not all(torch.equal(a, b) for a, b in zip(varied, masks(plain), strict=True))


@pytest.mark.parametrize("factors", ((2.0, 2.0, 2.0, 2.0), (0.001, 3.0, 1.0, 40.0)))
def test_scaling_the_gate_per_expert_leaves_the_mask(factors):
    scale_E = torch.tensor(factors)
    found = sums(synthetic(lambda weight, index: weight), gate_power=1.0)
    scaled = sums(synthetic(lambda weight, index: weight * scale_E[index]), gate_power=1.0)
    for source in ("hidden", "intermediate"):
        expected = found[source] * scale_E.double().square()[:, None]
        torch.testing.assert_close(scaled[source], expected, rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(masks(found), masks(scaled), strict=True))
    assert torch.equal(found["layer_hidden"], scaled["layer_hidden"])


def test_sum_to_one_divides_by_the_gates_of_a_token():
    routed = synthetic(lambda weight, index: weight)
    normal = synthetic(lambda weight, index: weight / weight.sum(dim=-1, keepdim=True))
    left = sums(routed, gate_power=1.0, normalize_gate=True, output_norms=True)
    right = sums(normal, gate_power=1.0, output_norms=True)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=0)


def test_foreign_experts_are_left_out():
    """Expert parallelism routes tokens of other ranks to indices from `num_experts` on."""
    routed = synthetic(lambda weight, index: weight, experts=6)
    for hessian in (False, True):
        found = sums(routed, gate_power=1.0, hessian=hessian, output_norms=True)
        inside = routed.topk_index_TK < 4
        assert found["tokens"].tolist() == [int((routed.topk_index_TK == expert).sum()) for expert in range(4)]
        assert float(found["gate_mass"].sum()) == pytest.approx(float(routed.topk_weight_TK[inside].sum()), rel=1e-6)
        for expert in range(4):
            gate_S = routed.gate_S[routed.expert_S == expert]
            value_SI = gate_S[:, None] * routed.intermediate_SI[routed.expert_S == expert]
            total = value_SI.T @ value_SI if hessian else value_SI.square().sum(dim=0).double()
            torch.testing.assert_close(found["intermediate"][expert], total, rtol=1e-4, atol=1e-4)
            norms = gate_S.double() @ routed.output_norm_S[routed.expert_S == expert].double()
            assert float(found["output_norm"][expert]) == pytest.approx(float(norms), rel=1e-12)


@pytest.mark.parametrize("steps", (1, 3, 2048))
def test_outer_products_do_not_depend_on_the_step(steps, monkeypatch):
    routed = synthetic(lambda weight, index: weight, tokens=40)
    expected = torch.zeros(4, 16, 16)
    for value, expert, square in zip(routed.intermediate_SI, routed.expert_S, routed.gate_S**2, strict=True):
        expected[expert] += square * torch.outer(value, value)
    monkeypatch.setattr("hf_mlopt.pruning.moments._SLOTS_PER_STEP", steps)
    total = torch.zeros(4, 16, 16)
    add_grouped_outer(total, routed.intermediate_SI, routed.expert_S, routed.gate_S**2)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_rows_are_summed_per_expert():
    value_SD = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]])
    total = sum_by_expert(value_SD, torch.tensor([2, 0, 2, 7]), 3)
    assert total.tolist() == [[10.0, 20.0], [0.0, 0.0], [101.0, 202.0]]


@pytest.mark.parametrize("source", ("hidden", "intermediate"))
def test_non_finite_activations_are_refused_by_name(source):
    layer, routed = moe_layers(make_family("mixtral"))[0], synthetic(lambda weight, index: weight)
    if source == "hidden":
        routed.hidden_TH[int((routed.topk_index_TK == 3).any(dim=-1).nonzero()[0]), 5] = float("nan")
        message = r"model\.layers\.0\.mlp\.experts: the hidden activations of expert \d"
    else:
        routed.intermediate_SI[int((routed.expert_S == 3).nonzero()[0]), 5] = float("inf")
        message = r"model\.layers\.0\.mlp\.experts: the intermediate activations of expert 3"
    moments = ExpertMoments(4, {"hidden": 24, "intermediate": 16}, gate_power=1.0)
    moments.check_finite(layer)
    moments.update(layer, routed)
    with pytest.raises(InputError, match=message):
        moments.check_finite(layer)


@pytest.mark.parametrize("gate_power", (0.0, 1.0, 2.0))
def test_norms_are_weighted_by_the_gate_whatever_its_power(gate_power):
    routed = synthetic(lambda weight, index: weight)
    found = sums(routed, gate_power=gate_power, output_norms=True)["output_norm"]
    expected = [0.0] * 4
    for e, g, norm in zip(
        routed.expert_S.tolist(), routed.gate_S.tolist(), routed.output_norm_S.tolist(), strict=True
    ):
        expected[e] += g * norm
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=1e-12)


def test_norms_are_summed_only_where_asked_for():
    routed = synthetic(lambda weight, index: weight)
    assert "output_norm" not in sums(routed)
    routed.output_norm_S = None
    with pytest.raises(AssertionError, match="output_norms=True"):
        sums(routed, output_norms=True)


@pytest.mark.parametrize("hessian", (False, True))
def test_moments_of_the_experts_that_are_kept(hessian):
    routed = synthetic(lambda weight, index: weight)
    before = sums(routed, gate_power=1.0, hessian=hessian, output_norms=True)
    moments = ExpertMoments(4, {"hidden": 24, "intermediate": 16}, gate_power=1.0, hessian=hessian, output_norms=True)
    moments.update(None, routed)
    assert moments.keep_([1, 3]) is moments and moments.num_experts == 2
    for key, value in moments.sums.items():
        assert torch.equal(value, before[key] if key.startswith("layer_") else before[key][[1, 3]]), key
    moments.check_finite(None)


def test_a_norm_that_is_not_finite_is_refused_by_name():
    layer, routed = moe_layers(make_family("mixtral"))[0], synthetic(lambda weight, index: weight)
    routed.output_norm_S[int((routed.expert_S == 2).nonzero()[0])] = float("inf")
    moments = ExpertMoments(4, {"hidden": 24, "intermediate": 16}, output_norms=True)
    moments.update(layer, routed)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts: the output activations of expert 2"):
        moments.check_finite(layer)
