"""A sparsity for each expert; scores, chunks and patterns are tested with their modules."""

import pytest
import torch

from hf_mlopt.pruning import METHODS, PruningConfig, apply
from hf_mlopt.pruning.apply import prune_weights_
from hf_mlopt.pruning.patterns import num_pruned


EXPERTS, OUTPUTS, WIDTH = 6, 8, 40
SPARSITIES = [0.35, 0.5, 0.65, 0.35, 0.29, 0.65]
MATRICES = (slice(0, 3), slice(3, None))


def data(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight_EOD = torch.randn(EXPERTS, OUTPUTS, WIDTH, generator=generator).to(dtype)
    inputs_ETD = torch.randn(EXPERTS, 200, WIDTH, generator=generator)
    return weight_EOD, inputs_ETD @ torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)


def pruned(method, sparsity=0.5, sparsities=None, dense=(), dtype=torch.float32, experts=slice(None)):
    weight_EOD, inputs_ETD = data(dtype)
    weight_EOD, inputs_ETD = weight_EOD[experts].clone(), inputs_ETD[experts]
    second_ED = inputs_ETD.double().square().sum(dim=1)
    moments = inputs_ETD.transpose(1, 2) @ inputs_ETD if METHODS[method].hessian else second_ED
    moments = moments if METHODS[method].calibrated else None
    config = PruningConfig(method=method, sparsity=sparsity)
    prune_weights_(weight_EOD, moments, config, dense, MATRICES, sparsities=sparsities)
    return weight_EOD


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("method", METHODS)
def test_equal_sparsities_are_the_uniform_path_bit_for_bit(method, dtype):
    uniform = pruned(method, 0.35, dtype=dtype)
    assert torch.equal(pruned(method, 0.9, [0.35] * EXPERTS, dtype=dtype), uniform)
    assert torch.equal(pruned(method, 0.9, torch.full((EXPERTS,), 0.35, dtype=torch.float64), dtype=dtype), uniform)


@pytest.mark.parametrize("chunk", (10, 400, 1000, 1 << 20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("method", METHODS)
def test_each_expert_is_pruned_as_if_alone(method, dtype, chunk, monkeypatch):
    monkeypatch.setattr(apply, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(apply, "_ACCELERATOR_CHUNK", chunk * 10)  # that of Hessians, several to a chunk
    together = pruned(method, sparsities=SPARSITIES, dense={1, 3}, dtype=dtype)
    for expert, sparsity in enumerate(SPARSITIES):
        if expert in (1, 3):
            assert torch.equal(together[expert], data(dtype)[0][expert])
            continue
        alone = pruned(method, sparsity, dtype=dtype, experts=slice(expert, expert + 1))[0]
        assert ((together[expert] == 0).sum(dim=-1) == num_pruned(sparsity, WIDTH)).all()
        torch.testing.assert_close(together[expert], alone, rtol=1e-5 if METHODS[method].hessian else 0, atol=0)


def test_a_transposed_view_is_pruned_in_place():
    stored_EDO = data()[0].transpose(-1, -2).contiguous()
    prune_weights_(stored_EDO.transpose(-1, -2), None, PruningConfig("magnitude", 0.5), sparsities=SPARSITIES)
    assert torch.equal(stored_EDO.transpose(-1, -2), pruned("magnitude", sparsities=SPARSITIES))


@pytest.mark.parametrize("method", ("wanda", "sparsegpt"))
def test_the_work_is_one_call_for_each_sparsity_not_for_each_expert(method, monkeypatch):
    name = "sparsegpt" if METHODS[method].hessian else "select"
    original, calls = getattr(apply, name), []
    monkeypatch.setattr(apply, name, lambda *args: calls.append(args) or original(*args))
    pruned(method, sparsities=SPARSITIES)
    assert len(calls) == 4


@pytest.mark.parametrize("sparsities", ([0.5] * 5, [0.5] * 7, torch.tensor([0.5], dtype=torch.float64)))
def test_one_sparsity_for_each_expert(sparsities):
    with pytest.raises(ValueError, match=f"{len(sparsities)} sparsities for 6 experts"):
        pruned("magnitude", sparsities=sparsities)


def test_a_tensor_of_float32_would_round_the_number_of_weights():
    with pytest.raises(ValueError, match="float64"):
        pruned("magnitude", sparsities=torch.full((EXPERTS,), 0.35))


def test_a_pattern_leaves_no_choice():
    with pytest.raises(ValueError, match="pattern='2:4'"):
        prune_weights_(data()[0], None, PruningConfig("magnitude", pattern="2:4"), sparsities=SPARSITIES)
