r"""
DOMO, [Double Momentum SGD for Federated Learning](https://huggingface.co/papers/2102.03970), and its relatives.

Clients take P local steps, then their models are averaged and the server takes a step with a momentum of its own,
which DOMO fuses into the clients' next start. One rule covers all variants (the paper's tables are unknown to us;
names and the default of β are ours):

```
# x server model   m server momentum (gradient units)   y start of a round   S sum of the lrs of a round
# α server lr   μ_s server momentum   β fusion   p_k weight of client k
y_r = x_r - β S m_r                                     # fusion at the start; else y_r = x_r
each client: P steps of SGD(lr, momentum μ_l) from y_r  # fusion at each step: then x -= β η m_r as well
Δ_r = y_r - Σ_k p_k x_{r,P}^k                           # fusion at each step: less β S m_r
m_{r+1} = μ_s m_r + Δ_r / S                            # server_unit="param": + Δ_r, and α, β without S
x_{r+1} = x_r - α S m_{r+1}
```

S in place of ηP follows a schedule inside the round. The S of the coming round is unknown when it begins: its start
takes that of the last one. With β = α μ_s the starts y_r are those of DiLoCo's outer Nesterov step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.optimizers.domo_variants import VARIANTS
from hf_mlopt.optimizers.over_base import OptimizerOverBase, merge_base_args
from hf_mlopt.optimizers.two_points import (
    ABOVE_0,
    AT_LEAST_0,
    BELOW_1,
    add_scaled,
    evaluate_closure,
    real,
    require,
    require_choice,
    require_each,
    wide,
    zeros_of,
)


class DOMO(OptimizerOverBase):
    """
    Local steps by `step()`, the end of a round by `sync()`. An option left at `None` is what the variant says.

    `eval()` puts the server model on the parameters, `train()` the local iterate back, exactly. In one process without
    other clients `sync()` needs no `average`; the method is then a lookahead with momentum.

    Args:
        params (iterable): Parameters or groups of them.
        lr (`float` or 0-dim `torch.Tensor`): Local learning rate η.
        variant (`str`, *optional*, defaults to `"domo"`): A name in [`VARIANTS`].
        momentum (`float`, *optional*): μ_l in [0, 1), for a base of SGD.
        server_momentum (`float`, *optional*): μ_s in [0, 1).
        server_lr (`float`, *optional*): α, above 0.
        fusion (`float`, *optional*): β, at least 0. At α μ_s, the default of DOMO, stable learning rates are smaller
            than at 0.3 to 0.6.
        local_state (`str`, *optional*): `reset`, `average` or `keep`: the state of `base` when a round begins.
        server_unit (`str`, *optional*): `grad` or `param`: the unit of the server momentum, which matters when the
            learning rate falls: a momentum in parameter units keeps its size.
        eval_point (`str`, *optional*): `x`, the server model, or `y`, the start of the round.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the local steps.
        base (`str` or `type`, *optional*): A `torch.optim.Optimizer`, or the name of one in `torch.optim`.
        base_args (`dict`, *optional*): Further keywords of it.

    Raises:
        ConfigurationError: A `ValueError` that names an option out of its range.
    """

    def __init__(
        self,
        params,
        lr: float | torch.Tensor,
        variant: str = "domo",
        momentum: float | None = None,
        server_momentum: float | None = None,
        server_lr: float | None = None,
        fusion: float | None = None,
        local_state: str | None = None,
        server_unit: str | None = None,
        eval_point: str | None = None,
        weight_decay: float = 0.0,
        base: str | type[torch.optim.Optimizer] | None = None,
        base_args: dict[str, Any] | None = None,
    ):
        require_choice("variant", variant, VARIANTS)
        settings = VARIANTS[variant]
        base = settings.base if base is None else base
        shared = {"lr": lr, "weight_decay": weight_decay}
        if base in ("SGD", torch.optim.SGD):
            shared["momentum"] = settings.momentum if momentum is None else momentum
            require_each({"momentum": (shared["momentum"], BELOW_1)})
        elif momentum is not None:
            raise ConfigurationError("momentum", momentum, f"is of SGD; what {base} takes goes into base_args")
        elif (settings.local_state if local_state is None else local_state) == "average":
            raise ConfigurationError("local_state", "average", f"is for a base of SGD; {base} takes keep or reset")
        base_args = merge_base_args(base_args, shared)
        own = {
            "server_momentum": settings.server_momentum if server_momentum is None else server_momentum,
            "server_lr": settings.server_lr if server_lr is None else server_lr,
            "fusion": settings.fusion if fusion is None else fusion,
            "local_state": settings.local_state if local_state is None else local_state,
            "server_unit": settings.server_unit if server_unit is None else server_unit,
            "eval_point": settings.eval_point if eval_point is None else eval_point,
        }
        require_each({"server_momentum": (own["server_momentum"], BELOW_1), "server_lr": (own["server_lr"], ABOVE_0)})
        if own["fusion"] is None:
            own["fusion"] = own["server_lr"] * own["server_momentum"]
        require_each({"fusion": (own["fusion"], AT_LEAST_0)})
        require_choice("local_state", own["local_state"], ("reset", "average", "keep"))
        require_choice("server_unit", own["server_unit"], ("grad", "param"))
        require_choice("eval_point", own["eval_point"], ("x", "y"))
        if settings.fusion_at == "step":
            allowed = f"must be grad for {variant}, whose local steps take the server momentum as a gradient"
            require("server_unit", own["server_unit"], allowed, own["server_unit"] == "grad")
        progress = {"lr_sum": 0.0, "last_lr_sum": 0.0, "local_step": 0, "round": 0}
        super().__init__(
            params, {**own, "variant": variant, "fusion_at": settings.fusion_at, **progress}, base, base_args
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        One local step.

        Raises:
            RuntimeError: At the evaluation point, or for a sparse gradient.
        """
        self._require_training_point("step()")
        loss = evaluate_closure(closure)
        self._begin()
        for group in self.param_groups:
            self._trained(group)  # refuses sparse gradients
        self.step_base()
        for group in self.param_groups:
            group["lr_sum"] = group["lr_sum"] + group["lr"]
            group["local_step"] += 1
            if group["fusion_at"] == "step":
                add_scaled(group["params"], self._server_momenta(group), group["lr"], -group["fusion"])
        return loss

    @torch.no_grad()
    def sync(
        self,
        average: Callable[[torch.Tensor], torch.Tensor] | None = None,
        buffers: Sequence[torch.Tensor] = (),
    ) -> None:
        """
        Ends a round: averages what the clients did, takes the server step, begins the next round.

        Args:
            average (`Callable`, *optional*): Given a flat float vector of this client, returns the (weighted) mean of
                those of all clients; every client calls it once, with a vector of the same length. None: one client.
            buffers (`Sequence[torch.Tensor]`, *optional*): Further float tensors to average, in place and by the same
                call, such as the running statistics of batch normalisation.

        Raises:
            RuntimeError: At the evaluation point, or if the mean is not finite; the parameters are then as they were.
        """
        self._require_training_point("sync()")
        self._begin()
        entries = [self._lr_sums(), *self._changes(), *self._local_momenta(), *buffers]
        flat = torch.cat([real(entry).reshape(-1).to(self._flat_dtype()) for entry in entries])
        mean = flat if average is None else average(flat)
        if not mean.isfinite().all():
            raise RuntimeError(
                f"round {self.param_groups[0]['round']}: the mean of the local models is not finite; lower the "
                "learning rate or the fusion, or clip gradients"
            )
        means = iter(_taken_apart(mean, entries))
        lr_sums = next(means).tolist()
        for group, lr_sum in zip(self.param_groups, lr_sums, strict=True):
            for parameter in group["params"]:
                self._server_step(parameter, next(means), lr_sum, group)
            group["last_lr_sum"] = lr_sum or group["last_lr_sum"]
            group.update(lr_sum=0.0, local_step=0, round=group["round"] + 1)
            for parameter in group["params"]:
                parameter.copy_(self._start(parameter, group))
        self._begin_local_states(means)
        for buffer in buffers:
            buffer.copy_(next(means))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ConfigurationError: If it is that of another variant.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if saved.get("variant", group["variant"]) != group["variant"]:
                allowed = (
                    f"the state to go on from is that of {saved['variant']!r}; take that variant, or begin afresh"
                )
                raise ConfigurationError("variant", group["variant"], allowed)
        super().load_state_dict(state_dict)

    def _begin(self) -> None:
        """Makes the server's state, on every client alike, also for what this one has no gradient for."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "server_param" not in state:
                    state["server_param"] = parameter.detach().to(wide(parameter.dtype), copy=True)
                    state["server_momentum_buffer"] = zeros_of(parameter)

    def _server_momenta(self, group: dict[str, Any]) -> list[torch.Tensor]:
        return [self.state[parameter]["server_momentum_buffer"] for parameter in group["params"]]

    def _flat_dtype(self) -> torch.dtype:
        wide_ones = (torch.float64, torch.complex128)
        is_wide = any(parameter.dtype in wide_ones for group in self.param_groups for parameter in group["params"])
        return torch.float64 if is_wide else torch.float32

    def _lr_sums(self) -> torch.Tensor:
        device = self.param_groups[0]["params"][0].device
        return torch.tensor(
            [float(group["lr_sum"]) for group in self.param_groups], dtype=torch.float64, device=device
        )

    def _changes(self) -> Iterator[torch.Tensor]:
        """Δ of this client, what its own gradients have done to each parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                change = self._start(parameter, group) - parameter
                if group["fusion_at"] == "step":
                    m = self.state[parameter]["server_momentum_buffer"]
                    change.sub_(m, alpha=group["fusion"] * float(group["lr_sum"]))
                yield change

    def _start(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """y of the running round, recomputed instead of kept; always with the same bits."""
        state = self.state[parameter]
        if group["fusion_at"] == "step" or group["fusion"] == 0:
            return state["server_param"].clone()
        scale = group["last_lr_sum"] if group["server_unit"] == "grad" else 1.0
        return state["server_param"] - state["server_momentum_buffer"] * (group["fusion"] * scale)

    def _server_step(
        self, parameter: torch.Tensor, change: torch.Tensor, lr_sum: float, group: dict[str, Any]
    ) -> None:
        if lr_sum == 0:
            return  # no step was taken, or each with a learning rate of 0
        state, scale = self.state[parameter], lr_sum if group["server_unit"] == "grad" else 1.0
        m = state["server_momentum_buffer"]
        m.mul_(group["server_momentum"]).add_(change, alpha=1 / scale)
        state["server_param"].sub_(m, alpha=group["server_lr"] * scale)

    def _local_momenta(self) -> Iterator[torch.Tensor]:
        """The local momenta that are averaged; zero where this client has none yet."""
        for parameter in self._with_averaged_momentum():
            own = self.base.state.get(parameter, {}).get("momentum_buffer")
            yield torch.zeros_like(parameter) if own is None else own

    def _with_averaged_momentum(self) -> list[torch.nn.Parameter]:
        groups = (group for group in self.param_groups if group["local_state"] == "average" and group["momentum"] > 0)
        return [parameter for group in groups for parameter in group["params"]]

    def _begin_local_states(self, means: Iterator[torch.Tensor]) -> None:
        for parameter in self._with_averaged_momentum():
            state, mean = self.base.state[parameter], next(means)
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.empty_like(parameter)
            state["momentum_buffer"].copy_(mean)
            self.state[parameter]["base"] = state
        for group in self.param_groups:
            for parameter in group["params"] if group["local_state"] == "reset" else ():
                if parameter in self.base.state:
                    self.base.state[parameter].clear()

    def _to_evaluation_point(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            state = self.state.get(parameter, {})
            if "server_param" not in state:
                continue  # nothing has been trained
            if group["local_step"] > 0:  # at the start of a round the local iterate is recomputed
                state["local_param"] = parameter.detach().clone()
            if group["eval_point"] == "x":
                parameter.copy_(state["server_param"])
            elif group["local_step"] > 0:
                parameter.copy_(self._start(parameter, group))

    def _to_training_point(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            state = self.state.get(parameter, {})
            if "local_param" in state:
                parameter.copy_(state.pop("local_param"))
            elif "server_param" in state:
                parameter.copy_(self._start(parameter, group))


def _taken_apart(flat: torch.Tensor, entries: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of the flat mean in the shapes, and the kind of numbers, of what went into it."""
    shapes = [real(entry).shape for entry in entries]
    parts = flat.split([shape.numel() for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [
        torch.view_as_complex(part.clone()) if entry.is_complex() else part
        for part, entry in zip(parts, entries, strict=True)
    ]
