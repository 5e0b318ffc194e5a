"""The layer-wise form of `hf-mlopt distill`: one layer of student and teacher in memory, resumable at any moment."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt import __version__
from hf_mlopt.configuration import to_dict
from hf_mlopt.errors import InputError
from hf_mlopt.hub import Checkpoint, complete_checkpoint, copy_config, safetensors_files, save_checkpoint
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.hub.output import unfinished_directory
from hf_mlopt.hub.shards import ShardReader, ShardWriter, index_json, write_errors
from hf_mlopt.workflows.distill_documents import documents
from hf_mlopt.workflows.loading import build_skeleton, load_model


if TYPE_CHECKING:
    from hf_mlopt.distillation.report import DistillationReport

logger = logging.getLogger(__name__)


def distill_layerwise_checkpoint(
    recipe, student: Checkpoint, teacher: Checkpoint, tokenizer, windows, device
) -> "tuple[DistillationReport, Path]":
    """
    Distils a checkpoint layer by layer.

    Args:
        recipe (`DistillRecipe`): What to do.
        student (`Checkpoint`), teacher (`Checkpoint`): The pruned checkpoint and the one it was pruned from.
        tokenizer: Of the student.
        windows (`CalibrationSet`): Windows to train on, followed by those to evaluate on.
        device (`torch.device`): Where layers are run and trained.

    Returns:
        `tuple[DistillationReport, Path]`: What was done, and the directory written.

    Raises:
        InputError: If the two do not fit, the student has no zeros, or an unfinished run is in the way or is another
            one.
    """
    for field, checkpoint in (("student", student), ("teacher", teacher)):
        if "quantization_config" in read_config(checkpoint.directory):
            raise InputError(f"{field}={checkpoint.name!r}: is quantized; give the unquantized weights")
    output = Path(recipe.output).expanduser().resolve()
    if recipe.stream:
        return _streamed(recipe, student, teacher, tokenizer, windows, device, output), output
    from hf_mlopt.distillation.layerwise import distill_layerwise

    model = load_model(student, recipe.trust_remote_code)
    report = distill_layerwise(
        model,
        load_model(teacher, recipe.trust_remote_code),
        windows.token_ids,
        recipe.layerwise,
        eval_samples=recipe.eval_samples,
        logging_steps=recipe.logging_steps,
        allow_dense=recipe.allow_dense,
        device=device,
    )
    provenance, files = documents(report, recipe, student, teacher, windows)
    save_checkpoint(model, tokenizer, output, provenance=provenance, files=files, source=student.directory)
    return report, output


def _streamed(recipe, student, teacher, tokenizer, windows, device, output: Path) -> "DistillationReport":
    """From the shards of both to new ones of the student's names."""
    from hf_mlopt.distillation.expert_inputs import ExpertInputs, ExpertInputsOnDisk
    from hf_mlopt.distillation.layerwise import distill_layerwise
    from hf_mlopt.streaming.skeleton import output_layout, unused_tensors

    number = len(windows.token_ids)
    with ExitStack() as stack:
        (student_model, student_reader), (teacher_model, teacher_reader) = (
            _open(checkpoint, recipe.trust_remote_code, stack) for checkpoint in (student, teacher)
        )
        layout = output_layout(student_model, student_reader.layout)
        if unused := unused_tensors(student_model, student_reader.layout):
            logger.warning(f"{len(unused)} tensors are no part of the model and are left out, {unused[0]} first")
        identity = _identity(recipe, (student, student_reader), (teacher, teacher_reader), windows, device)
        journal = _open_journal(recipe, output, identity, student_model)
        stack.callback(journal.close)
        try:
            journal.writer = stack.enter_context(ShardWriter(journal.checkpoint, layout))
            source = _source(student_model, student_reader, journal.writer, device, stack)
            source.copy_rest()  # first, so that damage there is found before any layer is computed
            in_memory = not recipe.offload_states
            report = distill_layerwise(
                student_model,
                teacher_model,
                windows.token_ids,
                recipe.layerwise,
                eval_samples=recipe.eval_samples,
                logging_steps=recipe.logging_steps,
                allow_dense=recipe.allow_dense,
                sources=(source, _source(teacher_model, teacher_reader, None, device, stack)),
                journal=journal,
                inputs=ExpertInputs(number) if in_memory else ExpertInputsOnDisk(number, journal.files.directory),
            )
            provenance, files = documents(report, recipe, student, teacher, windows)
        except InputError:
            journal.forget_if_nothing_was_done()
            raise
        if list(layout) != ["model.safetensors"]:
            files["model.safetensors.index.json"] = index_json(layout)
        with write_errors(journal.checkpoint):
            copy_config(student.directory, journal.checkpoint)
            complete_checkpoint(
                journal.checkpoint, tokenizer, provenance=provenance, files=files, source=student.directory
            )
        journal.finish(output)
    return report


def _open(checkpoint: Checkpoint, trust_remote_code: bool, stack: ExitStack):
    """The model without weights, and the files that hold them."""
    from hf_mlopt.streaming.skeleton import load_skeleton

    built = build_skeleton(checkpoint, trust_remote_code)
    reader = stack.enter_context(ShardReader(safetensors_files(checkpoint)))
    return load_skeleton(type(built), built.config, reader, checkpoint.name), reader


def _source(model, reader: ShardReader, writer: ShardWriter | None, device, stack: ExitStack):
    from hf_mlopt.moe import decoder_layers, moe_layers
    from hf_mlopt.streaming.layers import StreamedLayers

    moe = moe_layers(model)
    source = StreamedLayers(model, decoder_layers(model, moe)[0], moe, reader, writer, device)
    stack.callback(source.close)
    return source


def _open_journal(recipe, output: Path, identity: dict, model):
    from hf_mlopt.distillation.report import DistilledLayer
    from hf_mlopt.moe import decoder_layers, moe_layers
    from hf_mlopt.streaming.journal import Journal

    journal = Journal(
        unfinished_directory(output),
        identity,
        resume=recipe.resume,
        save_states_every=recipe.save_states_every,
        offload=recipe.offload_states and Path(recipe.offload_states).expanduser().resolve(),
        report_type=DistilledLayer,
    )
    if recipe.resume:
        logger.info(journal.progress(len(decoder_layers(model, moe_layers(model))[1])))
    return journal


def _identity(recipe, student, teacher, windows, device) -> dict:
    """Everything that the weights of the result depend on."""
    import torch
    import transformers

    from hf_mlopt.distillation.layerwise import LAYERWISE_FORMAT
    from hf_mlopt.streaming.journal import source_identity

    return {
        "run": "layer-wise distillation",
        "format": LAYERWISE_FORMAT,
        "hf_mlopt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "recipe": to_dict(recipe.layerwise) | {"eval_samples": recipe.eval_samples},
        "windows": windows.source["fingerprint"],
        **{
            name: {"config": read_config(checkpoint.directory), "files": source_identity(reader)}
            for name, (checkpoint, reader) in (("student", student), ("teacher", teacher))
        },
    }
