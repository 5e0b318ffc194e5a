r"""
RSGD and RSGDm: SGD that holds back part of every step as a residual, and evaluates the average that results.

The abstracts of [Exploit Where Optimizer Explores via Residuals](https://huggingface.co/papers/2004.05298) (v1, v2; v3
of that number is another paper) do not give the update rule, and no code confirms one. **This rule is our
reconstruction**, from the authors' later detached error feedback (DEF) on one worker with nothing communicated. It is
constant-weight schedule-free SGD with an inner momentum; no figure of the paper is claimed for it.

```
# w training point   x average ("exploit")   y explored iterate   e residual, in units of the parameters
# η lr   μ momentum   ρ residual   λ detach   m momentum buffer
g_t = ∇f(w_t) + weight_decay · w_t        m_{t+1} = μ m_t + g_t          D_t = e_t + η_t m_{t+1}
x_{t+1} = x_t - (1-ρ) D_t                 e_{t+1} = ρ D_t                w_{t+1} = x_{t+1} - λ e_{t+1}
```

With y = x - e this is y_{t+1} = y_t - η_t m_{t+1} (SGD, its gradients taken at w), x_{t+1} = ρ x_t + (1-ρ) y_{t+1}
(the exponential average of it) and w = (1-λ) x + λ y.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_mlopt.optimizers.two_points import (
    AT_LEAST_0,
    BELOW_1,
    COUNT_FROM_0,
    COUNT_FROM_1,
    UP_TO_1,
    TwoPointOptimizer,
    evaluate_closure,
    real,
    require_choice,
    require_each,
    wide,
    zeros_of,
)


EVALUATION_POINTS = ("x", "y", "w")
SCHEMES = ("detached",)  # a rule that the authors confirm would be another one

# Elements worked on at a time on a CPU: four arrays of them stay in the cache through the whole update, where one
# operation after the other over a large tensor would read each array from memory several times.
_PIECE = 1 << 17


def stability_bound(residual: float, detach: float) -> float:
    """
    Largest stable `lr * curvature` on a quadratic, for momentum 0 (derived; the rule is linear there).

    Args:
        residual (`float`): ρ, in [0, 1).
        detach (`float`): λ, in [0, 1].

    Returns:
        `float`: 2 (1 + ρ) / ((1 - ρ) + 2 ρ λ): 2 for SGD (ρ = 0, or λ = 1), 5.94 for the defaults.
    """
    return 2 * (1 + residual) / ((1 - residual) + 2 * residual * detach)


class RSGD(TwoPointOptimizer):
    r"""
    SGD with residuals; with `momentum` above 0 it is RSGDm. **The update rule is our reconstruction**, see above.

    Exact special cases: `residual=0` is SGD (with momentum); `detach=1` trains like it and evaluates the exponential
    average of its iterates; `detach=0, momentum=0` is heavy ball with lr η(1-ρ) and momentum ρ; ρ_t = t/(t+1) without
    momentum is schedule-free SGD with β = 1-λ; `period=k, reset_period=k` is Lookahead(k, 1-ρ).

    `eval()` moves the parameters to `eval_point`, `train()` back; `step()` wants the latter. Statistics of batch
    normalisation belong to w: run `torch.optim.swa_utils.update_bn` before x is evaluated.

    Args:
        params (iterable): Parameters or groups of them.
        lr (`float` or 0-dim `torch.Tensor`): Learning rate η. On a quadratic of curvature h without momentum it is
            stable below [`stability_bound`] / h.
        momentum (`float`, *optional*, defaults to 0.0): μ, in [0, 1). The buffer is absent at 0.
        residual (`float`, *optional*, defaults to 0.9): ρ, in [0, 1): the fraction of the step that is held back. The
            average reaches back 1/(1-ρ) steps. Ours; to be tuned over 0.5, 0.9, 0.99.
        detach (`float`, *optional*, defaults to 0.3): λ, in [0, 1]: where from x (0) to y (1) the gradient is taken.
        weight_decay (`float`, *optional*, defaults to 0.0): Added to the gradient times w.
        period (`int`, *optional*, defaults to 1): Steps after which the residual is applied, as in DEF. Above 1 a
            further buffer holds what has not been.
        reset_period (`int`, *optional*, defaults to 0): Steps after which the residual is dropped and x survives, as
            in the authors' older code; 0 is never.
        eval_point (`str`, *optional*, defaults to `"x"`): `x`, `y` or `w`.
        scheme (`str`, *optional*, defaults to `"detached"`): The rule above, the only one.
        maximize (`bool`, *optional*, defaults to `False`): Ascend instead.
        foreach (`bool`, *optional*): Whether to update all parameters in one operation. By default on GPUs only.

    Raises:
        ConfigurationError: A `ValueError` that names an option out of its range.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        residual: float = 0.9,
        detach: float = 0.3,
        weight_decay: float = 0.0,
        *,
        period: int = 1,
        reset_period: int = 0,
        eval_point: str = "x",
        scheme: str = "detached",
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        require_each(
            {"lr": (lr, AT_LEAST_0), "momentum": (momentum, BELOW_1), "weight_decay": (weight_decay, AT_LEAST_0)}
        )
        require_residual(residual, detach, period, reset_period, eval_point)
        require_choice("scheme", scheme, SCHEMES)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "residual": residual,
            "detach": detach,
            "weight_decay": weight_decay,
            "period": period,
            "reset_period": reset_period,
            "eval_point": eval_point,
            "scheme": scheme,
            "maximize": maximize,
            "foreach": foreach,
            "view": "train",
            "local_step": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        One update of w.

        Raises:
            RuntimeError: At the evaluation point, or for a sparse gradient.
        """
        self._require_training_point("step()")
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            work = [self._tensors(parameter, group) for parameter in self._trained(group)]
            states = [self.state[parameter] for parameter in self._trained(group)]
            foreach = group["foreach"]
            if foreach or (foreach is None and all(tensors["w"].is_cuda for tensors in work)):
                for kind in _of_one_kind(work, states):
                    _step_together(*kind, group)
            else:
                for tensors, state in zip(work, states, strict=True):
                    _step(tensors, state, group)
            after_step(self.state, group, [parameter for parameter in group["params"] if parameter in self.state])
        return loss

    def _tensors(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the update of one parameter reads and writes, complex numbers as pairs of real ones."""
        state = self.state[parameter]
        if group["momentum"] > 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_of(parameter)
        prepare_residual(state, parameter, group, scale=0.0)
        tensors = {"w": parameter.detach(), "g": parameter.grad}
        tensors |= {name: state[name] for name in ("momentum_buffer", "residual", "pending") if name in state}
        return {name: real(tensor) for name, tensor in tensors.items()}

    def _to_evaluation_point(self, group: dict[str, Any]) -> None:
        shift(self.state, group, sign=1)

    def _to_training_point(self, group: dict[str, Any]) -> None:
        shift(self.state, group, sign=-1)


