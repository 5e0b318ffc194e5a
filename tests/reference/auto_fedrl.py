"""
Auto-FedRL in float64 and plain loops. Shares no code with the library.

z: what the policy draws, d numbers. L[r]: validation loss of the model at the start of round r. rho[r]: reward of the
draw of round r-1. Z: window. mu, log_sigma: a diagonal Gaussian policy. mu, P: the released CS policy, P a precision.
"""

import math

import numpy as np


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def reward(L_before, L_now):
    return 1 - L_now / L_before


def mean_loss(L, n, sites):
    return sum(n[k] * L[k] for k in sites) / sum(n[k] for k in sites)


def window(r, Z):
    """Rounds t in (max(0, r - Z), r]."""
    return [t for t in range(max(0, r - Z) + 1, r + 1)]


class Adam:
    def __init__(self, lr, beta1, beta2):
        self.lr, self.beta1, self.beta2, self.t, self.m, self.v = lr, beta1, beta2, 0, {}, {}

    def descend(self, parameters, gradients):
        self.t += 1
        for name, g in gradients.items():
            self.m[name] = self.beta1 * self.m.get(name, 0.0) + (1 - self.beta1) * g
            self.v[name] = self.beta2 * self.v.get(name, 0.0) + (1 - self.beta2) * g * g
            m_hat = self.m[name] / (1 - self.beta1**self.t)
            v_hat = self.v[name] / (1 - self.beta2**self.t)
            parameters[name] = parameters[name] - self.lr * m_hat / (np.sqrt(v_hat) + 1e-8)


def diagonal(draws, L, Z, sigma, bound, kappa=0.0, cost=None, hyper_lr=0.01):
    """
    The policy after each round r in which L[r] became known; draws[r] is z of round r, cost[r] that of its training.
    REINFORCE with the sum over the window and log pi at the parameters of now. Yields mu, log_sigma.
    """
    d = len(draws[0])
    policy = {"mu": np.zeros(d), "log_sigma": np.full(d, math.log(sigma))}
    adam = Adam(hyper_lr, 0.7, 0.7)
    for r in range(len(L)):
        rounds = window(r, Z)
        rho = {t: reward(L[t - 1], L[t]) for t in rounds}
        if kappa:
            costs = sorted(cost[t - 1] for t in rounds)
            if rounds:
                middle = len(costs) // 2
                median = costs[middle] if len(costs) % 2 else (costs[middle - 1] + costs[middle]) / 2
            rho = {t: rho[t] - kappa * cost[t - 1] / median for t in rounds}
        if len(rounds) >= 2:
            mean = sum(rho.values()) / len(rho)
            g_mu, g_log_sigma = np.zeros(d), np.zeros(d)
            for t in rounds:
                for i in range(d):
                    sigma_i = math.exp(policy["log_sigma"][i])
                    offset = (draws[t - 1][i] - policy["mu"][i]) / sigma_i
                    g_mu[i] += (rho[t] - mean) * offset / sigma_i
                    g_log_sigma[i] += (rho[t] - mean) * (offset**2 - 1)
            adam.descend(policy, {"mu": -g_mu, "log_sigma": -g_log_sigma})
            policy["mu"] = np.clip(policy["mu"], -bound, bound)
            policy["log_sigma"] = np.maximum(policy["log_sigma"], math.log(1e-3))
        yield policy["mu"], policy["log_sigma"]


class ReleasedCS:
    """
    The policy CS as released: z ~ N(mu, P^-1), P = sqrt(85) I, mu held to +-.5. `overwrites`: the loop over the window
    keeps the last term it computes, that of the oldest round, instead of the sum.
    """

    def __init__(self, d, Z, seed, overwrites=True):
        self.d, self.Z, self.overwrites = d, Z, overwrites
        self.policy = {"mu": np.zeros(d), "P": math.sqrt(85) * np.eye(d)}
        self.adam, self.rng = Adam(0.01, 0.7, 0.7), np.random.default_rng(seed)
        self.draws, self.L = [], []

    def draw(self):
        self.policy["mu"] = np.clip(self.policy["mu"], -0.5, 0.5)
        covariance = np.linalg.inv((self.policy["P"] + self.policy["P"].T) / 2)
        factor = np.linalg.cholesky(covariance)
        self.draws.append(self.policy["mu"] + factor @ self.rng.normal(size=self.d))
        return self.draws[-1]

    def gradient(self, z, advantage):
        """Of -log pi(z) * advantage."""
        P, offset = self.policy["P"], z - self.policy["mu"]
        g_mu = -advantage * (P + P.T) / 2 @ offset
        g_P = -advantage * (np.linalg.inv(P).T - np.outer(offset, offset)) / 2
        return {"mu": g_mu, "P": g_P}

    def observe(self, L_r):
        """L_r, known once the round r - 1 is over."""
        self.L.append(L_r)
        r = len(self.L) - 1
        rounds = window(r, self.Z)
        if len(rounds) < 2:
            return None
        rho = {t: reward(self.L[t - 1], self.L[t]) for t in rounds}
        mean = sum(rho.values()) / len(rho)
        total = {"mu": np.zeros(self.d), "P": np.zeros((self.d, self.d))}
        for t in reversed(rounds):  # newest first
            term = self.gradient(self.draws[t - 1], rho[t] - mean)
            for name in total:
                total[name] = term[name] if self.overwrites else total[name] + term[name]
        self.adam.descend(self.policy, total)
        return total
