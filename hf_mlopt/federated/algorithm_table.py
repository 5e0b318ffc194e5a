"""Algorithms by the names that recipes use, made for a model and a roster."""

import inspect
from typing import TYPE_CHECKING, Any

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms import ALGORITHMS, FedBN, ServerAlgorithm, normalization_names
from hf_mlopt.optimizers.domo_variants import VARIANTS, Variant
from hf_mlopt.training.arguments import json_object


if TYPE_CHECKING:
    import torch

    from hf_mlopt.federated.arguments import FederatedTrainingArguments

# "fedavg" is FedAvg itself; DiLoCo is evaluated where its Nesterov step looks ahead, which no message carries.
_FAMILY = {name: variant for name, variant in VARIANTS.items() if name not in ("fedavg", "diloco")}
ALGORITHM_NAMES = sorted({*ALGORITHMS, *_FAMILY})
_FROM_VARIANT = ("server_momentum", "fusion", "fusion_at", "local_state", "server_lr", "server_unit")
_FROM_ARGUMENTS = {"fraction": "site_fraction", "min_sites": "min_sites", "weighting": "site_weights"}


def make_algorithm(args: "FederatedTrainingArguments", model: "torch.nn.Module") -> ServerAlgorithm:
    """
    The server's algorithm as the arguments say.

    Raises:
        ConfigurationError: If an option is unknown or out of range, or has an argument of its own.
    """
    variant = _FAMILY.get(args.algorithm)
    algorithm_cls = ALGORITHMS["domo" if variant else args.algorithm]
    options = {name: getattr(variant, name) for name in _FROM_VARIANT} if variant else {}
    if issubclass(algorithm_cls, FedBN):
        options["local_names"] = normalization_names(model)
    taken = set(inspect.signature(algorithm_cls).parameters) - {"options"}
    for key, value in (args.algorithm_args or {}).items():
        if key in _FROM_ARGUMENTS:
            raise ConfigurationError(f"algorithm_args.{key}", value, f"set {_FROM_ARGUMENTS[key]} instead")
        if key not in taken:
            remedy = f"{args.algorithm} takes {', '.join(sorted(taken - set(_FROM_ARGUMENTS))) or 'none'}"
            raise ConfigurationError(f"algorithm_args.{key}", value, remedy)
    common = {key: getattr(args, name) for key, name in _FROM_ARGUMENTS.items()}
    try:
        return algorithm_cls(**{**common, **options, **(args.algorithm_args or {})})
    except ConfigurationError as error:
        name = _FROM_ARGUMENTS.get(error.field, f"algorithm_args.{error.field}")
        raise ConfigurationError(name, error.value, str(error).partition(": ")[2]) from None


def local_optimizer(args: "FederatedTrainingArguments") -> tuple[str | None, dict[str, Any] | str | None]:
    """
    `mlopt_optim` and `mlopt_optim_args` of the local steps: what the arguments say, and where they say nothing what
    the algorithm is defined with.

    Raises:
        ConfigurationError: If the algorithm is not defined for the optimizer.
    """
    name, optim_args = args.mlopt_optim, args.mlopt_optim_args
    variant: Variant | None = _FAMILY.get(args.algorithm)
    if name in VARIANTS or name == "saef":
        raise ConfigurationError(
            "mlopt_optim", name, "exchanges of itself; name it as algorithm, or a local optimizer"
        )
    if variant is None and args.algorithm != "scaffold":
        return name, optim_args
    if name is None:
        momentum = variant.momentum if variant else 0.0
        name, optim_args = "sgd", optim_args or ({"momentum": momentum} if momentum else None)
    averages = variant is not None and variant.local_state == "average"
    if name != "sgd" and (variant is None or averages):
        why = "averages the momentum of SGD" if averages else "takes the change over the learning rates for a gradient"
        raise ConfigurationError("mlopt_optim", name, f"{args.algorithm} {why}; take sgd")
    if averages and not (json_object("mlopt_optim_args", optim_args) or {}).get("momentum"):
        raise ConfigurationError("mlopt_optim_args", optim_args, f"{args.algorithm} averages the momentum; give one")
    return name, optim_args
