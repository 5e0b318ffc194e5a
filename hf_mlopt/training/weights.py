"""Reading back the weights of a checkpoint whose names on disk are not those of the model's parameters."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel


def load_converted_weights(model, folder: str | Path) -> bool:
    """
    Loads a checkpoint that stores its tensors under the original Hub names, as `save_pretrained` writes fused experts.

    `Trainer` matches names only: resuming a mixture of experts, it leaves every expert as it was before the run and
    merely warns (transformers#48805). Here `from_pretrained` converts, at the price of a second copy in host memory.

    Args:
        model (`torch.nn.Module`): The model, changed in place.
        folder (`str` or `Path`): The checkpoint.

    Returns:
        `bool`: `False`, with nothing loaded, where the names agree or `model` is no `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    stored = set()
    for file in Path(folder).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            stored.update(shard.keys())
    if stored <= set(model.state_dict()):
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # wide enough for a router kept in float32
    model.load_state_dict(type(model).from_pretrained(folder, dtype=dtype).state_dict())
    return True
