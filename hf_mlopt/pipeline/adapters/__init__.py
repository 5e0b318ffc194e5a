"""How models of each family are cut into blocks."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.adapters.base import Adapter, Block
from hf_mlopt.pipeline.adapters.decoder import DecoderAdapter
from hf_mlopt.pipeline.adapters.gpt2 import GPT2Adapter
from hf_mlopt.pipeline.adapters.resnet import ResNetAdapter
from hf_mlopt.pipeline.adapters.vit import ViTAdapter
from hf_mlopt.pipeline.tied import part_embeddings


_BY_CLASS = {
    "GPT2LMHeadModel": GPT2Adapter,
    "ResNetForImageClassification": ResNetAdapter,
    "ViTForImageClassification": ViTAdapter,
}
# Causal language models whose cut our tests compare with the whole; others must pass the self-test first.
TESTED = {"gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "resnet", "vit"}


def adapter_of(model: nn.Module, moe_aux: str = "exact") -> Adapter:
    """
    Args:
        model (`PreTrainedModel`): Model to cut.
        moe_aux (`str`, *optional*, defaults to `"exact"`): See [`hf_mlopt.pipeline.partition.split`].

    Returns:
        [`Adapter`]: Of its family; the one of decoders where none is known.

    Raises:
        ConfigurationError: If the model is none of transformers', or its layout is not understood.
    """
    if moe_aux not in ("exact", "block"):
        raise ConfigurationError("moe_aux", moe_aux, 'must be "exact" or "block"')
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            "model", type(model).__name__, "must be a model of transformers, without wrappers such as PEFT or DDP"
        )
    adapter = _BY_CLASS.get(type(model).__name__, DecoderAdapter)
    return adapter(model, moe_aux) if issubclass(adapter, DecoderAdapter) else adapter(model)


def cut(adapter: Adapter, bounds: Sequence[int], tied: str = "owner_lagged") -> list[Block]:
    """
    Blocks of a model, with a tied embedding parted and nothing else shared.

    Raises:
        ConfigurationError: If the bounds are wrong, or two blocks would train one parameter.
    """
    if tied not in ("owner_lagged", "untie"):
        raise ConfigurationError("tied", tied, 'must be "owner_lagged" or "untie"')
    blocks = adapter.cut(bounds)
    part_embeddings(adapter.model, blocks, tied)
    holder = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if holder.setdefault(id(parameter), number) != number:
                raise ConfigurationError(
                    "model",
                    adapter.model.config.model_type,
                    f"{name} would be trained by blocks {holder[id(parameter)]} and {number}: only a word embedding "
                    "tied to the head can be shared; train this model without a pipeline",
                )
    return blocks
