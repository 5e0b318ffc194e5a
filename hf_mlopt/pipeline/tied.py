r"""
A word embedding that is tied to the head, when the two are in different blocks.

The last block (K-1, with the head) **owns** the weight: its optimizer alone changes it. The first block holds a
**copy**, which it never trains. For worker 0 with m_0 batches in flight, and E(n) the first drain point after batch n
(the end of the feed at the latest), the rule is

- *gradient*: what the copy received in the backward of batch n is added to the owner's gradient in the owner's
  backward of batch `min(n + m_0, E(n) - 1)`, after that backward and before the update that may follow it. Worker 0
  makes the gradient of batch n in its local step n + m_0 and the owner is in the same step then, so no smaller lag
  exists without running the first worker ahead; at a drain the last m_0 gradients join the last update.
- *refresh*: with r = `refresh_every`, after the owner's update v, where r divides v or the update is the last before a
  drain, the copy becomes the owner's weight of version v. Worker 0 loads it after its own update v, that is after its
  backward of the last batch of that update's group, before its next forward.

Both are functions of n alone, so timing cannot change a result. Neither can wait in a circle: the owner sends the
gradient of its block of batch n before it waits for worker 0, and worker 0 sends the copy's before it waits for the
weight. With m_0 = 0 and r = 1 this *is* training the tied model. A copy's gradient is already divided by the number of
items of its own group, and counts in the norm that the owner clips.
"""

import copy

import torch
from torch import nn


def part_embeddings(model: nn.Module, blocks: list[nn.Module], mode: str) -> None:
    """
    Gives the first block a tensor of its own where model ties embedding and head; changes only the blocks.

    Args:
        model (`PreTrainedModel`): The model that was cut.
        blocks (`list[Block]`): Its blocks.
        mode (`str`): `"owner_lagged"` names the pair in `block.tied`; `"untie"` trains both, and gives the blocks a
            configuration with `tie_word_embeddings=False`.
    """
    embedding, head = embedding_and_head(model)
    if head is None or len(blocks) == 1:
        return
    last = {id(module): name for name, module in blocks[-1].named_modules()}
    first = {id(module): name for name, module in blocks[0].named_modules()}
    place = first[id(embedding)]
    own = copy.copy(embedding)
    weight = embedding.weight
    own._parameters = {"weight": nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)}
    blocks[0].set_submodule(place, own)
    for block in blocks:
        if mode == "owner_lagged":
            block.tied = (f"{place}.weight", f"{last[id(head)]}.weight")
        else:
            config = copy.deepcopy(model.config)
            config.tie_word_embeddings = False
            block.shell.config = block.shell.base_model.config = config


def embedding_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Input embedding and head of a model that ties them; else `(None, None)`."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        return model.get_input_embeddings(), head
    return None, None


def gradient_of_copy(block: nn.Module) -> torch.Tensor:
    """
    Takes the copy's gradient from the first block, whose optimizer then has none to use.

    Returns:
        `torch.Tensor`: `[vocabulary, hidden]`; zeros where the batch gave none.
    """
    weight = block.get_parameter(block.tied[0])
    gradient, weight.grad = weight.grad, None
    return torch.zeros_like(weight) if gradient is None else gradient


@torch.no_grad()
def add_to_owner(block: nn.Module, gradient: torch.Tensor) -> None:
    """Adds a copy's gradient, `[vocabulary, hidden]`, to the owner's in the last block."""
    weight = block.get_parameter(block.tied[1])
    gradient = gradient.to(weight.device, weight.dtype)
    weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)


def owner_weight(block: nn.Module) -> torch.Tensor:
    """The owner's weight in the last block as a copy to send, `[vocabulary, hidden]`."""
    return block.get_parameter(block.tied[1]).detach().clone()


@torch.no_grad()
def refresh_copy(block: nn.Module, weight: torch.Tensor) -> None:
    """Writes the owner's weight, `[vocabulary, hidden]`, into the copy in the first block."""
    block.get_parameter(block.tied[0]).copy_(weight)
