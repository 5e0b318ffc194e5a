"""Scores, patterns, the calibrated sweep and its report. Light to import: torch comes with the first use."""

from importlib import import_module


_PUBLIC = {
    "METHODS": "hf_mlopt.pruning.scores",
    "MoEPruner": "hf_mlopt.pruning.pruner",
    "PruningConfig": "hf_mlopt.pruning.config",
    "PruningReport": "hf_mlopt.pruning.report",
    "validate": "hf_mlopt.pruning.validation",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
