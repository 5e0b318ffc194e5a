"""`hf-mlopt prune`: reads a checkpoint, prunes it, writes it with its recipe, report and card."""

import json
import logging
import os
import shlex
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt import __version__
from hf_mlopt.configuration import save_yaml
from hf_mlopt.data.calibration import CalibrationConfig, load_calibration
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.hub import Checkpoint, check_output, pruning_card, resolve_checkpoint, save_checkpoint
from hf_mlopt.hub.output import unfinished_directory
from hf_mlopt.hub.provenance import shown_name
from hf_mlopt.planning.machine import available_memory
from hf_mlopt.planning.memory import must_stream
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.workflows.loading import (
    build_skeleton,
    choose_device,
    context_length,
    launched_processes,
    load_model,
    load_tokenizer,
)


if TYPE_CHECKING:
    from hf_mlopt.pruning import PruningReport


logger = logging.getLogger(__name__)


@dataclass
class PruneRecipe(PruningConfig, CalibrationConfig):
    """
    Everything one run of `hf-mlopt prune` is given; the keys of a recipe.

    Args:
        model (`str`): Local directory or Hub id of the checkpoint to prune.
        output (`str`): Directory to write; must be absent or empty.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str`, *optional*, defaults to `"auto"`): Where layers are run, one at a time. `auto` is the first
            GPU, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run modeling code of the checkpoint.
        calibration_fingerprint (`str`, *optional*): Hash of the calibration tokens of an earlier run, as its recipe
            holds it. Other tokens than those are warned of.
        stream (`bool`, *optional*): Whether to read, prune and write one decoder layer at a time instead of loading
            the model. By default only if the model does not fit in memory.
        resume (`bool`, *optional*, defaults to `False`): Go on with a streamed run that was interrupted.
        offload_states (`str`, *optional*): Directory where the calibration states of a streamed run live instead of
            in memory.
        save_states_every (`int`, *optional*, defaults to 4): Layers of a streamed run after which the states are
            saved to go on from. Offloaded states are there after every layer.
    """

    model: str | None = None
    output: str | None = None
    revision: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    calibration_fingerprint: str | None = None
    stream: bool | None = None
    resume: bool = False
    offload_states: str | None = None
    save_states_every: int = 4

    def __post_init__(self):
        PruningConfig.__post_init__(self)
        CalibrationConfig.__post_init__(self)
        if self.save_states_every < 1:
            raise ConfigurationError("save_states_every", self.save_states_every, "must be at least 1")
        if self.stream is False and self.offload_states:
            raise ConfigurationError(
                "offload_states",
                self.offload_states,
                "only a streamed run keeps states on disk, so not with --in-memory",
            )
        if self.stream is False and self.resume:
            raise ConfigurationError(
                "resume", True, "only a streamed run can be gone on with, so not with --in-memory"
            )

    @property
    def pruning(self) -> PruningConfig:
        """The fields of `PruningConfig` alone."""
        return PruningConfig(**{field.name: getattr(self, field.name) for field in fields(PruningConfig)})


def prune_checkpoint(recipe: PruneRecipe) -> "tuple[PruningReport, Path]":
    """
    Carries out a recipe; nothing that looks finished is written unless all of it succeeds.

    Under `accelerate launch` or `torchrun` the calibration data are shared among the processes, and the first writes.

    Returns:
        `tuple[PruningReport, Path]`: What was done, and the directory written.

    Raises:
        InputError: For anything that cannot be done, before the weights are loaded wherever that can be told.
    """
    for name in ("model", "output"):
        if not getattr(recipe, name):
            raise ConfigurationError(name, getattr(recipe, name), "is needed, on the command line or in the recipe")
    checkpoint = resolve_checkpoint(recipe.model, recipe.revision)
    check_places(recipe, checkpoint.weight_bytes or 0)
    with launched_processes(recipe.device) as own_device:
        device = own_device or choose_device(recipe.device)
        skeleton = _check_architecture(checkpoint, recipe)
        tokenizer = load_tokenizer(checkpoint, recipe.trust_remote_code)
        calibration = _calibration(recipe, tokenizer, skeleton.config) if recipe.needs_calibration else None
        if _streams(recipe, checkpoint, skeleton.config, calibration):
            from hf_mlopt.workflows.stream import prune_streamed

            return prune_streamed(recipe, checkpoint, skeleton, tokenizer, calibration, device)

        from hf_mlopt import ranks
        from hf_mlopt.pruning import MoEPruner

        model = load_model(checkpoint, recipe.trust_remote_code)
        report = MoEPruner(recipe.pruning).prune(model, calibration and calibration.token_ids, device=device)
        if calibration is not None:
            report.calibration = calibration_record(calibration)
        if ranks.rank() == 0:
            write_pruned(model, tokenizer, report, recipe, checkpoint)
        ranks.wait_for_all()
        return report, Path(recipe.output).expanduser().resolve()


def check_places(recipe, weight_bytes: int) -> None:
    """
    Refuses a recipe whose output or states cannot be written, before any expensive work.

    Args:
        recipe: Its `output`, `resume` and `offload_states` count.
        weight_bytes (`int`): Bytes that will be written.
    """
    if recipe.resume and _was_complete(recipe.output):
        raise ConfigurationError("resume", True, f"the run is complete: {recipe.output} holds the checkpoint")
    check_output(recipe.output, 0 if recipe.resume else weight_bytes)
    if recipe.offload_states:
        _check_states_directory(recipe.offload_states)


