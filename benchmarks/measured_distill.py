"""
Runs one `hf-mlopt distill` in a process of its own and prints what it took, as one line of JSON.

    python benchmarks/measured_distill.py STUDENT --teacher TEACHER --output DIR ...

`baseline_bytes` is the resident memory when everything is imported and nothing is loaded, `peak_bytes` the highest
until the checkpoint is written.
"""

import argparse
import json
import time

import psutil
import torch

from hf_mlopt.cli import distill as verb
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.distill import DistillRecipe, distill_checkpoint


def main() -> None:
    import datasets  # noqa: F401  (reads the text)
    import transformers
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    import hf_mlopt.workflows.distill_end_to_end
    import hf_mlopt.workflows.distill_layerwise  # noqa: F401
    from hf_mlopt.pruning.pruner import peak_memory

    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    recipe = load_config(DistillRecipe, overrides=arguments_given(parser.parse_args(), DistillRecipe))
    baseline = psutil.Process().memory_info().rss
    started = time.perf_counter()
    distill_checkpoint(recipe)
    record = {
        "seconds": time.perf_counter() - started,
        "baseline_bytes": baseline,
        "peak_bytes": peak_memory(torch.device("cpu")),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
