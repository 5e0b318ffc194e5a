"""The parts of `hf-mlopt speed`: routing, what each variant computes, rounds, verdict. No test looks at a clock."""

import copy

import pytest
import torch
from families import FUSED_FAMILIES, make_family
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from hf_mlopt.moe import moe_layers
from hf_mlopt.speed import ExpertVariants, experts, timing, variants, verdict
from hf_mlopt.speed.routing import route, tokens_per_expert


CPU = torch.device("cpu")
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def layer_of(name, **overrides):
    return moe_layers(make_family(name, **overrides))[0]


def skeleton_of(name, **overrides):
    model = make_family(name, **overrides)
    return moe_layers(model.to("meta"))[0]


def routed(layer, counts, dtype=torch.float32):
    index_TK = route(counts, layer.top_k)
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(len(index_TK), layer.input_size("hidden"), generator=generator).to(dtype)
    return hidden_TH, index_TK, torch.rand(index_TK.shape, generator=generator)


def literally(layer, hidden_TH, index_TK, weight_TK):
    """The experts token by token, in float64."""
    module = copy.deepcopy(layer.experts).double()
    up = "gate_up_proj" if module.has_gate else "up_proj"
    output_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for token, hidden_H in enumerate(hidden_TH.double()):
        for expert, weight in zip(index_TK[token].tolist(), weight_TK[token].double(), strict=True):
            inner = layer.weight(expert, up).double() @ hidden_H
            inner = inner + getattr(module, f"{up}_bias")[expert] if module.has_bias else inner
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            output = layer.weight(expert, "down_proj").double() @ inner
            output = output + module.down_proj_bias[expert] if module.has_bias else output
            output_TH[token] += weight * output
    return output_TH


# Routing


@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (4, 1), (5, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 64])
def test_balanced_routing_gives_every_expert_its_even_share(num_experts, top_k, tokens):
    counts = tokens_per_expert([7] * num_experts, tokens, top_k)
    assert sum(counts) == tokens * top_k and max(counts) - min(counts) <= 1
    index_TK = route(counts, top_k)
    assert index_TK.shape == (tokens, top_k)
    assert torch.bincount(index_TK.flatten(), minlength=num_experts).tolist() == counts
    assert all(len(set(experts)) == top_k for experts in index_TK.tolist())


@pytest.mark.parametrize(
    "load, tokens, top_k, expected",
    [
        ([4, 2, 1, 1], 8, 2, [8, 4, 2, 2]),  # in proportion, the first one just full
        ([0.5, 0.3, 0.2], 10, 1, [5, 3, 2]),
        ([5, 3, 2], 4, 1, [2, 1, 1]),  # 2, 1.2 and 0.8: the largest remainder gets the token that is left
        ([100, 1, 1, 1], 10, 2, [10, 4, 3, 3]),  # no expert gets a token twice: the excess goes to the others
        ([5, 0, 0, 0], 4, 2, [4, 2, 1, 1]),
        ([9, 8, 1, 1], 1, 2, [1, 1, 0, 0]),
    ],
)
def test_tokens_follow_the_load(load, tokens, top_k, expected):
    assert tokens_per_expert(load, tokens, top_k) == expected
    assert torch.bincount(route(expected, top_k).flatten(), minlength=len(load)).tolist() == expected
    assert all(len(set(experts)) == top_k for experts in route(expected, top_k).tolist())


# What the variants compute