def _was_complete(output: str) -> bool:
    """Whether a run was killed when its checkpoint had its name; what it left beside that is removed."""
    path = Path(output).expanduser().resolve()
    unfinished = unfinished_directory(path)
    if not unfinished.is_dir() or (unfinished / "checkpoint").is_dir() or not (path / "config.json").is_file():
        return False
    shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _check_states_directory(directory: str) -> None:
    """Raises `ConfigurationError` if states cannot be kept in a directory, which is made if it is absent."""
    path = Path(directory).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError("offload_states", directory, f"cannot be written ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigurationError("offload_states", directory, "cannot be written (permission denied)")


def _calibration(recipe: PruneRecipe, tokenizer, config):
    calibration = load_calibration(recipe, tokenizer, context_length(config))
    if recipe.calibration_fingerprint not in (None, calibration.source["fingerprint"]):
        logger.warning(
            f"calibration={recipe.calibration!r} gives other tokens than when this recipe was written (the text, "
            "the tokenizer or, for the embedded text, Python has changed): so will the weights be."
        )
    return calibration


def _streams(recipe: PruneRecipe, checkpoint: Checkpoint, config, calibration) -> bool:
    """Whether to go layer by layer: if asked for, or if the model would not fit."""
    if recipe.stream is not None or recipe.resume or recipe.offload_states:
        return recipe.stream is not False
    from hf_mlopt import ranks

    tokens = calibration.token_ids.numel() if calibration is not None else 0
    states = tokens * config.get_text_config().hidden_size * 4
    streams = ranks.from_first(must_stream(checkpoint.weight_bytes or 0, states, available_memory()))
    if streams:
        logger.info("the model does not fit in memory with room to write it: going layer by layer (--stream)")
    return streams


def write_pruned(model, tokenizer, report, recipe: PruneRecipe, checkpoint: Checkpoint, evaluation=None) -> Path:
    """
    Writes a pruned model as an ordinary checkpoint with `recipe.yaml`, `pruning_report.json` and a card.

    Args:
        model, tokenizer, report: What was pruned, and how.
        recipe (`PruneRecipe`): What re-runs it.
        checkpoint (`Checkpoint`): The original.
        evaluation (`list[dict]`, *optional*): Perplexities measured in this run, for report and card.

    Returns:
        `Path`: The directory written.
    """
    provenance, files = documents(model, report, recipe, checkpoint, evaluation)
    return save_checkpoint(
        model, tokenizer, recipe.output, provenance=provenance, files=files, source=checkpoint.directory
    )


def documents(model, report, recipe: PruneRecipe, checkpoint: Checkpoint, evaluation=None) -> tuple[dict, dict]:
    """What goes into a checkpoint beside the weights: the block in `config.json`, and card, recipe and report."""
    from hf_mlopt.hub import environment, model_provenance

    report.environment = environment()
    report.model = model_provenance(model, checkpoint.revision)
    record = report.to_dict() | ({"evaluation": evaluation} if evaluation else {})
    output = recipe.output
    recipe = replace(
        recipe,
        output=None,  # whoever re-runs the recipe names a directory of their own
        # How it was run on this machine does not change the weights.
        resume=False,
        offload_states=None,
        stream=None,
        save_states_every=PruneRecipe.save_states_every,
        revision=recipe.revision or checkpoint.revision,
        calibration_fingerprint=report.calibration.get("fingerprint"),
    )
    card = pruning_card(record, Path(output).resolve().name, command=_command(recipe), license=checkpoint.license)
    keys = ["method", "sparsity", "pattern", "scope", "allocation"] if recipe.prunes_weights else []
    keys += ["drop_experts", "drop_score"] if recipe.drop_experts else []
    provenance = {key: record[key] for key in keys if record[key] is not None} | {
        "version": __version__,
        "base_model": report.model.get("source"),
        "revision": report.model.get("revision"),
    }
    return provenance, {
        "README.md": card,
        "recipe.yaml": lambda path: save_yaml(recipe, path),
        "pruning_report.json": json.dumps(record, indent=1) + "\n",
    }


def _check_architecture(checkpoint: Checkpoint, recipe: PruneRecipe):
    """Builds the model without weights, refuses what cannot be pruned and returns it."""
    from hf_mlopt.pruning import validate

    skeleton = build_skeleton(checkpoint, recipe.trust_remote_code)
    validate(skeleton, recipe.pruning)
    return skeleton


def calibration_record(calibration) -> dict:
    """Provenance of calibration tokens, with the sketch by which `evaluate` finds them again, in one line."""
    return {**calibration.source, "sketch": " ".join(map(str, calibration.sketch))}


def _command(recipe: PruneRecipe) -> str:
    """
    The command line that repeats a recipe; fields at their defaults are left out. It goes into a card, so of files and
    directories it gives only the names.
    """
    local = {name: getattr(recipe, name) for name in ("model", "calibration")}
    shown = {name: shown_name(value) for name, value in local.items()}
    recipe = replace(recipe, **shown, calibration_fingerprint=None)
    words = ["hf-mlopt", "prune", recipe.model, "--output", "DIR"]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in ("model", "output") or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        words += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
    return shlex.join(words)
