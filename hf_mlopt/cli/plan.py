"""`hf-mlopt plan MODEL --sparsity 0.5`: what `prune` with the same options would take and refuse."""

import argparse
import json
from pathlib import Path

from hf_mlopt.cli import prune
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.workflows.prune import PruneRecipe


HELP = "Tell what a pruning run will take and what it would be refused for, without reading any weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prune.add_arguments(parser)
    parser.add_argument(
        "--measure", action="store_true", help="Measure this machine for five seconds, for an estimate of the time."
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the plan to this file, as JSON.")


def run(args: argparse.Namespace) -> int:
    from hf_mlopt.planning import make_plan

    recipe = load_config(PruneRecipe, args.config, prune.without_rival(arguments_given(args, PruneRecipe)))
    if not recipe.model:
        raise ConfigurationError("model", recipe.model, "is needed, on the command line or in the recipe")
    plan = make_plan(recipe, measure=args.measure)
    print(plan)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={args.json!r}: cannot be written ({error.strerror})") from None
    return 2 if plan.conflicts else 0