@pytest.mark.parametrize("name", FUSED_FAMILIES)
def test_the_loop_computes_what_fused_experts_compute(name):
    layer = layer_of(name)
    inputs = routed(layer, uneven(layer))
    matrices = [list(layer.stacked(projection)) for projection in layer.projections]
    output = experts.run_expert_by_expert(layer.experts, *matrices, *inputs)
    torch.testing.assert_close(output, experts.run_fused(layer.experts, "grouped_mm", *inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)


def uneven(layer):
    """One expert with every token, one without any."""
    return tokens_per_expert([100, *[1] * (layer.num_experts - 2), 0], 12, layer.top_k)


@pytest.mark.parametrize("name", FAMILIES)
def test_2_of_4_keeps_the_two_largest_of_every_four_inputs(name):
    layer, given = layer_of(name), []
    for projection in layer.projections:
        matrices = experts.matrices_2_of_4(layer, projection, lambda matrix: given.append(matrix) or matrix)
        assert len(matrices) == layer.num_experts and all(matrix.is_contiguous() for matrix in given)
        for expert, matrix in enumerate(matrices):
            for row, pruned in zip(layer.weight(expert, projection).tolist(), matrix.tolist(), strict=True):
                for start in range(0, len(row), 4):
                    group = row[start : start + 4]
                    kept = sorted(group, key=abs)[2:]
                    assert pruned[start : start + 4] == [value if value in kept else 0 for value in group]


@pytest.mark.parametrize("name", FAMILIES)
def test_2_of_4_runs_on_the_pruned_weights(name):
    layer = layer_of(name)
    inputs = routed(layer, uneven(layer))
    sparse = [experts.matrices_2_of_4(layer, projection, lambda matrix: matrix) for projection in layer.projections]
    output = experts.run_expert_by_expert(layer.experts, *sparse, *inputs)
    dense = experts.run_fused(layer.experts, "grouped_mm", *inputs)
    for projection, matrices in zip(layer.projections, sparse, strict=True):
        layer.stacked(projection).copy_(torch.stack(matrices))
    torch.testing.assert_close(output.double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output, dense, atol=1e-2)


def test_2_of_4_is_what_torchs_own_format_holds():
    layer = layer_of("mixtral", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    stored = 0
    for projection in layer.projections:
        for matrix in experts.matrices_2_of_4(layer, projection, lambda matrix: matrix):
            packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
            assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), matrix)
            stored += packed.nbytes + meta.nbytes
    assert experts.bytes_2_of_4(layer.experts) == stored == 0.5625 * experts.expert_bytes(layer.experts)


def test_biases_are_not_compressed():
    layer = layer_of("gpt_oss", dtype=torch.bfloat16)
    biases = layer.experts.gate_up_proj_bias.nbytes + layer.experts.down_proj_bias.nbytes
    matrices = experts.expert_bytes(layer.experts) - biases
    assert experts.bytes_2_of_4(layer.experts) == 0.5625 * matrices + biases


def test_where_2_of_4_cannot_run():
    cuda = torch.device("cuda")
    assert "need a CUDA GPU" in experts.no_2_of_4(layer_of("mixtral", dtype=torch.bfloat16), CPU)
    assert "float32" in experts.no_2_of_4(layer_of("mixtral"), cuda)
    assert experts.no_2_of_4(layer_of("mixtral", dtype=torch.float16), cuda) is None
    odd = layer_of("mixtral", dtype=torch.bfloat16, intermediate_size=66)
    assert experts.no_2_of_4(odd, cuda) == "4 does not divide the input width 66 of down_proj"


