"""`hf-mlopt federate RECIPE --output-dir DIR`."""

import argparse
import sys

from hf_mlopt.configuration import add_arguments as add_fields
from hf_mlopt.configuration import arguments_given, load_config


HELP = "Train one model at several sites whose data stay where they are."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hf_mlopt.workflows.federate_recipe import FederateRecipe  # `TrainingArguments` comes with torch

    parser.add_argument("recipe", metavar="RECIPE", help="Recipe in YAML; options on the command line win over it.")
    short = {"--sites": "num_sites", "--rounds": "num_rounds"}
    for option, name in short.items():
        parser.add_argument(
            option, dest=name, type=int, default=argparse.SUPPRESS, help=f"Short for --{name.replace('_', '-')}."
        )
    add_fields(parser, FederateRecipe)


def run(args: argparse.Namespace) -> int | None:
    from hf_mlopt.federated import RoundFailed
    from hf_mlopt.workflows.federate import federate, site_rows
    from hf_mlopt.workflows.federate_recipe import FederateRecipe

    recipe = load_config(FederateRecipe, args.recipe, arguments_given(args, FederateRecipe))
    try:
        results, output = federate(recipe)
    except RoundFailed as error:
        print(f"hf-mlopt federate: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(site_rows(results))))
    for name, value in {**results["evaluation"], **(results["server"] or {})}.items():
        print(f"{name} {value:.4g}")
    megabytes = (results["bytes_down"] + results["bytes_up"]) / 1e6
    print(
        f"{len(results['rounds'])} rounds in {results['seconds']:.0f} s, {megabytes:.1f} MB between server and sites"
    )
    picture = ", curves.png" if recipe.plot else ""
    print(f"written to {output}: model, recipe.yaml, federated_results.json{picture}")
    return None


def table(rows: list[dict]) -> list[str]:
    """The final table, a line a site."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
