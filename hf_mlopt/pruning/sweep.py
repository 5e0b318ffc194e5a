"""
The calibrated sweep: one decoder layer at a time, states in, observe, prune, states out.

Where a layer comes from and goes to is the business of a `LayerSource`; the sweep is the same for a model in memory
and for one that streams from disk.
"""

# E experts   D input features

import time
from contextlib import ExitStack, suppress
from typing import Protocol

import torch
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.moe import MoELayer, observe_layers
from hf_mlopt.moe.all_tokens import intermediate_on_all_tokens
from hf_mlopt.moe.observation import SeenEnough
from hf_mlopt.pruning.apply import prune_weights_
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.coverage import needs_all_tokens, policy, refuse_uncovered, substitute, uncovered_experts
from hf_mlopt.pruning.moments import ExpertMoments
from hf_mlopt.pruning.report import LayerReport, tensor_report
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.states import LayerCalls
from hf_mlopt.pruning.targets import LinearMoments, Target, expert_targets, linear_layers
from hf_mlopt.pruning.validation import is_finite


class LayerSource(Protocol):
    """Hands out decoder layers, ready to run, and takes them back when they are done."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[str, nn.Module, MoELayer | None]:
        """Name of the decoder layer, the layer on the compute device, and its view as a mixture of experts."""

    def store(self, index: int) -> None:
        """The sweep has finished with the layer."""


class InMemory:
    """The decoder layers of a whole model; each is on the compute device only while it is swept."""

    def __init__(self, prefix: str, layers: nn.ModuleList, moe: list[MoELayer], device: torch.device):
        self.prefix, self.layers, self.device = prefix, layers, device
        self.moe = {layer.index: layer for layer in moe}
        self.home = [next(layer.parameters()).device for layer in layers]

    def __len__(self) -> int:
        return len(self.layers)

    def load(self, index: int) -> tuple[str, nn.Module, MoELayer | None]:
        return f"{self.prefix}.{index}", self.layers[index].to(self.device), self.moe.get(index)

    def store(self, index: int) -> None:
        self.layers[index].to(self.home[index])


@torch.no_grad()
def sweep(source: LayerSource, states: list[torch.Tensor], calls: LayerCalls, config: PruningConfig, progress):
    """
    Prunes every layer of `source`.

    Args:
        source (`LayerSource`): The decoder layers.
        states (`list[torch.Tensor]`): Input of the first layer per batch, `[batch, length, hidden]`; replaced as the
            sweep goes. Empty for methods that read no activations.
        calls (`LayerCalls`): How the layers are called.
        config (`PruningConfig`): Method, pattern, scope, propagation.
        progress (`Callable`): Wraps the layer indices in a progress bar.

    Returns:
        `list[LayerReport]`: One per decoder layer that lost weights.

    Raises:
        InputError: If activations are not finite, or an expert is not covered under the policy `error`.
    """
    reports = []
    for index in progress(range(len(source))):
        started = time.perf_counter()
        name, decoder, moe = source.load(index)
        try:
            report = _sweep_layer(name, index, decoder, moe, states, calls, config, last=index + 1 == len(source))
        finally:
            source.store(index)
        report.seconds = time.perf_counter() - started
        if report.tensors:
            reports.append(report)
    return reports


def _sweep_layer(name, index, decoder, moe, states, calls, config, last) -> LayerReport:
    """Prunes one layer and replaces the states by its outputs."""
    report = LayerReport(index, moe.name if moe is not None else name)
    linears = linear_layers(decoder, name, moe) if config.scope == "all-linear" else {}
    statistics, outputs = {}, []
    if states and (moe is not None or linears):
        statistics, outputs = _observe(name, index, decoder, moe, linears, states, calls, config, report)
    _prune(moe, linears, statistics, config, report)
    for number in range(0 if last else len(states)):  # nobody reads what the last layer gives
        output = outputs[number] if outputs else calls(index, decoder, states[number])
        if not is_finite(output):
            raise InputError(_not_finite(name))
        states[number] = output
    return report


def _observe(name, index, decoder, moe, linears, states, calls, config, report):
    """Runs a layer over all states; returns the moments of every input in scope and, to be
    propagated dense, the layer's outputs."""
    method = METHODS[config.method]
    gate_power = config.gate_power if method.gated else 0.0
    linear_moments = LinearMoments(method.hessian, gate_power)
    with ExitStack() as stack:
        if moe is not None:
            moments = ExpertMoments(
                moe.num_experts,
                {source: moe.input_size(source) for source in ("hidden", "intermediate")},
                gate_power=gate_power,
                hessian=method.hessian,
                normalize_gate=config.gate_normalize == "sum_to_one",
                device=states[0].device,
            )
            stack.enter_context(observe_layers([moe], moments.update))
        stack.enter_context(linear_moments.observing(linears, moe))
        outputs, finite = [], True
        for state in states:
            output = calls(index, decoder, state)
            finite = finite and is_finite(output)
            if config.propagate == "dense":  # otherwise the layer runs again when it is pruned: one copy less to hold
                outputs.append(output)
    statistics = dict(linear_moments.sums)
    if moe is not None:
        moments.check_finite(moe)  # names the expert, where it is one
    if not finite:
        raise InputError(_not_finite(name))
    if moe is not None:
        report.tokens_per_expert = moments.sums["tokens"].tolist()
        report.gate_mass = moments.sums["gate_mass"].tolist()
        report.uncovered = uncovered_experts(moments.sums["tokens"], config.min_tokens)
        refuse_uncovered(moe.name, moments.sums["tokens"], report.uncovered, config)
        statistics.update(_cover(index, decoder, moe, moments, states, calls, config, report.uncovered))
    return statistics, outputs


