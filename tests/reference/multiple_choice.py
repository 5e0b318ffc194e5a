"""Multiple choice by the log-likelihood of a continuation, summed token by token in float64."""

import math

import torch


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """log P(continuation | context) in nats; the space between the two belongs to the continuation."""
    whole = tokenizer(context + " " + continuation).input_ids
    given = tokenizer(context).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().tolist()
    total = 0.0
    for place in range(len(given), len(whole)):
        scores = logits[place - 1]
        largest = max(scores)
        total += scores[whole[place]] - largest - math.log(sum(math.exp(score - largest) for score in scores))
    return total


def accuracies(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """`acc` and, where the choices are continuations of one query, `acc_norm` (per character)."""
    right = right_norm = 0
    for row in rows:
        if "query" in row:
            scores = [log_likelihood(model, tokenizer, row["query"], choice) for choice in row["choices"]]
            normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        else:
            contexts = row["context_options"]
            scores = normed = [log_likelihood(model, tokenizer, one, row["continuation"]) for one in contexts]
        right += scores.index(max(scores)) == row["gold"]
        right_norm += normed.index(max(normed)) == row["gold"]
    return right / len(rows), right_norm / len(rows)
