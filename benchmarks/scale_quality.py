"""The quality part of `pruning_scale.py`: experts removed, sparsity allocated, perplexity of what is left."""

import copy

from common import Results
from pruning import WINDOW, load_reference
from transformers.utils import logging

from hf_mlopt.evaluation import perplexity
from hf_mlopt.pruning import MoEPruner, PruningConfig


# Fixed before any result was seen.
REMOVAL = [
    {"drop_experts": drop, "drop_score": score, **weights}
    for drop in (0.25, 0.5)
    for score in ("reap", "frequency")
    for weights in ({}, {"sparsity": 0.5})
]
ALLOCATION = [
    {"sparsity": sparsity, "allocation": allocation, "method": method}
    for method in ("moe-pruner", "wanda")
    for sparsity in (0.5, 0.7)
    for allocation in ("uniform", "load", "owl")
]


def measure_quality(results: Results, seeds: tuple[int, ...]) -> None:
    """Perplexity on WikiText-2 test of the reference model pruned each way, calibrated on 128 x 128 other tokens."""
    logging.disable_progress_bar()
    model, _, calibration, held_out = load_reference()
    held_out = held_out[: (200 if len(seeds) == 1 else 800) * WINDOW]
    results.note(dense_perplexity=perplexity(model, held_out, WINDOW).perplexity)
    for settings in [*REMOVAL, *ALLOCATION]:
        for seed in seeds:
            pruned = copy.deepcopy(model)
            report = MoEPruner(PruningConfig(**settings)).prune(pruned, calibration[seed], progress=False)
            results.add(
                kind="quality",
                **settings,
                seed=seed,
                perplexity=perplexity(pruned, held_out, WINDOW).perplexity,
                parameters=report.totals["parameters"],
                nonzero=report.totals["parameters"] - report.totals["zeros"],
            )
