import pytest
import torch

from hf_mlopt.pruning import METHODS
from hf_mlopt.pruning.apply import prune_weights_
from hf_mlopt.pruning.config import PruningConfig
from tests.reference import pruning as reference


def data(experts=3, outputs=10, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight_EOD = torch.randn(experts, outputs, width, generator=generator)
    # Moments over six orders of magnitude, as outlier features make them.
    second_ED = torch.exp(3 * torch.randn(experts, width, generator=generator, dtype=torch.float64))
    return weight_EOD, second_ED


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("method", reference.SCORES)
def test_score_equals_its_twin(method, dtype):
    weight_EOD, second_ED = data()
    weight_EOD = weight_EOD.to(dtype)
    score_EOD = METHODS[method].score(weight_EOD, second_ED)
    assert score_EOD.dtype == torch.float32 and score_EOD.shape == weight_EOD.shape
    for expert in range(3):
        expected = reference.SCORES[method](weight_EOD[expert].tolist(), second_ED[expert].tolist())
        torch.testing.assert_close(score_EOD[expert].double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", reference.SCORES)
def test_score_leaves_its_inputs_alone(method):
    weight_EOD, second_ED = data()
    METHODS[method].score(weight_EOD, second_ED)
    assert torch.equal(weight_EOD, data()[0]) and torch.equal(second_ED, data()[1])


@pytest.mark.parametrize("method", reference.SCORES)
def test_experts_do_not_influence_each_other(method):
    weight_EOD, second_ED = data()
    together = METHODS[method].score(weight_EOD, second_ED)
    alone = METHODS[method].score(weight_EOD[1:2], second_ED[1:2])
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("scale", (1e-6, 7.0, 1e6))
@pytest.mark.parametrize("method", ("wanda", "ria"))
def test_scaling_the_gate_of_an_expert_scales_its_scores(method, scale):
    """g -> c g multiplies Q by c², which no comparison inside the expert sees."""
    weight_EOD, second_ED = data()
    ratio = METHODS[method].score(weight_EOD, second_ED * scale**2) / METHODS[method].score(weight_EOD, second_ED)
    power = {"wanda": 1.0, "ria": 0.5}[method]
    torch.testing.assert_close(ratio, torch.full_like(ratio, scale**power), rtol=1e-5, atol=0)


def test_ria_of_dead_rows_and_columns_is_zero_and_finite():
    weight_EOD, second_ED = data()
    weight_EOD[0, 2], weight_EOD[1, :, 5] = 0.0, 0.0
    score_EOD = METHODS["ria"].score(weight_EOD, second_ED)
    assert torch.isfinite(score_EOD).all()
    assert (score_EOD[0, 2] == 0).all() and (score_EOD[1, :, 5] == 0).all()
    assert (score_EOD[2] > 0).all()


@pytest.mark.parametrize("chunk", (1, 24, 100, 240, 500))
@pytest.mark.parametrize("pattern", (None, "2:4"))
@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_change_the_result(method, pattern, chunk, monkeypatch):
    """Small chunks split experts, and rows where the method allows it."""
    config = PruningConfig(method=method, pattern=pattern, sparsity=None if pattern else 0.5)
    whole, second_ED = data()
    moments = torch.diag_embed(second_ED).float() if METHODS[method].hessian else second_ED
    moments = moments if METHODS[method].calibrated else None
    pieces = whole.clone()
    prune_weights_(whole, moments, config, dense={1})
    monkeypatch.setattr("hf_mlopt.pruning.apply._CPU_CHUNK", chunk)
    monkeypatch.setattr("hf_mlopt.pruning.apply._ACCELERATOR_CHUNK", chunk)
    prune_weights_(pieces, moments, config, dense={1})
    assert torch.equal(whole, pieces)
    assert torch.equal(whole[1], data()[0][1]) and ((whole[::2] == 0).sum(dim=-1) == 12).all()


def test_a_transposed_view_is_pruned_in_place():
    weight_EOD, second_ED = data()
    stored_EDO = weight_EOD.transpose(-1, -2).contiguous()
    config = PruningConfig(sparsity=0.5)
    prune_weights_(stored_EDO.transpose(-1, -2), second_ED, config, set())
    prune_weights_(weight_EOD, second_ED, config, set())
    assert torch.equal(stored_EDO.transpose(-1, -2), weight_EOD) and (stored_EDO == 0).any()
