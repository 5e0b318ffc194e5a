"""The fields that pipeline training adds to the arguments of a Trainer."""

from dataclasses import dataclass
from typing import Literal

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.config import PipelineConfig
from hf_mlopt.training.arguments import MLOptTrainingArguments
from hf_mlopt.training.combinations import refusal
from hf_mlopt.training.optimizer_table import optimizer_entry


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class PipelineTrainingArguments(MLOptTrainingArguments):
    """
    [`MLOptTrainingArguments`] and how a model is trained in stages. `gradient_accumulation_steps` batches make an
    update, of which stale stages want at least two.

    Args:
        pipeline (`str`, *optional*):
            Mode: `auto` measures stages and links and takes the least staleness without a bubble; `lag1`, `dsp`,
            `fr`, `bp`, or a vector such as `dsp:4,2,0`; `gpipe` and `1f1b` flush at every update.
        stages (`int`, *optional*):
            Blocks that the model is cut into, one a process; by default as many as processes. With more processes,
            replicas of the pipeline share the data.
        pipeline_bounds (`list[int]`, *optional*):
            Number of the first layer of every block, and the number of layers: `[0, 5, 12]`. By default balanced by
            measured times.
        pipeline_recompute (`str`, *optional*, defaults to `"auto"`):
            `yes` repeats the forward pass with the weights of the backward pass, so that only inputs are stale; `no`
            keeps graphs: faster, more memory, and another estimator.
        pipeline_predict (`str`, *optional*, defaults to `"momentum"`):
            Forward with the weights that are expected when the gradient comes: `momentum`, `adam` or `none`.
        pipeline_queue (`str`, *optional*, defaults to `"deterministic"`):
            `free` takes a gradient as soon as it is there; the result then depends on timing.
        pipeline_clip (`str`, *optional*, defaults to `"block"`):
            What `max_grad_norm` bounds: the norm of a block, or with `lagged_global` that of all, some updates ago.
        pipeline_tied (`str`, *optional*, defaults to `"owner_lagged"`):
            Embeddings tied to the head: the last block owns the weight and the first has a lagged copy; or `untie`.
        pipeline_moe_aux (`str`, *optional*, defaults to `"exact"`):
            Load-balancing loss over all layers, or with `block` over those of each block.
        pipeline_drain (`bool`, *optional*, defaults to `True`):
            Whether the pipeline is emptied before a checkpoint, whose model then is of one age. Without, it goes on
            undisturbed: the state resumes to the bit, and the saved model has blocks of several ages. An evaluation
            always empties it.
        pipeline_timeout (`float`, *optional*, defaults to 600.0):
            Seconds that a stage waits for a neighbour.
    """

    pipeline: str | None = None
    stages: int | None = None
    pipeline_bounds: list[int] | None = None
    pipeline_recompute: Literal["auto", "yes", "no"] = "auto"
    pipeline_predict: Literal["momentum", "adam", "none"] = "momentum"
    pipeline_queue: Literal["deterministic", "free"] = "deterministic"
    pipeline_clip: Literal["block", "lagged_global"] = "block"
    pipeline_tied: Literal["owner_lagged", "untie"] = "owner_lagged"
    pipeline_moe_aux: Literal["exact", "block"] = "exact"
    pipeline_drain: bool = True
    pipeline_timeout: float = 600.0

    def __post_init__(self):
        super().__post_init__()
        if self.pipeline is None:
            for name in ("stages", "pipeline_bounds"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(name, getattr(self, name), "needs pipeline, such as auto, lag1 or dsp")
            return
        self.stages = self.stages or self.processes
        pipeline_config(self)  # its own checks
        _check_processes(self)
        _check_features(self)
        # Each process would add what all stages of a pipeline count alike; replicas are added by the trainer.
        self.average_tokens_across_devices = False

    @property
    def processes(self) -> int:
        """How many train."""
        return self.world_size


def pipeline_config(args: PipelineTrainingArguments, mode: str | None = None) -> PipelineConfig:
    """
    What the runtime is given.

    Args:
        args ([`PipelineTrainingArguments`]): The arguments.
        mode (`str`, *optional*): In place of `auto`, what that has come to.

    Raises:
        ConfigurationError: For a value out of range, with the name of the argument.
    """
    names = {"mode": "pipeline", "stages": "stages", "update_every": "gradient_accumulation_steps"}
    names |= {"timeout_seconds": "pipeline_timeout", "max_grad_norm": "max_grad_norm", "seed": "seed"}
    names |= {name: f"pipeline_{name}" for name in ("recompute", "predict", "queue", "clip", "tied", "moe_aux")}
    values = {name: getattr(args, argument) for name, argument in names.items()}
    values |= {"mode": mode or args.pipeline, "max_grad_norm": values["max_grad_norm"] or 0.0}
    values["transport"] = "nccl" if args.device.type == "cuda" else "gloo"
    try:
        return PipelineConfig(**values)
    except ConfigurationError as error:
        text = str(error).partition(": ")[2]
        raise ConfigurationError(names.get(error.field, error.field), error.value, text) from None


def _check_processes(args: PipelineTrainingArguments) -> None:
    if args.processes % args.stages:
        count = "there is 1 process" if args.processes == 1 else f"there are {args.processes} processes"
        remedy = f"{count}; start as many as stages, or a multiple for replicas"
        raise ConfigurationError("stages", args.stages, remedy)
    bounds = args.pipeline_bounds
    if bounds is not None and len(bounds) != args.stages + 1:
        raise ConfigurationError("pipeline_bounds", bounds, f"needs {args.stages + 1} numbers: {args.stages} stages")


def _check_features(args: PipelineTrainingArguments) -> None:
    """Refuses what a stage alone cannot do."""
    refused = {
        "load_best_model_at_end": "stages are not reloaded; load the best checkpoint with from_pretrained afterwards",
        "fp16": "a scale that changes would differ between stages; use bf16",
        "fsdp": "stages hold whole blocks",
        "deepspeed": "stages hold whole blocks",
        "torch_compile": "compile the model before, or leave it out",
        "gradient_checkpointing": "pipeline_recompute repeats forward passes already",
        "activation_checkpointing": "pipeline_recompute repeats forward passes already",
        "auto_find_batch_size": "stages would find different ones",
        "neftune_noise_alpha": "it hooks the embedding of a whole model",
        "label_smoothing_factor": "the loss is that of the model",
        "include_num_input_tokens_seen": "every stage sees every batch",
        "local_steps": "local steps average whole models",
        "per_rank_data": "the stages of a pipeline read the same batches",
    }
    if args.keep_zeros:
        raise refusal("masks", "pipeline", True)
    if args.mlopt_optim is not None and optimizer_entry(args.mlopt_optim).has_rounds:
        raise refusal("local-steps", "pipeline", args.mlopt_optim)
    if args.mlopt_optim is not None and optimizer_entry(args.mlopt_optim).exchanges:
        raise refusal("saef", "pipeline", args.mlopt_optim)
    for name, reason in refused.items():
        value = getattr(args, name, None)
        is_set = value > 1 if name == "local_steps" else value not in (None, False, 0, 0.0, "no", [], {}, "")
        if is_set:
            raise ConfigurationError(name, value, f"does not go with pipeline: {reason}")
    if args.n_gpu > 1:
        raise ConfigurationError("n_gpu", args.n_gpu, "start one process per GPU with accelerate launch")
