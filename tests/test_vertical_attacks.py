"""The attacks: they succeed where the documentation says they do, and not within the budget."""

import numpy as np
import pytest

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.attacks import (
    GramView,
    accumulated_theta,
    features_from_low_rank,
    gram_recovery,
    labels_from_theta,
    theta_from_block_gradient,
)


RATE, L2 = 0.5, 1e-2


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def federation(rows, hidden, steps, batch=10, seed=0, noise=0.0):
    """
    Two blocks trained together by AFSGD-VP, in plain loops; what the label party saw of the other block.

    `noise` is the standard deviation of an error of each score, such as that of fixed point.
    """
    rng = np.random.default_rng(seed)
    own, other = rng.normal(size=(rows, 3)), rng.normal(size=(rows, hidden))
    y = np.where(own[:, 0] + other[:, 0] + rng.normal(size=rows) > 0, 1.0, -1.0)
    w_own, w_other = np.zeros(3), rng.normal(size=hidden) * 0.1
    partial, batches, thetas = [], [], []
    for _ in range(steps):
        seen = other @ w_other + noise * rng.normal(size=rows)
        partial.append(seen)
        J = rng.permutation(rows)[:batch]
        z = own[J] @ w_own + other[J] @ w_other
        theta = -y[J] * sigmoid(-y[J] * z)
        w_own = (1 - RATE * L2) * w_own - RATE * own[J].T @ theta / batch
        w_other = (1 - RATE * L2) * w_other - RATE * other[J].T @ theta / batch
        batches.append(J)
        thetas.append(theta)
    partial.append(other @ w_other + noise * rng.normal(size=rows))
    return GramView(np.array(partial), batches, thetas, RATE, L2), other, y


