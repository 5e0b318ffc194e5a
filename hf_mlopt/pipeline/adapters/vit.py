"""ViT for image classification."""

import torch
from torch import nn

from hf_mlopt.pipeline.adapters.base import PassThrough
from hf_mlopt.pipeline.adapters.vision import ImageAdapter


class NoPatches(PassThrough):
    """Stands for the embedding; the model reads the dtype of its projection."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Module()
        # A buffer, so that it follows `block.to(dtype)`.
        self.patch_embeddings.projection.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)


class ViTAdapter(ImageAdapter):
    """`ViTForImageClassification`."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.layers = [f"vit.layers.{i}" for i in range(len(model.vit.layers))]
        dtype = model.vit.embeddings.patch_embeddings.projection.weight.dtype
        self.inputs = {"vit.embeddings": NoPatches(dtype)}
        self.outputs = {"vit.layernorm": PassThrough(), "classifier": PassThrough()}
