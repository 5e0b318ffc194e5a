"""A noisy least-squares problem, and optimizers driven by gradients that do not come from autograd."""

import numpy as np
import torch


NUM_PARAMETERS = 8
SHAPES = ((3,), (2, 2), ())  # of the parameters, 8 numbers in all
NAMES = ("a.weight", "b.weight", "norm.bias")  # theirs in a message


class LeastSquares:
    """Another half mean square of 5 residuals in each of 40 steps, for each of 4 clients."""

    def __init__(self, seed=0):
        generator = np.random.default_rng(seed)
        self.start = generator.normal(size=NUM_PARAMETERS)
        self.A = generator.normal(size=(160, 5, NUM_PARAMETERS))
        self.b = generator.normal(size=(160, 5))

    def gradient(self, w, t):
        t = t % len(self.A)
        return self.A[t].T @ (self.A[t] @ w - self.b[t]) / 5

    def client_gradient(self, k, z, r, i):
        return self.gradient(z, 28 * r + 4 * i + k)


def parameters(flat, dtype=torch.float64, shapes=SHAPES):
    sizes = [int(np.prod(shape)) for shape in shapes]
    pieces = np.split(np.asarray(flat), np.cumsum(sizes)[:-1])
    return [
        torch.nn.Parameter(torch.tensor(piece.reshape(shape), dtype=dtype))
        for piece, shape in zip(pieces, shapes, strict=True)
    ]


def flat(params):
    return torch.cat([parameter.detach().reshape(-1) for parameter in params]).double().numpy()


def tensors(flat, dtype=torch.float64):
    """The same as a group of a message."""
    return {name: value.detach() for name, value in zip(NAMES, parameters(flat, dtype), strict=True)}


def numbers(group):
    """`[8]`, float64: what [`tensors`] was given."""
    return flat(group[name] for name in NAMES)


def set_gradients(params, gradient):
    pieces = torch.from_numpy(gradient).split([parameter.numel() for parameter in params])
    for parameter, piece in zip(params, pieces, strict=True):
        parameter.grad = piece.view(parameter.shape).to(parameter.dtype, copy=True)


def set_lr(optimizer, eta):
    """A number, or one for each group."""
    for n, group in enumerate(optimizer.param_groups):
        group["lr"] = eta[n] if isinstance(eta, (tuple, list)) else eta


def drive(optimizer, params, gradient, lrs):
    """Yields the parameters after each step."""
    for t, eta in enumerate(lrs):
        set_lr(optimizer, eta)
        set_gradients(params, gradient(flat(params), t))
        optimizer.step()
        yield flat(params)
