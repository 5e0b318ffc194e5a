"""
`hf-mlopt federate --engine flower`: the same recipe, with Flower between server and sites.

This module is the application of Flower's two ends, which find [`answer_factory`] and [`serve`] by name.
"""

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_mlopt.configuration import load_config, save_yaml
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated import RoundFailed
from hf_mlopt.federated.engines.flower_deployment import LocalFlower
from hf_mlopt.federated.engines.flower_runs import Link, require_flower, submit, write_app
from hf_mlopt.workflows.federate import Federation, check, federate
from hf_mlopt.workflows.federate_recipe import FederateRecipe


if TYPE_CHECKING:
    from hf_mlopt.federated.engines import Engine

logger = logging.getLogger(__name__)

_APPLICATION = "hf_mlopt.workflows.federate_flower"
_TIMEOUT = 3600.0  # seconds of an exchange
_OF_THE_SENDER = ("superlink", "root_certificates", "flower_nodes")


def federate_on_flower(recipe: FederateRecipe) -> tuple[dict | None, Path]:
    """
    Carries out a recipe over Flower: on this machine, with a SuperLink of its own that ends with it; or, with
    `superlink`, over one that runs, whose machine is then the server.

    Returns:
        `tuple[dict | None, Path]`: What `federated_results.json` holds, where this machine is the server; and the
        directory of it.

    Raises:
        InputError: If Flower is missing, the SuperLink is not to be trusted, or the recipe cannot be carried out.
        RoundFailed: If a round has too few sites, or the server's process has ended in another way.
    """
    require_flower(recipe.flower_simulation)
    output = Path(recipe.output_dir).resolve()
    if recipe.superlink is not None:
        certificates = None if recipe.root_certificates is None else Path(recipe.root_certificates).resolve()
        with tempfile.TemporaryDirectory(prefix="hf-mlopt-flower-") as folder:
            app = write_app(Path(folder) / "app", _APPLICATION, _run_config(recipe))
            with _failures():
                submit(app, Link(recipe.superlink, certificates), Path(folder) / "home", _show, _longest(recipe))
        return None, Path(recipe.output_dir)
    check(recipe)
    names = Federation(recipe).data.names
    run_config = {**_run_config(recipe), "sites": ",".join(names), "state": str(output / "sites")}
    with tempfile.TemporaryDirectory(prefix="hf-mlopt-flower-") as folder:
        with _failures(), LocalFlower(Path(folder), names, simulation=recipe.flower_simulation) as flower:
            flower.run(_APPLICATION, run_config, _show, _longest(recipe))
    return json.loads((output / "federated_results.json").read_text(encoding="utf-8")), output


def answer_factory(run_config: dict[str, Any], node_config: dict[str, Any]) -> tuple[str, Callable]:
    """
    What stands at a site. Its node configuration says `site`; where the site has data that the recipe does not name,
    `data`, and `release_personal` where its personal model of FedSM may be handed to users; and `state`, the folder
    for what it keeps to itself.
    """
    recipe = _recipe(run_config)
    name = node_config.get("site")
    if name is None:
        name = run_config["sites"].split(",")[int(node_config["partition-id"])]
    if "data" in node_config:
        recipe.site_datasets = {**(recipe.site_datasets or {}), name: node_config["data"]}
        # What a recipe from elsewhere says of this is no consent.
        recipe.release_personal = bool(node_config.get("release_personal", False))
    _check_demands(name, recipe, node_config)
    state = node_config.get("state", run_config.get("state"))
    if state is None:
        raise ConfigurationError("state", None, f"the node of site {name!r} needs a folder: --node-config 'state=...'")
    return name, Federation(recipe).client(Path(state)).answer


def _check_demands(site: str, recipe: FederateRecipe, node_config: dict[str, Any]) -> None:
    """What a site insists on, whatever recipe the server sends."""
    if node_config.get("secure_sum") and not recipe.secure_sum:
        raise ConfigurationError("secure_sum", False, f"site {site!r} takes part in masked sums only")
    least = node_config.get("noise_multiplier", 0.0)
    if recipe.noise_multiplier < least:
        remedy = f"site {site!r} demands at least {least:g}"
        raise ConfigurationError("noise_multiplier", recipe.noise_multiplier, remedy)


def serve(engine: "Engine", run_config: dict[str, Any]) -> None:
    """All rounds, as the server."""
    logging.getLogger("hf_mlopt").setLevel(logging.INFO)
    federate(_recipe(run_config), engine)


@contextmanager
def _failures() -> Iterator[None]:
    """What has ended the server's process, as it would have ended this one."""
    try:
        yield
    except RuntimeError as error:
        told = re.findall(r"RoundFailed: (.*)", str(error))
        raise RoundFailed(told[-1] if told else str(error)) from error


def _recipe(run_config: dict[str, Any]) -> FederateRecipe:
    given = yaml.safe_load(run_config["recipe"])
    return load_config(FederateRecipe, None, {**given, "disable_tqdm": True})


def _run_config(recipe: FederateRecipe) -> dict[str, Any]:
    """The recipe travels as text: server and sites may be other machines."""
    given = {name: value for name, value in recipe.given.items() if name not in _OF_THE_SENDER}
    given |= {"output_dir": str(recipe.output_dir)}
    if recipe.superlink is None:
        given["output_dir"] = str(Path(recipe.output_dir).resolve())
        for name in ("dataset", "eval_dataset", "model", "tokenizer"):
            given |= {name: str(Path(given[name]).resolve())} if _is_local(given.get(name)) else {}
        if recipe.site_datasets is not None:
            given["site_datasets"] = {site: _resolved(source) for site, source in recipe.site_datasets.items()}
    if recipe.resume_from_checkpoint:
        given["resume_from_checkpoint"] = recipe.resume_from_checkpoint
    written = dataclasses.make_dataclass("Written", [(name, Any) for name in given])(**given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        save_yaml(written, path)
        text = path.read_text(encoding="utf-8")
    config = {"recipe": text, "timeout": recipe.round_timeout or _TIMEOUT, "retries": recipe.site_retries}
    sites = ",".join(recipe.site_datasets) if recipe.site_datasets is not None else recipe.num_sites
    nodes = ",".join(f"{site}={node}" for site, node in (recipe.flower_nodes or {}).items())
    return {**config, "sites": sites, **({"nodes": nodes} if nodes else {})}


def _is_local(source: str | None) -> bool:
    return bool(source) and Path(source.partition(".npz:")[0] + (".npz" if ".npz:" in source else "")).exists()


def _resolved(source: str) -> str:
    return str(Path(source).resolve()) if _is_local(source) else source


def _longest(recipe: FederateRecipe) -> float:
    """Seconds of a whole run, for the process that waits for it: every exchange may take its time."""
    return (recipe.round_timeout or _TIMEOUT) * (8 * recipe.num_rounds + 3)


def _show(line: str) -> None:
    logger.info("%s", line)
