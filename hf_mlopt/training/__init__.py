"""The Trainer that every method of this package plugs into, its arguments, and callbacks shared by several methods."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "EvaluationCallback": "hf_mlopt.training.evaluation_callback",
    "KeepZerosCallback": "hf_mlopt.training.callbacks",
    "MLOptTrainer": "hf_mlopt.training.trainer",
    "MLOptTrainingArguments": "hf_mlopt.training.arguments",
    "OptimizerEntry": "hf_mlopt.training.optimizer_table",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
