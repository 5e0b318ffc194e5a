"""Checkpoints that plain Transformers reads, where they came from, and their cards. Importing this needs no torch."""

from hf_mlopt.hub.card import pruning_card, render_card
from hf_mlopt.hub.card_distilled import distillation_card
from hf_mlopt.hub.checkpoint import (
    Checkpoint,
    checkpoint_bytes,
    complete_checkpoint,
    copy_config,
    hub_errors,
    resolve_checkpoint,
    safetensors_files,
    save_checkpoint,
)
from hf_mlopt.hub.output import check_output, staged_output
from hf_mlopt.hub.provenance import environment, model_provenance


__all__ = [
    "Checkpoint",
    "check_output",
    "checkpoint_bytes",
    "complete_checkpoint",
    "copy_config",
    "distillation_card",
    "environment",
    "hub_errors",
    "model_provenance",
    "pruning_card",
    "render_card",
    "resolve_checkpoint",
    "safetensors_files",
    "save_checkpoint",
    "staged_output",
]
