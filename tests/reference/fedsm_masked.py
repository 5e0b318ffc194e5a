"""
FedSM by sums alone, in float64 and plain loops. Shares no code with the library, nor with the open form's twin but for
the selector's gradient and Adam.

w_g: global model. own[k]: personal model of site k as its local training left it, which only k has. total[k],
count[k]: sum of the personal models of the round that own[k] is of, and of how many. lam: own weight in SoftPull.
"""

import numpy as np

from tests.reference.fedsm import adam, selector_gradient


def pull(own, total, count, lam):
    """What a site makes of its own model and a sum that it is sent."""
    if count == 1:
        return own
    b = (1 - lam) / (count - 1)
    return np.array([(lam - b) * own[i] + b * total[i] for i in range(len(own))])


def masked_fedsm(w, W, g, x, present, n, steps, eta, lam, selector_steps, selector_lr):
    """g(k, w, r, i): gradient of the task. Yields w_g, what each site would go on from, and (W, m, v, s)."""
    w_g = np.array(w, dtype=np.float64)
    own = {k: np.array(w, dtype=np.float64) for k in n}
    total = {k: np.array(w, dtype=np.float64) for k in n}
    count = dict.fromkeys(n, 1)
    W, m, v, s = np.array(W, dtype=np.float64), np.zeros_like(W), np.zeros_like(W), 0
    for r, sites in enumerate(present):
        sum_n, sum_change, sum_personal = 0, np.zeros_like(w_g), np.zeros_like(w_g)
        sum_W, sum_m, sum_v = np.zeros_like(W), np.zeros_like(W), np.zeros_like(W)
        for k in sites:
            end, personal = np.array(w_g), pull(own[k], total[k], count[k], lam)
            for i in range(steps):
                end = end - eta * g(k, end, r, i)
                personal = personal - eta * g(k, personal, r, i)
            own[k] = personal
            W_k, m_k, v_k = W, m, v
            for i in range(selector_steps):
                W_k, m_k, v_k = adam(W_k, selector_gradient(W_k, x[k], k), m_k, v_k, s + i + 1, selector_lr)
            sum_n += n[k]
            sum_change += n[k] * (end - w_g)
            sum_personal += personal
            sum_W, sum_m, sum_v = sum_W + n[k] * W_k, sum_m + n[k] * m_k, sum_v + n[k] * v_k
        w_g = w_g + sum_change / sum_n
        for k in sites:
            total[k], count[k] = sum_personal, len(sites)
        W, m, v, s = sum_W / sum_n, sum_m / sum_n, sum_v / sum_n, s + selector_steps
        yield w_g, {k: pull(own[k], total[k], count[k], lam) for k in n}, (W, m, v, s)
