"""What a run will take, told from a checkpoint's `config.json` and headers alone. Imports no torch."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "DistillationPlan": "hf_mlopt.planning.distillation",
    "Plan": "hf_mlopt.planning.plan",
    "check_distillation_memory": "hf_mlopt.planning.distillation",
    "make_plan": "hf_mlopt.planning.plan",
    "plan_distillation": "hf_mlopt.planning.distillation",
    "planned_layout": "hf_mlopt.planning.layout",
    "read_shape": "hf_mlopt.planning.shape",
    "read_source": "hf_mlopt.planning.source",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
