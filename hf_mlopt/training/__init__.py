"""The Trainer that every method of this package plugs into, its arguments, and callbacks shared by several methods."""

from importlib import import_module


_PUBLIC = {
    "KeepZerosCallback": "hf_mlopt.training.callbacks",
    "MLOptTrainer": "hf_mlopt.training.trainer",
    "MLOptTrainingArguments": "hf_mlopt.training.arguments",
    "OptimizerEntry": "hf_mlopt.training.optimizer_table",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
