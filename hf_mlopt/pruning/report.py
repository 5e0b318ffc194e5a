"""What a pruning run did: sparsity per tensor, tokens per expert, fallbacks, time and memory."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.coverage import policy


@dataclass
class LayerReport:
    """
    One decoder layer.

    Args:
        index (`int`): Index of the decoder layer.
        name (`str`): Qualified name of the experts module, or of the decoder layer where it has no experts.
        tensors (`list[dict]`): `name`, `shape` and `sparsity` of every pruned parameter.
        tokens_per_expert (`list[int]`): Calibration tokens routed to each expert; empty without calibration.
        gate_mass (`list[float]`): Sum of the router weights of those tokens.
        uncovered (`list[int]`): Experts below `min_tokens`, treated by `on_uncovered`; without those removed.
        kept_experts (`list[int]`): The original numbers of the experts that stay; empty if none was removed.
        expert_scores (`list[float]`): By which they were chosen, per original expert.
        sparsity (`float`, *optional*): Asked of this layer; differs from layer to layer under `allocation="owl"`.
        sparsity_per_expert (`list[float]`): Under `allocation="load"`, of the experts that stay.
        seconds (`float`): Wall time.
    """

    index: int
    name: str
    tensors: list[dict] = field(default_factory=list)
    tokens_per_expert: list[int] = field(default_factory=list)
    gate_mass: list[float] = field(default_factory=list)
    uncovered: list[int] = field(default_factory=list)
    kept_experts: list[int] = field(default_factory=list)
    expert_scores: list[float] = field(default_factory=list)
    sparsity: float | None = None
    sparsity_per_expert: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class PruningReport:
    """
    The whole run; `to_dict()` is what `pruning_report.json` holds.

    Args:
        config (`PruningConfig`): What was asked for.
        experts_implementation (`str`): The implementation calibration ran on.
        layers (`list[LayerReport]`): In order of the decoder layers.
        totals (`dict`): `parameters` of the model as it is now, `removed_parameters` of experts that went,
            `pruned_parameters` in the scope, `zeros` among those, `sparsity_of_scope` and `sparsity_of_model`.
        seconds (`float`): Wall time of the sweep.
        peak_memory_bytes (`int`): Peak resident memory of the process, or peak allocation on the accelerator.
        calibration, model, environment (`dict`): Provenance, filled in by who knows it.
    """

    config: PruningConfig
    experts_implementation: str
    layers: list[LayerReport]
    totals: dict
    seconds: float
    peak_memory_bytes: int
    calibration: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights in the scope."""
        return self.totals["sparsity_of_scope"]

    @property
    def uncovered(self) -> dict[int, list[int]]:
        """Decoder layer to the experts there that calibration did not cover."""
        return {layer.index: layer.uncovered for layer in self.layers if layer.uncovered}

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts; the configuration's fields stand at the top,
        with the coverage policy that was in force."""
        rest = {key: value for key, value in vars(self).items() if key not in ("config", "layers")}
        in_force = {"on_uncovered": policy(self.config)}
        return {**asdict(self.config), **in_force, **rest, "layers": [asdict(layer) for layer in self.layers]}

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = []
        if self.config.drop_experts:
            first = next(layer for layer in self.layers if layer.kept_experts)
            lines.append(
                f"{len(first.tokens_per_expert) - len(first.kept_experts)} of {len(first.tokens_per_expert)} experts "
                f"of every layer removed by {self.config.drop_score}, {self.totals['removed_parameters']:,} parameters"
            )
        if self.config.prunes_weights:
            lines.append(
                f"{self.config.method} {self.config.label}, scope {self.config.scope}: "
                f"{100 * self.sparsity:.2f} % of {self.totals['pruned_parameters']:,} weights in scope are zero, "
                f"{100 * self.totals['sparsity_of_model']:.2f} % of the model"
            )
        lines[-1] += f", in {self.seconds:.1f} s"
        for index, experts in self.uncovered.items():
            lines.append(f"  layer {index}: experts {experts} with fewer than {max(self.config.min_tokens, 1)} tokens")
        return "\n".join(lines)


def tensor_report(name: str, weight: torch.Tensor) -> dict:
    """Name, shape and fraction of zeros of one parameter."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    return {"name": name, "shape": list(weight.shape), "zeros": zeros, "sparsity": zeros / weight.numel()}


def totals(model: nn.Module, layers: list[LayerReport], parameters_before: int) -> dict:
    """Sums over the report's tensors, against the size of the model."""
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    parameters = num_parameters(model)
    in_scope = sum(torch.Size(tensor["shape"]).numel() for tensor in tensors)
    zeros = sum(tensor["zeros"] for tensor in tensors)
    return {
        "parameters": parameters,
        "removed_parameters": parameters_before - parameters,
        "pruned_parameters": in_scope,
        "zeros": zeros,
        "sparsity_of_scope": zeros / in_scope if in_scope else 0.0,
        "sparsity_of_model": zeros / parameters,
    }


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
