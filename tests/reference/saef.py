"""
Step-ahead error feedback as its listing has it (Xu, Huo, Huang, 2020), in float64 and plain loops. Shares no code with
the library.

A model is a list of tensors, a tensor a list of numbers. x: weights of all. y: weights that worker k takes its
gradient at. e: what k has not sent. m: its momentum. c: what it sends. s: what the server has not sent. eta: learning
rate, mu: momentum, wd: weight decay, p: averaging period, n: workers.
"""


def sign(model):
    """sign(v) times the mean magnitude of the whole model."""
    count = sum(len(tensor) for tensor in model)
    scale = sum(abs(v) for tensor in model for v in tensor) / count
    return [[scale if v >= 0 else -scale for v in tensor] for tensor in model]


def sign_per_tensor(model):
    return [sign([tensor])[0] for tensor in model]


def sign_of_shards(n):
    """The scale is that of one of n equal pieces of all numbers in a row."""

    def coded(model):
        row = [v for tensor in model for v in tensor]
        size = -(-len(row) // n)
        out = []
        for begin in range(0, len(row), size):
            out += sign([row[begin : begin + size]])[0]
        return [[out.pop(0) for _ in tensor] for tensor in model]

    return coded


def top_k(ratio):
    """The ratio of largest magnitudes of each tensor, at least one."""

    def coded(model):
        out = []
        for tensor in model:
            kept = max(1, -int(-ratio * len(tensor) // 1))
            order = sorted(range(len(tensor)), key=lambda i: -abs(tensor[i]))[:kept]
            out.append([v if i in order else 0.0 for i, v in enumerate(tensor)])
        return out

    return coded


def identity(model):
    return [list(tensor) for tensor in model]


def combine(function, *models):
    return [[function(*vs) for vs in zip(*tensors, strict=True)] for tensors in zip(*models, strict=True)]


def saef(x, gradient, n, etas, mu=0.0, wd=0.0, C=sign, C_down=None, p=0, reset=0, mode="step-ahead"):
    """Yields a dict of x, s, and for each worker y, e, m, after each step. `gradient(k, y, t)`; `etas`: eta
    of every step."""
    zero = combine(lambda v: 0.0, x)
    e, m, s, y = [zero] * n, [zero] * n, zero, [x] * n
    for t, eta in enumerate(etas):
        if reset and (t + 1) % reset == 0:
            e = [zero] * n
        if p and (t + 1) % p == 0:
            mean = combine(lambda *vs: sum(vs) / n, *e)
            e = [mean] * n
        c = [None] * n
        for k in range(n):
            y[k] = combine(lambda a, b: a - b, x, e[k]) if mode == "step-ahead" else x
            g = gradient(k, y[k], t)
            g = combine(lambda v, w: v + wd * w, g, y[k])
            m[k] = combine(lambda v, w: mu * v + w, m[k], g)
            delta = combine(lambda v, w, eta=eta: v + eta * w, e[k], m[k])
            c[k] = C(delta)
            e[k] = combine(lambda v, w: v - w, delta, c[k]) if mode != "none" else zero
        a = combine(lambda *vs: sum(vs) / n, *c)
        if C_down is not None:
            a = combine(lambda v, w: v + w, a, s)
            d = C_down(a)
            s = combine(lambda v, w: v - w, a, d) if mode != "none" else zero
        else:
            d = a
        x = combine(lambda v, w: v - w, x, d)
        yield {"x": x, "s": s, "y": list(y), "e": list(e), "m": list(m)}
