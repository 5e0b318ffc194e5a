"""
The pruning methods in float64 and plain loops, in the notation of the papers. Shares no code with the library.

W[i][j]: output neuron i, input channel j. X[t][j]: activation of token t. g[t]: its router weight for the expert.
"""

import math
from fractions import Fraction

import torch


def routed_tokens(top_k_index, top_k_weights, expert: int) -> list[tuple[int, float]]:
    """(t, g_te) of every token t the router sends to `expert`."""
    pairs = []
    for t, (chosen, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights.double().tolist(), strict=True)):
        for e, g in zip(chosen, weights, strict=True):
            if e == expert:
                pairs.append((t, g))
    return pairs


def expert_intermediate(experts, e: int, x: torch.Tensor) -> torch.Tensor:
    """h = act(w1 x) * (w3 x), or act(w1 x) without gate, of one token, from the raw parameters of fused experts."""
    if not experts.has_gate:
        return experts.act_fn(experts.up_proj[e].double() @ x.double())
    up = experts.gate_up_proj[e].double()
    z = x.double() @ up if experts.is_transposed else up @ x.double()
    if experts.has_bias:
        z = z + experts.gate_up_proj_bias[e].double()
    if experts.is_concatenated:
        half = len(z) // 2
        return experts.act_fn(z[:half]) * z[half:]
    # gpt-oss: gate and up alternate, clamped, with a sigmoid of slope 1.702 and up shifted by one
    gate, linear = z[0::2].clamp(max=7.0), z[1::2].clamp(min=-7.0, max=7.0)
    return (linear + 1) * gate * torch.sigmoid(1.702 * gate)


def second_moment(X, g, gate_power: float = 1.0) -> list[float]:
    r"""Q[j] = \sum_t (g_t^\gamma X_tj)^2."""
    Q = [0.0] * len(X[0])
    for x, weight in zip(X, g, strict=True):
        for j, value in enumerate(x):
            Q[j] += (weight**gate_power * value) ** 2
    return Q


def full_second_moment(X, g, gate_power: float = 1.0) -> torch.Tensor:
    r"""H = \sum_t g_t^{2\gamma} x_t x_t^T."""
    H = torch.zeros(len(X[0]), len(X[0]), dtype=torch.float64)
    for x, weight in zip(X, g, strict=True):
        x = torch.tensor(x, dtype=torch.float64)
        H += weight ** (2 * gate_power) * torch.outer(x, x)
    return H


def blend(Q_own, tokens: int, Q_layer, min_tokens: int) -> list[float]:
    """Q_e <- (n q_e + kappa q_layer) / (n + kappa), kappa = min_tokens - n, both of mean one over the columns."""
    kappa = min_tokens - tokens
    mean_own, mean_layer = sum(Q_own) / len(Q_own), sum(Q_layer) / len(Q_layer)
    blended = []
    for own, layer in zip(Q_own, Q_layer, strict=True):
        q_e = own / mean_own if tokens else 0.0
        blended.append((tokens * q_e + kappa * layer / mean_layer) / (tokens + kappa))
    return blended


def magnitude_score(W) -> list[list[float]]:
    """S_ij = |W_ij|."""
    return [[abs(w) for w in row] for row in W]


def wanda_score(W, Q) -> list[list[float]]:
    r"""S_ij = |W_ij| \cdot \sqrt{Q_j}; with router weights inside Q it is MoE-Pruner, Eq. (9)."""
    return [[abs(w) * math.sqrt(Q[j]) for j, w in enumerate(row)] for row in W]


def ria_score(W, Q) -> list[list[float]]:
    r"""S_ij = (|W_ij| / \sum_i |W_ij| + |W_ij| / \sum_j |W_ij|) \cdot (\|X_j\|_2)^{1/2}."""
    column = [sum(abs(row[j]) for row in W) for j in range(len(W[0]))]
    scores = []
    for row in W:
        total = sum(abs(w) for w in row)
        scores.append([(abs(w) / column[j] + abs(w) / total) * math.sqrt(Q[j]) ** 0.5 for j, w in enumerate(row)])
    return scores


SCORES = {
    "magnitude": lambda W, Q: magnitude_score(W),
    "wanda": wanda_score,
    "moe-pruner": wanda_score,
    "ria": ria_score,
}


def num_removed(p: float, d_in: int) -> int:
    """floor(p d_in), with p the decimal number it is written as."""
    return math.floor(Fraction(str(p)) * d_in)


def lowest(S, count: int) -> list[bool]:
    """True at the `count` smallest of a comparison group; among equal scores the lower index goes first."""
    order = sorted(range(len(S)), key=lambda j: (S[j], j))
    removed = set(order[:count])
    return [j in removed for j in range(len(S))]


def mask_rows(S, p: float) -> list[list[bool]]:
    """Removes floor(p d_in) of every row."""
    return [lowest(row, num_removed(p, len(row))) for row in S]


def mask_n_of_m(S, N: int, M: int) -> list[list[bool]]:
    """Keeps the N largest of every M consecutive inputs."""
    return [sum((lowest(row[k : k + M], M - N) for k in range(0, len(row), M)), []) for row in S]


def sparsegpt(W, H, p: float | None = None, n_of_m: tuple[int, int] | None = None, block: int = 128):
    """
    W and mask of SparseGPT from its definition: column by column, the weights not yet visited make up for a removed
    one, by the inverse of the Hessian *restricted to them* (no Cholesky factor).

    As documented: 1 % of the mean diagonal is added to H; every row loses floor(p * stop) - floor(p * start) weights
    of the columns start ... stop of a block.
    """
    W, d = W.double().clone(), W.shape[1]
    H = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(d, dtype=torch.float64)
    inverse = [torch.linalg.inv(H[j:, j:]) for j in range(d)]
    removed = torch.zeros(W.shape, dtype=torch.bool)
    if n_of_m is not None:
        block = n_of_m[1]
    for start in range(0, d, block):
        stop = min(start + block, d)
        count = n_of_m[1] - n_of_m[0] if n_of_m is not None else num_removed(p, stop) - num_removed(p, start)
        for i in range(len(W)):
            S = [float(W[i, j] ** 2 / inverse[j][0, 0]) for j in range(start, stop)]
            removed[i, start:stop] = torch.tensor(lowest(S, count))
        for j in range(start, stop):
            for i in range(len(W)):
                if removed[i, j]:
                    W[i, j:] -= W[i, j] / inverse[j][0, 0] * inverse[j][0]
                    W[i, j] = 0.0
    return W, removed