def _recursion(state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float, float]:
    """
    The residual is kept as e = κ r, so that e ← ρ (e + η m) takes one operation: r ← a r + b m with a or b equal to 1,
    whichever keeps r from growing.

    Returns:
        `tuple[float, float, float]`: a, b and the next κ.
    """
    scale, lr, rho = state.get("residual_scale", 0.0), group["lr"], group["residual"]
    if isinstance(lr, torch.Tensor):  # already in m: as a number it would have to be fetched from its device
        scale = scale or 1.0
        return rho, rho / scale, scale
    if lr >= scale:
        return (scale / lr if lr else 0.0), 1.0, rho * lr
    return 1.0, lr / scale, rho * scale


def _step(tensors: dict[str, torch.Tensor], state: dict[str, Any], group: dict[str, Any]) -> None:
    """The step of one parameter. With period 1, w = y + (1-λ) e becomes two terms of one sum, without a temporary."""
    keep, add, scale = _recursion(state, group)
    rho, held = group["residual"], 1 - group["detach"]
    at_once = "residual" in tensors and group["period"] == 1
    for piece in _pieces(tensors):
        w, lr = piece["w"], group["lr"]
        wide_w = w.to(wide(w.dtype))
        m = piece["g"].to(wide_w.dtype)
        if group["maximize"]:  # a gradient is never written to
            m = -m
        if group["weight_decay"] != 0:
            m = m.add(wide_w, alpha=group["weight_decay"])
        if "momentum_buffer" in piece:
            m = _accumulate(piece["momentum_buffer"], group["momentum"], 1.0, m)
        if isinstance(lr, torch.Tensor):
            m, lr = m * lr, 1.0
        wide_w.add_(m, alpha=-lr * (1 - held * rho) if at_once else -lr)
        if at_once:
            wide_w.add_(piece["residual"], alpha=-held * (1 - rho) * state["residual_scale"])
            _accumulate(piece["residual"], keep, add, m)
        elif "pending" in piece:
            piece["pending"].add_(m, alpha=lr)
        if wide_w is not w:
            w.copy_(wide_w)
    if at_once:
        state["residual_scale"] = scale


