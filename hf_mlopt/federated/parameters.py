"""What of a model travels, and how it gets in and out."""

import hashlib
from collections.abc import Iterable, Mapping

import torch

from hf_mlopt.federated.algorithms import Message


class SharedParameters:
    """
    The parameters of a model that are trained, tied ones once, and its persistent buffers. So of a model with adapters
    only these travel, and of a frozen part nothing. Half precision travels as float32, or the small steps of a server
    would be rounded away.

    Args:
        model (`torch.nn.Module`): The model; its tensors are written in place.
    """

    def __init__(self, model: torch.nn.Module):
        kept = model.state_dict().keys()
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        self._initial = _copies(self.tensors())

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """`weights` and, where there are, `buffers`: the model's own."""
        groups = {"weights": self.weights, "buffers": self.buffers}
        return {group: tensors for group, tensors in groups.items() if tensors}

    def message(self, names: Mapping[str, Iterable[str]] | None = None) -> Message:
        """
        Copies on the CPU of what the model holds.

        Args:
            names (`Mapping[str, Iterable[str]]`, *optional*): Of each group the names wanted; by default all.
        """
        tensors = self.tensors()
        wanted = tensors if names is None else names
        return Message({group: _copies({name: tensors[group][name] for name in wanted[group]}) for group in wanted})

    def initial(self) -> Message:
        """What the model held when this was made."""
        return Message(self._initial)

    @torch.no_grad()
    def load(self, *messages: Message) -> None:
        """
        Has the model hold what the messages say of `weights` and `buffers`, and be as it was built in all the rest: so
        that nothing is left of another site that has used the model.
        """
        for group, tensors in self.tensors().items():
            for name, tensor in tensors.items():
                given = [m.groups[group][name] for m in messages if name in m.groups.get(group, ())]
                tensor.copy_(given[-1] if given else self._initial[group][name])

    def layout(self) -> dict[str, str]:
        """Name to dtype and shape of all that travels; two sites can train together if theirs are equal."""
        return {
            name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            for tensors in self.tensors().values()
            for name, tensor in tensors.items()
        }

    def frozen_digest(self) -> str:
        """SHA-256 in hex over what does not travel and must be equal at all sites; "" if there is nothing."""
        if not self.frozen:
            return ""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.frozen.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _copies(tensors: Mapping) -> dict:
    if any(isinstance(value, Mapping) for value in tensors.values()):
        return {group: _copies(inner) for group, inner in tensors.items()}
    return {
        name: tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)
        if tensor.is_floating_point()
        else tensor.detach().to("cpu", copy=True)
        for name, tensor in tensors.items()
    }
