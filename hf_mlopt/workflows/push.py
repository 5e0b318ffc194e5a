"""`hf-mlopt push`: looks through a directory, then puts it on the Hub."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import resolve_checkpoint, safetensors_files
from hf_mlopt.hub.checkpoint import Checkpoint, read_config
from hf_mlopt.hub.push import PlannedFile, check_repository, plan_files, require_token, upload
from hf_mlopt.hub.push_checks import (
    DISTILLATION,
    PRUNING,
    check_card,
    check_config,
    check_paths,
    check_results,
    published,
    read_report,
)
from hf_mlopt.hub.shards import ShardReader
from hf_mlopt.workflows.loading import build_skeleton, load_tokenizer


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


@dataclass
class PushConfig:
    """
    A directory and where it goes.

    Args:
        directory (`str`): Checkpoint with its card, as `hf-mlopt prune` and `hf-mlopt distill` write it.
        repo (`str`): Repository on the Hub, `user/name`; created if it is absent.
        private (`bool`, *optional*, defaults to `False`): Create it private; one that is public already is refused.
        revision (`str`, *optional*): Branch to push to, by default `main`; created if it is absent.
        dry_run (`bool`, *optional*, defaults to `False`): Look through everything and list what would go, without
            network and token.
        message (`str`, *optional*): Message of the commit.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run modeling code of the checkpoint to
            see that it loads.
    """

    directory: str | None = None
    repo: str | None = None
    private: bool = False
    revision: str | None = None
    dry_run: bool = False
    message: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PushResult:
    """
    What was sent, or would be.

    Args:
        files (`list[PlannedFile]`): The files.
        left_out (`list[str]`): What stays here.
        url (`str`, *optional*): Where the model is now; None of a dry run.
        removed (`list[str]`): Weight files of an earlier push that were removed there.
    """

    files: list[PlannedFile]
    left_out: list[str]
    url: str | None = None
    removed: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def push_checkpoint(config: PushConfig, api: "HfApi | None" = None) -> PushResult:
    """
    Puts a checkpoint on the Hub if it is what it says it is.

    Args:
        config (`PushConfig`): What goes where.
        api ([`~huggingface_hub.HfApi`], *optional*): The Hub; the usual one by default.

    Raises:
        InputError: If the directory is not whole, or its reports and card say otherwise than its weights, before
            anything is sent; or if the Hub refuses.
    """
    from huggingface_hub import HfApi

    for name in ("directory", "repo"):
        if not getattr(config, name):
            raise ConfigurationError(name, getattr(config, name), "is needed")
    directory = Path(config.directory).expanduser()
    if not directory.is_dir():
        raise ConfigurationError("directory", config.directory, "no such directory")
    check_repository(config.repo, config.revision)
    checkpoint = resolve_checkpoint(directory)
    api = api or HfApi()
    if not config.dry_run:
        require_token(api)
    files, left_out = check_directory(checkpoint, config.repo, config.trust_remote_code)
    if config.dry_run:
        return PushResult(files, left_out)
    message = config.message or f"Upload {config.repo.split('/')[1]} with hf-mlopt"
    url, removed = upload(
        api, files, config.repo, private=config.private, revision=config.revision, message=message
    )  # fmt: skip
    return PushResult(files, left_out, url, removed)


def check_directory(
    checkpoint: Checkpoint, repo: str, trust_remote_code: bool = False
) -> tuple[list[PlannedFile], list[str]]:
    """
    Looks through a directory, the cheap things first, and says what of it goes.

    Returns:
        `tuple[list[PlannedFile], list[str]]`: What goes, and what stays.

    Raises:
        InputError: For the first thing that is wrong.
    """
    directory = checkpoint.directory
    weights = safetensors_files(checkpoint)
    files, left_out = plan_files(directory, weights)
    config = read_config(directory)
    pruning, distillation = read_report(directory, PRUNING), read_report(directory, DISTILLATION)
    check_config(config, directory, pruning, distillation)
    source = _source(config, pruning)
    card = check_card(directory, source)
    if not card.data.license:
        logger.warning(f"{directory / 'README.md'}: names no license, so the Hub will show none")
    check_results(card, directory, pruning, distillation)
    base = card.data.base_model if isinstance(card.data.base_model, str) else None
    files = published(files, repo, _names(source, distillation), base)
    check_paths(files)
    _check_weights(checkpoint, weights, pruning, distillation is not None, trust_remote_code)
    return files, left_out


def _source(config: dict, pruning: dict | None) -> str | None:
    return ((pruning or {}).get("model") or {}).get("source") or (config.get("hf_mlopt") or {}).get("base_model")


def _names(source: str | None, distillation: dict | None) -> dict[str, str | None]:
    """What the reports call the models that a recipe names; a distillation's recipe has no `model`."""
    roles = ("student", "teacher")
    return {"model": source} | {role: ((distillation or {}).get(role) or {}).get("source") for role in roles}


