r"""
Layer-wise distillation of one Mixtral layer in float64 and plain loops, with AdamW written out. Shares no code with
the library.

x[w][t]: input of the experts for token t of window w. I[w][t]: experts that the teacher's router chose for it.
E_e(x) = W2 (silu(W1 x) * W3 x). Gradients are those of
L = \sum_e 1 / (n_e H) \sum_t ||E_e,teacher(x) - E_e,student(x)||^2, with n_e the tokens of expert e in the step.
"""

import math

import torch


def matrices(experts) -> list[dict[str, torch.Tensor]]:
    """W1, W3, W2 of every expert, out of Mixtral's fused parameters."""
    found = []
    for e in range(experts.num_experts):
        W1, W3 = experts.gate_up_proj[e].detach().double().chunk(2)
        found.append({"W1": W1.clone(), "W3": W3.clone(), "W2": experts.down_proj[e].detach().double().clone()})
    return found


def forward(W: dict, x: torch.Tensor) -> tuple:
    a, b = W["W1"] @ x, W["W3"] @ x
    s = 1 / (1 + torch.exp(-a))
    h = a * s * b
    return a, b, s, h, W["W2"] @ h


def loss_and_gradients(teacher: list[dict], student: list[dict], tokens: list[tuple]) -> tuple[float, list[dict]]:
    """`tokens`: (x, chosen experts) of every token of a step."""
    H = student[0]["W2"].shape[0]
    loss, gradients = 0.0, [{name: torch.zeros_like(W) for name, W in expert.items()} for expert in student]
    for e, (W_t, W_s) in enumerate(zip(teacher, student, strict=True)):
        routed = [x for x, chosen in tokens if e in chosen]
        for x in routed:
            a, b, s, h, y = forward(W_s, x)
            d = y - forward(W_t, x)[-1]
            loss += float((d * d).sum()) / (len(routed) * H)
            dy = 2 * d / (len(routed) * H)
            dh = W_s["W2"].T @ dy
            gradients[e]["W2"] += torch.outer(dy, h)
            gradients[e]["W3"] += torch.outer(dh * a * s, x)
            gradients[e]["W1"] += torch.outer(dh * b * (s + a * s * (1 - s)), x)
    return loss, gradients


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """`step` counts from 1. The rise has a step more than the warm-up, so that it begins above 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step <= warmup:
        return peak * step / (warmup + 1)
    return peak * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup))) / 2


def distill(teacher, student, x, I, batches, peak, warmup_ratio, weight_decay, beta1, beta2, eps):
    """
    Trains `student` in place; zeros stay zero. Returns the loss of every step, before it.

    AdamW: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
    W <- W - lr (weight_decay W + m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps)).
    """
    held = [{name: W == 0 for name, W in expert.items()} for expert in student]
    m = [{name: torch.zeros_like(W) for name, W in expert.items()} for expert in student]
    v = [{name: torch.zeros_like(W) for name, W in expert.items()} for expert in student]
    losses = []
    for k, windows in enumerate(batches, start=1):
        lr = learning_rate(k, len(batches), peak, warmup_ratio)
        tokens = [(x[w][t].double(), I[w][t].tolist()) for w in windows for t in range(len(x[w]))]
        loss, gradients = loss_and_gradients(teacher, student, tokens)
        losses.append(loss)
        for e, expert in enumerate(student):
            for name, W in expert.items():
                g = gradients[e][name]
                g[held[e][name]] = 0
                m[e][name] = beta1 * m[e][name] + (1 - beta1) * g
                v[e][name] = beta2 * v[e][name] + (1 - beta2) * g * g
                update = m[e][name] / (1 - beta1**k) / (torch.sqrt(v[e][name] / (1 - beta2**k)) + eps)
                W -= lr * (weight_decay * W + update)
                W[held[e][name]] = 0
    return losses
