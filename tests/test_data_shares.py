import math

import numpy as np
import pytest

from hf_mlopt.data import dirichlet_shares, label_sorted_shares
from hf_mlopt.errors import ConfigurationError


LABELS = np.random.default_rng(0).integers(0, 10, 1000)

SPLITS = {
    **{f"sorted {s}": lambda labels, n, seed, s=s: label_sorted_shares(labels, n, s, seed) for s in (0, 0.13, 0.5, 1)},
    **{f"dirichlet {a}": lambda labels, n, seed, a=a: dirichlet_shares(labels, n, a, seed) for a in (1e-300, 0.1, 10)},
}


def classes(shares) -> list[int]:
    return [len(set(LABELS[share])) for share in shares]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("count, num_shares", [(1000, 10), (1000, 7), (23, 23), (23, 22), (5, 1)])
def test_every_example_is_in_one_share_and_no_share_is_empty(split, count, num_shares):
    shares = split(LABELS[:count], num_shares, 3)
    assert len(shares) == num_shares and all(len(share) for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert all(share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_seed_decides_the_shares(split):
    first, again, other = (split(LABELS, 8, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(first, other, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(first, split(LABELS.tolist(), 8, 0), strict=True))


# Sorted by label


@pytest.mark.parametrize("similarity", [0, 0.13, 0.5, 1])
@pytest.mark.parametrize("count, num_shares", [(1000, 7), (13, 9), (10, 10)])
def test_sizes_differ_by_at_most_one(similarity, count, num_shares):
    sizes = [len(share) for share in label_sorted_shares(LABELS[:count], num_shares, similarity, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_without_similarity_each_share_is_a_run_of_the_sorted_labels():
    shares = label_sorted_shares(LABELS, 10, 0, 0)
    assert np.concatenate([np.sort(LABELS[share]) for share in shares]).tolist() == sorted(LABELS)
    # Which examples of a class that two shares divide go where is drawn, not their order in the data.
    assert any(np.diff(share[LABELS[share] == LABELS[share].max()]).max() > 30 for share in shares)


def test_similarity_is_the_part_that_is_dealt_at_random():
    labels = np.repeat(np.arange(10), 100)
    outside = []
    for similarity in (0, 0.3, 1):
        shares = label_sorted_shares(labels, 10, similarity, 0)
        outside.append(np.mean([np.mean(labels[share] != label) for label, share in enumerate(shares)]))
    # A random example has another label than the run beside it nine times in ten.
    assert outside[0] == 0
    assert outside[1] == pytest.approx(0.9 * 0.3, abs=0.05)
    assert outside[2] == pytest.approx(0.9, abs=0.05)


# Dirichlet


def test_alpha_decides_how_many_shares_hold_a_class():
    assert max(classes(dirichlet_shares(LABELS, 10, 1e-300, 0))) <= 10
    means = [np.mean(classes(dirichlet_shares(LABELS, 10, alpha, 0))) for alpha in (0.01, 0.3, 100)]
    assert means[0] < 3 < means[1] < 9 < means[2]


def test_a_large_alpha_divides_every_class_evenly():
    labels = np.repeat([0, 1], 500)
    for share in dirichlet_shares(labels, 5, 1e9, 0):
        assert np.bincount(labels[share]).tolist() == pytest.approx([100, 100], abs=1)


def test_proportions_have_the_variance_of_the_distribution():
    labels = np.arange(400 * 100) // 100  # 400 classes of 100
    held = np.array([np.bincount(labels[s], minlength=400) / 100 for s in dirichlet_shares(labels, 4, 0.5, 0)])
    assert held.mean(axis=1).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    # Var p_k = (1/K)(1 - 1/K) / (K alpha + 1)
    assert held.var() == pytest.approx(0.25 * 0.75 / (4 * 0.5 + 1), rel=0.1)


def test_examples_of_a_class_are_drawn_at_random():
    (first, _) = dirichlet_shares(np.zeros(1000, dtype=int), 2, 100.0, 0)
    assert abs(first.mean() - 499.5) < 50


def test_an_empty_share_takes_one_example_from_the_largest():
    sizes = sorted(len(share) for share in dirichlet_shares(np.zeros(50, dtype=int), 5, 1e-300, 0))
    assert sizes == [1, 1, 1, 1, 46]


# Bad values


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("num_shares", [0, 6])
def test_more_shares_than_examples_are_refused(split, num_shares):
    with pytest.raises(ConfigurationError, match=f"num_shares={num_shares}: must be from 1 to .*, 5"):
        split([0, 1, 0, 1, 0], num_shares, 0)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_negative_seed_is_refused(split):
    with pytest.raises(ConfigurationError, match="seed=-1"):
        split(LABELS, 2, -1)


@pytest.mark.parametrize("similarity", [-0.1, 1.1, math.nan])
def test_a_similarity_that_is_no_part_is_refused(similarity):
    with pytest.raises(ConfigurationError, match="similarity="):
        label_sorted_shares(LABELS, 2, similarity, 0)


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan])
def test_an_alpha_that_is_no_concentration_is_refused(alpha):
    with pytest.raises(ConfigurationError, match="alpha="):
        dirichlet_shares(LABELS, 2, alpha, 0)
