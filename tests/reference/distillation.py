"""
Expert-wise distillation of a Mixtral in float64 and plain loops, in the notation of MoE-Pruner, Eq. (10). Shares no
code with the library.

x[t]: input of the experts for token t. I[t]: experts that the teacher's router chose for it. E_e(x): output of expert
e, without the router's weight. z[t]: logits. y[b][s]: labels, -100 where nothing is predicted.
"""

import math

import torch


def expert_output(experts, e: int, x: torch.Tensor) -> torch.Tensor:
    """E_e(x) = W2 (silu(W1 x) * W3 x) of one token. Autograd runs through it."""
    W1, W3 = experts.gate_up_proj[e].double().chunk(2)
    a, b = W1 @ x.double(), W3 @ x.double()
    return experts.down_proj[e].double() @ (a / (1 + torch.exp(-a)) * b)


def squared_errors(student, teacher, x_s, x_t, index, mask, num_experts: int) -> tuple[list, list]:
    r"""\sum_t \sum_h (E_teacher(x) - E_student(x))^2 and the tokens t, of each expert of one layer."""
    sums, tokens = [0.0] * num_experts, [0] * num_experts
    for t, chosen in enumerate(index.tolist()):
        for e in chosen:
            if mask[t]:
                difference = expert_output(teacher, e, x_t[t]) - expert_output(student, e, x_s[t])
                sums[e] = sums[e] + sum(value**2 for value in difference)
                tokens[e] += 1
    return sums, tokens


def mean_squared_errors(sums, tokens, hidden_size: int) -> list:
    """MSE of each expert; an expert without tokens has none."""
    return [total / (n * hidden_size) if n else 0.0 for total, n in zip(sums, tokens, strict=True)]


def log_softmax(z) -> list[float]:
    top = max(z)
    log_sum = top + math.log(sum(math.exp(value - top) for value in z))
    return [value - log_sum for value in z]


def predictions(logits, labels):
    """(z, y) of every token that is predicted: position s of a row predicts s + 1."""
    for z_row, y_row in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for s in range(len(y_row) - 1):
            if y_row[s + 1] != -100:
                yield z_row[s], y_row[s + 1]


def cross_entropy(logits, labels) -> tuple[float, int]:
    """Sum over the predicted tokens, and how many they are."""
    terms = [-log_softmax(z)[y] for z, y in predictions(logits, labels)]
    return sum(terms), len(terms)


def forward_kl(student, teacher, labels, T: float) -> float:
    r"""T^2 \sum_t \sum_v p_v (log p_v - log q_v), p of the teacher, q of the student, both at temperature T."""
    total = 0.0
    for (z_s, _), (z_t, _) in zip(predictions(student, labels), predictions(teacher, labels), strict=True):
        q, p = log_softmax([value / T for value in z_s]), log_softmax([value / T for value in z_t])
        total += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    return T**2 * total


def load_balance(router_logits, mask, top_k: int) -> float:
    r"""E \sum_e f_e P_e of the Switch Transformer: f_e, share of the tokens sent to e; P_e, mean probability of e."""
    rows = [z for layer in router_logits for z, kept in zip(layer.double().tolist(), mask, strict=True) if kept]
    num_experts = len(rows[0])
    f, P = [0.0] * num_experts, [0.0] * num_experts
    for z in rows:
        p = [math.exp(value) for value in log_softmax(z)]
        for e in sorted(range(num_experts), key=lambda e: -p[e])[:top_k]:
            f[e] += 1 / len(rows)
        for e in range(num_experts):
            P[e] += p[e] / len(rows)
    return num_experts * sum(a * b for a, b in zip(f, P, strict=True))


def step(batches, student, teacher, hidden_size: int, top_k: int, T: float) -> dict:
    r"""
    The terms of L = L_CE + lmbda \sum_l \sum_e MSE + w L_KL + c L_aux of one optimizer step.

    `batches`: what was seen of each micro-batch: labels, mask, and of `student` and `teacher` logits, and per layer x,
    I and router logits. `student`, `teacher`: the experts of each layer.
    """
    ce = [cross_entropy(batch["student"]["logits"], batch["labels"]) for batch in batches]
    N = sum(count for _, count in ce)
    kl = [forward_kl(batch["student"]["logits"], batch["teacher"]["logits"], batch["labels"], T) for batch in batches]
    aux = [load_balance(batch["student"]["router_logits"], batch["mask"], top_k) for batch in batches]
    mse, tokens = [], []
    for l in range(len(student)):
        E = student[l].num_experts
        sums, counts = [0.0] * E, [0] * E
        for batch in batches:
            x_s, x_t, index = batch["student"]["x"][l], batch["teacher"]["x"][l], batch["teacher"]["index"][l]
            more, count = squared_errors(student[l], teacher[l], x_s, x_t, index, batch["mask"], E)
            sums = [a + b for a, b in zip(sums, more, strict=True)]
            counts = [a + b for a, b in zip(counts, count, strict=True)]
        mse.append(sum(mean_squared_errors(sums, counts, hidden_size)))
        tokens.append(counts)
    total = sum(value for value, _ in ce)
    return {"ce": total / N, "mse": mse, "tokens": tokens, "kl": sum(kl) / N, "aux": sum(aux) / len(aux)}
