"""`hf-mlopt distill STUDENT --teacher T --output DIR`."""

import argparse
import os

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.distill import DistillRecipe, distill_checkpoint, store_targets


HELP = "Win back quality that pruning cost: train a pruned checkpoint to give what the original's experts give."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "student", metavar="STUDENT", nargs="?", default=argparse.SUPPRESS, help="Local directory or Hub id."
    )
    parser.add_argument("--config", metavar="FILE", help="Recipe in YAML; options on the command line win over it.")
    add_fields(parser, DistillRecipe, exclude=("student",))


def run(args: argparse.Namespace) -> None:
    recipe = load_config(DistillRecipe, args.config, arguments_given(args, DistillRecipe))
    first = os.environ.get("RANK", "0") == "0"  # of the processes of `accelerate launch`
    if recipe.store_targets:
        store_targets(recipe)
        print(f"written to {recipe.store_targets}; train from it with --teacher-targets {recipe.store_targets}")
        return
    teacher = recipe.teacher or recipe.teacher_targets
    if first:
        print(f"distilling {recipe.student} from {teacher}, {recipe.mode}, on {recipe.dataset}")
    report, output = distill_checkpoint(recipe)
    if first:
        print(report)
        print(f"written to {output}: checkpoint, README.md, recipe.yaml, distillation_report.json, distillation.png")
        text = "embedded" if recipe.dataset == "embedded" else "wikitext"
        print(f"next: hf-mlopt evaluate {recipe.teacher or 'TEACHER'} {recipe.student} {output} --perplexity {text}")
