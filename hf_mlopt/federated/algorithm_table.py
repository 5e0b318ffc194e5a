"""Algorithms by the names that recipes use, made for a model and a roster."""

import dataclasses
import inspect
import logging
from typing import TYPE_CHECKING, Any

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated.algorithms import (
    ALGORITHMS,
    AutoFedRL,
    FedSM,
    MaskedFedSM,
    Message,
    SearchSpace,
    ServerAlgorithm,
)
from hf_mlopt.federated.selector_model import selector_weights
from hf_mlopt.optimizers.domo_variants import VARIANTS, Variant
from hf_mlopt.training.arguments import json_object


if TYPE_CHECKING:
    import torch

    from hf_mlopt.federated.arguments import FederatedTrainingArguments

logger = logging.getLogger(__name__)

# "fedavg" is FedAvg itself; DiLoCo is evaluated where its Nesterov step looks ahead, which no message carries.
_FAMILY = {name: variant for name, variant in VARIANTS.items() if name not in ("fedavg", "diloco")}
ALGORITHM_NAMES = sorted({*ALGORITHMS, *_FAMILY})
_FROM_VARIANT = ("server_momentum", "fusion", "fusion_at", "local_state", "server_lr", "server_unit")
# What an algorithm may start with beside the model: (model, number of sites, seed) to the group.
_STARTS = {"selector": selector_weights}
_FROM_ARGUMENTS = {"fraction": "site_fraction", "min_sites": "min_sites", "weighting": "site_weights"}


def make_algorithm(args: "FederatedTrainingArguments", model: "torch.nn.Module") -> ServerAlgorithm:
    """
    The server's algorithm as the arguments say; with `auto_fedrl` in its wrapper.

    Raises:
        ConfigurationError: If an option is unknown or out of range, or has an argument of its own.
    """
    variant = _FAMILY.get(args.algorithm)
    algorithm_cls = ALGORITHMS["domo" if variant else args.algorithm]
    options = {name: getattr(variant, name) for name in _FROM_VARIANT} if variant else {}
    options |= algorithm_cls.options_for(model, args)
    if algorithm_cls is FedSM and args.secure_sum:
        algorithm_cls = MaskedFedSM
    taken = set(inspect.signature(algorithm_cls).parameters) - {"options"}
    for key, value in (args.algorithm_args or {}).items():
        if key in _FROM_ARGUMENTS:
            raise ConfigurationError(f"algorithm_args.{key}", value, f"set {_FROM_ARGUMENTS[key]} instead")
        if key not in taken:
            remedy = f"{args.algorithm} takes {', '.join(sorted(taken - set(_FROM_ARGUMENTS))) or 'none'}"
            raise ConfigurationError(f"algorithm_args.{key}", value, remedy)
    common = {key: getattr(args, name) for key, name in _FROM_ARGUMENTS.items()}
    try:
        algorithm = algorithm_cls(**{**common, **options, **(args.algorithm_args or {})})
    except ConfigurationError as error:
        name = _FROM_ARGUMENTS.get(error.field, f"algorithm_args.{error.field}")
        raise ConfigurationError(name, error.value, str(error).partition(": ")[2]) from None
    return algorithm if args.auto_fedrl is None else _tuned(algorithm, args)


def first_message(
    algorithm: ServerAlgorithm, init: Message, model: "torch.nn.Module", num_sites: int, seed: int
) -> Message:
    """What `setup` of an algorithm takes: `init`, which is the model's, and the groups that it starts with beside."""
    made = {group: _STARTS[group](model, num_sites, seed) for group in algorithm.starts_with}
    return Message({**init.groups, **made}, init.scalars)


def corrects_gradients(args: "FederatedTrainingArguments") -> bool:
    """Whether the algorithm has sites add to gradients; of the DOMO family, to every step."""
    variant = _FAMILY.get(args.algorithm)
    if variant is None:
        return ALGORITHMS[args.algorithm].corrects_gradients
    return (args.algorithm_args or {}).get("fusion_at", variant.fusion_at) == "step"


def auto_fedrl_parts(given: dict[str, Any]) -> tuple[SearchSpace, dict[str, Any]]:
    """
    The search space that `auto_fedrl` of the arguments names, and the further options of [`AutoFedRL`].

    Raises:
        ConfigurationError: If a key is unknown, or a range is none.
    """
    ranges = {field.name for field in dataclasses.fields(SearchSpace)} - {"kind"}
    options = set(inspect.signature(AutoFedRL).parameters) - {"inner", "space"}
    for key, value in given.items():
        if key not in {"search_space", *ranges, *options}:
            known = ", ".join(sorted({"search_space", *ranges, *options}))
            raise ConfigurationError(f"auto_fedrl.{key}", value, f"Auto-FedRL takes {known}")
    chosen = {key: value for key, value in given.items() if key in ranges}
    if chosen.get("local_steps") is not None:
        chosen.setdefault("local_epochs", None)
    try:
        space = SearchSpace(given.get("search_space", "log"), **chosen)
    except ConfigurationError as error:
        raise ConfigurationError(f"auto_fedrl.{error.field}", error.value, str(error).partition(": ")[2]) from None
    return space, {key: value for key, value in given.items() if key in options}


def _tuned(algorithm: ServerAlgorithm, args: "FederatedTrainingArguments") -> AutoFedRL:
    space, options = auto_fedrl_parts(args.auto_fedrl)
    if space.local_epochs is not None and args.local_steps is not None:
        remedy = "local_steps is fixed; set local_epochs to null in auto_fedrl, or search local_steps there"
        raise ConfigurationError("local_steps", args.local_steps, remedy)
    try:
        return AutoFedRL(algorithm, space, **options)
    except ConfigurationError as error:
        name = "site_weights" if error.field == "weighting" else f"auto_fedrl.{error.field}"
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
    kind = ALGORITHMS["domo" if variant else args.algorithm]
    if name in VARIANTS or name == "saef":
        raise ConfigurationError(
            "mlopt_optim", name, "exchanges of itself; name it as algorithm, or a local optimizer"
        )
    if variant is None and not kind.needs_sgd:
        return name, optim_args
    optim_args = json_object("mlopt_optim_args", optim_args) or {}
    if name in (None, "sgd"):
        name, momentum = "sgd", variant.momentum if variant else 0.0
        optim_args = {"momentum": momentum, **optim_args} if momentum else optim_args
    averages = variant is not None and variant.local_state == "average"
    if name != "sgd" and (variant is None or averages):
        why = "averages the momentum of SGD" if averages else kind.needs_sgd
        raise ConfigurationError("mlopt_optim", name, f"{args.algorithm} {why}; take sgd")
    if averages and not optim_args.get("momentum"):
        raise ConfigurationError("mlopt_optim_args", optim_args, f"{args.algorithm} averages the momentum; give one")
    if kind.needs_plain_sgd and (optim_args.get("momentum") or args.max_grad_norm):
        remedy = "which momentum and clipping falsify: set max_grad_norm to 0, and no momentum"
        logger.warning("%s %s, %s", args.algorithm, kind.needs_sgd, remedy)
    return name, optim_args or None