def relative(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


@pytest.mark.parametrize("rows, hidden", [(60, 6), (200, 10)])
def test_the_gram_matrix_is_recovered(rows, hidden):
    view, other, _ = federation(rows, hidden, rows + 20)
    assert relative(gram_recovery(view), other @ other.T) < 1e-8


def test_few_views_do_not_suffice():
    view, other, _ = federation(60, 6, 80)
    few = GramView(view.partial[:31], view.batches[:30], view.theta[:30], RATE, L2)
    assert relative(gram_recovery(few), other @ other.T) > 0.3
    # The default budget: half of the hidden features, here 3 views of a row.
    within = GramView(view.partial[:3], view.batches[:2], view.theta[:2], RATE, L2)
    assert relative(gram_recovery(within), other @ other.T) > 0.9


def test_the_wrong_regulariser_spoils_it():
    """The equation holds with the run's own numbers only."""
    view, other, _ = federation(60, 6, 80)
    off = GramView(view.partial, view.batches, view.theta, RATE, 0.0)
    assert relative(gram_recovery(off), other @ other.T) > 1e-2
    off = GramView(view.partial, view.batches, view.theta, 2 * RATE, L2 / 2)
    assert relative(gram_recovery(off), other @ other.T) == pytest.approx(0.5, abs=0.01)


def test_scores_at_as_many_versions_as_hidden_features_are_enough():
    rng = np.random.default_rng(0)
    hidden, rows = 20, 2000
    other = rng.normal(size=(rows, hidden))
    known = np.arange(40)
    errors = {}
    for versions in (10, 15, 20, 25):
        partial = rng.normal(size=(versions, hidden)) @ other.T
        errors[versions] = relative(features_from_low_rank(partial, hidden, known, other[known]), other)
    assert errors[10] > 0.3 and errors[15] > 0.3  # 10 is the default budget
    assert errors[20] < 1e-8 and errors[25] < 1e-8
    partial = rng.normal(size=(25, hidden)) @ other.T
    noisy = {
        noise: relative(
            features_from_low_rank(partial + noise * rng.normal(size=partial.shape), hidden, known, other[known]),
            other,
        )
        for noise in (2.0**-25, 0.1)
    }
    assert noisy[2.0**-25] < 1e-4 < 0.05 < noisy[0.1]  # fixed point does not hide it, noise does


def test_labels_of_theta_are_exact():
    rng = np.random.default_rng(0)
    y, z = rng.choice([-1.0, 1.0], 500), rng.normal(0, 5, 500)
    assert (labels_from_theta(-y * sigmoid(-y * z)) == y).all()
    scores, classes = rng.normal(size=(500, 4)), rng.integers(0, 4, 500)
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert (labels_from_theta(probabilities - np.eye(4)[classes]) == classes).all()


@pytest.mark.parametrize("classes", [(), (3,)])
def test_a_block_gradient_of_fewer_rows_than_features_gives_theta(classes):
    rng = np.random.default_rng(0)
    features, theta, weights = (rng.normal(size=shape) for shape in ((64, 100), (64, *classes), (100, *classes)))
    gradient = features.T @ theta / 64 + 0.1 * weights
    assert relative(theta_from_block_gradient(gradient, features, weights, 0.1), theta) < 1e-10
    assert relative(theta_from_block_gradient(gradient - 0.1 * weights, features), theta) < 1e-10
    with pytest.raises(InputError, match=r"l2=0.1 without weights"):
        theta_from_block_gradient(gradient, features, l2=0.1)
    # With more rows than features a projection is left.
    more = rng.normal(size=(400, 100))
    theta = rng.normal(size=(400, *classes))
    error = relative(theta_from_block_gradient(more.T @ theta / 400, more), theta)
    assert error == pytest.approx(np.sqrt(1 - 100 / 400), abs=0.05)


def auc(score, label):
    order = np.argsort(score)
    ranks = np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    positive = label > 0
    return (ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / (positive.sum() * (~positive).sum())


@pytest.mark.parametrize("ratio, epochs, low, high", [(4, 1, 0.75, 0.85), (4, 4, 0.99, 1.01), (32, 1, 0.5, 0.65)])
def test_plain_gradients_of_large_batches_give_labels_away_over_epochs(ratio, epochs, low, high):
    """Mode `he` at its floor of B = 4 d_l: one epoch says much, four say all. Labels independent of the features."""
    from hf_mlopt.vertical.backward import label_leak

    rng = np.random.default_rng(1)
    width, size = 10, 10 * ratio
    rows = 10 * size
    features, y = rng.normal(size=(rows, width)), rng.choice([-1.0, 1.0], rows)
    gradients, batches = [], []
    for _ in range(epochs):
        for batch in rng.permutation(rows).reshape(-1, size):
            gradients.append(features[batch].T @ (-y[batch] * 0.5) / size)
            batches.append(batch)
    found = auc(-accumulated_theta(gradients, features, batches), y)
    assert low <= found <= high
    if epochs * width < size:
        assert found == pytest.approx(label_leak(size, width, epochs), abs=0.06)


def test_more_equations_than_rows_give_theta_itself():
    rng = np.random.default_rng(0)
    features, theta = rng.normal(size=(60, 5)), rng.normal(size=60)
    batches = [batch for _ in range(6) for batch in rng.permutation(60).reshape(-1, 20)]
    gradients = [features[batch].T @ theta[batch] / 20 for batch in batches]
    assert relative(accumulated_theta(gradients, features, batches), theta) < 1e-8


@pytest.mark.parametrize("changes", [{"batches": []}, {"theta": []}, {"partial": np.zeros((1, 5))}])
def test_views_that_do_not_fit(changes):
    view, _, _ = federation(20, 2, 3)
    fields = {"partial": view.partial, "batches": view.batches, "theta": view.theta, **changes}
    with pytest.raises(InputError, match=r"T \+ 1 rows of partial"):
        GramView(**fields, learning_rate=RATE)
    with pytest.raises(InputError, match="2 known rows with 3 rows"):
        features_from_low_rank(np.eye(4), 2, np.arange(2), np.zeros((3, 2)))
