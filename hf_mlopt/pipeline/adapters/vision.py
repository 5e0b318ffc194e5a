"""What image classifiers have in common: hidden states take the place of the pixels."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_mlopt.pipeline.adapters.base import Adapter, Batch, Block, Tensors


class ImageBlock(Block):
    """Layers of an image classifier."""

    def forward(self, boundary: Tensors, batch: Batch) -> Tensors:
        boundary = self.from_before(boundary, 1)
        hidden_states = self.of_batch(batch, "pixel_values") if self.is_first else boundary[0]
        if not self.is_last:
            return (self.shell.base_model(pixel_values=hidden_states).last_hidden_state,)
        labels = self.of_batch(batch, "labels")
        logits = self.shell(pixel_values=hidden_states).logits
        config, items = self.shell.config, batch.get("num_items_in_batch")
        if items is None:
            return self.shell.loss_function(labels, logits, config), logits
        # transformers leaves the number of items out in the forward of ResNet, and in losses that are no
        # cross-entropy: a group of batches would have too large a gradient.
        loss = self.shell.loss_function(labels, logits, config, num_items_in_batch=items)
        if config.problem_type != "single_label_classification":
            loss = loss * labels.numel() / items
        return loss, logits


class ImageAdapter(Adapter):
    """An image classifier; a subclass says where its layers are."""

    image_size = 64  # of a random batch, where the configuration does not fix it

    def block(self, shell: nn.Module, start: int, stop: int) -> ImageBlock:
        return ImageBlock(shell, start == 0, stop == len(self.layers))

    def random_batch(self, shape: Sequence[int] | None = None) -> Batch:
        config = self.model.config
        size = getattr(config, "image_size", self.image_size)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = shape or (2, config.num_channels, height, width)
        labels = torch.randint(config.num_labels, (shape[0],))
        if config.problem_type == "multi_label_classification":
            labels = nn.functional.one_hot(labels, config.num_labels).float()
        elif config.problem_type == "regression" or config.num_labels == 1:
            labels = torch.randn(shape[0], config.num_labels)
        return {"pixel_values": torch.randn(*shape, dtype=next(self.model.parameters()).dtype), "labels": labels}