def _cover(index, decoder, moe, moments, states, calls, config, uncovered) -> dict[str, torch.Tensor]:
    """The moments each expert is pruned by: its own, or the policy's substitute where it saw too few tokens."""
    statistics = {source: moments.sums[source] for source in ("hidden", "intermediate")}
    forced = {}
    if uncovered and needs_all_tokens(config):
        forced = _all_token_moments(index, decoder, moe, states, calls, uncovered, moments.hessian)
    for expert in uncovered:
        layer_moments = {
            "hidden": moments.sums["layer_hidden"],
            "intermediate": forced.get(expert, statistics["intermediate"][expert]),
        }
        for source, layer_sum in layer_moments.items():
            own = statistics[source][expert]
            tokens = int(moments.sums["tokens"][expert])
            statistics[source][expert] = substitute(own, tokens, layer_sum, config)
    return statistics


def _all_token_moments(index, decoder, moe, states, calls, uncovered, hessian) -> dict[int, torch.Tensor]:
    """Moments of the intermediate activations of uncovered experts, each run over every token of the layer."""
    totals: dict[int, torch.Tensor] = {}

    def add(_module, args):
        hidden_TH = args[0].reshape(-1, args[0].shape[-1])
        for expert in uncovered:
            value_TI = intermediate_on_all_tokens(moe, hidden_TH, expert).float()
            total = value_TI.T @ value_TI if hessian else value_TI.square().sum(dim=0).double()
            totals[expert] = totals[expert] + total if expert in totals else total
        raise SeenEnough

    watched = moe.experts if moe.is_fused else moe.router  # both are given the input of the experts
    handle = watched.register_forward_pre_hook(add)
    try:
        for state in states:
            with suppress(SeenEnough):
                calls(index, decoder, state)
    finally:
        handle.remove()
    return totals


def _prune(moe, linears, statistics, config, report) -> None:
    targets = expert_targets(moe) if moe is not None else []
    targets += [Target(f"{name}.weight", linear.weight.data[None], name) for name, linear in linears.items()]
    if METHODS[config.method].calibrated:
        for target in targets:
            if target.statistic not in statistics:
                raise InputError(f"{target.name}: the calibration data never reached it, so it cannot be scored.")
    left_dense = set(report.uncovered) if policy(config) == "skip" else set()
    for target in targets:
        moments = statistics.get(target.statistic)
        dense = left_dense if target.statistic in ("hidden", "intermediate") else set()
        if target.expert is not None:
            moments = None if moments is None else moments[target.expert, None]
            dense = {0} if target.expert in dense else set()
        prune_weights_(target.weight_EOD, moments, config, dense, target.matrices)
        stored = target.weight_EOD if target.weight_EOD.shape[0] > 1 else target.weight_EOD[0]
        report.tensors.append(tensor_report(target.name, stored))


def _not_finite(name: str) -> str:
    return f"{name}: the output on the calibration data holds NaN or Inf; check the checkpoint and its dtype."
