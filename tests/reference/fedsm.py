"""
FedSM in float64 and plain loops over sites and coordinates. Shares no code with the library.

w_g, w[k]: global and personal models. lam: own weight in SoftPull. W: selector, a linear map, [K][F]; m, v,
s: its Adam moments and steps. x[k]: inputs of site k for the selector, all with the label k.
"""

import math

import numpy as np


def soft_pull(ends, lam):
    """ends[k]: personal models after local training, of the sites that answered."""
    if len(ends) == 1:
        return dict(ends)
    pulled = {}
    for k in ends:
        w = lam * ends[k]
        for j in ends:
            if j != k:
                w = w + (1 - lam) / (len(ends) - 1) * ends[j]
        pulled[k] = w
    return pulled


def softmax(logits):
    exponentials = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def selector_gradient(W, x, label):
    """Of the mean cross entropy over the rows of x."""
    g = np.zeros_like(W)
    for row in x:
        P = softmax([sum(W[k][f] * row[f] for f in range(len(row))) for k in range(len(W))])
        for k in range(len(W)):
            for f in range(len(row)):
                g[k][f] += (P[k] - (k == label)) * row[f] / len(x)
    return g


def adam(W, g, m, v, t, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return W - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v


def fedsm(w, W, g, x, present, n, steps, eta, lam, selector_steps, selector_lr):
    """g(k, w, r, i): gradient of the task. Yields w_g, the personal models, and (W, m, v, s)."""
    w_g = np.array(w, dtype=np.float64)
    personal = {k: np.array(w, dtype=np.float64) for k in n}
    W, m, v, s = np.array(W, dtype=np.float64), np.zeros_like(W), np.zeros_like(W), 0
    for r, sites in enumerate(present):
        p = {k: n[k] / sum(n[j] for j in sites) for k in sites}
        ends, own, selectors = {}, {}, {}
        for k in sites:
            ends[k], own[k] = np.array(w_g), np.array(personal[k])
            for i in range(steps):
                ends[k] = ends[k] - eta * g(k, ends[k], r, i)
                own[k] = own[k] - eta * g(k, own[k], r, i)
            W_k, m_k, v_k = W, m, v
            for i in range(selector_steps):
                W_k, m_k, v_k = adam(W_k, selector_gradient(W_k, x[k], k), m_k, v_k, s + i + 1, selector_lr)
            selectors[k] = W_k, m_k, v_k
        w_g = sum(p[k] * ends[k] for k in sites)
        personal = {**personal, **soft_pull(own, lam)}
        W, m, v = (sum(p[k] * selectors[k][part] for k in sites) for part in range(3))
        s = s + selector_steps
        yield w_g, personal, (W, m, v, s)


def route(P, gamma):
    """Index of the personal model for every row of P, or None for the global model."""
    chosen = []
    for row in P:
        best = max(range(len(row)), key=lambda k: row[k])
        chosen.append(best if row[best] > gamma else None)
    return chosen


def features(image):
    """image: [C][H][W] in [0, 1]."""
    C, H, W = image.shape
    means, stds = [], []
    for c in range(C):
        values = [float(image[c][i][j]) for i in range(H) for j in range(W)]
        mean = sum(values) / len(values)
        means.append(mean)
        stds.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))
    grey = [[sum(float(image[c][i][j]) for c in range(C)) / C for j in range(W)] for i in range(H)]
    histogram = [0.0] * 16
    for i in range(H):
        for j in range(W):
            histogram[min(int(grey[i][j] * 16), 15)] += 1 / (H * W)
    steps = [abs(grey[i + 1][j] - grey[i][j]) for i in range(H - 1) for j in range(W)]
    return np.array([*means, *stds, *histogram, sum(steps) / len(steps)])


def lda(groups, f, shrinkage=0.1):
    """groups[k]: feature rows of site k. Squared distances and probabilities of the feature vector f."""
    N = sum(len(rows) for rows in groups)
    d = len(f)
    S = np.zeros((d, d))
    for rows in groups:
        mu = sum(rows) / len(rows)
        for row in rows:
            S += np.outer(row - mu, row - mu) / N
    covariance = (1 - shrinkage) * S + shrinkage * np.trace(S) / d * np.eye(d)
    distances = []
    for rows in groups:
        offset = f - sum(rows) / len(rows)
        distances.append(float(offset @ np.linalg.solve(covariance, offset)))
    return distances, softmax([-distance / 2 for distance in distances])
