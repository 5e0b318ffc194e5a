import pytest
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.pruning.patterns import select
from hf_mlopt.pruning.sparsegpt import sparsegpt
from tests.reference import pruning as reference


def data(width: int, experts=2, outputs=5, samples=400, seed=0):
    """Correlated inputs, so that the weights that stay have something to make up for."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(experts, width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs_ESD = torch.randn(experts, samples, width, generator=generator) @ mixing
    weight_EOD = torch.randn(experts, outputs, width, generator=generator)
    return weight_EOD, inputs_ESD, inputs_ESD.transpose(1, 2) @ inputs_ESD


@pytest.mark.parametrize(
    ("width", "sparsity", "n_of_m"),
    [
        (24, 0.5, None),
        (33, 0.3, None),  # odd width
        (150, 0.7, None),  # two blocks, the second of them short
        (24, None, (2, 4)),
        (136, None, (4, 8)),  # two blocks
        (30, None, (1, 3)),
        (132, None, (1, 3)),  # 128 is no multiple of the group
        (24, 0.0, None),
    ],
)
def test_equals_the_literal_column_loop(width, sparsity, n_of_m):
    weight_EOD, _, hessian_EDD = data(width)
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, hessian_EDD, sparsity, n_of_m)
    assert updated_EOD.dtype == torch.float32
    for expert in range(2):
        W, removed = reference.sparsegpt(weight_EOD[expert], hessian_EDD[expert], sparsity, n_of_m)
        assert torch.equal(pruned_EOD[expert], removed)
        torch.testing.assert_close(updated_EOD[expert].double(), W, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", (0.3, 0.5, 0.77))
def test_every_row_has_exactly_the_sparsity(sparsity):
    weight_EOD, _, hessian_EDD = data(300, outputs=7)
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, hessian_EDD, sparsity, None)
    assert (pruned_EOD.sum(dim=-1) == reference.num_removed(sparsity, 300)).all()
    assert torch.equal(updated_EOD == 0, pruned_EOD)


@pytest.mark.parametrize("pattern", ((0.5, None), (None, (2, 4))))
def test_the_update_lowers_the_error_of_the_layer(pattern):
    """‖X Wᵀ - X W'ᵀ‖ is smaller than with the same mask and no update, and than after magnitude pruning."""
    weight_EOD, inputs_ESD, hessian_EDD = data(64, outputs=16)
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, hessian_EDD, *pattern)

    def error(new_EOD):
        return (inputs_ESD @ (weight_EOD - new_EOD).transpose(1, 2)).square().sum()

    assert error(updated_EOD) < 0.8 * error(weight_EOD.masked_fill(pruned_EOD, 0))
    assert error(updated_EOD) < error(weight_EOD.masked_fill(select(weight_EOD.abs(), *pattern), 0))


def test_the_inputs_are_left_alone_and_the_scale_of_the_moments_does_not_matter():
    weight_EOD, _, hessian_EDD = data(32)
    first, pruned = sparsegpt(weight_EOD, hessian_EDD, 0.5, None)
    assert torch.equal(weight_EOD, data(32)[0]) and torch.equal(hessian_EDD, data(32)[2])
    second, other = sparsegpt(weight_EOD, hessian_EDD * 2.0**-20, 0.5, None)
    assert torch.equal(pruned, other)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_lose_their_weights_first():
    weight_EOD, inputs_ESD, _ = data(32)
    weight_EOD = weight_EOD.sign()  # among weights of one size
    dead = [3, 8, 20, 31]
    inputs_ESD[..., dead] = 0
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, inputs_ESD.transpose(1, 2) @ inputs_ESD, 0.25, None)
    assert pruned_EOD[..., dead].all() and torch.isfinite(updated_EOD).all()


def test_diagonal_moments_leave_the_survivors_as_they_are():
    """Inputs that do not correlate have nothing to make up with: the mask is Wanda's and no weight moves."""
    weight_EOD, _, _ = data(32)
    second_ED = torch.rand(2, 32, generator=torch.Generator().manual_seed(2)) + 0.1
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, torch.diag_embed(second_ED), 0.5, None)
    damped_ED = second_ED + 0.01 * second_ED.mean(dim=-1, keepdim=True)
    assert torch.equal(pruned_EOD, select(weight_EOD.square() * damped_ED[:, None], 0.5, None))
    assert torch.equal(updated_EOD, weight_EOD.masked_fill(pruned_EOD, 0))


def test_fewer_tokens_than_inputs_still_work():
    """The Hessian is singular; damping makes it positive definite."""
    weight_EOD, _, hessian_EDD = data(64, samples=3)
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, hessian_EDD, 0.5, None)
    assert torch.isfinite(updated_EOD).all() and (pruned_EOD.sum(dim=-1) == 32).all()


def test_no_tokens_at_all_are_magnitude_not_a_wiped_out_expert():
    weight_EOD, _, hessian_EDD = data(16)
    updated_EOD, pruned_EOD = sparsegpt(weight_EOD, torch.zeros_like(hessian_EDD), 0.5, None)
    assert torch.equal(pruned_EOD, select(weight_EOD.abs(), 0.5, None))
    assert torch.equal(updated_EOD, weight_EOD.masked_fill(pruned_EOD, 0))


@pytest.mark.parametrize(
    ("damage", "message"), [(float("nan"), "NaN or Inf"), (float("inf"), "NaN or Inf"), (-1e9, "factored")]
)
def test_moments_that_cannot_be_used_are_refused(damage, message):
    weight_EOD, _, hessian_EDD = data(16)
    hessian_EDD[1, 2, 2] = damage
    with pytest.raises(InputError, match=message):
        sparsegpt(weight_EOD, hessian_EDD, 0.5, None)
