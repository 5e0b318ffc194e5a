"""
Vertical training in the paper's letters: one machine, all columns, float64, plain loops, one gradient per row.

Rows of X are lists of floats turned into vectors; w is [d, K]. Nothing is shared with the library.
"""

import math

import numpy as np


def theta_of(loss, z, y, K):
    """dL/dz of one row, [K]."""
    if loss == "logistic":
        return np.array([-y / (1.0 + math.exp(y * z[0]))])
    if loss == "ridge":
        return np.array([z[0] - y])
    top = max(z)
    total = sum(math.exp(z[k] - top) for k in range(K))
    return np.array([math.exp(z[k] - top) / total - (1.0 if k == y else 0.0) for k in range(K)])


def value_of(loss, z, y, K):
    """L of one row."""
    if loss == "logistic":
        return math.log1p(math.exp(-y * z[0]))
    if loss == "ridge":
        return 0.5 * (z[0] - y) ** 2
    top = max(z)
    return math.log(sum(math.exp(z[k] - top) for k in range(K))) + top - z[int(y)]


def objective(X, y, w, loss, l2):
    total = 0.0
    for i in range(len(X)):
        total += value_of(loss, X[i] @ w, y[i], w.shape[1])
    return total / len(X) + l2 / 2 * float(np.sum(w * w))


def gradient_of_row(X, y, w, i, loss):
    """x_i θ_iᵀ, [d, K]."""
    return np.outer(X[i], theta_of(loss, X[i] @ w, y[i], w.shape[1]))


def centralised(algorithm, X, y, batches, passes, gamma, l2, loss, K=1):
    """
    All iterates. `batches(k)` are the rows of step k, `passes` the number of steps between two anchors.
    """
    n, d = X.shape
    w = np.zeros((d, K))
    iterates = []
    table = [gradient_of_row(X, y, w, i, loss) for i in range(n)]
    anchor = w.copy()
    k = 0
    while True:
        rows = batches(k)
        if rows is None:
            return iterates
        if algorithm == "svrg" and k > 0 and k % passes == 0:
            anchor = w.copy()
        if algorithm == "sgd":
            g = sum(gradient_of_row(X, y, w, i, loss) for i in rows) / len(rows)
        elif algorithm == "svrg":
            mu = sum(gradient_of_row(X, y, anchor, i, loss) for i in range(n)) / n
            new = sum(gradient_of_row(X, y, w, i, loss) for i in rows)
            old = sum(gradient_of_row(X, y, anchor, i, loss) for i in rows)
            g = (new - old) / len(rows) + mu
        else:
            mean = sum(table) / n
            new = [gradient_of_row(X, y, w, i, loss) for i in rows]
            g = sum(a - table[i] for a, i in zip(new, rows, strict=True)) / len(rows) + mean
            for a, i in zip(new, rows, strict=True):
                table[i] = a
        w = w - gamma * (g + l2 * w)
        iterates.append(w.copy())
        k += 1


def asynchronous_saga(X, y, columns, events, batches, gamma, l2, loss, K=1):
    """
    Blocks that read and write in the order of `events`, ("read" | "write", party). `columns` are the features of each
    party. A read takes the scores of the party's next batch from the weights everyone has then; the write uses them.
    """
    n, d = X.shape
    w = np.zeros((d, K))
    tables = [[gradient_of_row(X, y, w, i, loss) for i in range(n)] for _ in columns]
    steps, held = [0] * len(columns), [None] * len(columns)
    for kind, l in events:
        if kind == "read":
            rows = batches(steps[l])
            held[l] = (rows, [X[i] @ w for i in rows])
            continue
        rows, scores = held[l]
        mean = sum(tables[l]) / n
        new = [np.outer(X[i], theta_of(loss, z, y[i], K)) for i, z in zip(rows, scores, strict=True)]
        g = sum(a - tables[l][i] for a, i in zip(new, rows, strict=True)) / len(rows) + mean
        for a, i in zip(new, rows, strict=True):
            tables[l][i] = a
        own = columns[l]
        w = w.copy()
        w[own] = w[own] - gamma * (g[own] + l2 * w[own])
        steps[l] += 1
    return w
