"""The weights of a decoder layer that a scope covers, and the statistics each is scored by."""

# T tokens   E experts   O output features   D input features

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_mlopt.moe import MoELayer


@dataclass(frozen=True, eq=False)
class Target:
    """
    Matrices that are pruned together.

    Args:
        name (`str`): Qualified name of the parameter.
        weight_EOD (`torch.Tensor`): A view, `[experts, output, input]`; one "expert" for an ordinary linear layer.
        statistic (`str`): `"hidden"`, `"intermediate"`, or the name of the linear layer.
        expert (`int`, *optional*): The expert, where each has a matrix of its own (`ModuleList`).
        matrices (`tuple[slice]`): The output rows of each matrix, where several are stored as one (gate and up).
    """

    name: str
    weight_EOD: torch.Tensor
    statistic: str
    expert: int | None = None
    matrices: tuple[slice, ...] = (slice(None),)


def expert_targets(layer: MoELayer) -> list[Target]:
    """The matrices of the routed experts."""
    if layer.is_fused:
        return [
            Target(
                f"{layer.name}.{projection}", layer.stacked(projection), source, matrices=layer.matrices(projection)
            )
            for projection, source in layer.projections.items()
        ]
    return [
        Target(f"{layer.name}.{expert}.{projection}.weight", layer.weight(expert, projection)[None], source, expert)
        for expert in range(layer.num_experts)
        for projection, source in layer.projections.items()
    ]


def linear_layers(decoder_layer: nn.Module, prefix: str, layer: MoELayer | None) -> dict[str, nn.Linear]:
    """Attention, shared experts and dense MLP of a decoder layer; router, gates and routed experts left out."""
    excluded = set()
    if layer is not None:
        excluded = {*layer.experts.modules(), *layer.router.modules()}
    return {
        f"{prefix}.{name}": module
        for name, module in decoder_layer.named_modules()
        # One output feature is a gate, such as Qwen2-MoE's shared_expert_gate.
        if isinstance(module, nn.Linear) and module not in excluded and module.out_features > 1
    }


class LinearMoments:
    """Σ_t x_tj² (or Σ x xᵀ) of the inputs of ordinary linear layers, each as `[1, input]` or `[1, input, input]`."""

    def __init__(self, hessian: bool, gate_power: float):
        self.hessian, self.gate_power = hessian, gate_power
        self.sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def observing(self, linears: dict[str, nn.Linear], layer: MoELayer | None) -> Iterator[None]:
        """Sums over the forward passes made inside the context."""
        shared = getattr(layer.block, "shared_expert", None) if layer is not None else None
        gate = getattr(layer.block, "shared_expert_gate", None) if layer is not None else None
        handles, weight = [], {}
        inside = set()
        if isinstance(shared, nn.Module) and isinstance(gate, nn.Module) and self.gate_power > 0:
            # Qwen2-MoE multiplies its shared expert by a gate of its own, so that is its router weight.
            inside = set(shared.modules())

            def remember_gate(_module, args):
                weight["T"] = torch.sigmoid(gate(args[0])).flatten().float().pow(2 * self.gate_power)

            handles.append(shared.register_forward_pre_hook(remember_gate))
        for name, linear in linears.items():
            handles.append(linear.register_forward_pre_hook(self._hook(name, weight if linear in inside else {})))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, weight: dict[str, torch.Tensor]):
        def add(_module, args):
            value_TD = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if "T" in weight:
                value_TD = value_TD * weight["T"].sqrt()[:, None]
            total = value_TD.T @ value_TD if self.hessian else value_TD.square().sum(dim=0).double()
            self.sums[name] = self.sums[name] + total[None] if name in self.sums else total[None]

        return add
