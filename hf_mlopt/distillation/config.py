"""What a layer-wise distillation is given. Importing this needs no torch."""

import math
from dataclasses import dataclass

from hf_mlopt.errors import ConfigurationError


@dataclass
class LayerwiseConfig:
    """
    How each layer's experts are trained to give what the teacher's give.

    Args:
        epochs (`float`, *optional*, defaults to 3.0): Times the training windows are gone through.
        learning_rate (`float`, *optional*, defaults to 1e-4): The highest learning rate of AdamW.
        batch_size (`int`, *optional*, defaults to 8): Windows per step.
        warmup_ratio (`float`, *optional*, defaults to 0.03): Share of the steps in which the learning rate rises; it
            falls to 0 as a cosine in the others.
        weight_decay (`float`, *optional*, defaults to 0.0): As in AdamW.
        seed (`int`, *optional*, defaults to 0): Seed of the order of windows.
    """

    epochs: float = 3.0
    learning_rate: float = 1e-4
    batch_size: int = 8
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(name, value, "must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigurationError("warmup_ratio", self.warmup_ratio, "must be at least 0 and below 1")
        for name, least in (("batch_size", 1), ("weight_decay", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(name, getattr(self, name), f"must be at least {least}")
