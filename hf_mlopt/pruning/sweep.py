"""
The calibrated sweep: one decoder layer at a time, states in, observe, prune, states out.

Where a layer comes from and goes to is the business of a `LayerSource`; the sweep is the same for a model in memory
and for one that streams from disk.
"""

# E experts   D input features

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from hf_mlopt import ranks
from hf_mlopt.errors import InputError
from hf_mlopt.moe import MoELayer, observe_layers
from hf_mlopt.moe.all_tokens import intermediate_on_all_tokens
from hf_mlopt.moe.observation import SeenEnough
from hf_mlopt.pruning.allocation import expert_sparsities
from hf_mlopt.pruning.apply import prune_weights_
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.coverage import needs_all_tokens, policy, refuse_uncovered, substitute, uncovered_experts
from hf_mlopt.pruning.kept import num_kept
from hf_mlopt.pruning.moments import ExpertMoments
from hf_mlopt.pruning.removal import expert_scores, keep_experts_, kept_experts, routing_groups
from hf_mlopt.pruning.report import LayerReport, tensor_report
from hf_mlopt.pruning.scores import METHODS
from hf_mlopt.pruning.states import LayerCalls
from hf_mlopt.pruning.targets import LinearMoments, Target, expert_targets, linear_layers
from hf_mlopt.pruning.validation import is_finite


class LayerSource(Protocol):
    """
    Hands out decoder layers, ready to run on `device`, and takes them back when they are done. `smaller` is the model
    with fewer experts, without weights, or None if all stay.
    """

    device: torch.device
    smaller: nn.Module | None

    def __len__(self) -> int: ...

    def embedding(self) -> AbstractContextManager:
        """A context in which the model can embed tokens."""

    def load(self, index: int) -> tuple[str, nn.Module, MoELayer | None]:
        """Name of the decoder layer, the layer on the compute device, and its view as a mixture of experts."""

    def remove_experts(self, index: int, keep: list[int]) -> None:
        """Leaves the loaded layer with the given experts."""

    def store(self, index: int, changed: bool = True) -> None:
        """The sweep has finished with the layer; `changed=False` if it was only read, or failed."""


class Journal(Protocol):
    """Notes what is done, so that a run can be gone on with."""

    reports: list[LayerReport]

    def first_states(self, embedded, shapes: list[tuple[int, int]], device: torch.device):
        """Keeps the states of the first layer, which come one by one, `[batch, length, hidden]`."""

    def saved_states(self, device: torch.device):
        """The states of the layer to go on with."""

    def record(self, index: int, report: LayerReport, states, last: bool) -> None:
        """The layer is stored; its outputs are in `states`."""

    def remembered(self, name: str, compute):
        """What `compute()` gives, or gave in an earlier part of the run."""


class InMemory:
    """
    The decoder layers of a whole model; each is on the compute device only while it is swept.

    Args:
        prefix (`str`), layers (`nn.ModuleList`), moe (`list[MoELayer]`): The decoder layers, their name, their view.
        device (`torch.device`): Where they are run.
        smaller (`nn.Module`, *optional*): The model with fewer experts, on the meta device, see
            [`~pruning.removal.smaller_model`].
    """

    def __init__(self, prefix: str, layers: nn.ModuleList, moe: list[MoELayer], device: torch.device, smaller=None):
        self.prefix, self.layers, self.device, self.smaller = prefix, layers, device, smaller
        self.moe = {layer.index: layer for layer in moe}
        self.home = [device_of(layer) for layer in layers]

    def __len__(self) -> int:
        return len(self.layers)

    def embedding(self) -> AbstractContextManager:
        return nullcontext()

    def load(self, index: int) -> tuple[str, nn.Module, MoELayer | None]:
        return f"{self.prefix}.{index}", self.layers[index].to(self.device), self.moe.get(index)

    def remove_experts(self, index: int, keep: list[int]) -> None:
        keep_experts_(self.layers[index], self.smaller.get_submodule(f"{self.prefix}.{index}"), keep)

    def store(self, index: int, changed: bool = True) -> None:
        self.layers[index].to(self.home[index])


