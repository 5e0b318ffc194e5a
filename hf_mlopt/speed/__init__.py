"""What the experts of one layer cost to run, dense and pruned, on the machine at hand."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "ExpertVariants": "hf_mlopt.speed.variants",
    "verdict": "hf_mlopt.speed.advice",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
