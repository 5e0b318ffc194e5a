"""Perplexity by the protocol of Wanda (`lib/eval.py`), which MoE-Pruner and most papers on pruning follow."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_mlopt.errors import InputError


@dataclass(frozen=True)
class PerplexityResult:
    """
    A perplexity and what it was measured on. Comparable only at equal tokenizer, text and window.

    Args:
        perplexity (`float`): exp of `nll`.
        nll (`float`): Mean negative log-likelihood in nats per predicted token.
        tokens (`int`): Predicted tokens: the first of each window has no context and is not predicted.
        windows (`int`): Number of windows.
        window (`int`): Tokens in a window.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: torch.LongTensor,
    window: int,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> PerplexityResult:
    """
    Perplexity over non-overlapping windows, each predicted without what stands before it; the tail is dropped.

    All windows have the same length, so the mean over windows is the mean over tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model. It is put into eval mode for the
            measurement, and back.
        token_ids (`torch.LongTensor`): `[tokens]`, the whole text.
        window (`int`): Tokens in a window, at most the model's context.
        batch_size (`int`, *optional*, defaults to 8): Windows in a forward pass.
        device (`torch.device`, *optional*): Where the inputs go; by default where the model is.

    Raises:
        InputError: If the text is shorter than one window, the window too short to predict a token, or a loss is not
            finite.
    """
    if window < 2:
        raise InputError(f"window={window}: must be at least 2, one token of context and one to predict")
    num_windows = len(token_ids) // window
    if num_windows == 0:
        raise InputError(f"the text has {len(token_ids)} tokens, less than one window of {window}; shorten the window")
    batches = token_ids[: num_windows * window].view(num_windows, window).split(batch_size)
    was_training, total = model.training, 0.0
    model.eval()
    try:
        with tqdm(total=num_windows, desc="perplexity", unit="window", leave=False, disable=None) as progress:
            for batch in batches:
                total += _summed_nll(model, batch.to(device or model.device))
                if not math.isfinite(total):
                    first = progress.n
                    raise InputError(
                        f"the loss is {total} in windows {first} to {first + len(batch) - 1}: "
                        "weights or activations hold NaN or Inf"
                    )
                progress.update(len(batch))
    finally:
        model.train(was_training)
    tokens = num_windows * (window - 1)
    nll = total / tokens
    perplexity = torch.tensor(nll, dtype=torch.float64).exp().item()  # inf, where `math.exp` would raise
    return PerplexityResult(perplexity, nll, tokens, num_windows, window)


def _summed_nll(model: PreTrainedModel, batch: torch.LongTensor) -> float:
    """Sum over the batch of the negative log-likelihood in nats; one window at a time in float32 to spare memory."""
    logits = model(batch, use_cache=False).logits
    return sum(
        F.cross_entropy(scores[:-1].float(), tokens[1:], reduction="sum").item()
        for scores, tokens in zip(logits, batch, strict=True)
    )
