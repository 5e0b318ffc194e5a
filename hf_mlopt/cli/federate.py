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
    from hf_mlopt.workflows.federate_flower import federate_on_flower
    from hf_mlopt.workflows.federate_recipe import FederateRecipe
    from hf_mlopt.workflows.tables import text_table

    recipe = load_config(FederateRecipe, args.recipe, arguments_given(args, FederateRecipe))
    try:
        results, output = federate(recipe) if recipe.engine == "in-process" else federate_on_flower(recipe)
    except RoundFailed as error:
        print(f"hf-mlopt federate: {error}", file=sys.stderr)
        return 1
    if results is None:
        print(f"the machine of the SuperLink has written model and federated_results.json to {output}")
        return None
    print("\n".join(text_table(site_rows(results))))
    for name, value in {**results["evaluation"], **(results["server"] or {})}.items():
        print(f"{name} {value:.4g}")
    if "segmentation" in results:
        print("\n".join(_dice_lines(results["segmentation"])))
    megabytes = (results["bytes_down"] + results["bytes_up"]) / 1e6
    print(
        f"{len(results['rounds'])} rounds in {results['seconds']:.0f} s, {megabytes:.1f} MB between server and sites"
    )
    written = ["model", "recipe.yaml", "federated_results.json"]
    optional = ("base", "curves.png", "auto_fedrl.png", "overlays", "super_model")
    written += [name for name in optional if (output / name).exists()]
    print(f"written to {output}: {', '.join(written)}")
    return None


def _dice_lines(found: dict) -> list[str]:
    lines = ["mean dice over sites: " + ", ".join(f"{name} {value:.4g}" for name, value in found["mean"].items())]
    if "unseen" in found:
        told = [f"{name} {found['unseen'][name]:.4g}" for name in ("global", "super") if name in found["unseen"]]
        lines.append(f"dice at {found['unseen']['site']}, which took no part: " + ", ".join(told))
    if "selector_accuracy" in found:
        lines.append(f"the selector names the right site for {100 * found['selector_accuracy']:.1f} % of the images")
    return lines