def _accumulate(buffer: torch.Tensor, keep: float, add: float, value: torch.Tensor) -> torch.Tensor:
    """buffer ← keep · buffer + add · value, with as few readings of memory as torch has operations for."""
    if add == 1 and type(buffer) is torch.Tensor:
        return torch.add(value, buffer, alpha=keep, out=buffer)
    if keep != 1:
        buffer.mul_(keep)
    return buffer.add_(value, alpha=add)


def _step_together(batch: list[dict[str, torch.Tensor]], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """[`_step`] of several parameters of one kind, in few large operations."""
    keep, add, scale = _recursion(states[0], group)
    w, lr, rho, held = [tensors["w"] for tensors in batch], group["lr"], group["residual"], 1 - group["detach"]
    narrow = w[0].dtype != wide(w[0].dtype)
    wide_w = [tensor.to(wide(tensor.dtype)) for tensor in w] if narrow else w
    m = [tensors["g"].to(target.dtype) for tensors, target in zip(batch, wide_w, strict=True)]
    if group["maximize"]:
        m = torch._foreach_neg(m)
    if group["weight_decay"] != 0:
        m = torch._foreach_add(m, wide_w, alpha=group["weight_decay"])
    if "momentum_buffer" in batch[0]:
        g, m = m, [tensors["momentum_buffer"] for tensors in batch]
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, g)
    if isinstance(lr, torch.Tensor):
        m, lr = torch._foreach_mul(m, lr), 1.0
    e = [tensors["residual"] for tensors in batch if "residual" in tensors]
    at_once = e and group["period"] == 1
    torch._foreach_add_(wide_w, m, alpha=-lr * (1 - held * rho) if at_once else -lr)
    if at_once:
        torch._foreach_add_(wide_w, e, alpha=-held * (1 - rho) * states[0]["residual_scale"])
        if keep != 1:
            torch._foreach_mul_(e, keep)
        torch._foreach_add_(e, m, alpha=add)
        for state in states:
            state["residual_scale"] = scale
    elif e:
        torch._foreach_add_([tensors["pending"] for tensors in batch], m, alpha=lr)
    if narrow:
        torch._foreach_copy_(w, wide_w)


def _of_one_kind(work: list[dict[str, torch.Tensor]], states: list[dict[str, Any]]) -> list[tuple[list, list]]:
    """Tensors and states sorted by device, dtypes, buffers and scale, as one operation on many tensors needs it."""
    kinds: dict[tuple, tuple[list, list]] = {}
    for tensors, state in zip(work, states, strict=True):
        dtypes = tuple((name, tensor.dtype) for name, tensor in tensors.items())
        kind = kinds.setdefault((tensors["w"].device, dtypes, state.get("residual_scale")), ([], []))
        kind[0].append(tensors)
        kind[1].append(state)
    return list(kinds.values())


