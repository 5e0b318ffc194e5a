"""Whether a student can learn from a teacher, told from their shapes alone."""

from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.moe import MoELayer, decoder_layers, moe_layers
from hf_mlopt.moe.expert_outputs import require_fused
from hf_mlopt.moe.layers import text_config
from hf_mlopt.training.callbacks import MIN_SPARSITY, sparsity_of


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """
    Refuses a teacher whose experts are not those of the student one by one.

    Args:
        student, teacher (`nn.Module`): Causal language models; may live on the meta device.

    Raises:
        InputError: If one is no mixture of experts, or they differ in vocabulary, decoder layers, hidden size, experts
            or routing. All differences are named with both sizes.
    """
    sizes = [_sizes(model) for model in (student, teacher)]
    differing = [
        f"{name} {ours} and {theirs}"
        for (name, ours), theirs in zip(sizes[0].items(), sizes[1].values(), strict=True)
        if ours != theirs
    ]
    if differing:
        raise InputError(
            f"teacher: does not fit the student, which have {'; '.join(differing)}. Give the model that the student "
            "was pruned from, with all its experts"
        )


def require_zeros(layers: list[MoELayer]) -> None:
    """Raises `InputError` if no expert matrix of a model counts as pruned."""
    matrices = [layer.stacked(projection) for layer in layers for projection in layer.projections]
    most = max(sparsity_of(matrix) for matrix in matrices)
    if most < MIN_SPARSITY:
        raise InputError(
            f"student: its experts are dense ({100 * most:.1f} % zeros at most), so there is no mask to keep; give a "
            "pruned model, or --allow-dense (allow_dense=True) to train all weights"
        )


def _sizes(model: nn.Module) -> dict:
    layers = moe_layers(model)
    require_fused(layers)
    config = text_config(model)
    return {
        "a vocabulary of": config.vocab_size,
        "decoder layers": len(decoder_layers(model, layers)[1]),
        "hidden size": config.hidden_size,
        "mixture-of-experts layers at": [layer.index for layer in layers],
        "experts per layer": _one([layer.num_experts for layer in layers]),
        "experts per token": _one([layer.top_k for layer in layers]),
    }


def _one(values: list):
    return values[0] if len(set(values)) == 1 else values
