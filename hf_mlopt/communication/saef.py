r"""
Step-ahead error feedback in the space of updates, as its authors train with it: [Step-Ahead Error Feedback for
Distributed Training with Compressed Gradient](https://huggingface.co/papers/2008.05823). The hook of [`compress`]
codes gradients and overlaps with the backward pass; this optimizer codes updates and is the method itself.

```
# of rank k: y weights of its gradient   m momentum   e what it has not sent   c what it sends
# of all: x weights   s what the server has not sent   η lr   μ momentum   λ weight decay   C codec   n ranks
step t = 0, 1, …:   if (t+1) % reset_period == 0:  e ← 0
                    if (t+1) % average_period == 0:  e ← (1/n) Σ e        in full precision, before the shift
                    y ← x - e
                    m ← μ m + ∇F(y) + λ y        Δ ← e + η m        c ← C(Δ)        e ← Δ - c
                    a ← (1/n) Σ c        with codec_down: a ← a + s,  d ← C(a),  s ← a - d;  else d ← a
                    x ← x - d
```

The first three lines of step t + 1 run at the end of `step()`, so that the weights stand at y when it returns.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.utils import logging

from hf_mlopt.communication.config import require_contractive
from hf_mlopt.communication.hook import Traffic
from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.communication.saef_exchange import COLLECTIVES, UpdateExchange, found_codec
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.optimizers.two_points import (
    AT_LEAST_0,
    BELOW_1,
    COUNT_FROM_0,
    TwoPointOptimizer,
    evaluate_closure,
    require_choice,
    require_each,
    zeros_of,
)


logger = logging.get_logger(__name__)

MODES = ("step-ahead", "classic", "none")


class _Moved(NamedTuple):
    """A parameter that some rank has a gradient of, with its state and options."""

    parameter: torch.nn.Parameter
    state: dict[str, torch.Tensor]
    group: dict[str, Any]


class SAEFOptimizer(TwoPointOptimizer):
    r"""
    SGD with momentum whose updates travel coded, with step-ahead error feedback in units of an update.

    ```python
    optimizer = SAEFOptimizer(model.parameters(), lr=0.1, momentum=0.9, codec="sign", codec_down="sign")
    loss(model(batch)).backward()  # of this rank's batch: a plain model, or all backward passes in DDP's no_sync()
    optimizer.step()  # exchanges; the weights are this rank's y afterwards
    ```

    All ranks begin with the same weights, which the first step checks. `eval()` moves the weights to x, the same bits
    on all ranks, for evaluation and saving; `train()` back. Momentum and residual are those of this rank, and so is
    `state_dict()`: save it on every rank. Clip this rank's gradients before `step()`. A gradient that is not finite on
    some rank makes the step none on all. In one process it codes without sending.

    Args:
        params (iterable): Parameters or groups of them, in the same order on all ranks; float32 or float64, as the
            shift would be lost in 16 bits (train those under autocast).
        lr (`float` or 0-dim `torch.Tensor`): η.
        momentum (`float`, *optional*, defaults to 0.0): μ, in [0, 1).
        weight_decay (`float`, *optional*, defaults to 0.0): λ, at y.
        codec (`str` or `Codec`, *optional*, defaults to `"sign"`): C. By name, `sign` has one scale for all parameters
            as in the paper; other names, and a `Codec`, cut all parameters in a row into their own blocks. Top-k takes
            its share of each parameter by itself, as in the paper.
        codec_down (`str` or `Codec`, *optional*): C of the way back (back-compression); by default none. The authors
            code both ways.
        average_period (`int`, *optional*, defaults to 0): Steps between two averages of e; 0 is never. The authors
            take 20 with top-k on ImageNet and 0 with sign on CIFAR.
        reset_period (`int`, *optional*, defaults to 0): Steps after which e is dropped; 0 is never.
        error_feedback (`str`, *optional*, defaults to `"step-ahead"`): `classic` takes the gradient at x; `none`
            forgets e and s.
        group (`ProcessGroup`, *optional*): The ranks; by default all.
        per_tensor (`bool`, *optional*): Whether each parameter is coded by itself; by default with top-k.
        collective (`str`, *optional*, defaults to `"all-gather"`): A rank's message of w bytes goes to all others, so
            that C sees all parameters at once on both ways, as in the paper. It sends (n-1) w bytes, `two-phase` about
            2 w, less from 4 ranks on; what shares a scale, or a share of top-k, is then one of n shards.
        seed (`int`, *optional*, defaults to 0): Of stochastic rounding.

    Raises:
        ConfigurationError: For an unknown codec, an option out of its range, a parameter that is too narrow, or error
            feedback around a codec whose error may be larger than the update.
    """

    _step_supports_amp_scaling = True  # a GradScaler would skip the step on one rank alone, and the others would wait

    def __init__(
        self,
        params,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        codec: str | Codec = "sign",
        codec_down: str | Codec | None = None,
        average_period: int = 0,
        reset_period: int = 0,
        error_feedback: str = "step-ahead",
        group=None,
        *,
        per_tensor: bool | None = None,
        collective: str = "all-gather",
        seed: int = 0,
    ):
        periods = {"average_period": average_period, "reset_period": reset_period}
        require_each({"lr": (lr, AT_LEAST_0), "momentum": (momentum, BELOW_1)})
        require_each({"weight_decay": (weight_decay, AT_LEAST_0)})
        require_each({name: (value, COUNT_FROM_0) for name, value in periods.items()})
        require_choice("error_feedback", error_feedback, MODES)
        require_choice("collective", collective, COLLECTIVES)
        up, down = found_codec("codec", codec), found_codec("codec_down", codec_down)
        if error_feedback == "none":
            for name, value in periods.items():
                if value:
                    raise ConfigurationError(name, value, "needs error_feedback; without it nothing is kept")
        else:
            for name, used in (("codec", up), ("codec_down", down)):
                if used is not None:
                    require_contractive(name, used)
        self.error_feedback = error_feedback
        self.exchange = UpdateExchange(up, down, group, per_tensor, collective, seed)
        self.traffic = Traffic()
        self._is_compared = False
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**own, **periods, "view": "train", "local_step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        One step of all ranks, which all call it.

        Raises:
            RuntimeError: At the evaluation point, for a sparse gradient, or if another rank does not answer.
            InputError: In the first step, if the ranks have other options or weights than one another.
        """
        self._require_training_point("step()")
        loss = evaluate_closure(closure)
        self._compare_over_ranks()
        start = time.perf_counter()
        moved = self._agree()
        if moved:
            self._move(moved)
        if moved is not None:
            for group in self.param_groups:
                group["local_step"] += 1
            self._prepare_next()
        self.traffic.steps += 1
        self.traffic.seconds += time.perf_counter() - start
        return loss

    def take_traffic(self) -> Traffic:
        """What travelled since the last call."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic

    def _agree(self) -> list[_Moved] | None:
        """Parameters that some rank has a gradient of, the same on all; None if some gradient is not finite."""
        everyone = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for group in self.param_groups for parameter in self._trained(group)]
        is_finite = all([bool(gradient.isfinite().all()) for gradient in gradients])
        votes = [parameter.grad is not None for parameter, _ in everyone] + [not is_finite]
        votes = torch.tensor(votes, dtype=torch.uint8, device=everyone[0][0].device)
        *is_moved, is_broken = self.exchange.any_of(votes)
        if is_broken:
            logger.warning_once("gradients were not finite: all ranks skip such steps, and keep what was not sent.")
            return None
        return [
            _Moved(parameter, self.state[parameter], group)
            for (parameter, group), one in zip(everyone, is_moved, strict=True)
            if one
        ]

    def _move(self, moved: list[_Moved]) -> None:
        """From the gradient to the new x and e."""
        keeps, serves = self.error_feedback != "none", self.exchange.codec_down is not None
        delta = torch.cat([self._delta(*one).flatten() for one in moved])
        server = _joined(moved, "server_residual") if keeps and serves else None
        sizes = tuple(parameter.numel() for parameter, *_ in moved)
        reply = self.exchange.mean(delta, sizes, server, self.param_groups[0]["local_step"])
        if server is not None:
            _write(server, [state["server_residual"] for _, state, _ in moved])
        targets = [state.get("x", parameter.detach()) for parameter, state, _ in moved]
        for target, part in zip(targets, reply.update.split(sizes), strict=True):
            target.sub_(part.view(target.shape))
        self.traffic.norm += float(delta.square().sum())
        unsent = delta.sub_(reply.sent)
        self.traffic.error += float(unsent.square().sum())
        if keeps:
            _write(unsent, [state["residual"] for _, state, _ in moved])
        self.traffic.bytes_sent += reply.bytes_sent
        self.traffic.elements += delta.numel()
        self.traffic.coded += delta.numel()

    def _delta(self, parameter: torch.nn.Parameter, state: dict, group: dict[str, Any]) -> torch.Tensor:
        """Δ of a parameter, float32; its momentum is the new one afterwards."""
        m = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(self, "grad_scale", None) is not None:  # of a GradScaler, which leaves it to this step
            m = m / self.grad_scale
        if group["weight_decay"] != 0:
            m = m.add(parameter, alpha=group["weight_decay"])
        if group["momentum"] > 0:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = zeros_of(parameter)
            m = state["momentum_buffer"].mul_(group["momentum"]).add_(m)
        delta = (m * group["lr"]).float()
        return delta.add_(_residual(parameter, state, "residual")) if self.error_feedback != "none" else delta

    def _prepare_next(self) -> None:
        """What the next step begins with: e dropped or averaged, the weights at y."""
        averaged = []
        for group in self.param_groups:
            t = group["local_step"]
            kept = [self.state[p]["residual"] for p in group["params"] if "residual" in self.state.get(p, {})]
            if group["reset_period"] and (t + 1) % group["reset_period"] == 0:
                for residual in kept:
                    residual.zero_()
            if group["average_period"] and (t + 1) % group["average_period"] == 0:
                averaged += kept
        if averaged:
            flat = torch.cat([residual.flatten() for residual in averaged])
            self.traffic.bytes_sent += self.exchange.average(flat)
            _write(flat, averaged)
        for group in self.param_groups:
            self._to_training_point(group)

    def _to_training_point(self, group: dict[str, Any]) -> None:
        for parameter in group["params"] if self.error_feedback == "step-ahead" else ():
            state = self.state.get(parameter, {})
            if "residual" in state:
                if "x" not in state:  # kept, as adding e again would round otherwise on every rank
                    state["x"] = parameter.detach().clone()
                torch.sub(state["x"], state["residual"], out=parameter.detach())

    def _to_evaluation_point(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if "x" in self.state.get(parameter, {}):
                parameter.copy_(self.state[parameter].pop("x"))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Also puts the weights where this rank trained, if it was saved there: every rank has a y of its own, and a
        saved model is that of one.
        """
        super().load_state_dict(state_dict)
        self._is_compared = False
        for group in self.param_groups:
            if group["view"] == "train":
                self._to_training_point(group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("error_feedback", "exchange", "traffic", "_is_compared")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._is_compared = False
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                remedy = "weights must be float32 or float64, which can hold the shift; train in 16 bits by autocast"
                raise ConfigurationError("params", str(parameter.dtype), remedy)

    def _compare_over_ranks(self) -> None:
        """Once: whether all ranks were given the same, and begin at the same weights."""
        if self._is_compared or self.exchange.world == 1:
            return
        names = ("codec", "codec_down", "per_tensor", "collective", "seed")
        settings = {name: repr(getattr(self.exchange, name)) for name in names}
        settings["error_feedback"] = self.error_feedback
        for name in self.param_groups[0].keys() - {"params", "param_names", "lr"}:
            settings[name] = [group[name] for group in self.param_groups]
        settings["lr"] = [float(group["lr"]) for group in self.param_groups]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        settings["shapes"] = [list(parameter.shape) for parameter in parameters]
        settings["weights"] = [_sum_of_bits(self.state.get(p, {}).get("x", p)) for p in parameters]
        everyone: list = [None] * self.exchange.world
        dist.all_gather_object(everyone, settings, group=self.exchange.group)
        different = [name for name in settings if any(other[name] != settings[name] for other in everyone)]
        if different:
            long = {"shapes": "shapes of the parameters", "weights": "weights"}
            shown = [long.get(name) or f"{name}: {[other[name] for other in everyone]}" for name in different]
            raise InputError(f"the ranks disagree about {'; '.join(shown)}. Start all of them with the same")
        self._is_compared = True


def _residual(parameter: torch.nn.Parameter, state: dict, name: str) -> torch.Tensor:
    if name not in state:
        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
    return state[name]


def _joined(moved: list[_Moved], name: str) -> torch.Tensor:
    return torch.cat([_residual(parameter, state, name).flatten() for parameter, state, _ in moved])


def _write(flat: torch.Tensor, targets: list[torch.Tensor]) -> None:
    for target, part in zip(targets, flat.split([target.numel() for target in targets]), strict=True):
        target.copy_(part.view(target.shape))


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """The same for the same bits, in whatever order they are summed."""
    return int(tensor.detach().flatten().view(torch.int32).sum())
