"""From values and levels to codes, and back."""

import torch

from hf_mlopt.communication.quantizers.draws import Draw
from hf_mlopt.communication.quantizers.memory import Memory, namespace, native


# N blocks   D entries of a block   L levels of a block

_CACHED = 1 << 17  # few enough for a processor's cache, many enough to pay for the calls
_ELSEWHERE = 1 << 26


def elements_at_once(device: torch.device) -> int:
    """How many elements to work on at a time."""
    return _CACHED if device.type == "cpu" else _ELSEWHERE


def safe_divisor(divisor: torch.Tensor) -> torch.Tensor:
    """`divisor` with 1 for 0: what it divides is then 0 as well."""
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def largest_magnitude(rows_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
    """`[blocks, 1]`, float32."""
    return torch.abs(rows_ND, out=memory.like("magnitude", rows_ND)).amax(dim=1, keepdim=True)


def root_mean_square(rows_ND: torch.Tensor) -> torch.Tensor:
    """σ about zero, `[blocks, 1]`: the standard deviation of a gradient whose mean is zero."""
    return torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True) / rows_ND.shape[1] ** 0.5


def at_least_zero(values_ND: torch.Tensor, codes_ND: torch.Tensor) -> None:
    """codes = (values >= 0), as 0 and 1."""
    value, flag = native(values_ND), native(codes_ND.view(torch.bool))
    namespace(value).greater_equal(value, 0, out=flag)


def round_between_levels(values_ND: torch.Tensor, levels_NL: torch.Tensor, draw: Draw, codes_ND: torch.Tensor) -> None:
    """
    Stochastic rounding: v in [b_k, b_k+1] becomes k + 1 with probability (v - b_k) / (b_k+1 - b_k), else k. Values
    outside [b_0, b_s] saturate; a value on a level gets that level.

    Args:
        values_ND (`torch.Tensor`): `[blocks, block]`, float32.
        levels_NL (`torch.Tensor`): `[blocks, levels]`, float32, ascending; one row where all blocks share it.
        draw (`Draw`): Random numbers, one a value.
        codes_ND (`torch.Tensor`): `[blocks, block]`, uint8, written.
    """
    blocks, width = values_ND.shape
    step = max(1, elements_at_once(values_ND.device) // width)
    levels_NL = levels_NL.expand(blocks, -1)
    gaps_NL = levels_NL.diff(dim=1)
    for first in range(0, blocks, step):
        part = slice(first, first + step)
        code_ND, level_NL = codes_ND[part], levels_NL[part]
        above_ND = draw.memory.like("above", code_ND)
        value, code, level = native(values_ND[part]), native(code_ND), native(level_NL)
        above, flag = native(above_ND), native(above_ND.view(torch.bool))  # the same bytes
        greater_equal = namespace(value).greater_equal
        code[:] = 0
        for k in range(1, level.shape[1] - 1):
            greater_equal(value, level[:, k : k + 1], out=flag)
            code += above
        below_ND = draw.memory.like("below", code_ND, torch.int64).copy_(code_ND)
        picked_ND = draw.memory.like("picked", code_ND, torch.float32)
        border = draw.uniform(first * width, tuple(code_ND.shape))
        border *= native(torch.gather(gaps_NL[part], 1, below_ND, out=picked_ND))
        border += native(torch.gather(level_NL, 1, below_ND, out=picked_ND))
        greater_equal(value, border, out=flag)
        code += above


def round_on_grid(position_ND: torch.Tensor, steps: int, draw: Draw, codes_ND: torch.Tensor) -> None:
    """
    Stochastic rounding to the integers 0 … `steps`, that is floor(x + u); positions outside saturate.

    Args:
        position_ND (`torch.Tensor`): `[blocks, block]`, float32, overwritten.
        steps (`int`): Number of steps, one less than levels.
        draw, codes_ND: As for [`round_between_levels`].
    """
    position_ND.clamp_(0, steps)
    position, code = native(position_ND), native(codes_ND)
    position += draw.uniform(0, tuple(position_ND.shape))
    if namespace(position) is torch:
        code.copy_(position)
    else:
        code[:] = position.astype(code.dtype)


def look_up(levels_NL: torch.Tensor, codes_ND: torch.Tensor, values_ND: torch.Tensor, memory: Memory) -> torch.Tensor:
    """Writes the level of each code to `values_ND`; one row of levels may serve all blocks."""
    index_ND = memory.like("index", codes_ND, torch.int64).copy_(codes_ND)
    return torch.gather(levels_NL.expand(len(codes_ND), -1), 1, index_ND, out=values_ND)
