"""
`hf-mlopt plan MODEL --sparsity 0.5`: what `prune` with the same options would take and refuse.
`hf-mlopt plan STUDENT --distill ...`: what `distill` would, in each of its ways.
"""

import argparse
import json
from pathlib import Path

from hf_mlopt.cli import prune
from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.workflows.distill import DistillRecipe
from hf_mlopt.workflows.prune import PruneRecipe


HELP = "Tell what a run of prune or distill will take and what it would be refused for, without reading any weights."

_PRUNE, _DISTILL = (set(recipe.__dataclass_fields__) for recipe in (PruneRecipe, DistillRecipe))
_OF_DISTILL_PLANS = ("gpus", "gpu_memory", "fsdp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prune.add_arguments(parser)
    parser.add_argument(
        "--measure", action="store_true", help="Measure this machine for five seconds, for an estimate of the time."
    )
    parser.add_argument("--json", metavar="FILE", help="Also write the plan to this file, as JSON.")
    parser.add_argument(
        "--distill",
        action="store_true",
        help="Plan `hf-mlopt distill` instead: MODEL is the student, and options have the defaults of that command.",
    )
    group = parser.add_argument_group("with --distill")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on (default: those of this machine)")
    group.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="What each of them has (default: what is free here)"
    )
    group.add_argument(
        "--fsdp", action="store_true", help="Several GPUs share the models (FSDP2); without, each holds all (DDP)."
    )
    add_fields(group, DistillRecipe, exclude=("student", *(_PRUNE & _DISTILL)))


def run(args: argparse.Namespace) -> int:
    plan = _plan_distillation(args) if args.distill else _plan_pruning(args)
    print(plan)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"json={args.json!r}: cannot be written ({error.strerror})") from None
    return 2 if plan.conflicts else 0


def _plan_pruning(args: argparse.Namespace):
    from hf_mlopt.planning import make_plan

    asked = {name: getattr(args, name) for name in _OF_DISTILL_PLANS if getattr(args, name)}
    _refuse(asked | _given(args, _DISTILL - _PRUNE), "belongs to --distill")
    recipe = load_config(PruneRecipe, args.config, prune.without_rival(arguments_given(args, PruneRecipe)))
    if not recipe.model:
        raise ConfigurationError("model", recipe.model, "is needed, on the command line or in the recipe")
    return make_plan(recipe, measure=args.measure)


def _plan_distillation(args: argparse.Namespace):
    from hf_mlopt.planning import plan_distillation

    measure = {"measure": True} if args.measure else {}
    _refuse(measure | _given(args, _PRUNE - _DISTILL - {"model"}), "belongs to a plan of pruning, without --distill")
    for name in ("gpus", "gpu_memory"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigurationError(name, value, "must be above 0")
    given = arguments_given(args, DistillRecipe) | ({"student": args.model} if hasattr(args, "model") else {})
    if args.config is None and not {"teacher", "teacher_targets"} & set(given):
        given["teacher"] = given.get("student")  # takes as much as the model that the student was pruned from
    recipe = load_config(DistillRecipe, args.config, given)
    memory = round(args.gpu_memory * 1e9) if args.gpu_memory else None
    return plan_distillation(recipe, gpus=args.gpus, gpu_memory=memory, sharded=args.fsdp)


def _given(args: argparse.Namespace, names: set[str]) -> dict:
    return {name: getattr(args, name) for name in sorted(names) if hasattr(args, name)}


def _refuse(given: dict, why: str) -> None:
    for name, value in given.items():
        raise ConfigurationError(name, value, why)