@torch.no_grad()
def sweep(
    source: LayerSource,
    states,
    calls: LayerCalls,
    config: PruningConfig,
    progress,
    journal: Journal | None = None,
    sparsities: list[float] | None = None,
) -> list[LayerReport]:
    """
    Prunes every layer of `source`.

    Args:
        source (`LayerSource`): The decoder layers.
        states (`States`): Input of the first layer to prune per batch, `[batch, length, hidden]`; replaced as the
            sweep goes. Empty for methods that read no activations.
        calls (`LayerCalls`): How the layers are called.
        config (`PruningConfig`): Method, pattern, scope, propagation.
        progress (`Callable`): Wraps the layer indices in a progress bar.
        journal (`Journal`, *optional*): Notes every finished layer; those it knows already are left out.
        sparsities (`list[float]`, *optional*): One per decoder layer, in place of the one of `config`.

    Returns:
        `list[LayerReport]`: One per decoder layer that lost weights or experts.

    Raises:
        InputError: If activations are not finite, or an expert is not covered under the policy `error`.
    """
    reports = list(journal.reports) if journal is not None else []
    for index in progress(range(len(reports), len(source))):
        started = time.perf_counter()
        name, decoder, moe = source.load(index)
        last = index + 1 == len(source)
        layer_config = config
        if sparsities is not None:
            layer_config = replace(config, sparsity=sparsities[index], allocation="uniform")
        try:
            report = _sweep_layer(source, name, index, decoder, moe, states, calls, layer_config, last)
        except BaseException:
            source.store(index, changed=False)
            raise
        source.store(index)
        states.advance()
        report.sparsity = layer_config.sparsity
        report.seconds = time.perf_counter() - started
        reports.append(report)
        if journal is not None:
            journal.record(index, report, states, last)
    return [report for report in reports if report.tensors or report.kept_experts]


def _sweep_layer(source, name, index, decoder, moe, states, calls, config, last) -> LayerReport:
    """Prunes one layer and replaces the states by its outputs."""
    report = LayerReport(index, moe.name if moe is not None else name)
    linears = linear_layers(decoder, name, moe) if config.scope == "all-linear" else {}
    statistics, outputs = {}, []
    if len(states) and (moe is not None or linears):
        moments, statistics, outputs = observe_layer(name, index, decoder, moe, linears, states, calls, config)
        if moe is not None:
            report.tokens_per_expert = moments.sums["tokens"].tolist()
            report.gate_mass = moments.sums["gate_mass"].tolist()
            if config.drop_experts:
                moe = _remove_experts(source, index, moe, moments, config, report)
            statistics |= _cover(index, decoder, moe, moments, states, calls, config, report)
    if config.prunes_weights:
        _prune(moe, linears, statistics, config, report)
    finite = True
    for number in range(0 if last else len(states)):  # nobody reads what the last layer gives
        output = outputs[number] if outputs else calls(index, decoder, states[number])
        finite = finite and is_finite(output)
        states[number] = output
    if len(states) and not ranks.all_agree(finite, device_of(decoder)):
        raise InputError(_not_finite(name))
    return report


def observe_layer(name, index, decoder, moe, linears, states, calls, config: PruningConfig):
    """
    Runs a layer over all states.

    Returns:
        `tuple[ExpertMoments | None, dict[str, torch.Tensor], list[torch.Tensor]]`: The moments of the experts, those
        of other linear layers in scope by name, and, to be propagated dense, the layer's outputs.
    """
    method = METHODS[config.method]
    gate_power = config.gate_power if method.gated else 0.0
    linear_moments = LinearMoments(method.hessian, gate_power)
    output_norms = bool(config.drop_experts) and config.drop_score == "reap"
    moments = None
    with ExitStack() as stack:
        if moe is not None:
            moments = ExpertMoments(
                moe.num_experts,
                {source: moe.input_size(source) for source in ("hidden", "intermediate")},
                gate_power=gate_power,
                hessian=method.hessian,
                normalize_gate=config.gate_normalize == "sum_to_one",
                output_norms=output_norms,
                device=device_of(decoder),
            )
            stack.enter_context(observe_layers([moe], moments.update, output_norms))
        stack.enter_context(linear_moments.observing(linears, moe))
        outputs, finite = [], True
        for number in range(len(states)):
            output = calls(index, decoder, states[number])
            finite = finite and is_finite(output)
            if config.propagate == "dense":  # otherwise the layer runs again when it is pruned: one copy less to hold
                outputs.append(output)
    ranks.sum_(linear_moments.sums)
    if moe is not None:
        ranks.sum_(moments.sums)
        moments.check_finite(moe)  # names the expert, where it is one
    if not ranks.all_agree(finite, device_of(decoder)):
        raise InputError(_not_finite(name))
    return moments, dict(linear_moments.sums), outputs


