"""
LoRA on expert matrices that keeps the zeros of a pruned model: what a token is multiplied by is
W + (W != 0) * scaling * B A, in training as in the model that is left when the adapters are merged.
"""

# E experts   H hidden   T tokens   K experts per token

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_mlopt.errors import InputError
from hf_mlopt.moe import moe_layers
from hf_mlopt.moe.expert_outputs import require_fused
from hf_mlopt.training.adapters import mask_adapters, wrapped_experts


def add_masked_lora(model: PreTrainedModel, rank: int, alpha: float | None = None, **settings) -> PeftModel:
    """
    Puts adapters on all expert matrices of a model and freezes everything else. Where a matrix is zero now, the
    adapters change nothing; peft's own merging (`merge_and_unload`) keeps to that too.

    Gate and up projections that are stored as one tensor share an adapter.

    Args:
        model ([`~transformers.PreTrainedModel`]): With fused experts; changed in place.
        rank (`int`): Rank of the update of each expert's matrix.
        alpha (`float`, *optional*): The update is scaled by `alpha / rank`; twice the rank by default.
        **settings: Further fields of [`~peft.LoraConfig`], such as `use_rslora` or `init_lora_weights`.

    Returns:
        [`~peft.PeftModel`]: To be trained, then given to [`merge_masked_lora`].

    Raises:
        InputError: If the model holds no mixture of experts, or one whose experts are not fused.
    """
    layers = moe_layers(model)
    require_fused(layers)
    names = [f"{layer.name}.{projection}" for layer in layers for projection in layer.projections]
    alpha = 2 * rank if alpha is None else alpha
    # Without the empty list peft adapts attention too, in families it knows.
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[], target_parameters=names, task_type="CAUSAL_LM", **settings
    )
    with warnings.catch_warnings():  # peft asks for an attribute that transformers has given another name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, config)
    return mask_adapters(adapted)


@torch.no_grad()
def merge_masked_lora(model: PeftModel) -> PreTrainedModel:
    """
    Writes into the base model what its experts are multiplied by, bit for bit, and takes the adapters off.

    Args:
        model ([`~peft.PeftModel`]): Of [`add_masked_lora`].

    Returns:
        [`~transformers.PreTrainedModel`]: The model it was made from, with new weights and the same zeros.

    Raises:
        InputError: If FSDP has sharded the model.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise InputError(
            "model: is sharded by FSDP; gather its state dict, load it into add_masked_lora of the student as it was, "
            "and merge that"
        )
    for weight, effective in _effective_weights(model):
        weight.copy_(effective)
    for wrapper in wrapped_experts(model).values():
        wrapper.zeros_hook.remove()
    return model.unload()


def count_revived(model: PeftModel) -> int:
    """Weights that are zero in the base model and not in what its experts are multiplied by; 0 unless masks fail."""
    return sum(int(effective[weight == 0].count_nonzero()) for weight, effective in _effective_weights(model))


@torch.no_grad()
def _effective_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Every adapted weight and what a forward pass multiplies by in its place: read in one, of a single token."""
    found = {}

    def read(experts, args):
        found.update({name: getattr(experts, name) for name in experts.parametrizations})

    for experts, wrapper in wrapped_experts(model).items():
        with _gathered(model, experts), experts.register_forward_pre_hook(read):
            down = experts.down_proj
            hidden_TH = down.new_zeros(1, down.shape[2 if experts.is_transposed else 1])
            index_TK = torch.zeros(1, 1, dtype=torch.long, device=down.device)
            wrapper(hidden_TH, index_TK, down.new_ones(1, 1))
            while found:
                name, effective = found.popitem()
                yield getattr(experts, name), effective


@contextmanager
def _gathered(model: nn.Module, experts: nn.Module) -> Iterator[None]:
    """Whole weights instead of the shards of FSDP2, if there are such."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule) and experts in set(unit.modules())]
    if not units:
        yield
        return
    units[-1].unshard()
    try:
        yield
    finally:
        units[-1].reshard()
