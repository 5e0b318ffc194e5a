import pytest
import torch

from hf_mlopt.pruning.patterns import num_pruned, select, smallest_per_group, smallest_per_row
from tests.reference import pruning as reference


def scores(kind: str, shape):
    generator = torch.Generator().manual_seed(1)
    if kind == "distinct":
        return torch.rand(shape, generator=generator)
    if kind == "few values":
        return torch.randint(0, 3, shape, generator=generator).float()
    if kind == "half zero":
        return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.5)
    if kind == "huge and tiny":
        return 10 ** (80 * torch.rand(shape, generator=generator) - 42)
    return torch.full(shape, 0.5)


KINDS = ("distinct", "few values", "half zero", "huge and tiny", "constant")


@pytest.mark.parametrize("sparsity", (0.0, 0.1, 0.29, 0.3, 0.5, 0.57, 0.7, 0.99))
@pytest.mark.parametrize("width", (1, 2, 7, 24, 100))
@pytest.mark.parametrize("kind", KINDS)
def test_unstructured_equals_its_twin(kind, width, sparsity):
    score = scores(kind, (2, 5, width))
    pruned = select(score, sparsity, None)
    expected = [reference.mask_rows(rows.tolist(), sparsity) for rows in score]
    assert pruned.dtype == torch.bool and torch.equal(pruned, torch.tensor(expected))
    assert (pruned.sum(dim=-1) == reference.num_removed(sparsity, width)).all()


@pytest.mark.parametrize("n_of_m", ((2, 4), (4, 8), (1, 2), (1, 4), (3, 4), (1, 3), (2, 5), (1, 16)))
@pytest.mark.parametrize("kind", KINDS)
def test_n_of_m_equals_its_twin(kind, n_of_m):
    score = scores(kind, (2, 5, 6 * n_of_m[1]))
    pruned = select(score, None, n_of_m)
    expected = [reference.mask_n_of_m(rows.tolist(), *n_of_m) for rows in score]
    assert pruned.dtype == torch.bool and torch.equal(pruned, torch.tensor(expected))
    assert (pruned.unflatten(-1, (-1, n_of_m[1])).sum(dim=-1) == n_of_m[1] - n_of_m[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_survivor_scores_at_least_as_much_as_every_pruned_weight(kind):
    score = scores(kind, (4, 6, 48))
    for pruned, group in ((select(score, 0.6, None), 48), (select(score, None, (2, 4)), 4)):
        lowest_kept = score.masked_fill(pruned, float("inf")).unflatten(-1, (-1, group)).amin(dim=-1)
        highest_pruned = score.masked_fill(~pruned, float("-inf")).unflatten(-1, (-1, group)).amax(dim=-1)
        assert (lowest_kept >= highest_pruned).all()


def test_ties_go_by_index():
    assert smallest_per_row(torch.ones(1, 6), 2).tolist() == [[True, True, False, False, False, False]]
    assert smallest_per_group(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]
    row = torch.tensor([[3.0, 1.0, 2.0, 1.0, 2.0, 2.0]])
    assert smallest_per_row(row, 3).tolist() == [[False, True, True, True, False, False]]


@pytest.mark.parametrize("pattern", ((0.5, None), (None, (2, 4))))
def test_a_view_with_other_strides_gives_the_same_mask(pattern):
    stored = scores("few values", (2, 24, 5))
    view = stored.transpose(-1, -2)
    assert torch.equal(select(view, *pattern), select(view.contiguous(), *pattern))


@pytest.mark.parametrize(
    ("sparsity", "width", "count"),
    [(0.5, 7, 3), (0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7), (0.99, 14336, 14192), (0.1, 9, 0), (0.0, 64, 0)],
)
def test_count_is_the_floor_of_the_decimal_number(sparsity, width, count):
    assert num_pruned(sparsity, width) == count


@pytest.mark.parametrize(("kept", "group"), ((128, 256), (200, 256), (20, 32)))
def test_large_groups_are_selected_like_small_ones(kept, group):
    score = torch.randint(0, 50, (3, 2 * group), generator=torch.Generator().manual_seed(0)).float()
    mask = smallest_per_group(score, kept, group)
    expected = reference.mask_n_of_m(score.tolist(), kept, group)
    assert mask.tolist() == expected
