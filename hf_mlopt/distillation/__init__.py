"""Expert-wise distillation of a pruned mixture of experts: a Trainer, and a mode that goes layer by layer."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "DistillationArguments": "hf_mlopt.distillation.arguments",
    "ExpertDistillationTrainer": "hf_mlopt.distillation.trainer",
    "LayerwiseConfig": "hf_mlopt.distillation.config",
    "StoredTargets": "hf_mlopt.distillation.stored",
    "distill_layerwise": "hf_mlopt.distillation.layerwise",
    "add_masked_lora": "hf_mlopt.distillation.lora",
    "merge_masked_lora": "hf_mlopt.distillation.lora",
    "store_targets": "hf_mlopt.distillation.stored",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