def _pieces(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """A large tensor on a CPU in pieces that stay in its cache; others whole."""
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors.values())
    if (
        not plain
        or torch.compiler.is_compiling()  # which fuses by itself
        or tensors["w"].device.type != "cpu"
        or tensors["w"].numel() <= _PIECE
        or not all(tensor.is_contiguous() for tensor in tensors.values())
    ):
        yield tensors
        return
    split = [tensor.view(-1).split(_PIECE) for tensor in tensors.values()]
    for pieces in zip(*split, strict=True):
        yield dict(zip(tensors, pieces, strict=True))


def require_residual(residual: float, detach: float, period: int, reset_period: int, eval_point: str) -> None:
    """Checks the options of the residual, which the wrapper shares."""
    require_each(
        {
            "residual": (residual, BELOW_1),
            "detach": (detach, UP_TO_1),
            "period": (period, COUNT_FROM_1),
            "reset_period": (reset_period, COUNT_FROM_0),
        }
    )
    require_choice("eval_point", eval_point, EVALUATION_POINTS)


def prepare_residual(state: dict[str, Any], parameter: torch.Tensor, group: dict[str, Any], scale: float) -> None:
    """Makes the buffers that the options need, when they need them; the residual is `residual * residual_scale`."""
    if (group["residual"] > 0 or group["period"] > 1) and "residual" not in state:
        state["residual"] = zeros_of(parameter)
        state["residual_scale"] = scale
    if group["period"] > 1 and "pending" not in state:
        state["pending"] = zeros_of(parameter)


@torch.no_grad()
def after_step(states: dict, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
    """Applies the residual at the end of a period, and drops it at that of a reset period."""
    period, reset_period = group["period"], group["reset_period"]
    if period == 1 and not reset_period:
        return  # nothing to count
    group["local_step"] += 1
    applied = period > 1 and group["local_step"] % period == 0
    dropped = reset_period and group["local_step"] % reset_period == 0
    for parameter in parameters if applied or dropped else ():
        state, w = states[parameter], parameter.detach()
        if "residual" not in state:
            continue
        if applied:  # e ← ρ (e + S), w ← w + (1-λ) (e_new - e_old), with S the steps of the period
            e = state["residual"] * state["residual_scale"]
            new = (e + state["pending"]).mul_(group["residual"])
            _add(w, (new - e).mul_(1 - group["detach"]))
            state["residual"].copy_(new)
            state["residual_scale"] = 1.0
            state["pending"].zero_()
        if dropped:
            _add(w, _to_x(state, group["detach"]))
            state["residual"].zero_()
            if "pending" in state:
                state["pending"].zero_()


def shift(states: dict, group: dict[str, Any], sign: int) -> None:
    """Moves the parameters of a group from w to its evaluation point (sign 1) or back (-1)."""
    for parameter in group["params"]:
        state = states.get(parameter, {})
        if "residual" not in state or group["eval_point"] == "w":
            continue
        if group["eval_point"] == "x":
            distance = _to_x(state, group["detach"])
        else:  # y = w - (1-λ) e, in the middle of a period as well
            distance = state["residual"] * ((group["detach"] - 1) * state["residual_scale"])
        _add(parameter.detach(), distance.mul_(sign))


def _to_x(state: dict[str, Any], detach: float) -> torch.Tensor:
    """x - w: λ e, and what a running period has not applied."""
    distance = state["residual"] * (detach * state["residual_scale"])
    return distance.add_(state["pending"]) if "pending" in state else distance


def _add(w: torch.Tensor, distance: torch.Tensor) -> None:
    w.copy_(w.to(distance.dtype) + distance)
