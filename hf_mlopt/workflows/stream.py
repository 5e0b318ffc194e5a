"""The streamed form of `hf-mlopt prune`: one decoder layer in memory at a time, resumable at any moment."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt import __version__
from hf_mlopt.configuration import to_dict
from hf_mlopt.errors import InputError
from hf_mlopt.hub import Checkpoint, complete_checkpoint, copy_config, safetensors_files
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.hub.shards import ShardReader, ShardWriter, index_json, write_errors
from hf_mlopt.workflows.prune import PruneRecipe, calibration_record, documents


if TYPE_CHECKING:
    from hf_mlopt.pruning import PruningReport

logger = logging.getLogger(__name__)


def prune_streamed(
    recipe: PruneRecipe, checkpoint: Checkpoint, skeleton, tokenizer, calibration, device
) -> "tuple[PruningReport, Path]":
    """
    Prunes a checkpoint from its shards to new ones of the same names.

    Args:
        recipe (`PruneRecipe`), checkpoint (`Checkpoint`), tokenizer, calibration: What to do, to what, and by what.
        skeleton (`PreTrainedModel`): The model on the meta device; gives class and configuration.
        device (`torch.device`): Where layers are run.

    Returns:
        `tuple[PruningReport, Path]`: What was done, and the directory written.

    Raises:
        InputError: As [`prune_checkpoint`] does, and if an unfinished run is in the way or is another one.
    """
    from hf_mlopt import ranks
    from hf_mlopt.moe import decoder_layers, moe_layers
    from hf_mlopt.pruning import MoEPruner
    from hf_mlopt.pruning.pruner import with_fewer_experts
    from hf_mlopt.streaming.layers import StreamedLayers
    from hf_mlopt.streaming.skeleton import load_skeleton, output_layout, unused_tensors

    output = Path(recipe.output).expanduser().resolve()
    with ExitStack() as stack:
        reader = stack.enter_context(ShardReader(safetensors_files(checkpoint)))
        model = load_skeleton(type(skeleton), skeleton.config, reader, checkpoint.name)
        moe = moe_layers(model)
        smaller = with_fewer_experts(model, moe, recipe.pruning)
        left = model if smaller is None else smaller
        layout = output_layout(left, reader.layout)
        if unused := unused_tensors(model, reader.layout):
            logger.warning(f"{len(unused)} tensors are no part of the model and are left out, {unused[0]} first")
        prefix, layers = decoder_layers(model, moe)
        journal = _open_journal(
            recipe, output, _identity(recipe, checkpoint, reader, calibration, device), len(layers)
        )
        stack.callback(journal.close)
        try:
            if ranks.rank() == 0:
                journal.writer = stack.enter_context(ShardWriter(journal.checkpoint, layout))
            source = StreamedLayers(model, prefix, moe, reader, journal.writer, device, smaller)
            stack.callback(source.close)
            if ranks.rank() == 0:
                source.copy_rest()  # first, so that damage there is found before any layer is computed
            report = MoEPruner(recipe.pruning).prune(
                model, calibration and calibration.token_ids, source=source, journal=journal
            )
        except InputError:
            journal.forget_if_nothing_was_done()
            raise
        if calibration is not None:
            report.calibration = calibration_record(calibration)
        if ranks.rank() == 0:
            experts = None if smaller is None else (moe[0].num_experts, moe_layers(smaller)[0].num_experts)
            provenance, files = documents(left, report, recipe, checkpoint)
            if list(layout) != ["model.safetensors"]:
                files["model.safetensors.index.json"] = index_json(layout)
            with write_errors(journal.checkpoint):
                copy_config(checkpoint.directory, journal.checkpoint, experts)
                complete_checkpoint(
                    journal.checkpoint, tokenizer, provenance=provenance, files=files, source=checkpoint.directory
                )
            journal.finish(output)
        ranks.wait_for_all()
    return report, output


def _open_journal(recipe: PruneRecipe, output: Path, identity: dict, num_layers: int):
    from hf_mlopt import ranks
    from hf_mlopt.hub.output import unfinished_directory
    from hf_mlopt.streaming.journal import Journal

    journal = Journal(
        unfinished_directory(output),
        identity,
        resume=recipe.resume,
        save_states_every=recipe.save_states_every,
        offload=recipe.offload_states and Path(recipe.offload_states).expanduser().resolve(),
    )
    if recipe.resume and ranks.rank() == 0:
        logger.info(journal.progress(num_layers))
    return journal


def _identity(recipe: PruneRecipe, checkpoint: Checkpoint, reader: ShardReader, calibration, device) -> dict:
    """Everything that the weights of the result depend on."""
    import torch
    import transformers

    from hf_mlopt import ranks
    from hf_mlopt.streaming.journal import SWEEP_FORMAT, source_identity

    return {
        "format": SWEEP_FORMAT,
        "hf_mlopt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "processes": ranks.world_size(),
        "threads": torch.get_num_threads(),
        "config": read_config(checkpoint.directory),
        "recipe": to_dict(recipe.pruning),
        "calibration": calibration and calibration.source["fingerprint"],
        "source": source_identity(reader),
    }
