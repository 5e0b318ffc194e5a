"""The fields that this package adds to `TrainingArguments`."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from hf_mlopt.communication.config import EXEMPT
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.training.combinations import refusal
from hf_mlopt.training.compression import compression_config
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
        keep_zeros (`bool`, *optional*, defaults to `False`):
            Whether the zeros of a pruned model stay zeros, see [`KeepZerosCallback`]; adapters of its expert matrices
            then change nothing there. They are filled without.
        reset_local_state (`bool`, *optional*, defaults to `False`):
            On resuming, begin what a single rank has kept afresh: for another number of ranks or of local steps.
        grad_codec (`str`, *optional*):
            Codec in which gradients travel between DDP ranks: `bingrad-b`, `orq-9`, `orq-5-optimal`, `sign`, `bf16`...
        grad_codec_down (`str`, *optional*):
            Codec in which their means travel back; by default the same.
        grad_codec_args (`dict` or `str`, *optional*):
            Settings of the codecs, or a JSON object of them: `{"block": 1024}`.
        error_feedback (`str`, *optional*, defaults to `"none"`):
            `none`, `classic` or `step-ahead`: what becomes of what a codec did not send.
        grad_collective (`str`, *optional*, defaults to `"auto"`):
            `auto`, `two-phase`, `all-gather`, or `hierarchical`: coded between machines, float32 inside one.
        step_ahead (`float`, *optional*, defaults to 0.1):
            Coefficient of the step ahead, between 0 (`classic`) and 1.
        error_average_period (`int`, *optional*, defaults to 0):
            Steps between two averages over the ranks of what was not sent; 0 is never.
        warmup_steps_uncompressed (`int`, *optional*, defaults to 1):
            Steps before the first compressed one.
        compress_min_bytes (`int`, *optional*, defaults to 16384):
            Gradients of a bucket smaller than this travel in float32.
        compress_exempt (`list[str]`, *optional*, defaults to `["1d", "embeddings", "head"]`):
            Parameters that travel in float32: vectors, embeddings, the head, or parts of names.
        compress_auto_off (`bool`, *optional*, defaults to `False`):
            Whether gradients go on in bf16 where the codec does not pay on this link; without, a warning says so.
    """

    mlopt_optim: str | None = None
    mlopt_optim_args: dict[str, Any] | str | None = None
    local_steps: int = 1
    local_weights: Literal["equal", "examples"] = "equal"
    per_rank_data: bool = False
    keep_zeros: bool = False
    reset_local_state: bool = False
    grad_codec: str | None = None
    grad_codec_down: str | None = None
    grad_codec_args: dict[str, Any] | str | None = None
    error_feedback: Literal["none", "classic", "step-ahead"] = "none"
    grad_collective: Literal["auto", "two-phase", "all-gather", "hierarchical"] = "auto"
    step_ahead: float = 0.1
    error_average_period: int = 0
    warmup_steps_uncompressed: int = 1
    compress_min_bytes: int = 16384
    compress_exempt: list[str] = field(default_factory=lambda: list(EXEMPT))
    compress_auto_off: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("mlopt_optim_args", "grad_codec_args"):
            setattr(self, name, json_object(name, getattr(self, name)))
        if self.local_steps < 1:
            raise ConfigurationError("local_steps", self.local_steps, "must be at least 1")
        if self.local_weights not in ("equal", "examples"):
            raise ConfigurationError("local_weights", self.local_weights, "must be equal or examples")
        if self.mlopt_optim is not None:
            entry = optimizer_entry(self.mlopt_optim)
            if self.local_steps > 1 and not entry.has_rounds:
                names = ", ".join(sorted(name for name, entry in OPTIMIZERS.items() if entry.has_rounds))
                raise ConfigurationError("local_steps", self.local_steps, f"needs mlopt_optim to be one of {names}")
            if self.keep_zeros and entry.exchanges:
                raise refusal("masks", "saef", True)
        elif self.mlopt_optim_args:
            raise ConfigurationError(
                "mlopt_optim_args", self.mlopt_optim_args, "needs mlopt_optim; optim has optim_args"
            )
        compression_config(self)  # its own checks


def json_object(name: str, value: dict | str | None) -> dict | None:
    """A field that is a dict, or a JSON object as the command line gives it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # refused below, with the text as it was given
    if not isinstance(value, dict | None):
        raise ConfigurationError(name, value, "must be a dict or a JSON object")
    return value
