"""The cards of what a federated segmentation leaves: the global model, and the super model of FedSM."""

from collections.abc import Mapping
from typing import Any

from hf_mlopt.hub.card import render_card


_MODELS = ("global", "personal", "super")
_HEADER = {"library_name": "hf_mlopt", "pipeline_tag": "image-segmentation"}


def super_model_card(name: str, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """
    States what a super model is made of, and what was measured.

    Args:
        name (`str`): For the title.
        config (`Mapping`): Its `config.json`.
        results (`Mapping`): `sites`, `mean`, `unseen` and `selector_accuracy`, as far as they were measured.

    Returns:
        `str`: The text of `README.md`.
    """
    accuracy = results.get("selector_accuracy")
    data = {"name": name, "config": config, "selector_accuracy": accuracy, "environment": config["hf_mlopt"]}
    tags = ["hf_mlopt", "federated-learning", "fedsm"]
    return render_card("super_model", {**data, **_dice(results)}, {**_HEADER, "tags": tags})


def segmentation_card(name: str, results: Mapping[str, Any]) -> str:
    """
    States how a model of segmentation was trained, and what was measured.

    Args:
        name (`str`): For the title.
        results (`Mapping`): What `federated_results.json` holds.

    Returns:
        `str`: The text of `README.md`.
    """
    measured = results.get("segmentation", {})
    tags = ["hf_mlopt", "federated-learning", results["algorithm"]["name"]]
    data = {"name": name, "results": results, "environment": results["environment"], **_dice(measured)}
    return render_card("segmentation", data, {**_HEADER, "tags": tags})


def _dice(results: Mapping[str, Any]) -> dict[str, list]:
    """Columns and rows of the table."""
    rows = dict(results.get("sites", {}))
    models = [model for model in _MODELS if any(model in row for row in rows.values())]
    if unseen := results.get("unseen"):
        rows[f"{unseen['site']} (took no part)"] = unseen
    if results.get("mean"):
        rows["mean over sites"] = results["mean"]
    table = [[site, row.get("images"), *(row.get(model) for model in models)] for site, row in rows.items()]
    return {"models": models, "table": table}
