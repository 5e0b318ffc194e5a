"""
DOMO, its relatives, DiLoCo and SlowMo in float64 and plain loops over clients. Shares no code with the library.

x: server model. m: server momentum. y: where a round starts. z: iterate of a client. p[k]: weight of client k. eta:
learning rate of a local step, S its sum over a round. d: direction of a client, its local steps over S. An option, and
eta, is a number or an array with a value for each coordinate, which is what parameter groups are.
"""

import numpy as np


def average(values, p):
    total = 0.0
    for value, p_k in zip(values, p, strict=True):
        total = total + p_k * value
    return total


def domo(x, gradient, rounds, bases, p, alpha, mu_s, beta, fused, local, unit="grad"):
    """
    Yields after each round: x, y, m, and the path of every client.

    Args:
        gradient: `gradient(k, z, r, i)` of client k in its i-th step of round r.
        rounds: For each round the learning rates of its steps.
        bases: For each client what makes local steps, with `step(z, g, eta)`, `zero()` and, where averaged, `m`.
        fused: "before" the local steps (DOMO), "inside" them (DOMO-S), or None.
        local: "zero", "average" or "keep".
        unit: m adds up d ("grad") or S d ("param").
    """
    x = np.array(x, dtype=np.float64)
    y, m = x, np.zeros_like(x)
    for r, etas in enumerate(rounds):
        S = sum(etas) + np.zeros_like(x)
        sums, paths = [], []
        for k, base in enumerate(bases):
            if local == "zero":
                base.zero()
            z, steps, path = y, np.zeros_like(x), []
            for i, eta in enumerate(etas):
                u = base.step(z, gradient(k, z, r, i), eta)
                z = z - u
                if fused == "inside":
                    z = z - beta * eta * m
                steps = steps + u
                path.append(z)
            sums.append(steps)
            paths.append(path)
        if local == "average":
            m_l = average([base.m for base in bases], p)
            for base in bases:
                base.m = m_l
        trained = S > 0  # where it is 0 the server does nothing
        if unit == "grad":
            d = [np.divide(steps, S, out=np.zeros_like(x), where=trained) for steps in sums]
            m = np.where(trained, mu_s * m + average(d, p), m)
            M = S * m
        else:
            m = np.where(trained, mu_s * m + average(sums, p), m)
            M = m
        x = np.where(trained, x - alpha * M, x)
        y = np.where(trained, x - beta * M if fused == "before" else x, y)
        yield x, y, m, paths


def slowmo(x, local_model, rounds, p, alpha, beta):
    """SlowMo, Algorithm 1, at a learning rate that is constant within a round. Yields x."""
    x = np.array(x, dtype=np.float64)
    u = np.zeros_like(x)
    for r, etas in enumerate(rounds):
        gamma = etas[0]
        u = beta * u + (x - average([local_model(k, x, r) for k in range(len(p))], p)) / gamma
        x = x - alpha * gamma * u
        yield x
