"""Optimizers by name, which `TrainingArguments(optim=...)` does not allow: its own list is closed."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from transformers import TrainingArguments

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.optimizers.domo_variants import VARIANTS


@dataclass(frozen=True)
class OptimizerEntry:
    """
    One row of the table.

    Args:
        name (`str`): Value of `mlopt_optim`.
        target (`str`): `module:Class`, imported when it is used.
        defaults (`Mapping[str, Any]`, *optional*): Keywords that differ from the class's own defaults.
        from_arguments (`Mapping`, *optional*): Keyword to the field, the tuple or the mapping of fields, of
            `TrainingArguments` that holds it.
        has_rounds (`bool`, *optional*, defaults to `False`): Whether it takes local steps and averages then.
        exchanges (`bool`, *optional*, defaults to `False`): Whether its step exchanges what DDP would reduce.
    """

    name: str
    target: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    from_arguments: Mapping[str, Any] = field(default_factory=dict)
    has_rounds: bool = False
    exchanges: bool = False

    def load(self) -> type:
        """Returns the optimizer class."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


_ADAM = {"betas": ("adam_beta1", "adam_beta2"), "eps": "adam_epsilon"}
_WRAPPER = "hf_mlopt.optimizers.rsgd_wrapper:RSGDWrapper"
_ENTRIES = (
    OptimizerEntry("adamw", "torch.optim:AdamW", from_arguments=_ADAM),
    OptimizerEntry("sgd", "torch.optim:SGD"),
    OptimizerEntry("rsgd", "hf_mlopt.optimizers.rsgd:RSGD"),
    OptimizerEntry("rsgdm", "hf_mlopt.optimizers.rsgd:RSGD", {"momentum": 0.9}),
    OptimizerEntry("rsgd-adamw", _WRAPPER, {"base": "AdamW"}, from_arguments={"base_args": _ADAM}),
    OptimizerEntry("saef", "hf_mlopt.communication.saef:SAEFOptimizer", {"momentum": 0.9}, exchanges=True),
    *(
        OptimizerEntry(
            name,
            "hf_mlopt.optimizers.domo:DOMO",
            {"variant": name},
            from_arguments={"base_args": _ADAM} if variant.base == "AdamW" else {},
            has_rounds=True,
        )
        for name, variant in VARIANTS.items()
    ),
)
OPTIMIZERS = {entry.name: entry for entry in _ENTRIES}

# Set through arguments of their own, which the schedule and the two weight-decay groups read.
_OWN_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def optimizer_entry(name: str) -> OptimizerEntry:
    """
    Looks an optimizer up.

    Raises:
        ConfigurationError: If the name is unknown; the message lists the known ones.
    """
    if name not in OPTIMIZERS:
        raise ConfigurationError("mlopt_optim", name, f"must be one of {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[name]


def optimizer_cls_and_kwargs(
    name: str, optim_args: Mapping[str, Any] | None, args: TrainingArguments
) -> tuple[type, dict[str, Any]]:
    """
    Resolves a name into what `Trainer(optimizer_cls_and_kwargs=...)` takes. Weight decay is absent from it: Trainer
    sets it per parameter group, and to 0 for biases and norms.

    Args:
        name (`str`): Name in the table.
        optim_args (`Mapping[str, Any]`, *optional*): Keywords of the optimizer; they win over the table's defaults.
        args (`TrainingArguments`): Holds `learning_rate` and whatever the entry takes from it.

    Returns:
        `tuple[type, dict]`: The class and its keywords.

    Raises:
        ConfigurationError: If the name or a keyword is unknown, or a keyword has an argument of its own.
    """
    entry = optimizer_entry(name)
    optimizer_cls = entry.load()
    fixed = {"variant", "base"} & set(entry.defaults)  # the name says these
    allowed = set(inspect.signature(optimizer_cls).parameters) - {"params", *_OWN_FIELDS} - fixed
    for key, value in (optim_args or {}).items():
        if key in _OWN_FIELDS:
            raise ConfigurationError(f"mlopt_optim_args.{key}", value, f"set {_OWN_FIELDS[key]} instead")
        if key not in allowed:
            remedy = f"{name} takes {', '.join(sorted(allowed))}"
            raise ConfigurationError(f"mlopt_optim_args.{key}", value, remedy)
    from_arguments = {key: _read(args, source) for key, source in entry.from_arguments.items()}
    keywords = {"lr": args.learning_rate, **entry.defaults, **from_arguments, **(optim_args or {})}
    if "base_args" in from_arguments and not (optim_args or {}).get("base"):
        keywords["base_args"] = {**from_arguments["base_args"], **((optim_args or {}).get("base_args") or {})}
    return optimizer_cls, keywords


def _read(args: TrainingArguments, source: str | tuple | Mapping):
    if isinstance(source, Mapping):
        return {key: _read(args, value) for key, value in source.items()}
    return tuple(getattr(args, name) for name in source) if isinstance(source, tuple) else getattr(args, source)
