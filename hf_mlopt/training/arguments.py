"""The fields that this package adds to `TrainingArguments`."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.training.optimizer_table import OPTIMIZERS, optimizer_entry


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class MLOptTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` and what names the methods of this package.

    Args:
        mlopt_optim (`str`, *optional*):
            Optimizer by name, in place of `optim`: `adamw`, `sgd`, `rsgd`, `rsgdm`, `rsgd-adamw`; with rounds `domo`,
            `domo-s`, `fedavg`, `fedavg-lm`, `fedavg-lm-z`, `fedavg-sm`, `fedavg-slm`, `fedavg-slm-z`, `slowmo`,
            `diloco`. It gets `learning_rate` and `weight_decay` from the other arguments.
        mlopt_optim_args (`dict` or `str`, *optional*):
            Further keywords of that optimizer, or a JSON object of them: `{"momentum": 0.9}`.
        local_steps (`int`, *optional*, defaults to 1):
            Optimizer steps that every rank takes alone before the models are averaged, with an optimizer with rounds.
        local_weights (`str`, *optional*, defaults to `"equal"`):
            Weight of a rank in that average: `equal`, or by its number of `examples`.
        per_rank_data (`bool`, *optional*, defaults to `False`):
            Whether the training data of a rank are its own (a silo) instead of a share of one data set.
        reset_local_state (`bool`, *optional*, defaults to `False`):
            On resuming, begin what a single rank has kept afresh: for another number of ranks or of local steps.
    """

    mlopt_optim: str | None = None
    mlopt_optim_args: dict[str, Any] | str | None = None
    local_steps: int = 1
    local_weights: Literal["equal", "examples"] = "equal"
    per_rank_data: bool = False
    reset_local_state: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.mlopt_optim_args, str):
            try:
                self.mlopt_optim_args = json.loads(self.mlopt_optim_args)
            except json.JSONDecodeError:
                pass  # refused below, with the text as it was given
        if self.local_steps < 1:
            raise ConfigurationError("local_steps", self.local_steps, "must be at least 1")
        if self.local_weights not in ("equal", "examples"):
            raise ConfigurationError("local_weights", self.local_weights, "must be equal or examples")
        if not isinstance(self.mlopt_optim_args, dict | None):
            raise ConfigurationError("mlopt_optim_args", self.mlopt_optim_args, "must be a dict or a JSON object")
        if self.mlopt_optim is not None:
            entry = optimizer_entry(self.mlopt_optim)
            if self.local_steps > 1 and not entry.has_rounds:
                names = ", ".join(sorted(name for name, entry in OPTIMIZERS.items() if entry.has_rounds))
                raise ConfigurationError("local_steps", self.local_steps, f"needs mlopt_optim to be one of {names}")
        elif self.mlopt_optim_args:
            raise ConfigurationError(
                "mlopt_optim_args", self.mlopt_optim_args, "needs mlopt_optim; optim has optim_args"
            )
