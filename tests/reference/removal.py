"""
The score of REAP in float64 and plain loops, from the raw parameters of experts. Shares no code with the library.

S_e = 1/|X_e| sum over the tokens x in X_e, those sent to expert e, of g_e(x) * ||f_e(x)||_2.
"""

import math

import torch

from tests.reference.pruning import expert_intermediate, routed_tokens


def expert_output(experts, e: int, x: torch.Tensor) -> torch.Tensor:
    """f_e(x) of one token, without the router weight."""
    h, down = expert_intermediate(experts, e, x), experts.down_proj[e].double()
    y = h @ down if experts.is_transposed else down @ h
    return y + experts.down_proj_bias[e].double() if experts.has_bias else y


def norm(y) -> float:
    return math.sqrt(sum(value**2 for value in y.tolist()))


def reap_scores(experts, X, top_k_index, top_k_weights, num_experts: int, padding=()) -> list[float]:
    """S_e of every expert; 0 where X_e is empty. Tokens in `padding` belong to no X_e."""
    scores = []
    for e in range(num_experts):
        pairs = [(t, g) for t, g in routed_tokens(top_k_index, top_k_weights, e) if t not in padding]
        total = sum(g * norm(expert_output(experts, e, X[t])) for t, g in pairs)
        scores.append(total / len(pairs) if pairs else 0.0)
    return scores


def kept(scores, num_kept: int, num_groups: int = 1) -> list[int]:
    """The best of every group of consecutive experts; among equal scores the lower index goes first."""
    size, chosen = len(scores) // num_groups, []
    for g in range(num_groups):
        group = list(range(g * size, (g + 1) * size))
        while len(group) > num_kept // num_groups:
            worst = group[0]
            for e in group:
                if scores[e] < scores[worst]:
                    worst = e
            group.remove(worst)
        chosen += group
    return chosen
