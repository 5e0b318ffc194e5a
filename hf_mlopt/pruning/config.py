"""What to prune, by which score, in which pattern."""

import re
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pruning.scores import METHODS


@dataclass
class PruningConfig:
    """
    One-shot pruning of a mixture of experts.

    Args:
        method (`str`, *optional*, defaults to `"moe-pruner"`): Score that decides which weights go.
        sparsity (`float`, *optional*): Fraction of every output row to remove, in [0, 1). Give this or `pattern`;
            both may be left out with `drop_experts`.
        pattern (`str`, *optional*): N:M pattern such as `2:4`, N weights kept of every M consecutive inputs.
        allocation (`str`, *optional*, defaults to `"uniform"`): `uniform` removes `sparsity` from every row, `load`
            more from experts of a layer that matter less to it, `owl` less from layers with more outliers; both
            keep the total.
        drop_experts (`float`, *optional*, defaults to 0.0): Fraction of the experts of every layer that are removed
            as a whole, before weights of the others are.
        drop_score (`str`, *optional*, defaults to `"reap"`): Experts with the lowest mean of router weight times
            norm of the output go (`reap`), or those that are sent the fewest tokens (`frequency`).
        scope (`str`, *optional*, defaults to `"experts"`): `experts` prunes the routed experts, `all-linear` also
            attention, shared experts and dense MLPs. Router, embeddings and head are never pruned.
        propagate (`str`, *optional*, defaults to `"pruned"`): Whether the next layer is calibrated on the output of
            the `pruned` or of the `dense` layer.
        gate_power (`float`, *optional*, defaults to 1.0): Power of the router weight in the gated methods. 0 ignores
            the router, 1 is MoE-Pruner.
        gate_normalize (`str`, *optional*, defaults to `"as_model"`): Router weights as the model uses them, or
            `sum_to_one` over the experts of a token.
        min_tokens (`int`, *optional*, defaults to 256): Calibration tokens below which an expert counts as not
            covered. 0 turns the guard off.
        on_uncovered (`str`, *optional*, defaults to `"blend"`): What to do with an expert that is not covered.
            `blend` mixes in the statistics of the whole layer, `all_tokens` uses only those, `magnitude` ignores
            activations, `skip` leaves the expert dense, `error` stops.
        batch_size (`int`, *optional*, defaults to 8): Calibration sequences per forward pass.
    """

    method: Literal[*METHODS] = "moe-pruner"
    sparsity: float | None = None
    pattern: str | None = None
    allocation: Literal["uniform", "load", "owl"] = "uniform"
    drop_experts: float = 0.0
    drop_score: Literal["reap", "frequency"] = "reap"
    scope: Literal["experts", "all-linear"] = "experts"
    propagate: Literal["pruned", "dense"] = "pruned"
    gate_power: float = 1.0
    gate_normalize: Literal["as_model", "sum_to_one"] = "as_model"
    min_tokens: int = 256
    on_uncovered: Literal["blend", "all_tokens", "magnitude", "skip", "error"] = "blend"
    batch_size: int = 8

    def __post_init__(self):
        for field, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, field) not in get_args(kind):
                raise ConfigurationError(field, getattr(self, field), f"must be one of {', '.join(get_args(kind))}")
        for field in ("sparsity", "drop_experts", "gate_power", "min_tokens", "batch_size"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ConfigurationError(field, value, "must be a number")
        if not 0 <= self.drop_experts < 1:
            raise ConfigurationError("drop_experts", self.drop_experts, "must be in [0, 1), e.g. 0.25")
        if self.sparsity is not None and self.pattern is not None:
            raise ConfigurationError("sparsity", self.sparsity, "give either sparsity or pattern, both are given")
        if not self.prunes_weights and not self.drop_experts:
            raise ConfigurationError("sparsity", None, "give sparsity, pattern or drop_experts, none is given")
        if self.allocation != "uniform" and not self.sparsity:
            raise ConfigurationError("allocation", self.allocation, "needs a sparsity above 0, and no pattern")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ConfigurationError("sparsity", self.sparsity, "must be in [0, 1), e.g. 0.5")
        if self.pattern is not None:
            self.n_of_m  # noqa: B018  (raises when malformed)
        if self.allocation == "owl" and self.sparsity > 0.95:
            raise ConfigurationError("sparsity", self.sparsity, "must be at most 0.95 with allocation='owl'")
        if not 0 <= self.gate_power <= 16:
            raise ConfigurationError("gate_power", self.gate_power, "must be in [0, 16]; 0 ignores the router")
        if self.min_tokens < 0:
            raise ConfigurationError("min_tokens", self.min_tokens, "must be at least 0; 0 turns the guard off")
        if self.batch_size < 1:
            raise ConfigurationError("batch_size", self.batch_size, "must be at least 1")

    @property
    def prunes_weights(self) -> bool:
        """Whether single weights are removed, not only experts."""
        return self.sparsity is not None or self.pattern is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are read."""
        return METHODS[self.method].calibrated or self.drop_experts > 0 or self.allocation == "owl"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`(2, 4)` for the pattern `2:4`, None for unstructured sparsity."""
        if self.pattern is None:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        kept, group = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < group:
            raise ConfigurationError("pattern", self.pattern, "must be N:M with 0 < N < M, e.g. 2:4")
        return kept, group

    @property
    def label(self) -> str:
        """`"50%"`, `"2:4"`, `"25% fewer experts"` or `"25% fewer experts, 50%"`."""
        parts = [f"{100 * self.drop_experts:g}% fewer experts"] if self.drop_experts else []
        if self.prunes_weights:
            parts.append(self.pattern or f"{100 * self.sparsity:g}%")
        return ", ".join(parts)
