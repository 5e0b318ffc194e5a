"""The ways to run one layer's experts that are compared: dense, half zero, 2:4, and with experts removed."""

# T tokens   H hidden   E experts   K experts per token   R experts retained

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.moe import MoELayer
from hf_mlopt.pruning.kept import refuse_drop
from hf_mlopt.speed.experts import (
    bytes_2_of_4,
    expert_bytes,
    fill_with_noise_,
    keep_experts,
    matrices_2_of_4,
    no_2_of_4,
    run_expert_by_expert,
    run_fused,
    with_half_zeros,
)
from hf_mlopt.speed.routing import route, tokens_per_expert
from hf_mlopt.speed.timing import ratio, time_in_rounds


class ExpertVariants:
    """
    One layer's experts, ready to be timed.

    Args:
        layer (`MoELayer`): A fused layer on the meta device; its experts are filled with random weights.
        device (`torch.device`): Where to run.
        drop_experts (`list[float]`): Fractions of the experts to remove.
        convert (`Callable`, *optional*): Makes a matrix with 2:4 zeros sparse; by default
            `torch.sparse.to_sparse_semi_structured`, where the device has it.

    Attributes:
        described (`dict[str, dict]`): By name of a variant: `what` it is in words, and the `bytes` of its weights.
        does_not_apply (`list[str]`): What is not among them, and why.
    """

    def __init__(self, layer: MoELayer, device: torch.device, drop_experts: list[float], convert=None):
        self.layer, self.device = layer, device
        fill_with_noise_(layer.experts, device)
        size = expert_bytes(layer.experts)
        self.half_zeros = with_half_zeros(layer.experts)
        self.described = {
            "dense": {"what": "dense", "bytes": size},
            "half_zeros": {"what": "half zeros", "bytes": size},
        }
        self.does_not_apply: list[str] = []
        self.matrices: dict[str, list[list[torch.Tensor]]] = {}
        self._add_2_of_4(convert)
        self.removed = {}
        for drop in drop_experts:
            self._add_removal(drop)

    def _add_2_of_4(self, convert: Callable | None) -> None:
        layer, size = self.layer, bytes_2_of_4(self.layer.experts)
        reason = no_2_of_4(layer, self.device) if convert is None else None
        if reason is None:
            try:
                convert = convert or torch.sparse.to_sparse_semi_structured
                matrices = [matrices_2_of_4(layer, projection, convert) for projection in layer.projections]
                counts_E = tokens_per_expert([1] * layer.num_experts, 16, layer.top_k)
                run_expert_by_expert(layer.experts, *matrices, *self._inputs(counts_E))
            except RuntimeError as error:  # shapes, architectures and builds without a kernel: torch says which
                reason = str(error).strip().split("\n")[0]
        if reason is not None:
            stored = f"; it would take {size / expert_bytes(layer.experts):.4g} of the bytes" if size else ""
            self.does_not_apply.append(f"2:4: {reason}{stored}")
            return
        dense = [list(layer.stacked(projection)) for projection in layer.projections]
        self.matrices = {"dense_loop": dense, "2:4": matrices}
        self.described["dense_loop"] = {"what": "dense, by expert", "bytes": expert_bytes(layer.experts)}
        self.described["2:4"] = {"what": "2:4, by expert", "bytes": size}

    def _add_removal(self, drop: float) -> None:
        layer, config = self.layer, self.layer.experts.config
        groups = getattr(config, "n_group", None), getattr(config, "topk_group", None)
        try:
            kept = refuse_drop(drop, layer.num_experts, layer.top_k, *groups)
        except ConfigurationError as error:
            self.does_not_apply.append(str(error))
            return
        experts, name = keep_experts(layer.experts, kept), f"drop_{drop:g}"
        self.removed[name] = experts
        what = f"{layer.num_experts - kept} of {layer.num_experts} removed"
        self.described[name] = {"what": what, "bytes": expert_bytes(experts)}

    def _inputs(self, counts_E: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, expert indices and router weights, as transformers hands them to fused experts."""
        index_TK = route(counts_E, self.layer.top_k).to(self.device)
        weight_TK = torch.full(index_TK.shape, 1 / self.layer.top_k, device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (len(index_TK), self.layer.input_size("hidden"))
        dtype = self.layer.experts.down_proj.dtype
        return torch.randn(shape, generator=generator, dtype=dtype, device=self.device), index_TK, weight_TK

    def counts(self, tokens: int, load_E: list[float]) -> dict[str, list[int]]:
        """
        Tokens per expert, of the whole layer (`dense`) and with experts removed: always the last ones, whose tokens
        then go to the others in proportion to their load.
        """
        kept = {"dense": len(load_E)} | {name: experts.num_experts for name, experts in self.removed.items()}
        return {name: tokens_per_expert(load_E[:count], tokens, self.layer.top_k) for name, count in kept.items()}

    def calls(self, counts: dict[str, list[int]], implementation: str) -> dict[str, Callable]:
        """A function for each variant that runs its experts once."""
        experts, inputs = self.layer.experts, self._inputs(counts["dense"])
        calls = {
            "dense": partial(run_fused, experts, implementation, *inputs),
            "half_zeros": partial(run_fused, self.half_zeros, implementation, *inputs),
        }
        for name, matrices in self.matrices.items():
            calls[name] = partial(run_expert_by_expert, experts, *matrices, *inputs)
        for name, fewer in self.removed.items():
            calls[name] = partial(run_fused, fewer, implementation, *self._inputs(counts[name]))
        return calls

    def measure(self, tokens: int, load_E: list[float], repeats: int) -> dict:
        """
        Times all variants on one number of tokens.

        Args:
            tokens (`int`): Tokens of the forward pass.
            load_E (`list[float]`): Load of each expert, the highest first.
            repeats (`int`): Rounds.

        Returns:
            `dict`: `tokens`, `tokens_per_expert` (see [`~ExpertVariants.counts`]), `implementation` of dense experts,
                `rounds`, `seconds` (median, by variant), `speedup` over dense (by variant, see [`~timing.ratio`]) and,
                where 2:4 was run, `kernel_speedup` of 2:4 over the same loop with dense matrices.
        """
        counts = self.counts(tokens, load_E)
        implementation = self._fastest_implementation(counts)
        seconds = time_in_rounds(self.calls(counts, implementation), self.device, repeats)
        row = {
            "tokens": tokens,
            "tokens_per_expert": counts,
            "implementation": implementation,
            "rounds": len(seconds["dense"]),
            "seconds": {name: median(values) for name, values in seconds.items()},
            "speedup": {name: ratio(seconds["dense"], values) for name, values in seconds.items() if name != "dense"},
        }
        if "2:4" in seconds:
            row["kernel_speedup"] = ratio(seconds["dense_loop"], seconds["2:4"])
        return row

    def _fastest_implementation(self, counts: dict[str, list[int]]) -> str:
        """
        transformers runs `grouped_mm`, but `generate` decodes with `batched_mm` on a GPU. The faster one is the dense
        model that pruning has to beat; `batched_mm` copies a matrix for each token and expert, so it is tried only
        while that is not more than the layer holds.
        """
        if self.device.type == "cpu" or sum(counts["dense"]) > self.layer.num_experts:
            return "grouped_mm"
        names = ("grouped_mm", "batched_mm")
        seconds = time_in_rounds({name: self.calls(counts, name)["dense"] for name in names}, self.device, 5)
        return min(names, key=lambda name: median(seconds[name]))
