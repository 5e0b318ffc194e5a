"""What an expert-wise distillation adds to the arguments of a Trainer."""

import math
from dataclasses import dataclass

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.training import MLOptTrainingArguments


@dataclass(repr=False)
class DistillationArguments(MLOptTrainingArguments):
    """
    Arguments of [`ExpertDistillationTrainer`].

    Args:
        lmbda (`float`, *optional*): Weight of the experts' mean squared error. By default the ratio of cross-entropy
            to that error on the first step's batches, as in the paper; 0 is plain fine-tuning with a mask.
        logit_weight (`float`, *optional*, defaults to 0.0): Weight of the KL divergence from the teacher's logits.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits of that divergence.
        freeze_router (`bool`, *optional*, defaults to `False`): Whether routers keep their weights.
        router_aux_loss (`bool`, *optional*, defaults to `True`): Whether the load-balancing loss is added, with the
            coefficient of the model's configuration.
        allow_dense (`bool`, *optional*, defaults to `False`): Whether a student without zeros is accepted.
        lora_rank (`int`, *optional*): Train adapters of this rank on the expert matrices, and nothing else; see
            [`add_masked_lora`].
        lora_alpha (`float`, *optional*): The adapters are scaled by `lora_alpha / lora_rank`; twice the rank by
            default.
    """

    lmbda: float | None = None
    logit_weight: float = 0.0
    temperature: float = 1.0
    freeze_router: bool = False
    router_aux_loss: bool = True
    allow_dense: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None

    def __post_init__(self):
        self.keep_zeros = self.lora_rank is None  # what adapters start from has zeros too, which are not to be kept
        super().__post_init__()
        for name in ("lmbda", "logit_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigurationError(name, value, "must be at least 0")
        if not self.average_tokens_across_devices:
            raise ConfigurationError("average_tokens_across_devices", False, "must be True for distillation")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigurationError("temperature", self.temperature, "must be above 0")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigurationError("lora_rank", self.lora_rank, "must be at least 1")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ConfigurationError("lora_alpha", self.lora_alpha, "needs lora_rank")
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # since, and until, 5.2x
            keywords = getattr(self, name, None)
            if keywords is not None and keywords.get("use_reentrant") is not False:
                allowed = 'must hold "use_reentrant": false; the other kind drops the gradient of the experts\' error'
                raise ConfigurationError(name, keywords, allowed)
