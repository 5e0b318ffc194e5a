"""`hf-mlopt recipes list` and `hf-mlopt recipes copy`: the recipes that travel with the package."""

import argparse
import shutil
from pathlib import Path

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.resources import resource_dir


HELP = "List the recipes that come with the package, or copy them to a folder of yours."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="Print the name of every recipe and what it is for.")
    copy = actions.add_parser("copy", help="Copy a recipe, to be edited and used.", allow_abbrev=False)
    copy.add_argument("name", metavar="NAME", help="A name from the list, or `all`.")
    copy.add_argument("--output", metavar="DIR", required=True, help="Folder to copy into; made when absent.")


def run(args: argparse.Namespace) -> None:
    folder = resource_dir("recipes")
    recipes = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".yaml", ".py", ".sbatch")
    }
    if args.action == "list":
        width = max(map(len, recipes), default=0)
        for name, path in recipes.items():
            print(f"{name:<{width}}  {_summary(path)}".rstrip())
    else:
        _copy(folder, _selected(recipes, args.name), Path(args.output))


def _summary(recipe: Path) -> str:
    """The comment or docstring that a recipe begins with; its first line, after that which names an interpreter."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    first = next((line for line in lines if not line.startswith("#!")), "")
    return first.strip('#" ') if first.startswith(("#", '"""')) else ""


def _selected(recipes: dict[str, Path], name: str) -> list[Path]:
    if name == "all":
        return list(recipes.values())
    recipe = recipes.get(name) or recipes.get(f"{name}.yaml")
    if recipe is None:
        raise ConfigurationError("NAME", name, f"must be `all` or one of: {', '.join(recipes)}")
    return [recipe]


def _copy(folder: Path, sources: list[Path], output: Path) -> None:
    targets = [output / source.relative_to(folder) for source in sources]
    for target in targets:  # all of them first: nothing is copied when one is refused
        if target.exists():
            raise ConfigurationError("--output", str(output), f"{target} exists already; choose another folder")
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        print(target)
