"""Published methods for training and serving under real constraints, in the Hugging Face workflow you already have."""

from hf_mlopt.lazy import lazy_names


__version__ = "0.1.0"

_PUBLIC = {
    "DOMO": "hf_mlopt.optimizers",
    "DistillationArguments": "hf_mlopt.distillation",
    "ExpertDistillationTrainer": "hf_mlopt.distillation",
    "FederatedTrainer": "hf_mlopt.federated",
    "FederatedTrainingArguments": "hf_mlopt.federated",
    "LayerwiseConfig": "hf_mlopt.distillation",
    "MLOptTrainer": "hf_mlopt.training",
    "MLOptTrainingArguments": "hf_mlopt.training",
    "MoELayer": "hf_mlopt.moe",
    "MoEPruner": "hf_mlopt.pruning",
    "PipelineTrainer": "hf_mlopt.pipeline",
    "PipelineTrainingArguments": "hf_mlopt.pipeline",
    "PruningConfig": "hf_mlopt.pruning",
    "PruningReport": "hf_mlopt.pruning",
    "RSGD": "hf_mlopt.optimizers",
    "RSGDWrapper": "hf_mlopt.optimizers",
    "SAEFOptimizer": "hf_mlopt.communication",
    "compress": "hf_mlopt.communication",
    "distill_layerwise": "hf_mlopt.distillation",
    "evaluate_tasks": "hf_mlopt.evaluation",
    "moe_layers": "hf_mlopt.moe",
    "observe": "hf_mlopt.moe",
    "perplexity": "hf_mlopt.evaluation",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__():
    return [*globals(), *_PUBLIC]
