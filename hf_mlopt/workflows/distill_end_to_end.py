"""The end-to-end form of `hf-mlopt distill`: student and teacher side by side in a Trainer, also in many processes."""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hf_mlopt import __version__, ranks
from hf_mlopt.configuration import to_dict
from hf_mlopt.data import window_dataset
from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer, StoredTargets
from hf_mlopt.distillation.lora import add_masked_lora, merge_masked_lora
from hf_mlopt.distillation.report import DistillationReport
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.hub import Checkpoint, complete_checkpoint, copy_config, safetensors_files, staged_output
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.hub.output import unfinished_directory
from hf_mlopt.hub.shards import ShardReader
from hf_mlopt.moe import moe_layers
from hf_mlopt.pruning.pruner import peak_memory
from hf_mlopt.streaming.journal import begin_run, source_identity
from hf_mlopt.workflows.distill import OF_EXCHANGES
from hf_mlopt.workflows.distill_documents import documents
from hf_mlopt.workflows.loading import load_model
from hf_mlopt.workflows.train_recipe import refuse_bad_optimizer


_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the second is the older name
_TRAINING = "training"  # directory with the checkpoints to go on from
_FORMAT = 1  # raised when the same recipe would give other weights
# How a run is watched and where it runs, which its weights do not depend on.
_FREE = ("output", "resume", "logging_steps", "save_steps", "device", "dataset_fingerprint")


def distill_end_to_end(recipe, student: Checkpoint, teacher: Checkpoint | None, tokenizer, windows, skeleton):
    """
    Trains the student and writes it.

    Args:
        recipe (`DistillRecipe`): What to do.
        student (`Checkpoint`), teacher (`Checkpoint`, *optional*): The pruned checkpoint and the one it was pruned
            from; None with stored targets.
        tokenizer, skeleton: Of the student.
        windows (`CalibrationSet`): Windows to train on, followed by those to evaluate on.

    Returns:
        `tuple[DistillationReport, Path]`: What was done, and the directory written.
    """
    started = time.perf_counter()
    output = Path(recipe.output).expanduser().resolve()
    arguments = _arguments(recipe, unfinished_directory(output) / _TRAINING)  # checks what it is given
    train_dataset = window_dataset(windows.token_ids[: recipe.samples])
    eval_dataset = window_dataset(windows.token_ids[recipe.samples :]) if recipe.eval_samples else None
    stored = None
    if recipe.teacher_targets:
        stored = StoredTargets(recipe.teacher_targets)
        stored.check(skeleton, {"samples": train_dataset, "eval_samples": eval_dataset})
    identity = partial(_identity, recipe, student, teacher, stored, windows)
    with _run_directory(recipe, output, identity):
        model = load_model(student, recipe.trust_remote_code)
        dtypes, zeros = {name: parameter.dtype for name, parameter in model.named_parameters()}, _zeros(model)
        _choose_weights(model, recipe)
        trainer = ExpertDistillationTrainer(
            model,
            stored or _teacher(recipe, teacher),
            arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(arguments.output_dir) if recipe.resume else None)
        report = _report(recipe, trainer, windows, time.perf_counter() - started)
        if stored is not None:
            report.teacher = {name: stored.manifest["teacher"][name] for name in ("source", "revision")}
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if ranks.rank() == 0:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            if recipe.lora_rank:
                model, state = _merged(recipe, model, state, student)
            tied = getattr(model, "all_tied_weights_keys", {})  # cast one by one they would be stored one by one
            state = {
                name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items() if name not in tied
            }
            report.mask_violations = _revived(zeros, state)
            _write(recipe, model, state, student, teacher, tokenizer, windows, report, output)
            shutil.rmtree(unfinished_directory(output))
        ranks.wait_for_all()
        del trainer, model
        gc.collect()  # DDP holds the process group, which may hang when it ends before DDP does
    return report, output


@contextmanager
def _run_directory(recipe, output: Path, identity: Callable[[], dict]) -> Iterator[None]:
    """The directory of this run, for its training checkpoints; one process begins it, or goes on with it."""
    directory, lock = unfinished_directory(output), None
    try:
        lock = ranks.on_first(lambda: begin_run(directory, identity(), recipe.resume, parts=(_TRAINING,)))
        yield
    finally:
        if lock is not None and ranks.rank() == 0:
            os.close(lock)


def _identity(recipe, student: Checkpoint, teacher: Checkpoint | None, stored, windows) -> dict:
    """Everything that the weights of the result depend on."""
    return {
        "format": _FORMAT,
        "hf_mlopt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processes": ranks.world_size(),
        "sharded": _is_sharded(),
        "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "recipe": {name: value for name, value in to_dict(recipe).items() if name not in _FREE},
        "windows": windows.source["fingerprint"],
        "student": _source_identity(student),
        "teacher": teacher and _source_identity(teacher),
        "targets": stored and {name: stored.manifest[name] for name in ("fingerprint", "teacher")},
    }


def _source_identity(checkpoint: Checkpoint) -> dict:
    with ShardReader(safetensors_files(checkpoint)) as reader:
        return {"config": read_config(checkpoint.directory), "files": source_identity(reader)}


