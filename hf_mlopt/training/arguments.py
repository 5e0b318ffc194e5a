"""The fields that this package adds to `TrainingArguments`."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.training.optimizer_table import optimizer_entry


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class MLOptTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` and what names the methods of this package.

    Args:
        mlopt_optim (`str`, *optional*):
            Optimizer by name, in place of `optim`: `adamw` or `sgd`. It gets `learning_rate` and `weight_decay` from
            the other arguments.
        mlopt_optim_args (`dict` or `str`, *optional*):
            Further keywords of that optimizer, or a JSON object of them: `{"momentum": 0.9}`.
    """

    mlopt_optim: str | None = None
    mlopt_optim_args: dict[str, Any] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.mlopt_optim_args, str):
            try:
                self.mlopt_optim_args = json.loads(self.mlopt_optim_args)
            except json.JSONDecodeError:
                pass  # refused below, with the text as it was given
        if not isinstance(self.mlopt_optim_args, dict | None):
            raise ConfigurationError("mlopt_optim_args", self.mlopt_optim_args, "must be a dict or a JSON object")
        if self.mlopt_optim is not None:
            optimizer_entry(self.mlopt_optim)
        elif self.mlopt_optim_args:
            raise ConfigurationError(
                "mlopt_optim_args", self.mlopt_optim_args, "needs mlopt_optim; optim has optim_args"
            )
