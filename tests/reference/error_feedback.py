"""
Step-ahead error feedback, arXiv 2008.05823, with all workers in one process: the listing, step by step.

Works in the dtype of `x`; numpy only.
"""

import numpy as np


# x weights   y^k weights of worker k's gradient   e^k, e^s residuals of workers and server   m^k momenta
# Δ^k = e^k + η m^k   c^k = C(Δ^k)   η learning rate   μ momentum   p averaging period


def step_ahead(x, gradient, compress, n, steps, eta, mu=0.0, p=0, server=False, alpha=1.0):
    """`gradient(k, t, y)` is that of worker k; without `alpha` this is error feedback. Returns x, all e^k and e^s."""
    x = x.copy()
    zero, e, m = np.zeros_like(x), [np.zeros_like(x) for _ in range(n)], [np.zeros_like(x) for _ in range(n)]
    e_s = zero.copy()
    for t in range(steps):
        if p and (t + 1) % p == 0:
            e_bar = sum(e, zero) / n
            e = [e_bar.copy() for _ in range(n)]
        c = []
        for k in range(n):
            y = x - alpha * e[k]
            m[k] = mu * m[k] + gradient(k, t, y)
            delta = e[k] + eta * m[k]
            c.append(compress(delta))
            e[k] = delta - c[k]
        a = sum(c, zero) / n
        if server:
            a = a + e_s
            e_s = a - compress(a)
            a = compress(a)
        x = x - a
    return x, e, e_s


def top_k(ratio):
    """The largest entries by magnitude, ratio rounded up."""

    def compress(v):
        out = np.zeros_like(v)
        for i in sorted(range(len(v)), key=lambda i: -abs(v[i]))[: -int(-ratio * len(v) // 1)]:
            out[i] = v[i]
        return out

    return compress


def sign_of_pairs(v):
    """sign(v) times the mean magnitude of every two entries."""
    out = np.empty_like(v)
    for i in range(0, len(v), 2):
        scale = (abs(v[i]) + abs(v[i + 1])) / v.dtype.type(2)
        out[i : i + 2] = np.where(v[i : i + 2] >= 0, scale, -scale)
    return out
