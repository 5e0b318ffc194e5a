"""Whether a block gives the same numbers when its forward is repeated, which recomputation lives on."""

import torch
from torch import nn

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.adapters import adapter_of
from hf_mlopt.pipeline.adapters.base import Block
from hf_mlopt.pipeline.self_test import state_kept
from hf_mlopt.pipeline.stage import replayed


@torch.no_grad()
def require_replay(model: nn.Module, blocks: list[Block]) -> None:
    """
    Runs every block twice on a small batch with the same seed, dropout on.

    Args:
        model (`PreTrainedModel`): The whole model, in the mode that is to be trained; as before afterwards.
        blocks (`list[Block]`): From [`~hf_mlopt.pipeline.partition.split`].

    Raises:
        ConfigurationError: If the two differ, as where a module draws from a generator of its own.
    """
    device = next(model.parameters()).device
    batch = {name: x.to(device) for name, x in adapter_of(model).random_batch().items()}
    boundary = ()
    with state_kept(model):
        for number, block in enumerate(blocks):
            passes = []
            for _ in range(2):
                with replayed(0, number, 0, device):
                    passes.append(block(boundary, batch))
            first, second = passes
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                remedy = f"block {number} gives other numbers when its forward is repeated with the same seed (does a "
                remedy += "module draw from a generator of its own?); use torch's dropout, or pipeline_recompute=no"
                raise ConfigurationError("model", type(model).__name__, remedy)
            boundary = first
