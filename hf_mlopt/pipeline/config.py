"""What a user may decide about pipeline training."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.schedule import SYNCHRONOUS, parse


@dataclass
class PipelineConfig:
    """
    Training of a model cut into stages, each on a worker of its own.

    Args:
        stages (`int`, *optional*, defaults to 2): Workers of a pipeline, K.
        mode (`str`, *optional*, defaults to `"auto"`): `auto` measures the stages and takes the least staleness that
            leaves no bubble; `lag1`, `dsp`, `dsp:4,2,0` (batches in flight at each stage), `dsp:1,1,0;4,2,0` (with
            the lengths of the feature queues), `fr`, `bp`; `gpipe` and `1f1b` flush at every update.
        recompute (`str`, *optional*, defaults to `"auto"`): `yes` repeats the forward with the weights of the
            backward: exact gradients but for stale inputs. `no` keeps the graph: faster, more memory, and a different
            estimator (old activations, new weights; under autocast, old casts of them too). `auto` is `yes` unless a
            plan says otherwise.
        predict (`str`, *optional*, defaults to `"momentum"`): Forward with the weights expected at the time of the
            backward: `momentum`, `adam` (the last update, continued), or `none`.
        predict_limit (`float`, *optional*, defaults to 0.1): Prediction is left out for a batch where it would move
            the weights by more than this share of their norm.
        update_every (`int`, *optional*, defaults to 4): Batches of an update.
        queue (`str`, *optional*, defaults to `"deterministic"`): `free` takes a gradient as soon as it is there; the
            result then depends on timing.
        transport (`str`, *optional*, defaults to `"gloo"`): `gloo`, `nccl`, or `local`: threads of one process.
        clip (`str`, *optional*, defaults to `"block"`): The norm that `max_grad_norm` bounds: that of the stage's own
            gradient, or with `lagged_global` that of all stages' some updates ago.
        max_grad_norm (`float`, *optional*, defaults to 0.0): Bound of the gradient norm; 0 is none.
        tied (`str`, *optional*, defaults to `"owner_lagged"`): Weights shared by the first and the last stage: the
            last owns them and the first holds a lagged copy; `untie`; `colocate` puts both uses on one worker.
        moe_aux (`str`, *optional*, defaults to `"exact"`): Load-balancing loss of a mixture of experts over all
            layers, or with `block` over those of each stage.
        seed (`int`, *optional*, defaults to 0): Of dropout.
        timeout_seconds (`float`, *optional*, defaults to 600.0): How long a stage waits for a neighbour.

    Raises:
        ConfigurationError: For a value out of range, or a vector that cannot run.
    """

    stages: int = 2
    mode: str = "auto"
    recompute: Literal["auto", "yes", "no"] = "auto"
    predict: Literal["momentum", "adam", "none"] = "momentum"
    predict_limit: float = 0.1
    update_every: int = 4
    queue: Literal["deterministic", "free"] = "deterministic"
    transport: Literal["gloo", "nccl", "local"] = "gloo"
    clip: Literal["block", "lagged_global"] = "block"
    max_grad_norm: float = 0.0
    tied: Literal["owner_lagged", "untie", "colocate"] = "owner_lagged"
    moe_aux: Literal["exact", "block"] = "exact"
    seed: int = 0
    timeout_seconds: float = 600.0

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if get_args(kind) and getattr(self, name) not in get_args(kind):
                raise ConfigurationError(name, getattr(self, name), f"must be one of {', '.join(get_args(kind))}")
        for name in ("stages", "update_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(name, getattr(self, name), "must be at least 1")
        for name in ("timeout_seconds", "predict_limit"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigurationError(name, getattr(self, name), "must be a positive number")
        if not (self.max_grad_norm >= 0 and math.isfinite(self.max_grad_norm)):
            raise ConfigurationError("max_grad_norm", self.max_grad_norm, "must be 0 (no clipping) or a bound")
        if self.mode not in ("auto", *SYNCHRONOUS):
            parse(self.mode, self.stages)
        if self.mode in SYNCHRONOUS and self.queue == "free":
            raise ConfigurationError("queue", self.queue, f"mode={self.mode} has a fixed order: use deterministic")
        if self.clip == "lagged_global" and self.queue == "free":
            raise ConfigurationError("clip", self.clip, "needs queue=deterministic: the lag must be known")
