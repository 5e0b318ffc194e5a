"""The parts of `vertical.py` on the event clock: any machine gives the same numbers."""

import statistics

import numpy as np
import scipy.sparse
from common import SHARED, Results
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

from hf_mlopt.vertical.arguments import VerticalArguments
from hf_mlopt.vertical.clock import EventClock
from hf_mlopt.vertical.data import read_libsvm, read_table, sign_labels
from hf_mlopt.vertical.splits import split_contiguous
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import make_loss


L2, PARTIES, SLOW = 1e-4, 8, 3.0
ALGORITHMS, SEEDS = ("saga", "svrg", "sgd"), (0, 1, 2)
# Data: batch size, learning rate, L2. Rows have norm 1 with the bias, so that one rate suits all.
DATA = {"a9a": (256, 2.0, L2), "credit": (256, 2.0, L2), "breast_cancer": (64, 2.0, 1e-2)}


def load(name: str):
    """Features with rows of norm 1, bias last, and labels -1 and 1."""
    if name == "a9a":
        files = [(SHARED / "vertical" / f"a9a_vertical_p{n}", count) for n, count in ((0, 61), (1, 62))]
        parts = [read_libsvm(path, count, with_label=True, constant="keep") for path, count in files]
        features, labels = scipy.sparse.hstack([part.features for part in parts], format="csr"), parts[0].label
    elif name == "credit":
        guest, host = (
            read_table(SHARED / "vertical" / f"default_credit_hetero_{side}.csv") for side in ("guest", "host")
        )
        names = [*(f"x{n}" for n in range(13)), *(f"x{n}" for n in range(10))]
        columns = [table.column(column) for table, column in zip([guest] * 13 + [host] * 10, names, strict=True)]
        features, labels = np.column_stack([column.to_numpy() for column in columns]), guest.column("y").to_numpy()
    else:
        features, labels = load_breast_cancer(return_X_y=True)
        features = (features - features.mean(0)) / features.std(0)
    ones = np.ones((len(labels), 1))
    if scipy.sparse.issparse(features):
        whole = scipy.sparse.csr_array(scipy.sparse.hstack([features, ones]))
        norms = np.sqrt(whole.multiply(whole).sum(axis=1))
        return scipy.sparse.csr_array(scipy.sparse.diags_array(1 / norms) @ whole), sign_labels(labels)
    whole = np.hstack([features, ones])
    return whole / np.linalg.norm(whole, axis=1, keepdims=True), sign_labels(labels)


def best(features, labels: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
    """f* and its weights, by L-BFGS."""
    loss = make_loss("logistic")

    def both(w):
        z = (features @ w)[:, None]
        theta = loss.theta(z, labels)
        return loss.values(z, labels).mean() + l2 / 2 * w @ w, features.T @ theta[:, 0] / len(labels) + l2 * w

    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(both, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), found.x


def clock(features, labels, name: str, slow: float, **options) -> EventClock:
    batch, rate, l2 = DATA[name]
    given = {"batch_size": batch, "learning_rate": rate, "l2": l2, "bias": False}  # the bias is a column already
    arguments = VerticalArguments(**(given | options))
    schedule = arguments.schedule(len(labels))
    parts = split_contiguous(features.shape[1], PARTIES)
    blocks = [FeatureBlock(features[:, columns], schedule) for columns in parts]
    return EventClock(arguments, blocks, labels, [1.0, slow] + [1.0] * (PARTIES - 2), fixed_point=True)


def optimum(results: Results, short: bool) -> None:
    for name in ("breast_cancer",) if short else DATA:
        features, labels = load(name)
        batch, _, l2 = DATA[name]
        least, _ = best(features, labels, l2)
        model = LogisticRegression(C=1 / (len(labels) * l2), fit_intercept=False, tol=1e-10, max_iter=20_000)
        oracle = model.fit(features, labels).score(features, labels)
        for algorithm in ("svrg", "saga"):
            run = clock(features, labels, name, 1.0, algorithm=algorithm)
            last = run.run(_until(1e-5, least, 100 * -(-len(labels) // batch)), 8 * PARTIES)[-1]
            z = sum(party.optimizer.block.scores(w) for party, w in zip(run.parties, run.weights(), strict=True))
            accuracy = float(np.mean(np.sign(z[:, 0]) == labels))
            epochs = last.seconds * batch / len(labels)
            row = {"data": name, "algorithm": algorithm, "gap": last.objective - least, "epochs": epochs}
            results.add(kind="optimum", **row, accuracy=accuracy, scikit_learn=float(oracle))


def straggler(results: Results, short: bool) -> None:
    gap = 1e-3
    for name in ("breast_cancer", "credit") if short else ("credit", "breast_cancer", "a9a"):
        features, labels = load(name)
        batch, _, l2 = DATA[name]
        least, _ = best(features, labels, l2)
        limit = SLOW * 60 * -(-len(labels) // batch)
        for algorithm in ("saga",) if short else ALGORITHMS:
            times: dict[str, list[float]] = {"sync": [], "async": [], "compensated": []}
            for seed in SEEDS[: 1 if short else None]:
                for kind in times:
                    options = {"mode": "sync" if kind == "sync" else "async", "seed": seed, "algorithm": algorithm}
                    run = clock(features, labels, name, SLOW, delay_compensation=kind == "compensated", **options)
                    last = run.run(_until(gap, least, limit), PARTIES)[-1]
                    times[kind].append(last.seconds if last.objective - least <= gap else float("inf"))
            ratios = {
                kind: [a / b for a, b in zip(times["sync"], times[kind], strict=True)]
                for kind in ("async", "compensated")
            }
            row = {"data": name, "algorithm": algorithm, "seeds": len(times["sync"]), **times}
            speed = {f"{kind}_speed_up": statistics.median(values) for kind, values in ratios.items()}
            results.add(kind="straggler", **row, **speed)


def _until(gap: float, least: float, limit: float):
    return lambda point: point.objective - least <= gap or point.seconds > limit
