"""FedBN: what normalises a site's features stays at the site."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms.fedavg import FedAvg
from hf_mlopt.federated.algorithms.message import Message
from hf_mlopt.federated.algorithms.server import require


_NORMALIZATION = re.compile(r"Norm(alization)?(\d+d)?$")


class FedBN(FedAvg):
    """
    [FedBN: Federated Learning on Non-IID Features via Local Batch Normalization](https://huggingface.co/papers/2102.07623),
    Algorithm 1: [`FedAvg`] of all but the parameters of normalization layers, and without any buffer. What stays local
    is in no message: it is taken out of `init`, and a reply that holds it is refused.

    Args:
        local_names (`Sequence[str]`): Names of parameters that stay local, such as [`normalization_names`] finds, or
            patterns with `*`.
        options: Those of [`ServerAlgorithm`].
    """

    name = "fedbn"

    def __init__(self, local_names: Sequence[str], **options):
        super().__init__(**options)
        is_list = not isinstance(local_names, str) and len(local_names) > 0
        require("local_names", local_names, is_list, "give a list of names or patterns; without one take fedavg")
        self.local_names = list(local_names)

    @classmethod
    def options_for(cls, model: torch.nn.Module, args: Any) -> dict[str, Any]:
        """As [`ServerAlgorithm.options_for`]: the names of normalization layers."""
        return {"local_names": normalization_names(model)}

    def setup(self, sites: Sequence[str], init: Message, seed: int) -> None:
        weights = init.groups.get("weights", {})
        shared = shared_names(weights, self.local_names)
        if len(shared) == len(weights) or not shared:
            which = "no weight" if shared else "every weight"
            raise ConfigurationError(
                "local_names", self.local_names, f"fits {which} of the model; some must stay local"
            )
        super().setup(sites, Message({"weights": {name: weights[name] for name in shared}}), seed)


def shared_names(names: Iterable[str], local_names: Sequence[str]) -> list[str]:
    """Those of `names` that fit none of the patterns in `local_names`, in their order."""
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in local_names)]


def normalization_names(model: torch.nn.Module) -> list[str]:
    """
    Names of the parameters of normalization layers of any kind: of modules whose class name ends in `Norm`, maybe with
    a number of dimensions, such as `BatchNorm2d`, `LayerNorm` or `LlamaRMSNorm`.
    """
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if _NORMALIZATION.search(type(module).__name__)
        for name, _ in module.named_parameters(recurse=False)
    ]
