"""`hf-mlopt plan-pipeline MODEL --stages 4`."""

import argparse

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config
from hf_mlopt.workflows.plan_pipeline import PipelinePlanRecipe, plan_pipeline


HELP = "Tell where a model would be cut into stages, and what every mode of pipeline training would take."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="Local directory or Hub id."
    )
    add_fields(parser, PipelinePlanRecipe, exclude=("model",))


def run(args: argparse.Namespace) -> None:
    given = arguments_given(args, PipelinePlanRecipe) | ({"model": args.model} if hasattr(args, "model") else {})
    recipe = load_config(PipelinePlanRecipe, overrides=given)
    plan = plan_pipeline(recipe)
    print(f"{plan.name}, measured on {plan.device} with random weights, batches of {recipe.batch_size}")
    for k, (start, stop, (forward, backward)) in enumerate(
        zip(plan.bounds, plan.bounds[1:], plan.times, strict=False)
    ):
        layers = f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
        print(f"stage {k}: {layers}, forward {1e3 * forward:.3g} ms, backward {1e3 * backward:.3g} ms")
    print(f"--pipeline-bounds {' '.join(map(str, plan.bounds))}")
    print()
    print("\n".join(table(plan)))
    print()
    print("bp, gpipe and 1f1b have the gradients of back-propagation; the others are stale, and what that costs in")
    print("quality is in docs/pipeline.md. auto is the least staleness without a bubble at this latency and jitter.")


def table(plan) -> list[str]:
    """
    A line for every mode.

    Args:
        plan (`PipelinePlan`): What was measured and modelled.
    """
    base = plan.rows[0]["seconds"]
    lines = [["mode", "repeats", "in flight", "ms a batch", "x bp", "GB a stage"]]
    for row in plan.rows:
        memory = " ".join(f"{size / 1e9:.3g}" for size in row["memory"])
        flight = " ".join(map(str, row["in_flight"]))
        repeats = "forward" if row["recompute"] else "-"
        lines.append(
            [row["mode"], repeats, flight, f"{1e3 * row['seconds']:.3g}", f"{base / row['seconds']:.2f}", memory]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
