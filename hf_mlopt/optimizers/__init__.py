"""Optimizers with two points, one to train and one to evaluate. Tensors in, tensors out; no ranks, no files."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "DOMO": "hf_mlopt.optimizers.domo",
    "RSGD": "hf_mlopt.optimizers.rsgd",
    "RSGDWrapper": "hf_mlopt.optimizers.rsgd_wrapper",
    "VARIANTS": "hf_mlopt.optimizers.domo_variants",
    "stability_bound": "hf_mlopt.optimizers.rsgd",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
