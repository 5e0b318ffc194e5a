"""
Runs one `hf-mlopt prune` in a process of its own and prints what it took, as one line of JSON.

    python benchmarks/measured_prune.py MODEL --output DIR --sparsity 0.5 --stream ...

`baseline_bytes` is the resident memory when everything is imported and nothing is loaded, `peak_bytes` the highest
until the checkpoint is written; the difference is what the run itself took.
"""

import argparse
import json
import time

import psutil
import torch

from hf_mlopt.cli import prune as verb
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.prune import PruneRecipe, prune_checkpoint


def main() -> None:
    import datasets  # noqa: F401  (reads calibration data)
    import transformers
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    import hf_mlopt.workflows.stream  # noqa: F401
    from hf_mlopt.pruning.pruner import peak_memory

    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    recipe = load_config(PruneRecipe, overrides=arguments_given(parser.parse_args(), PruneRecipe))
    baseline = psutil.Process().memory_info().rss
    started = time.perf_counter()
    report, _ = prune_checkpoint(recipe)
    record = {
        "seconds": time.perf_counter() - started,
        "sweep_seconds": report.seconds,
        "baseline_bytes": baseline,
        "peak_bytes": peak_memory(torch.device("cpu")),
        "sparsity": report.sparsity,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