def _check_weights(
    checkpoint: Checkpoint, weights: list[Path], pruning: dict | None, distilled: bool, trust_remote_code: bool
) -> None:
    """Whether a model can be made of the files, from their headers; and whether it is as sparse as its report says."""
    from hf_mlopt.streaming.skeleton import load_skeleton

    load_tokenizer(checkpoint, trust_remote_code)
    empty = build_skeleton(checkpoint, trust_remote_code)
    with ShardReader(weights) as reader:
        model = load_skeleton(type(empty), empty.config, reader, checkpoint.name)
        if pruning is not None:
            check_sparsity(model, reader, pruning, checkpoint.directory / PRUNING, distilled)


def check_sparsity(model, reader: ShardReader, report: dict, path: Path, distilled: bool = False) -> None:
    """
    Counts the zeros that a report declares, one decoder layer in memory at a time.

    Args:
        model ([`~transformers.PreTrainedModel`]): Skeleton of the checkpoint.
        reader (`ShardReader`): Its files.
        report (`dict`): What `pruning_report.json` says.
        path (`Path`): That file, for messages.
        distilled (`bool`, *optional*, defaults to `False`): The weights were trained since: none of the zeros may be
            lost, but a few more are no fault.

    Raises:
        InputError: Names the first tensor that is another than declared, both values and what to do.
    """
    remedy = (
        "the zeros did not survive the training; distil with the mask kept"
        if distilled
        else "report and weights are of different runs, or the weights were changed since; copy both from one run"
    )
    declared = {tensor["name"]: tensor for layer in report.get("layers") or [] for tensor in layer["tensors"]}
    counted = 0
    for names in tqdm(_layers(model, declared, path), desc="counting zeros", unit="layer", leave=False, disable=None):
        for tensor, (shape, zeros) in _count(model, reader, names).items():
            expected = declared[tensor]
            if list(shape) != expected["shape"]:
                raise InputError(
                    f"{path}: says {tensor} has shape {expected['shape']}, it has {list(shape)}; {remedy}"
                )
            numel = shape.numel()
            wanted = expected.get("zeros", round(expected["sparsity"] * numel))
            if zeros < wanted or (zeros > wanted and not distilled):
                raise InputError(
                    f"{path}: says {wanted:,} of {numel:,} weights of {tensor} are zero "
                    f"({100 * wanted / numel:.2f} %), but {zeros:,} are ({100 * zeros / numel:.2f} %): {remedy}"
                )
            counted += wanted
    totals = report.get("totals") or {}
    if declared and totals.get("zeros", counted) != counted:
        raise InputError(f"{path}: totals.zeros is {totals['zeros']:,}, its tensors have {counted:,}: {remedy}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if totals.get("parameters", parameters) != parameters:
        raise InputError(
            f"{path}: totals.parameters is {totals['parameters']:,}, the model has {parameters:,}; {remedy}"
        )


def _layers(model, declared: dict[str, dict], path: Path) -> list[list[str]]:
    """The declared tensors, those of a decoder layer together."""
    prefix, known, groups = _prefix(model), model.state_dict().keys(), {}
    for name in declared:
        if name not in known or not name.startswith(prefix):
            raise InputError(f"{path}: names {name}, which the model does not have; copy the report of this model")
        groups.setdefault(name.removeprefix(prefix).split(".")[0], []).append(name)
    return list(groups.values())


def _prefix(model) -> str:
    from hf_mlopt.moe import decoder_layers, moe_layers

    return f"{decoder_layers(model, moe_layers(model))[0]}."


def _count(model, reader: ShardReader, names: list[str]) -> dict:
    """Shape and number of zeros of some tensors of one decoder layer, which is read for that and dropped again."""
    import torch

    from hf_mlopt.streaming.layers import load_parameters
    from hf_mlopt.streaming.skeleton import release_

    prefix = _prefix(model)
    layer = prefix + names[0].removeprefix(prefix).split(".")[0]
    held = [f"{layer}.{name}" for name in model.get_submodule(layer).state_dict()]
    before = load_parameters(model, held, reader)
    try:
        values = {name: model.get_parameter(name) for name in names}
        return {name: (value.shape, value.numel() - int(torch.count_nonzero(value))) for name, value in values.items()}
    finally:
        release_(model, before)
