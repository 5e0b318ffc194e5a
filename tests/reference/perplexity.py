"""Perplexity in float64 and plain loops, as the papers define it."""

import math

import torch


def perplexity(model, token_ids: list[int], window: int) -> float:
    r"""\exp(1/N \sum_w \sum_{i=2}^{n} -\log p(x_i | x_1 ... x_{i-1})) over whole windows w of n tokens."""
    nll, count = 0.0, 0
    for start in range(0, len(token_ids) - window + 1, window):
        x = token_ids[start : start + window]
        with torch.no_grad():
            logits = model(torch.tensor([x])).logits[0].double()
        for i in range(1, window):
            z = logits[i - 1].tolist()
            log_norm = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
            nll += log_norm - z[x[i]]
            count += 1
    return math.exp(nll / count)
