"""`hf-mlopt distill`: a pruned checkpoint and the model it was pruned from in, a distilled checkpoint out."""

from dataclasses import dataclass, fields
from typing import Literal

from hf_mlopt.data import CalibrationConfig
from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.errors import ConfigurationError


_LEARNING_RATE = {"end-to-end": 2e-5, "layerwise": 1e-4}  # the first is the paper's


@dataclass
class DistillRecipe:
    """
    Everything one run of `hf-mlopt distill` is given; the keys of a recipe.

    Args:
        student (`str`): Local directory or Hub id of the pruned checkpoint.
        teacher (`str`): Local directory or Hub id of the model it was pruned from.
        output (`str`): Directory to write; must be absent or empty.
        mode (`str`, *optional*, defaults to `"layerwise"`): `layerwise` trains one decoder layer at a time on the
            outputs of its experts, and never holds more than a layer of each model; `end-to-end` trains the whole
            model on cross-entropy and the outputs of all experts.
        student_revision (`str`, *optional*): Branch, tag or commit of the student on the Hub.
        teacher_revision (`str`, *optional*): Of the teacher.
        dataset (`str`, *optional*, defaults to `"allenai/c4"`): Text to train on: `embedded` (no network), a local
            .txt, .jsonl or .parquet file (column `text`, or `input_ids`), or a data set on the Hub.
        samples (`int`, *optional*, defaults to 1000): Windows to train on.
        eval_samples (`int`, *optional*, defaults to 16): Further windows, which are only evaluated on.
        sequence_length (`int`, *optional*, defaults to 2048): Tokens in a window; cut to the model's context.
        packing (`str`, *optional*): `documents` takes one random window out of each document that is long enough,
            `stream` joins the documents and takes random windows. By default `stream` for plain text.
        seed (`int`, *optional*, defaults to 0): Seed of the choice of windows and of their order.
        epochs (`float`, *optional*, defaults to 3.0): Times the windows are gone through.
        learning_rate (`float`, *optional*): The highest one; 2e-5 end-to-end, 1e-4 layer-wise by default.
        batch_size (`int`, *optional*, defaults to 8): Windows per step and process.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): Batches per step, end-to-end.
        warmup_ratio (`float`, *optional*, defaults to 0.03): Share of the steps in which the learning rate rises; it
            falls to 0 as a cosine in the others.
        weight_decay (`float`, *optional*, defaults to 0.0): As in AdamW.
        max_grad_norm (`float`, *optional*, defaults to 1.0): Gradients are clipped to this norm, end-to-end.
        lmbda (`float`, *optional*): Weight of the experts' error, end-to-end. By default the ratio of cross-entropy to
            that error at the first step.
        logit_weight (`float`, *optional*, defaults to 0.0): Weight of the KL divergence from the teacher's logits,
            end-to-end.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits of that divergence.
        trained (`str`, *optional*, defaults to `"all"`): `all` or `experts`: the weights that are trained end-to-end.
        lora_rank (`int`, *optional*): Train adapters of this rank on the experts instead, and merge them, end-to-end.
        freeze_router (`bool`, *optional*, defaults to `False`): Whether routers keep their weights, end-to-end.
        router_aux_loss (`bool`, *optional*, defaults to `True`): Whether the load-balancing loss is added, end-to-end.
        allow_dense (`bool`, *optional*, defaults to `False`): Whether a student without zeros is accepted.
        bf16 (`bool`, *optional*, defaults to `False`): Whether to compute in bfloat16 on float32 weights, end-to-end.
        activation_checkpointing (`bool`, *optional*, defaults to `False`): Whether to compute activations a second
            time instead of keeping them, end-to-end.
        logging_steps (`int`, *optional*, defaults to 10): Steps between two log lines.
        save_steps (`int`, *optional*, defaults to 200): Steps between two training checkpoints, end-to-end.
        device (`str`, *optional*, defaults to `"auto"`): `auto` is the first GPU, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run modeling code of the checkpoints.
        resume (`bool`, *optional*, defaults to `False`): Go on with a run that was interrupted.
    """

    student: str | None = None
    teacher: str | None = None
    output: str | None = None
    mode: Literal["layerwise", "end-to-end"] = "layerwise"
    student_revision: str | None = None
    teacher_revision: str | None = None
    dataset: str = "allenai/c4"
    samples: int = 1000
    eval_samples: int = 16
    sequence_length: int = 2048
    packing: Literal["documents", "stream"] | None = None
    seed: int = 0
    epochs: float = 3.0
    learning_rate: float | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lmbda: float | None = None
    logit_weight: float = 0.0
    temperature: float = 1.0
    trained: Literal["all", "experts"] = "all"
    lora_rank: int | None = None
    freeze_router: bool = False
    router_aux_loss: bool = True
    allow_dense: bool = False
    bf16: bool = False
    activation_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 200
    device: str = "auto"
    trust_remote_code: bool = False
    resume: bool = False

    def __post_init__(self):
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise ConfigurationError(name, getattr(self, name), "is needed, on the command line or in the recipe")
        for name, least in (
            ("gradient_accumulation_steps", 1),
            ("eval_samples", 0),
            ("logging_steps", 1),
            ("save_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigurationError(name, getattr(self, name), f"must be at least {least}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigurationError("lora_rank", self.lora_rank, "must be at least 1")
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATE[self.mode]
        self.layerwise, self.windows  # noqa: B018  their own checks
        self._refuse_options_of_the_other_mode()

    @property
    def layerwise(self) -> LayerwiseConfig:
        """The fields of `LayerwiseConfig` alone."""
        return LayerwiseConfig(**{field.name: getattr(self, field.name) for field in fields(LayerwiseConfig)})

    @property
    def windows(self) -> CalibrationConfig:
        """Where the windows come from: those to train on, then those to evaluate on."""
        return CalibrationConfig(
            self.dataset, self.samples + self.eval_samples, self.sequence_length, self.seed, self.packing
        )

    def _refuse_options_of_the_other_mode(self) -> None:
        if self.mode == "end-to-end":
            return
        for name in _END_TO_END_ONLY:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ConfigurationError(
                    name, getattr(self, name), "belongs to --mode end-to-end; layer by layer only experts are trained"
                )


_END_TO_END_ONLY = (
    "gradient_accumulation_steps",
    "max_grad_norm",
    "lmbda",
    "logit_weight",
    "temperature",
    "trained",
    "lora_rank",
    "freeze_router",
    "router_aux_loss",
    "bf16",
    "activation_checkpointing",
    "save_steps",
)
