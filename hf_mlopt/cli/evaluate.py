"""`hf-mlopt evaluate MODEL --perplexity SOURCE`."""

import argparse

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.evaluate import EvaluationConfig, evaluate_checkpoint


HELP = "Measure the perplexity of a checkpoint, as the pruning papers do."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Local directory or Hub id.")
    add_fields(parser, EvaluationConfig, exclude=("model",))


def run(args: argparse.Namespace) -> None:
    config = load_config(EvaluationConfig, overrides=arguments_given(args, EvaluationConfig))
    result = evaluate_checkpoint(config)
    print(f"{config.model}: perplexity {result['perplexity']:.3f} ({result['nll']:.4f} nats per token)")
    print(
        f"  {config.perplexity}, split {config.split}, {result['windows']} windows of {result['window']} tokens, "
        "not overlapping, tail dropped"
    )
    if config.output:
        print(f"written to {config.output}")