def _remove_experts(source, index, moe, moments, config, report) -> MoELayer:
    """Removes the experts that matter least; what is known of the others gets their new numbers."""
    scores_E = expert_scores(moments.sums, config.drop_score)
    keep = kept_experts(scores_E, num_kept(moe.num_experts, config.drop_experts), routing_groups(source.smaller))
    report.kept_experts, report.expert_scores = keep, scores_E.tolist()
    moments.keep_(keep)
    source.remove_experts(index, keep)
    return replace(moe, num_experts=len(keep))


def _cover(index, decoder, moe, moments, states, calls, config, report) -> dict[str, torch.Tensor]:
    """The moments each expert is pruned by: its own, or the policy's substitute where it saw too few tokens."""
    uncovered = uncovered_experts(moments.sums["tokens"], config.min_tokens)
    kept = report.kept_experts or range(moe.num_experts)
    if not config.prunes_weights:
        return {}
    report.uncovered = [kept[expert] for expert in uncovered]
    refuse_uncovered(moe.name, moments.sums["tokens"], uncovered, kept, config)
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
        for number in range(len(states)):
            with suppress(SeenEnough):
                calls(index, decoder, states[number])
    finally:
        handle.remove()
    ranks.sum_(totals)
    return totals


def _prune(moe, linears, statistics, config, report) -> None:
    targets = expert_targets(moe) if moe is not None else []
    targets += [Target(f"{name}.weight", linear.weight.data[None], name) for name, linear in linears.items()]
    if METHODS[config.method].calibrated:
        for target in targets:
            if target.statistic not in statistics:
                raise InputError(f"{target.name}: the calibration data never reached it, so it cannot be scored.")
    kept = report.kept_experts or range(moe.num_experts if moe is not None else 0)
    uncovered = [kept.index(expert) for expert in report.uncovered]
    left_dense = set(uncovered) if policy(config) == "skip" else set()
    sparsities = _allocate(moe, statistics, uncovered, config, report)
    for target in targets:
        moments, of_expert = statistics.get(target.statistic), sparsities
        dense = left_dense if target.statistic in ("hidden", "intermediate") else set()
        if target.expert is not None:
            moments = None if moments is None else moments[target.expert, None]
            dense = {0} if target.expert in dense else set()
            of_expert = sparsities and [sparsities[target.expert]]
        elif target.statistic not in ("hidden", "intermediate"):
            of_expert = None
        prune_weights_(target.weight_EOD, moments, config, dense, target.matrices, of_expert)
        stored = target.weight_EOD if target.weight_EOD.shape[0] > 1 else target.weight_EOD[0]
        report.tensors.append(tensor_report(target.name, stored))


def _allocate(moe, statistics, uncovered, config, report) -> list[float] | None:
    """A sparsity per expert, where they are not the same for all."""
    if config.allocation != "load" or moe is None:
        return None
    uncovered_E = torch.zeros(moe.num_experts, dtype=torch.bool)
    uncovered_E[uncovered] = True
    report.sparsity_per_expert = expert_sparsities(expert_targets(moe), statistics, config, uncovered_E)
    return report.sparsity_per_expert


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of a module are."""
    return next(module.parameters()).device


def _not_finite(name: str) -> str:
    return f"{name}: the output on the calibration data holds NaN or Inf; check the checkpoint and its dtype."
