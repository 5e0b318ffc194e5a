"""Published methods for training and serving under real constraints, in the Hugging Face workflow you already have."""

from importlib import import_module


__version__ = "0.1.0"

# Public name -> module. Imported on first use, so that `import hf_mlopt` is quick and pulls in no torch.
_PUBLIC = {
    "MLOptTrainer": "hf_mlopt.training",
    "MLOptTrainingArguments": "hf_mlopt.training",
    "MoELayer": "hf_mlopt.moe",
    "MoEPruner": "hf_mlopt.pruning",
    "PruningConfig": "hf_mlopt.pruning",
    "PruningReport": "hf_mlopt.pruning",
    "moe_layers": "hf_mlopt.moe",
    "observe": "hf_mlopt.moe",
    "perplexity": "hf_mlopt.evaluation",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *_PUBLIC]
