"""How many experts stay when a fraction is removed, and when that cannot be. Arithmetic alone, without torch."""

import math

from hf_mlopt.errors import ConfigurationError


def num_kept(num_experts: int, drop: float) -> int:
    """R = E - floor(drop · E), with drop as the decimal number the user wrote (0.29 of 100 removes 29)."""
    return num_experts - int(drop * num_experts + 1e-9)


def refuse_drop(
    drop: float, num_experts: int, top_k: int, num_groups: int | None = None, topk_groups: int | None = None
) -> int:
    """
    Checks that a router can do with what is left.

    Args:
        drop (`float`): Fraction of the experts of a layer to remove, in [0, 1).
        num_experts (`int`): Routed experts of a layer.
        top_k (`int`): Experts a token is sent to.
        num_groups (`int`, *optional*): `n_group` of a configuration whose router first picks groups of consecutive
            experts (DeepSeek).
        topk_groups (`int`, *optional*): `topk_group`, the groups that a token's experts are taken from.

    Returns:
        `int`: Experts that stay in each layer.

    Raises:
        ConfigurationError: If nothing would be removed, or the router could not pick its experts from the rest.
    """
    kept, groups = num_kept(num_experts, drop), num_groups or 1
    topk_groups = topk_groups or groups
    # Such a router scores a group by the sum of its two best experts, even if there is only one group.
    each = max(2 if num_groups else 1, math.ceil(top_k / topk_groups))
    most = num_experts - groups * each
    keeps = f"keeps {kept} of {num_experts} experts"
    if kept == num_experts:
        remedy = f"drop at least {_fraction(groups, num_experts)}" if most >= groups else "this model can lose none"
        raise ConfigurationError("drop_experts", drop, f"{keeps}, so none goes; {remedy}")
    if kept < groups * each:
        needs = f"the router needs {groups * each} to send a token to {top_k}"
        if groups > 1:
            needs += f" in {topk_groups} of {groups} groups"
        remedy = f"drop at most {_fraction(most, num_experts)}" if most >= groups else "this model can lose none"
        raise ConfigurationError("drop_experts", drop, f"{keeps}, but {needs}; {remedy}")
    if kept % groups:
        raise ConfigurationError(
            "drop_experts",
            drop,
            f"{keeps}, which its {groups} groups cannot share evenly; drop a multiple of "
            f"{_fraction(groups, num_experts)}",
        )
    return kept


def _fraction(count: int, num_experts: int) -> str:
    """A decimal number that removes `count` experts, rounded up where it has no end."""
    return f"{math.ceil(count / num_experts * 1e6 - 1e-6) / 1e6:g}"
