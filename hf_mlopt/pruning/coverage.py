"""
The coverage guard: what to do with experts that calibration sent few or no tokens to.

Without it such experts fail silently: with no tokens all Wanda scores are zero and the first columns by index go, and
SparseGPT removes the whole expert.
"""

# E experts   D input features

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.pruning.config import PruningConfig


def uncovered_experts(tokens_E: torch.Tensor, min_tokens: int) -> list[int]:
    """Experts with fewer than `min_tokens` tokens; with the guard off (0), those with none."""
    return (tokens_E < max(min_tokens, 1)).nonzero().flatten().tolist()


def policy(config: PruningConfig) -> str:
    """The policy in force. Guard off: an expert without any token still has no scores but its magnitudes."""
    return config.on_uncovered if config.min_tokens > 0 else "magnitude"


def needs_all_tokens(config: PruningConfig) -> bool:
    """Whether uncovered experts must be run on all tokens of the layer."""
    return policy(config) in ("blend", "all_tokens")


def refuse_uncovered(name: str, tokens_E: torch.Tensor, uncovered: list[int], numbers, config: PruningConfig) -> None:
    """Raises for the policy `error`, naming the experts by their original `numbers`, and what they saw."""
    if uncovered and policy(config) == "error":
        seen = ", ".join(f"{numbers[expert]}: {int(tokens_E[expert])}" for expert in uncovered)
        raise InputError(
            f"{name}: experts below min_tokens={config.min_tokens} ({seen}); calibrate on more samples or choose "
            "another on_uncovered than 'error'."
        )


def substitute(own: torch.Tensor, tokens: int, layer: torch.Tensor, config: PruningConfig) -> torch.Tensor:
    r"""
    The moments an uncovered expert is pruned by.

    `blend`: Q_e ← (n_e · q_e + κ · q_layer) / (n_e + κ) with κ = min_tokens - n_e, continuous at the threshold. Both
    are divided by their mean over columns first, which keeps the mask invariant to g → c·g.

    Args:
        own (`torch.Tensor`): Sums over the expert's own tokens, `[input]` or, for Hessians, `[input, input]`.
        tokens (`int`): How many tokens those were.
        layer (`torch.Tensor`): Sums over all tokens of the layer, without router weights, shaped as `own`.
        config (`PruningConfig`): Gives policy and threshold.
    """
    chosen = policy(config)
    if chosen == "all_tokens":
        return layer
    if chosen == "blend":
        missing = config.min_tokens - tokens
        return (tokens * _unit_mean(own) + missing * _unit_mean(layer)) / config.min_tokens
    return torch.eye(len(own)).to(own) if own.ndim == 2 else torch.ones_like(own)


def _unit_mean(moments: torch.Tensor) -> torch.Tensor:
    diagonal = moments if moments.ndim == 1 else moments.diagonal()
    mean = diagonal.mean()
    return moments / mean if mean > 0 else torch.zeros_like(moments)
