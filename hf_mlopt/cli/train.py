"""`hf-mlopt train --config FILE --output-dir DIR`."""

import argparse
import logging
import os

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.errors import InputError


HELP = "Train a language model or an image classifier with an optimizer of this package."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hf_mlopt.workflows.train import TrainRecipe  # the fields of `TrainingArguments` come with torch

    parser.add_argument("--config", metavar="FILE", help="Recipe in YAML; options on the command line win over it.")
    add_fields(parser, TrainRecipe)


def run(args: argparse.Namespace) -> int | None:
    from hf_mlopt.workflows.launch import as_words, launch, launched
    from hf_mlopt.workflows.train import TrainRecipe, check, train

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("hf_mlopt").setLevel(logging.ERROR)
    given = arguments_given(args, TrainRecipe)
    recipe = load_config(TrainRecipe, args.config, given)
    if (recipe.num_processes or 1) > 1 and not launched():
        check(recipe)
        words = ["train", *(["--config", args.config] if args.config else []), *as_words(given, TrainRecipe)]
        return launch(words, recipe.num_processes, recipe.use_cpu)
    try:
        results, output = train(recipe)
    except InputError:
        _leave_process_group()
        raise
    _leave_process_group()
    if first:
        metric = next(name for name in ("eval_perplexity", "eval_accuracy") if name in results)
        value = "not finite" if results[metric] is None else f"{results[metric]:.4g}"
        print(f"{metric.removeprefix('eval_')} {value} after {results['steps']} steps in {results['seconds']:.0f} s")
        print(f"written to {output}: model, recipe.yaml, train_results.json" + _pictures(recipe))
    return None


def _pictures(recipe) -> str:
    if not recipe.plot:
        return ""
    return ", curves.png" + (", timeline.png" if recipe.pipeline else "")


def _leave_process_group() -> None:
    import gc

    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DDP holds the process group, which may hang when it ends before DDP does
        dist.destroy_process_group()
