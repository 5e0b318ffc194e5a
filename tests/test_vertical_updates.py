"""Losses, batches and block steps against literal twins, exact cases, and the optimum."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.clock import EventClock
from hf_mlopt.vertical.updater import ALGORITHMS
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.compensation import block_smoothness, compensated_rate
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.vertical.updates.schedule import BatchSchedule
from hf_mlopt.vertical.updates.weights import LazyWeights, Update
from tests.reference import vertical as reference


LOSSES = {"logistic": 1, "ridge": 1, "multinomial": 3}


def problem(loss, rows=23, columns=7, seed=0, density=1.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < density)
    if loss == "logistic":
        return X, np.where(rng.random(rows) < 0.4, 1.0, -1.0)
    return X, rng.normal(size=rows) if loss == "ridge" else rng.integers(0, 3, rows)


@pytest.mark.parametrize("name, K", LOSSES.items())
def test_losses_and_their_derivatives(name, K):
    X, y = problem(name)
    loss, w = make_loss(name, 3), np.random.default_rng(1).normal(size=(X.shape[1], K))
    assert loss.words == K
    y, z = loss.check_labels(y), X @ w
    for i in range(len(X)):
        assert loss.values(z, y)[i] == pytest.approx(reference.value_of(name, z[i], y[i], K), rel=1e-13)
        np.testing.assert_allclose(
            loss.theta(z, y)[i], reference.theta_of(name, z[i], y[i], K), rtol=1e-12, atol=1e-15
        )
    step = np.zeros_like(z)
    for k in range(K):  # the derivative, and its slope below the stated bound
        step[:, k] = 1e-6
        slope = (loss.values(z + step, y) - loss.values(z - step, y)) / 2e-6
        np.testing.assert_allclose(loss.theta(z, y)[:, k], slope, atol=1e-8)
        bend = (loss.theta(z + step, y) - loss.theta(z - step, y)) / 2e-6
        assert np.linalg.norm(bend, axis=1).max() <= loss.curvature + 1e-6
        step[:, k] = 0


def test_losses_stay_finite_far_out():
    y = make_loss("logistic").check_labels([1, -1])
    z = np.array([[-1e4], [-1e4]])
    assert make_loss("logistic").values(z, y).tolist() == [1e4, 0]
    assert make_loss("logistic").theta(z, y).tolist() == [[-1], [0]]
    far = np.array([[1e4, -1e4, 0.0]])
    assert make_loss("multinomial", 3).values(far, np.array([1])).tolist() == [2e4]


@pytest.mark.parametrize(
    "loss, labels, text",
    [
        ("logistic", [1, 0], r"labels\[1\]=0: must be -1 or \+1; recode"),
        ("ridge", [1.0, np.nan], r"labels\[1\]=nan: must be finite"),
        ("multinomial", [0, 2, 3], r"labels\[2\]=3: must be a whole number, 0 to 2"),
        ("multinomial", [0, 1.5], r"labels\[1\]=1.5"),
        ("ridge", [[1.0]], "one label a row"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss, labels, text):
    with pytest.raises(InputError, match=text):
        make_loss(loss, 3).check_labels(labels)


def test_unknown_losses_are_refused():
    with pytest.raises(ConfigurationError, match="loss='hinge'"):
        make_loss("hinge")
    with pytest.raises(ConfigurationError, match="num_labels=1"):
        make_loss("multinomial", 1)


@pytest.mark.parametrize("rows, size", [(23, 5), (20, 5), (3, 8), (1, 1)])
def test_a_schedule_visits_every_row_once_an_epoch(rows, size):
    schedule = BatchSchedule(rows, size, seed=3)
    for epoch in range(3):
        order = [schedule.batch(epoch * schedule.num_batches + place) for place in range(schedule.num_batches)]
        assert sorted(np.concatenate([schedule.rows(batch) for batch in order])) == list(range(rows))


def test_a_schedule_depends_on_the_seed_alone_and_reshuffles():
    one, same, other = (BatchSchedule(200, 5, seed) for seed in (3, 3, 4))
    orders = [[s.batch(k) for k in range(80)] for s in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:40] != orders[0][40:]
    assert all((one.rows(b) == same.rows(b)).all() for b in range(40))
    assert any((one.rows(b) != other.rows(b)).any() for b in range(40))
    # Fixed numbers: other machines and versions must give the same.
    assert [int(r) for r in BatchSchedule(9, 3, 1).rows(0)] == [0, 8, 5]
    plain = BatchSchedule(7, 3, 1, order="kept")
    assert [plain.rows(plain.batch(k)).tolist() for k in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_drawn_batches_come_independently():
    schedule = BatchSchedule(400, 10, 7, order="drawn")
    drawn = np.array([schedule.batch(k) for k in range(40_000)])
    counts = np.bincount(drawn, minlength=40)
    assert ((counts - 1000) ** 2 / 1000).sum() < 73  # χ², 39 degrees of freedom, p = 0.001
    assert abs((drawn[1:] == drawn[:-1]).mean() - 1 / 40) < 0.004  # also across epochs
    assert {len(set(drawn[k * 40 : k * 40 + 40])) for k in range(100)} != {40}
    assert schedule.most_visits(40_000) == counts.max()
    assert BatchSchedule(400, 10, 7).most_visits(81) == 3


@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_multiply_alike_dense_and_sparse(density, bias):
    X, _ = problem("ridge", 31, 40, density=density)
    whole = np.hstack([X, np.ones((31, 1))]) if bias else X
    schedule = BatchSchedule(31, 4, seed=0)
    rng = np.random.default_rng(2)
    w, theta = rng.normal(size=(whole.shape[1], 2)), rng.normal(size=(31, 2))
    for given in (X, sparse.csr_array(X), sparse.coo_matrix(X)):
        block = FeatureBlock(given, schedule, bias)
        assert block.num_features == whole.shape[1]
        np.testing.assert_allclose(block.scores(w), whole @ w, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(block.transposed(theta), whole.T @ theta, rtol=1e-13, atol=1e-13)


def test_sparse_blocks_take_memory_of_their_entries():
    features = sparse.random_array((2000, 50_000), density=4e-5, rng=np.random.default_rng(0), format="csr")
    block = FeatureBlock(features, BatchSchedule(2000, 50, 0))
    assert sum(batch.features.nnz for batch in block.batches) == features.nnz
    assert sum(len(batch.columns) for batch in block.batches) <= features.nnz  # C, not d_l, a step touches


@pytest.mark.parametrize(
    "features, text",
    [
        (np.ones((4, 2)), r"shape \[4, 2\], must be a matrix of 5 rows"),
        (np.ones(5), "must be a matrix"),
        (np.diag([1, 1, np.nan, 1, 1]), r"features\[2, 2\]=nan"),
        (sparse.csr_array(np.diag([1, 1, 1, np.inf, 1])), r"features\[3, 3\]=inf"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, text):
    with pytest.raises(InputError, match=text):
        FeatureBlock(features, BatchSchedule(5, 2, 0))


def test_lazy_weights_follow_the_plain_step():
    rng = np.random.default_rng(0)
    lazy, w, m = LazyWeights(9, 2), np.zeros((9, 2)), rng.normal(size=(9, 2))
    lazy.set_drift(m)
    for k in range(300):  # beyond several folds
        columns = np.sort(rng.choice(9, 3, replace=False))
        g, delta = rng.normal(size=(2, 3, 2))
        lazy.step(Update(columns, g, delta), 0.1, 0.3)
        full, change = np.zeros_like(w), np.zeros_like(w)
        full[columns], change[columns] = g, delta
        w, m = w - 0.1 * (full + m + 0.3 * w), m + change
        if k == 150:
            m = rng.normal(size=(9, 2))
            lazy.set_drift(m)
        np.testing.assert_allclose(lazy.read(slice(None)), w, rtol=1e-11, atol=1e-12)
        np.testing.assert_array_equal(lazy.read(columns), lazy.read(slice(None))[columns])


def test_a_rate_that_overshoots_the_penalty_is_refused():
    with pytest.raises(ConfigurationError, match="learning_rate=3"):
        LazyWeights(2, 1).step(Update(slice(None), np.ones((2, 1))), 3, 0.5)


def train_alone(algorithm, loss_name, X, y, schedule, steps, rate, l2):
    """One party with all columns, by the library."""
    loss = make_loss(loss_name, 3)
    block = FeatureBlock(X, schedule)
    optimizer = ALGORITHMS[algorithm](block, loss, loss.check_labels(y))
    weights, iterates = optimizer.initial_weights(), []
    for k in range(steps):
        if algorithm == "svrg" and k and k % schedule.num_batches == 0:
            weights.set_drift(optimizer.set_anchor(block.scores(weights.read(slice(None)))))
        batch = block.batches[schedule.batch(k)]
        z = batch.forward(weights.read(batch.columns))
        weights.step(optimizer.update(schedule.batch(k), z), rate, l2)
        iterates.append(weights.read(slice(None)))
    return iterates


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_equal_the_literal_twin(algorithm, loss, density):
    X, y = problem(loss, density=density)
    schedule = BatchSchedule(len(X), 4, seed=5)
    steps = 3 * schedule.num_batches + 2
    fast = train_alone(algorithm, loss, sparse.csr_array(X) if density < 1 else X, y, schedule, steps, 0.1, 0.05)
    rows = [schedule.rows(schedule.batch(k)) for k in range(steps)] + [None]
    slow = reference.centralised(
        algorithm, X, y, rows.__getitem__, schedule.num_batches, 0.1, 0.05, loss, LOSSES[loss]
    )
    assert len(slow) == steps
    for one, two in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-13)


def test_smoothness_is_the_largest_eigenvalue():
    X, _ = problem("ridge", 40, 6)
    block = FeatureBlock(X, BatchSchedule(40, 7, 0))
    exact = np.linalg.eigvalsh(X.T @ X / 40)[-1]
    assert block_smoothness(block, 0.25, 0.1, 200) == pytest.approx(0.25 * exact + 0.1, rel=1e-6)
    assert 0.8 < (block_smoothness(block, 0.25, 0.0) / (0.25 * exact)) <= 1 + 1e-12
    zero = FeatureBlock(np.zeros((4, 2)), BatchSchedule(4, 2, 0))
    assert block_smoothness(zero, 0.25, 0.1) == 0.1


def test_compensated_rates():
    assert compensated_rate(0.5, 10, 30, smoothness=0.1) == pytest.approx(1.5)
    assert compensated_rate(0.5, 10, 300, smoothness=0.1) == pytest.approx(10.0)  # c / L_l
    assert compensated_rate(0.5, 10, 300, smoothness=0.1, c=0.5) == pytest.approx(5.0)
    assert compensated_rate(0.5, 10, 300, smoothness=100) == 0.5  # a bound never shortens γ
    assert compensated_rate(0.5, 30, 10, smoothness=0.1) == 0.5


def clock_of(X, y, splits, seconds, **options):
    arguments = VerticalArguments(**({"batch_size": 4, "l2": 0.05, "learning_rate": 0.1, "seed": 1} | options))
    schedule = arguments.schedule(len(X))
    blocks = [FeatureBlock(part, schedule) for part in np.array_split(X, splits, axis=1)]
    return EventClock(arguments, blocks, y, seconds)


def test_the_clock_interleaves_as_the_times_say():
    X, y = problem("logistic")
    clock = clock_of(X, y, 2, [1.0, 2.5], delay_compensation=False)
    points = clock.run(lambda point: sum(point.updates) >= 7, every=1)
    writes = [party for kind, party in clock.events if kind == "write"]
    assert writes == [0, 0, 1, 0, 0, 0, 1]  # at 1, 2, 2.5, 3, 4, 5, 5
    assert points[-1].seconds == 5.0
    assert points[-1].updates == (5, 2)
    assert clock.staleness == {0: 4, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("loss", LOSSES)
def test_asynchronous_steps_equal_the_literal_twin(loss):
    X, y = problem(loss)
    options = {"loss": loss, "num_labels": 3, "delay_compensation": False}
    clock = clock_of(X, y, 3, [1.0, 1.3, 3.0], **options)
    clock.run(lambda point: sum(point.updates) >= 40, every=1)
    columns = np.array_split(np.arange(X.shape[1]), 3)
    rows = lambda k: clock.schedule.rows(clock.schedule.batch(k))  # noqa: E731
    slow = reference.asynchronous_saga(X, y, columns, clock.events, rows, 0.1, 0.05, loss, LOSSES[loss])
    np.testing.assert_allclose(np.vstack(clock.weights()), slow, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_synchronous_clock_equals_one_machine(algorithm):
    X, y = problem("logistic")
    clock = clock_of(X, y, 3, [1.0, 1.0, 3.0], mode="sync", algorithm=algorithm)
    points = clock.run(lambda point: point.updates[0] >= 15, every=3)
    alone = train_alone(algorithm, "logistic", X, y, clock.schedule, 15, 0.1, 0.05)[-1]
    np.testing.assert_allclose(np.vstack(clock.weights()), alone, rtol=1e-11, atol=1e-13)
    assert points[-1].seconds == 45.0
    assert points[-1].objective == pytest.approx(reference.objective(X, y, alone, "logistic", 0.05), rel=1e-12)


def cancer():
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    X = np.hstack([(X - X.mean(0)) / X.std(0), np.ones((len(X), 1))])
    return X / np.linalg.norm(X, axis=1, keepdims=True), 2.0 * y - 1


def optimum(X, y, l2):
    """scikit-learn's fit of the same objective, to round-off: C = 1 / (n λ), the bias a column."""
    model = LogisticRegression(C=1 / (len(X) * l2), fit_intercept=False, tol=1e-12, max_iter=2000, solver="newton-cg")
    w = model.fit(X, y).coef_.T
    return reference.objective(X, y, w, "logistic", l2), float(np.mean((X @ w > 0)[:, 0] == (y > 0)))


