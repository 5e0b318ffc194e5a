"""How many tokens each expert of a layer gets, and a routing that gives it exactly those."""

# T tokens   E experts   K experts per token   S slots = T * K

import torch


def tokens_per_expert(load_E: list[float], tokens: int, top_k: int) -> list[int]:
    """
    How many of `tokens` each expert gets when the slots are shared out in proportion to a load.

    Args:
        load_E (`list[float]`): Load of each expert in any unit, at least `top_k` of them; all equal if balanced.
        tokens (`int`): Tokens of the forward pass, the most one expert can get.
        top_k (`int`): Experts a token is sent to.

    Returns:
        `list[int]`: `[experts]`, summing to `tokens * top_k`.
    """
    load_E = torch.tensor(load_E, dtype=torch.float64)
    load_E += 1e-9 * load_E.sum()  # if the loaded experts are full, the others take what is left
    full_E, share_E = torch.zeros(len(load_E), dtype=torch.bool), torch.zeros_like(load_E)
    while True:
        share_E[~full_E] = load_E[~full_E] * (tokens * top_k - tokens * int(full_E.sum())) / load_E[~full_E].sum()
        if not bool((share_E > tokens).any()):
            break
        full_E |= share_E >= tokens
        share_E[full_E] = tokens
    counts_E = (share_E + 1e-6).floor()
    # Whole tokens first, then one more for the largest remainders.
    missing = tokens * top_k - int(counts_E.sum())
    counts_E[torch.argsort(share_E - counts_E, descending=True, stable=True)[:missing]] += 1
    return counts_E.int().tolist()


def route(counts_E: list[int], top_k: int) -> torch.Tensor:
    """Expert indices `[tokens, top-k]`, int64, that send each expert its count of tokens and no token to one twice."""
    expert_S = torch.repeat_interleave(torch.arange(len(counts_E)), torch.tensor(counts_E))
    # No count exceeds the number of tokens, so the slots of one expert, dealt out in turn, fall to different tokens.
    return expert_S.view(top_k, -1).T.contiguous()