def test_what_torch_refuses_is_passed_on(monkeypatch):
    monkeypatch.setattr(variants, "no_2_of_4", lambda layer, device: None)
    made = ExpertVariants(skeleton_of("mixtral", dtype=torch.bfloat16), CPU, [])
    assert "2:4" not in made.described and len(made.does_not_apply) == 1
    assert made.does_not_apply[0].startswith("2:4: ") and "CUDA" in made.does_not_apply[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_half_zeros_are_a_copy(name):
    layer = layer_of(name)
    before = {key: value.clone() for key, value in layer.experts.named_parameters()}
    zeros = experts.with_half_zeros(layer.experts)
    for key, value in layer.experts.named_parameters():
        assert torch.equal(value, before[key])
    for key in ("gate_up_proj", "down_proj"):
        changed = getattr(zeros, key)
        assert 0.45 < (changed == 0).float().mean() < 0.55
        assert torch.equal(changed[changed != 0], before[key][changed != 0])
        assert all(0.4 < (matrix == 0).float().mean() < 0.6 for matrix in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_removal_computes_with_the_experts_that_stay(name):
    made = ExpertVariants(skeleton_of(name), CPU, [0.25, 0.5])
    layer, num_experts = made.layer, made.layer.num_experts
    counts = made.counts(6, [1] * num_experts)
    kept = {"drop_0.25": num_experts * 3 // 4, "drop_0.5": num_experts // 2}
    for variant, count in kept.items():
        assert len(counts[variant]) == count and sum(counts[variant]) == sum(counts["dense"]) == 6 * layer.top_k
        assert made.described[variant]["what"] == f"{num_experts - count} of {num_experts} removed"
        assert made.described[variant]["bytes"] * num_experts == made.described["dense"]["bytes"] * count

        inputs = routed(layer, counts[variant])
        output = experts.run_fused(made.removed[variant], "grouped_mm", *inputs)
        torch.testing.assert_close(output.double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)
    # Experts that were removed are not touched, whatever is in them.
    layer.stacked("down_proj")[kept["drop_0.5"] :] = float("nan")
    calls = made.calls(counts, "grouped_mm")
    assert calls["dense"]().isnan().any() and not calls["drop_0.5"]().isnan().any()


def test_what_cannot_be_removed_is_said():
    made = ExpertVariants(skeleton_of("mixtral"), CPU, [0.1, 0.5, 0.75])
    assert list(made.removed) == ["drop_0.5"]
    _, none, too_many = made.does_not_apply
    assert "drop_experts=0.1" in none and "none goes" in none
    assert "drop_experts=0.75" in too_many and "keeps 1 of 4" in too_many
    # Two groups of four: three of eight leave groups of unequal size.
    grouped = ExpertVariants(skeleton_of("deepseek_v3"), CPU, [0.375])
    assert not grouped.removed and "2 groups" in grouped.does_not_apply[1]


def test_the_most_used_experts_stay():
    made = ExpertVariants(skeleton_of("mixtral"), CPU, [0.5])
    assert made.counts(8, [0.4, 0.3, 0.2, 0.1]) == {"dense": [6, 5, 3, 2], "drop_0.5": [8, 8]}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_runs_its_own_weights(name):
    made = ExpertVariants(skeleton_of(name), CPU, [0.5], convert=lambda matrix: matrix)
    layer, counts = made.layer, made.counts(6, [1] * made.layer.num_experts)
    calls = made.calls(counts, "grouped_mm")
    assert list(calls) == list(made.described)
    inputs = calls["dense"].args[2:]
    output = {variant: call() for variant, call in calls.items()}
    torch.testing.assert_close(output["dense"].double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["dense_loop"], output["dense"], atol=1e-5, rtol=1e-5)
    fewer = calls["drop_0.5"].args[0]
    assert (fewer.num_experts, len(fewer.down_proj)) == (layer.num_experts // 2,) * 2
    assert torch.bincount(calls["drop_0.5"].args[3].flatten()).tolist() == counts["drop_0.5"]
    for projection in layer.projections:
        pruned = experts.matrices_2_of_4(layer, projection, lambda matrix: matrix)
        layer.stacked(projection).copy_(torch.stack(pruned))
    torch.testing.assert_close(output["2:4"].double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)
    for key, value in made.half_zeros.named_parameters():
        getattr(layer.experts, key).copy_(value)
    torch.testing.assert_close(output["half_zeros"].double(), literally(layer, *inputs), atol=1e-5, rtol=1e-5)


def test_a_speedup_is_above_1_for_what_takes_less_time(monkeypatch):
    made = ExpertVariants(skeleton_of("mixtral"), CPU, [0.5], convert=lambda matrix: matrix)
    seconds = {"dense": 2.0, "half_zeros": 2.0, "dense_loop": 8.0, "2:4": 4.0, "drop_0.5": 1.0}
    monkeypatch.setattr(variants, "time_in_rounds", lambda *_: {name: [value] * 3 for name, value in seconds.items()})
    row = made.measure(8, [1] * 4, 3)
    speedups = {name: speedup["median"] for name, speedup in row["speedup"].items()}
    assert speedups == {"half_zeros": 1.0, "dense_loop": 0.25, "2:4": 0.5, "drop_0.5": 2.0}
    assert row["kernel_speedup"]["median"] == 2.0 and row["seconds"] == seconds


def test_a_row_is_complete():
    made = ExpertVariants(skeleton_of("qwen3_moe"), CPU, [0.5], convert=lambda matrix: matrix)
    row = made.measure(3, [1] * 8, repeats=6)
    named = ["half_zeros", "dense_loop", "2:4", "drop_0.5"]
    assert list(made.described) == ["dense", *named] and list(row["seconds"]) == ["dense", *named]
    assert list(row["speedup"]) == named and row["rounds"] == 6 and row["implementation"] == "grouped_mm"
    assert row["tokens"] == 3 and row["tokens_per_expert"] == {"dense": [1] * 6 + [0] * 2, "drop_0.5": [2, 2, 1, 1]}
    assert all(value > 0 for value in row["seconds"].values())
    assert set(row["kernel_speedup"]) == {"median", "low", "high"}


@pytest.mark.parametrize(
    "device, tokens, batched, expected",
    [("cuda", 2, 1.0, "batched_mm"), ("cuda", 2, 3.0, "grouped_mm"), ("cuda", 3, 1.0, "grouped_mm")]
    + [("cpu", 2, 1.0, "grouped_mm")],
)
def test_dense_is_the_faster_of_two_on_a_gpu(monkeypatch, device, tokens, batched, expected):
    made = ExpertVariants(skeleton_of("mixtral"), CPU, [])
    made.device = torch.device(device)
    made.calls = lambda counts, name: {"dense": name}
    monkeypatch.setattr(variants, "time_in_rounds", lambda *_: {"grouped_mm": [2.0], "batched_mm": [batched]})
    assert made._fastest_implementation(made.counts(tokens, [1] * 4)) == expected


# Rounds and ratios


@pytest.fixture
def clock(monkeypatch):
    """Records who is timed, for how many calls, in place of timing."""
    seen = []
    monkeypatch.setattr(timing, "_seconds", lambda function, device, calls: seen.append((function, calls)) or 0.004)
    return seen


def test_rounds_run_forwards_and_backwards(clock):
    seconds = timing.time_in_rounds({"a": "A", "b": "B"}, CPU, 6)
    assert seconds == {"a": [0.004] * 6, "b": [0.004] * 6}
    warm_up, rounds = clock[:12], clock[12:]
    assert {calls for _, calls in warm_up} == {1} and {calls for _, calls in rounds} == {5}  # 5 x 4 ms fill a block
    assert [function for function, _ in rounds] == ["A", "B", "B", "A", "A", "B", "B", "A", "A", "B", "B", "A"]


def test_six_rounds_are_run_whatever_they_take(clock, monkeypatch):
    monkeypatch.setattr(timing, "_COMPARISON_SECONDS", 0.0)
    assert len(timing.time_in_rounds({"a": "A"}, CPU, 50)["a"]) == 6


@pytest.mark.parametrize("rounds, low, high", [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (20, 6, 15), (30, 10, 21)])
def test_the_interval_is_that_of_the_sign_test(rounds, low, high):
    found = timing.ratio([2.0 * value for value in reversed(range(1, rounds + 1))], [2.0] * rounds)
    assert found == {"median": (rounds + 1) / 2, "low": low, "high": high}


def test_a_ratio_is_taken_round_by_round():
    assert timing.ratio([1.0, 2.0, 4.0], [0.5, 1.0, 2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


# The verdict


DESCRIBED = {
    "dense": {"what": "dense"},
    "half_zeros": {"what": "half zeros"},
    "dense_loop": {"what": "dense, by expert"},
    "2:4": {"what": "2:4, by expert"},
    "drop_0.25": {"what": "2 of 8 removed"},
    "drop_0.5": {"what": "4 of 8 removed"},
}


def speedup(median, spread=0.01):
    return {"median": median, "low": median - spread, "high": median + spread}


def row(tokens, kernel=None, **medians):
    """`half_zeros` is 1 unless given; a number, or a pair of number and spread."""
    given = {"half_zeros": 1.0, **medians}
    speedups = {name: speedup(*value) if isinstance(value, tuple) else speedup(value) for name, value in given.items()}
    return {"tokens": tokens, "speedup": speedups} | ({"kernel_speedup": speedup(kernel)} if kernel else {})


def judge(*rows):
    described = {name: DESCRIBED[name] for name in ("dense", *rows[0]["speedup"])}
    return verdict(described, list(rows))


def test_the_fastest_is_named_where_there_is_one():
    first, second, zeros = judge(
        row(1, **{"drop_0.25": 1.03, "drop_0.5": 1.04}), row(8, **{"drop_0.25": 1.2, "drop_0.5": 1.3})
    )
    assert first == "8 tokens: fastest is 4 of 8 removed, 1.30 (1.29 to 1.31) times the speed of dense"
    assert second == "1 token: nothing here is faster than dense"
    assert zeros.startswith("half zeros: 1.00 times the speed of dense, no gain")


def test_a_gain_that_the_rounds_do_not_show_is_none():
    lines = judge(row(1, **{"drop_0.5": (1.4, 0.36)}), row(512, **{"drop_0.5": 1.0}))
    assert lines[0] == "1 and 512 tokens: nothing here is faster than dense"
    assert lines[-1].startswith("1 token: uncertain by more than 0.2")


def test_2_of_4_is_judged_by_the_whole_and_explained_by_its_parts():
    lines = judge(
        row(8, kernel=0.5, **{"dense_loop": 0.4, "2:4": 0.2}),
        row(2048, kernel=1.5, **{"dense_loop": 0.9, "2:4": 1.35}),
    )
    assert lines[0].startswith("2048 tokens: fastest is 2:4, by expert, 1.35")
    assert lines[1] == "8 tokens: nothing here is faster than dense"
    assert (
        "0.50 to 1.50 times the speed of the same loop" in lines[2] and "0.40 to 0.90 times the speed of" in lines[2]
    )


def test_neither_a_fast_loop_nor_zeros_win_anything():
    lines = judge(row(8, kernel=1.0, **{"dense_loop": 2.0, "2:4": 1.0, "half_zeros": 1.3}))
    assert lines[0] == "8 tokens: nothing here is faster than dense"
    assert lines[-1] == "half zeros: 1.30 times the speed of dense; here zeros do gain, at 8 tokens"
