"""The pass over the dense model that tells how much each of its layers can lose (OWL)."""

from dataclasses import replace

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.pruning.allocation import outlier_fraction, owl_sparsities
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.states import LayerCalls
from hf_mlopt.pruning.sweep import LayerSource, observe_layer
from hf_mlopt.pruning.targets import expert_targets, linear_layers


@torch.no_grad()
def layer_sparsities(source: LayerSource, states, calls: LayerCalls, config: PruningConfig, progress) -> list[float]:
    """
    Runs the dense model once and gives every decoder layer a sparsity, [OWL](https://huggingface.co/papers/2310.05175).

    Args:
        source, states, calls, progress: As in [`~pruning.sweep.sweep`]; the states are used up.
        config (`PruningConfig`): Method, sparsity, scope.

    Returns:
        `list[float]`: One per decoder layer; those without weights in scope get the mean.
    """
    # Diagonal moments and plain outputs are all that is wanted; and no outputs are held beside the states.
    diagonal = {"sparsegpt": "wanda", "sparsegpt-gated": "moe-pruner"}
    config = replace(config, method=diagonal.get(config.method, config.method), drop_experts=0.0, propagate="pruned")
    measured = {}
    for index in progress(range(len(source))):
        name, decoder, moe = source.load(index)
        try:
            linears = linear_layers(decoder, name, moe) if config.scope == "all-linear" else {}
            if moe is not None or linears:
                moments, statistics, _ = observe_layer(name, index, decoder, moe, linears, states, calls, config)
                parts = [(linear.weight.data[None], _known(statistics, name)) for name, linear in linears.items()]
                for target in expert_targets(moe) if moe is not None else ():
                    of_expert = slice(None) if target.expert is None else slice(target.expert, target.expert + 1)
                    parts.append((target.weight_EOD, moments.sums[target.statistic][of_expert]))
                measured[index] = outlier_fraction(parts), sum(weight.numel() for weight, _ in parts)
            for number in range(len(states) if index + 1 < len(source) else 0):
                states[number] = calls(index, decoder, states[number])
        finally:
            source.store(index, changed=False)
        states.advance()
        states.forget_earlier()
    fractions, sizes = zip(*measured.values(), strict=True)
    given = dict(zip(measured, owl_sparsities(fractions, config.sparsity, sizes), strict=True))
    return [given.get(index, config.sparsity) for index in range(len(source))]


def _known(statistics: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in statistics:
        raise InputError(f"{name}.weight: the calibration data never reached it, so it cannot be scored.")
    return statistics[name]