def _last_checkpoint(directory: str) -> str | None:
    """The last whole training checkpoint; what a killed process left half-written is removed."""
    for path in Path(directory).glob("checkpoint-*"):
        if ranks.rank() == 0 and not (path / TRAINER_STATE_NAME).is_file():  # it is written last
            shutil.rmtree(path)
    ranks.wait_for_all()
    return get_last_checkpoint(directory)


def _zeros(model) -> dict[str, np.ndarray]:
    """Which weights of the experts are zero, one bit each, by the names of the parameters."""
    return {
        f"{layer.name}.{projection}": np.packbits((getattr(layer.experts, projection) == 0).numpy())
        for layer in moe_layers(model)
        for projection in layer.projections
    }


def _revived(zeros: dict[str, np.ndarray], state: dict) -> int:
    """Weights that were zero and are not zero now."""
    return sum(
        int((np.unpackbits(bits, count=state[name].numel()) & (state[name] != 0).cpu().numpy().ravel()).sum())
        for name, bits in zeros.items()
    )


def _teacher(recipe, teacher: Checkpoint):
    if recipe.lmbda == 0 and recipe.logit_weight == 0:
        return None
    return load_model(teacher, recipe.trust_remote_code)


def _choose_weights(model, recipe) -> None:
    """Which weights are trained, in float32: a step is often smaller than half of what bfloat16 resolves."""
    if not recipe.lora_rank or _is_sharded():  # frozen weights need no more than they have
        model.float()
    if recipe.trained == "experts":
        model.requires_grad_(False)
        for layer in moe_layers(model):
            layer.experts.requires_grad_(True)


def _is_sharded() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def _merged(recipe, model, state: dict, student: Checkpoint):
    """The student with its adapters merged, and its weights."""
    if _is_sharded():  # merging needs whole weights
        whole = add_masked_lora(load_model(student, recipe.trust_remote_code).float(), recipe.lora_rank)
        whole.load_state_dict(state)
        model = whole
    merged = merge_masked_lora(model)
    return merged, merged.state_dict()


def _arguments(recipe, directory: Path) -> DistillationArguments:
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise ConfigurationError(
            "device", recipe.device, "must be auto, cpu or cuda end-to-end; CUDA_VISIBLE_DEVICES says which"
        )
    names = {field.name for field in fields(DistillationArguments)}
    checkpointing = next(name for name in _CHECKPOINTING if name in names)
    of_a_step = recipe.batch_size * recipe.gradient_accumulation_steps * ranks.world_size()
    steps = max(1, int(recipe.epochs * recipe.samples / of_a_step))
    taken = ("learning_rate", "weight_decay", "max_grad_norm", "gradient_accumulation_steps", "seed", "bf16")
    taken += ("save_steps", "lora_rank", *OF_EXCHANGES)
    taken += ("lmbda", "logit_weight", "temperature", "freeze_router", "router_aux_loss", "allow_dense")
    arguments = DistillationArguments(
        output_dir=str(directory),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_ratio,
        eval_strategy="epoch" if recipe.eval_samples else "no",
        eval_on_start=bool(recipe.eval_samples) and not recipe.resume,
        save_total_limit=1,
        use_cpu=recipe.device == "cpu",
        ddp_find_unused_parameters=False,  # stacked experts all get a gradient
        report_to="none",
        logging_steps=min(recipe.logging_steps, steps),  # a short run has a course too
        **{checkpointing: recipe.activation_checkpointing},
        **{name: getattr(recipe, name) for name in taken},
    )
    refuse_bad_optimizer(arguments)
    return arguments


def _report(recipe, trainer, windows, seconds: float) -> DistillationReport:
    steps, taken = trainer.state.global_step, ("samples", "eval_samples", "epochs", "learning_rate", "lora_rank")
    taken += ("freeze_router", "logit_weight", "temperature")
    return DistillationReport(
        mode=recipe.mode,
        sequence_length=windows.token_ids.shape[1],
        tokens=round(trainer.state.epoch * len(trainer.train_dataset)) * windows.token_ids.shape[1],
        steps=steps,
        trained="lora" if recipe.lora_rank else recipe.trained,
        lmbda=trainer.lmbda,
        seconds=seconds + trainer.seconds_before,
        processes=trainer.args.world_size,
        sharded=_is_sharded(),
        precision=trainer.accelerator.mixed_precision,
        peak_memory_bytes=peak_memory(trainer.args.device),
        loss=[row for row in trainer.state.log_history if "train_runtime" not in row],
        **{name: getattr(recipe, name) for name in taken},
    )


def _write(recipe, model, state: dict, student, teacher, tokenizer, windows, report, output: Path) -> None:
    """Writes an ordinary checkpoint; its `config.json` is the student's, whose shape has not changed."""
    provenance, files = documents(report, recipe, student, teacher, windows)
    with staged_output(output) as directory:
        model.save_pretrained(directory, state_dict=state, max_shard_size="5GB")
        copy_config(student.directory, directory)
        complete_checkpoint(directory, tokenizer, provenance=provenance, files=files, source=student.directory)
