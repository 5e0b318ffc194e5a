"""The algorithms by the names recipes use."""

from importlib import import_module

from hf_mlopt.federated.algorithms import ALGORITHM_CLASSES


_CLASSES = [getattr(import_module(module), name) for name, module in ALGORITHM_CLASSES.items()]
ALGORITHMS = {algorithm.name: algorithm for algorithm in _CLASSES}
