"""`hf-mlopt prune MODEL --output DIR --sparsity 0.5`."""

import argparse
import os

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.prune import PruneRecipe, prune_checkpoint


HELP = "Prune the experts of a mixture-of-experts checkpoint in one shot and write the result."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="Local directory or Hub id."
    )
    parser.add_argument("--config", metavar="FILE", help="Recipe in YAML; options on the command line win over it.")
    add_fields(parser, PruneRecipe, exclude=("model",))
    parser.add_argument(
        "--in-memory",
        dest="stream",
        action="store_const",
        const=False,
        default=argparse.SUPPRESS,
        help="Load the whole model, also where it seems not to fit.",
    )


def run(args: argparse.Namespace) -> None:
    given = arguments_given(args, PruneRecipe)
    recipe = load_config(PruneRecipe, args.config, without_rival(given))
    what = recipe.calibration if recipe.needs_calibration else "nothing"
    first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    if first:
        how = f"{recipe.method} {recipe.label}" if recipe.prunes_weights else f"{recipe.label} by {recipe.drop_score}"
        print(f"pruning {recipe.model}: {how}, scope {recipe.scope}, calibrated on {what}")
    report, output = prune_checkpoint(recipe)
    if first:
        print(report)
        print(f"written to {output}: checkpoint, README.md, recipe.yaml, pruning_report.json")
        print(f"next: hf-mlopt evaluate {output} --perplexity {'embedded' if what == 'embedded' else 'wikitext'}")


def without_rival(given: dict) -> dict:
    """`--pattern` on the command line replaces a recipe's sparsity, and the other way round."""
    for name, rival in (("sparsity", "pattern"), ("pattern", "sparsity")):
        if name in given and rival not in given:
            return {**given, rival: None}
    return given
