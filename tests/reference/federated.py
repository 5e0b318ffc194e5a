"""
Federated algorithms in float64 and plain loops over sites. Shares no code with the library.

w: server model. w_k: model of site k after its local steps. p[k]: weight of site k. Delta: mean change of the sites.
g(k, w, r, i): gradient of site k at w in step i of round r. eta: local learning rate, a constant. present[r]: the
sites that take part in round r. n[k]: samples of site k.
"""

import numpy as np


def shares(n, sites):
    return {k: n[k] / sum(n[j] for j in sites) for k in sites}


def local_sgd(w, steps, eta, gradient):
    w_k = np.array(w)
    for i in range(steps):
        w_k = w_k - eta * gradient(w_k, i)
    return w_k


def mean_change(w, ends, p):
    Delta = np.zeros_like(w)
    for k in ends:
        Delta = Delta + p[k] * (ends[k] - w)
    return Delta


def fedopt(w, g, present, n, steps, eta, server, mu=0.0):
    """FedAvg and what differs from it at the server, w = server(w, Delta, r), or by the proximal term mu. Yields w."""
    w = np.array(w, dtype=np.float64)
    for r, sites in enumerate(present):
        ends = {}
        for k in sites:

            def gradient(z, i, k=k, r=r, start=w):
                return g(k, z, r, i) + mu * (z - start)

            ends[k] = local_sgd(w, steps, eta, gradient)
        w = server(w, mean_change(w, ends, shares(n, sites)), r)
        yield w


def fedavg():
    return lambda w, Delta, r: w + Delta


def fedavgm(mu, alpha):
    memory = {"m": 0.0}

    def server(w, Delta, r):
        memory["m"] = mu * memory["m"] + Delta
        return w + alpha * memory["m"]

    return server


def adaptive(eta, beta1, beta2, tau, kind, flwr=False):
    """FedAdam and FedYogi, coordinate by coordinate; flwr: with the bias correction of Flower's FedAdam."""
    memory = {}

    def server(w, Delta, r):
        m, v = memory.setdefault("m", [0.0] * len(w)), memory.setdefault("v", [0.0] * len(w))
        new = np.array(w)
        for j in range(len(w)):
            m[j] = beta1 * m[j] + (1 - beta1) * Delta[j]
            if kind == "adam":
                v[j] = beta2 * v[j] + (1 - beta2) * Delta[j] ** 2
            elif v[j] > Delta[j] ** 2:
                v[j] = v[j] - (1 - beta2) * Delta[j] ** 2
            elif v[j] < Delta[j] ** 2:
                v[j] = v[j] + (1 - beta2) * Delta[j] ** 2
            step = eta
            if flwr:
                server_round = r + 1  # Flower counts from 1
                step = eta * (1 - beta2 ** (server_round + 1.0)) ** 0.5 / (1 - beta1 ** (server_round + 1.0))
            new[j] = w[j] + step * m[j] / (v[j] ** 0.5 + tau)
        return new

    return server


# The library's algorithm and its options, and the server that is its twin. All that is special happens there.
SERVERS = [
    ("fedavg", {}, fedavg),
    ("fedavgm", {"server_momentum": 0.6, "server_lr": 0.7}, lambda: fedavgm(0.6, 0.7)),
    ("fedadam", {}, lambda: adaptive(0.1, 0.9, 0.99, 1e-3, "adam")),
    ("fedadam", {"bias_correction": "flwr"}, lambda: adaptive(0.1, 0.9, 0.99, 1e-3, "adam", flwr=True)),
    ("fedadam", {"betas": (0.5, 0.8), "tau": 0.1}, lambda: adaptive(0.1, 0.5, 0.8, 0.1, "adam")),
    ("fedyogi", {"server_lr": 0.05}, lambda: adaptive(0.05, 0.9, 0.99, 1e-3, "yogi")),
]


def scaffold(w, g, present, n, steps, eta, alpha):
    """SCAFFOLD, Algorithm 1, option II. Yields w, c and the controls of all sites. eta: a number, or one a round."""
    w = np.array(w, dtype=np.float64)
    K = len(n)
    c, c_k = np.zeros_like(w), {k: np.zeros_like(w) for k in n}
    for r, sites in enumerate(present):
        eta_r = eta[r] if isinstance(eta, list) else eta
        ends, changes = {}, []
        for k in sites:
            z = np.array(w)
            for i in range(steps):
                z = z - eta_r * (g(k, z, r, i) + c - c_k[k])
            c_plus = c_k[k] - c + (w - z) / (steps * eta_r)
            changes.append(c_plus - c_k[k])
            c_k[k] = c_plus
            ends[k] = z
        w = w + alpha * mean_change(w, ends, shares(n, sites))
        c = c + sum(changes) / K
        yield w, c, dict(c_k)


def ditto(w, g, present, n, steps, eta, lmbda):
    """Ditto, Algorithm 1. Yields w and the personal models."""
    common = fedopt(w, g, present, n, steps, eta, fedavg())
    v = {k: np.array(w, dtype=np.float64) for k in n}
    w = np.array(w, dtype=np.float64)
    for r, sites in enumerate(present):
        for k in sites:
            for i in range(steps):
                v[k] = v[k] - eta * (g(k, v[k], r, i) + lmbda * (v[k] - w))
        w = next(common)
        yield w, dict(v)


def fedbn(w, is_local, g, present, n, steps, eta):
    """FedBN: coordinates with is_local stay with their site. Yields the models of all sites."""
    w_k = {k: np.array(w, dtype=np.float64) for k in n}
    shared = np.array(w, dtype=np.float64)
    for r, sites in enumerate(present):
        ends = {}
        for k in sites:
            start = np.where(is_local, w_k[k], shared)
            ends[k] = local_sgd(start, steps, eta, lambda z, i, k=k, r=r: g(k, z, r, i))
        p = shares(n, sites)
        total = np.zeros_like(shared)
        for k in sites:
            total = total + p[k] * ends[k]
            w_k[k] = ends[k]
        shared = np.where(is_local, shared, total)
        yield {k: np.where(is_local, w_k[k], shared) for k in n}
