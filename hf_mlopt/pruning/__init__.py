"""Scores, patterns, the calibrated sweep and its report. Light to import: torch comes with the first use."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "METHODS": "hf_mlopt.pruning.scores",
    "MoEPruner": "hf_mlopt.pruning.pruner",
    "PruningConfig": "hf_mlopt.pruning.config",
    "PruningReport": "hf_mlopt.pruning.report",
    "validate": "hf_mlopt.pruning.validation",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
