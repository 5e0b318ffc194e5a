"""`hf-mlopt distill`: a pruned checkpoint and the model it was pruned from in, a distilled checkpoint out."""

import logging
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_mlopt.data import CalibrationConfig, load_calibration, window_dataset
from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import Checkpoint, resolve_checkpoint
from hf_mlopt.planning import check_distillation_memory
from hf_mlopt.training.combinations import END_TO_END_ONLY
from hf_mlopt.workflows.loading import (
    build_skeleton,
    choose_device,
    context_length,
    launched_processes,
    load_model,
    load_tokenizer,
)
from hf_mlopt.workflows.prune import check_places


logger = logging.getLogger(__name__)

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
        mlopt_optim (`str`, *optional*): Optimizer in place of AdamW, end-to-end: `rsgdm`, `domo`... as in `hf-mlopt
            train`.
        mlopt_optim_args (`dict`, *optional*): Its keywords: `{"residual": 0.9}`.
        local_steps (`int`, *optional*, defaults to 1): Steps that each process takes alone before the models are
            averaged, with an optimizer that has rounds, end-to-end.
        grad_codec (`str`, *optional*): Codec in which gradients travel between processes, end-to-end: `orq-5-optimal`,
            `bingrad-b`...
        grad_codec_args (`dict`, *optional*): Its settings: `{"block": 1024}`.
        error_feedback (`str`, *optional*, defaults to `"none"`): `none`, `classic` or `step-ahead`: what becomes of
            what the codec did not send.
        step_ahead (`float`, *optional*, defaults to 0.1): Coefficient of the step ahead.
        compress_min_bytes (`int`, *optional*, defaults to 16384): Gradients of a bucket smaller than this travel in
            float32.
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
        dataset_fingerprint (`str`, *optional*): Hash of the tokens of an earlier run, as its recipe holds it. Other
            tokens than those are warned of.
        stream (`bool`, *optional*, defaults to `True`): Whether to read and write one decoder layer at a time,
            layer-wise; `--no-stream` loads both models, and such a run cannot be gone on with.
        offload_states (`str`, *optional*): Directory where the states of the windows live instead of in memory,
            layer-wise.
        save_states_every (`int`, *optional*, defaults to 4): Layers after which the states are saved to go on from,
            layer-wise. Offloaded states are there after every layer.
        store_targets (`str`, *optional*): Directory to write what the teacher's experts make of all windows to, once;
            nothing is trained.
        teacher_targets (`str`, *optional*): Such a directory, to train from in place of a teacher, end-to-end.
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
    mlopt_optim: str | None = None
    mlopt_optim_args: dict[str, Any] | None = None
    local_steps: int = 1
    grad_codec: str | None = None
    grad_codec_args: dict[str, Any] | None = None
    error_feedback: Literal["none", "classic", "step-ahead"] = "none"
    step_ahead: float = 0.1
    compress_min_bytes: int = 16384
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
    dataset_fingerprint: str | None = None
    stream: bool = True
    offload_states: str | None = None
    save_states_every: int = 4
    store_targets: str | None = None
    teacher_targets: str | None = None

    def __post_init__(self):
        for name in ("student", "teacher"):
            if not getattr(self, name) and not (name == "teacher" and self.teacher_targets):
                raise ConfigurationError(name, getattr(self, name), "is needed, on the command line or in the recipe")
        for name, least in (
            ("samples", 1),
            ("gradient_accumulation_steps", 1),
            ("eval_samples", 0),
            ("logging_steps", 1),
            ("save_steps", 1),
            ("save_states_every", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigurationError(name, getattr(self, name), f"must be at least {least}")
        if self.teacher_targets and (self.teacher or self.store_targets):
            other = "teacher" if self.teacher else "store_targets"
            raise ConfigurationError(
                other, getattr(self, other), "goes without teacher_targets, which come from a teacher"
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigurationError("lora_rank", self.lora_rank, "must be at least 1")
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATE[self.mode]
        self.layerwise, self.windows  # noqa: B018  their own checks
        self._refuse_options_of_the_other_mode()
        if not self.stream:
            for name in ("resume", "offload_states"):
                if getattr(self, name):
                    raise ConfigurationError(name, getattr(self, name), "needs a streamed run, so not --no-stream")

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
        names, why = {
            "layerwise": (_END_TO_END_ONLY, END_TO_END_ONLY),
            "end-to-end": (_LAYERWISE_ONLY, "belongs to --mode layerwise; end-to-end both models are in memory"),
        }[self.mode]
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigurationError(name, getattr(self, name), why)


# How processes train together, as in `hf-mlopt train`.
OF_EXCHANGES = (
    *("mlopt_optim", "mlopt_optim_args", "local_steps", "grad_codec", "grad_codec_args"),
    *("error_feedback", "step_ahead", "compress_min_bytes"),
)
_END_TO_END_ONLY = (
    "gradient_accumulation_steps",
    "max_grad_norm",
    "lmbda",
    "logit_weight",
    "temperature",
    "trained",
    "lora_rank",
    *OF_EXCHANGES,
    "freeze_router",
    "router_aux_loss",
    "bf16",
    "activation_checkpointing",
    "save_steps",
    "store_targets",
    "teacher_targets",
)
_LAYERWISE_ONLY = ("stream", "offload_states", "save_states_every")


def distill_checkpoint(recipe: DistillRecipe):
    """
    Carries out a recipe; nothing that looks finished is written unless all of it succeeds.

    Returns:
        `tuple[DistillationReport, Path]`: What was done, and the directory written.

    Raises:
        InputError: For anything that cannot be done, before the weights are loaded wherever that can be told.
    """
    if not recipe.output:
        raise ConfigurationError("output", recipe.output, "is needed, on the command line or in the recipe")
    if recipe.mode == "layerwise" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "mode", recipe.mode, "runs in one process, on one device; start it without accelerate launch or torchrun"
        )
    student = resolve_checkpoint(recipe.student, recipe.student_revision)
    teacher = resolve_checkpoint(recipe.teacher, recipe.teacher_revision) if recipe.teacher else None
    check_places(recipe, student.weight_bytes or 0)
    with launched_processes(recipe.device) as own_device:
        device = own_device or choose_device(recipe.device)
        tokenizer, skeleton = _check_pair(recipe, student, teacher)
        directories = student.directory, teacher and teacher.directory
        check_distillation_memory(recipe, *directories, gpu_memory=_free_memory(device))
        windows = _windows(recipe, tokenizer, skeleton.config)
        if recipe.mode == "layerwise":
            from hf_mlopt.workflows.distill_layerwise import distill_layerwise_checkpoint

            return distill_layerwise_checkpoint(recipe, student, teacher, tokenizer, windows, device)
        from hf_mlopt.workflows.distill_end_to_end import distill_end_to_end

        return distill_end_to_end(recipe, student, teacher, tokenizer, windows, skeleton)


def _free_memory(device) -> int | None:
    """Bytes free on a GPU; None on a CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def store_targets(recipe: DistillRecipe) -> None:
    """
    Runs the teacher of a recipe over its windows and keeps what its experts give, in `recipe.store_targets`.

    Raises:
        InputError: As [`distill_checkpoint`] does, and if the disk is too small.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("store_targets", recipe.store_targets, "is done by one process")
    from hf_mlopt.distillation import stored

    student = resolve_checkpoint(recipe.student, recipe.student_revision)
    teacher = resolve_checkpoint(recipe.teacher, recipe.teacher_revision)
    tokenizer, skeleton = _check_pair(recipe, student, teacher)
    dataset = window_dataset(_windows(recipe, tokenizer, skeleton.config).token_ids)
    model = build_skeleton(teacher, recipe.trust_remote_code)
    settings = {"dtype": _stored_dtype(model), "resume": recipe.resume}
    logger.info(stored.plan_targets(model, dataset, recipe.store_targets, **settings))
    model = load_model(teacher, recipe.trust_remote_code).to(choose_device(recipe.device))
    stored.store_targets(model, dataset, recipe.store_targets, revision=teacher.revision, **settings)


def _stored_dtype(model) -> str:
    dtype = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    return dtype if dtype == "float32" else "bfloat16"


def _check_pair(recipe: DistillRecipe, student: Checkpoint, teacher: Checkpoint | None):
    """Refuses a teacher that does not fit; returns tokenizer and skeleton of the student."""
    from hf_mlopt.distillation.compatibility import check_pair

    if teacher is None:
        skeleton = build_skeleton(student, recipe.trust_remote_code)
        return load_tokenizer(student, recipe.trust_remote_code), skeleton
    skeletons = [build_skeleton(checkpoint, recipe.trust_remote_code) for checkpoint in (student, teacher)]
    check_pair(*skeletons)
    tokenizers = [load_tokenizer(checkpoint, recipe.trust_remote_code) for checkpoint in (student, teacher)]
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise InputError(
            f"teacher={teacher.name!r}: its tokenizer has another vocabulary than that of the student, so the two "
            "would read other text; give the model that the student was pruned from"
        )
    return tokenizers[0], skeletons[0]


def _windows(recipe: DistillRecipe, tokenizer, config):
    """The windows to train on, then those to evaluate on."""
    try:
        windows = load_calibration(recipe.windows, tokenizer, context_length(config), held_out=recipe.eval_samples)
    except InputError as error:  # it says what the options of `prune` are called
        text = str(error).replace("--calibration-packing", "--packing").replace("--calibration ", "--dataset ")
        raise InputError(text.replace("calibration=", "dataset=")) from None
    if recipe.dataset_fingerprint not in (None, windows.source["fingerprint"]):
        logger.warning(
            f"dataset={recipe.dataset!r} gives other tokens than when this recipe was written (the text, the "
            "tokenizer or, for the embedded text, Python has changed): so will the weights be."
        )
    return windows
