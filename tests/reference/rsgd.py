"""
RSGD and the methods it equals in special cases, in float64 and plain loops. Shares no code with the library.

w: point of the gradients. x: average. e: residual, in units of the parameters. y = x - e: explored iterate. m:
momentum. D: what has been proposed and not yet applied. eta: learning rate, of step t the t-th of `lrs`. An option is
a number, or an array with a value for each coordinate, which is what parameter groups are.
"""

import numpy as np


class Momentum:
    """m = mu m + g + wd w; proposes eta m."""

    def __init__(self, mu=0.0, wd=0.0):
        self.mu, self.wd = mu, wd
        self.zero()

    def zero(self):
        self.m = 0.0

    def step(self, w, g, eta):
        self.m = self.mu * self.m + (g + self.wd * w)
        return eta * self.m


class AdamW:
    """Loshchilov and Hutter, Algorithm 2, with the decay times eta as in torch; proposes what it would subtract."""

    def __init__(self, beta1=0.9, beta2=0.999, eps=1e-8, wd=0.01):
        self.beta1, self.beta2, self.eps, self.wd = beta1, beta2, eps, wd
        self.zero()

    def zero(self):
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, w, g, eta):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return eta * self.wd * w + eta * m_hat / (np.sqrt(v_hat) + self.eps)


def rsgd(w, gradient, lrs, base, rho, lam, period=1, reset_period=0):
    """Yields (w, x, y) after each step. `gradient(w, t)`; `rho` may be a function of t."""
    w = np.array(w, dtype=np.float64)
    x, e = w, np.zeros_like(w)
    D = e
    for t, eta in enumerate(lrs):
        rho_t = rho(t) if callable(rho) else rho
        u = base.step(w, gradient(w, t), eta)
        D = D + u
        w = w - u
        if (t + 1) % period == 0:
            x = x - (1 - rho_t) * D
            e = rho_t * D
            w = x - lam * e
            D = e
        if reset_period and (t + 1) % reset_period == 0:
            e = np.zeros_like(w)
            D = e
            w = x
        yield w, x, x - D


def detached_error_feedback(w, gradient, lrs, compress, lam, mu, period=1):
    """DEF on one worker in the order of its code, with Delta the sum of the steps. Yields (w, x)."""
    w = np.array(w, dtype=np.float64)
    x, m, Delta = w, np.zeros_like(w), np.zeros_like(w)
    for t, eta in enumerate(lrs):
        m = mu * m + gradient(w, t)
        w = w - eta * m
        Delta = Delta + eta * m
        if (t + 1) % period == 0:
            c = compress(Delta)
            e = Delta - c
            x = x - c
            w = x - lam * e
            Delta = e
        yield w, x


def schedule_free_sgd(w, gradient, lrs, beta):
    """Defazio et al., Eq. (3)-(5), constant weights c_t = 1 / t. Yields its (y, x, z)."""
    z = np.array(w, dtype=np.float64)
    x = z
    for t, eta in enumerate(lrs, start=1):
        y = (1 - beta) * z + beta * x
        z = z - eta * gradient(y, t - 1)
        c = 1 / t
        x = (1 - c) * x + c * z
        yield (1 - beta) * z + beta * x, x, z


def lookahead(w, gradient, lrs, k, a, mu):
    """Zhang et al., Algorithm 1, over SGD whose momentum is kept. phi: slow weights. Yields (theta, phi)."""
    theta = np.array(w, dtype=np.float64)
    phi, m = theta, np.zeros_like(theta)
    for t, eta in enumerate(lrs):
        m = mu * m + gradient(theta, t)
        theta = theta - eta * m
        if (t + 1) % k == 0:
            phi = phi + a * (theta - phi)
            theta = phi
        yield theta, phi