@pytest.mark.parametrize("algorithm", ["svrg", "saga"])
def test_asynchronous_runs_reach_the_optimum_linearly(algorithm):
    """A2 and A3 on a data set of scikit-learn, with one party three times as slow."""
    X, y = cancer()
    best, accuracy = optimum(X, y, 1e-3)
    options = {"algorithm": algorithm, "l2": 1e-3, "learning_rate": 2.0, "batch_size": 32}
    clock = clock_of(X, y, 4, [1.0, 1.0, 1.0, 3.0], **options)
    points = clock.run(lambda point: point.updates[0] >= 3200, every=4 * 80)
    gaps = np.array([point.objective - best for point in points])
    assert -1e-12 <= gaps[-1] <= 1e-8
    logs = np.log10(gaps[(gaps > 3e-9) & (gaps < 1e-2)])
    place = np.arange(len(logs))
    assert np.corrcoef(place, logs)[0, 1] < -0.98  # a straight line on a log scale
    z = X @ np.vstack(clock.weights())
    assert abs(float(np.mean((z > 0)[:, 0] == (y > 0))) - accuracy) <= 1e-3


def test_the_plateau_of_sgd_shrinks_with_the_rate():
    X, y = cancer()
    best, _ = optimum(X, y, 1e-3)
    plateaus = []
    for rate in (4.0, 1.0):
        clock = clock_of(X, y, 3, [1.0] * 3, algorithm="sgd", l2=1e-3, learning_rate=rate, batch_size=8)
        points = clock.run(lambda point, rate=rate: point.updates[0] >= 8000 / rate, every=3 * 72)
        plateaus.append(np.mean([point.objective - best for point in points[-10:]]))
    assert plateaus[0] > 2.5 * plateaus[1] > 0


def test_compensated_steps_make_up_for_a_slow_party():
    """A4 in small: time to a gap with one of eight parties three times as slow, against a barrier."""
    X, y = cancer()
    best, _ = optimum(X, y, 1e-3)
    times, seconds = {}, 4 * [1.0] + [3.0] + 3 * [1.0]
    ways = {"sync": {"mode": "sync"}, "plain": {"delay_compensation": False}, "compensated": {}}
    for name, options in ways.items():
        clock = clock_of(X, y, 8, seconds, l2=1e-3, learning_rate=1.0, batch_size=32, **options)
        points = clock.run(lambda point: point.objective - best < 1e-3, every=40)
        times[name] = points[-1].seconds
        if name != "sync":
            assert max(clock.staleness) == 21  # three steps of each of the seven others
    assert times["sync"] / times["plain"] >= 1.3
    assert times["sync"] / times["compensated"] >= 2.5


@pytest.mark.parametrize("seconds", [[1.0], [1.0, 0.0]])
def test_step_times_that_do_not_fit_are_refused(seconds):
    X, y = problem("logistic")
    with pytest.raises(InputError, match="step_seconds"):
        clock_of(X, y, 2, seconds)
