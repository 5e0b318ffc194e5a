"""Whether a student can learn from a teacher, told from their shapes alone."""

from accelerate.state import AcceleratorState
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError
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
    differing = differences(sizes(student), sizes(teacher))
    if differing:
        raise InputError(
            f"teacher: does not fit the student, which have {differing}. Give the model that the student was pruned "
            "from, with all its experts"
        )


def differences(ours: dict, theirs: dict) -> str:
    """What differs between the [`sizes`] of two models, in words, both values named; empty if nothing does."""
    return "; ".join(f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name])


def require_zeros(layers: list[MoELayer]) -> None:
    """Raises `InputError` if no expert matrix of a model counts as pruned."""
    matrices = [layer.stacked(projection) for layer in layers for projection in layer.projections]
    most = max(sparsity_of(matrix) for matrix in matrices)
    if most < MIN_SPARSITY:
        raise InputError(
            f"student: its experts are dense ({100 * most:.1f} % zeros at most), so there is no mask to keep; give a "
            "pruned model, or --allow-dense (allow_dense=True) to train all weights"
        )


def require_supported(state: AcceleratorState, num_gpus: int) -> None:
    """
    Raises `InputError` for ways to train in which outputs of experts or masks would be lost.

    Args:
        state (`AcceleratorState`): Of the run.
        num_gpus (`int`): GPUs that this one process trains on.
    """
    if num_gpus > 1:
        raise InputError(
            f"one process sees {num_gpus} GPUs and would copy the model to all of them at every step; start it with "
            "`accelerate launch`, or let it see one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise ConfigurationError("distributed_type", "DEEPSPEED", "must be FSDP or MULTI_GPU for distillation")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigurationError("fsdp_version", plugin.fsdp_version, "must be 2 for distillation")


def sizes(model: nn.Module) -> dict:
    """Everything in which a student must agree with its teacher, in words and JSON-able."""
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
