"""Perplexity by the protocol of Wanda (`lib/eval.py`), which MoE-Pruner and most papers on pruning follow."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_mlopt import ranks
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
        stderr (`float`, *optional*): Standard error of `perplexity` from the spread between windows, to first order;
            None for a single window.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    stderr: float | None = None


def check_windows(num_tokens: int, window: int) -> None:
    """Raises `InputError` if a text has no window of this length to predict a token in."""
    if window < 2:
        raise InputError(f"window={window}: must be at least 2, one token of context and one to predict")
    if num_tokens < window:
        raise InputError(f"the text has {num_tokens} tokens, less than one window of {window}; shorten the window")


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    token_ids: torch.LongTensor,
    window: int,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    distributed: bool = False,
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
        distributed (`bool`, *optional*, defaults to `False`): Whether the processes of the default group, each of
            which holds the whole model, share the windows. All of them must call this, and get the same result.

    Raises:
        InputError: If the text is shorter than one window, the window too short to predict a token, or a loss is not
            finite.
    """
    check_windows(len(token_ids), window)
    num_windows = len(token_ids) // window
    share = token_ids[: num_windows * window].view(num_windows, window)
    if distributed:
        share = share[ranks.rank() :: ranks.world_size()]
    was_training, nlls = model.training, []
    model.eval()
    try:
        with tqdm(total=len(share), desc="perplexity", unit="window", leave=False, disable=None) as progress:
            for batch in share.split(batch_size) if len(share) else ():
                nlls += _summed_nlls(model, batch.to(device or model.device))
                progress.update(len(batch))
                if not all(map(math.isfinite, nlls[-len(batch) :])):
                    break  # the other processes wait for this one
    finally:
        model.train(was_training)
    return _result(ranks.interleaved(nlls) if distributed else nlls, num_windows, window)


def _summed_nlls(model: PreTrainedModel, batch: torch.LongTensor) -> list[float]:
    """Negative log-likelihood of each window in nats; one window at a time in float32 to spare memory."""
    logits = model(batch, use_cache=False).logits
    return [
        F.cross_entropy(scores[:-1].float(), tokens[1:], reduction="sum").item()
        for scores, tokens in zip(logits, batch, strict=True)
    ]


def _result(nlls: list[float], num_windows: int, window: int) -> PerplexityResult:
    for index, value in enumerate(nlls):
        if not math.isfinite(value):
            raise InputError(f"the loss is {value} in window {index}: weights or activations hold NaN or Inf")
    tokens = num_windows * (window - 1)
    nll = math.fsum(nlls) / tokens
    perplexity = torch.tensor(nll, dtype=torch.float64).exp().item()  # inf, where `math.exp` would raise
    stderr = None
    if num_windows > 1:
        means = torch.tensor(nlls, dtype=torch.float64) / (window - 1)
        stderr = perplexity * (means.std() / num_windows**0.5).item()  # d exp(x) = exp(x) dx
    return PerplexityResult(perplexity, nll, tokens, num_windows, window, stderr)
