"""What a recipe of `--task segmentation` may say, and what only it may."""

import importlib.util
import json
import math
from typing import TYPE_CHECKING, Any

from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    from hf_mlopt.workflows.federate_recipe import FederateRecipe

DISCS = "discs"
MAX_DISC_SITES = 5
_IMAGES = 48  # of discs, a site
# Fields of the other tasks, and of this one, with what they are where nothing is given.
_OF_OTHERS = {
    **{"model": None, "lora": None, "tokenizer": None, "vocab_size": None, "eval_dataset": None},
    **{"partition": "iid", "dirichlet_alpha": None, "similarity": None, "site_column": None},
}
_OF_THIS = {
    **{"site_names": None, "unseen_site": None, "pool_sites": False, "augmentation": None, "overlay_every": 10},
    **{"volumes": None, "intensity_window": None},
}


def check_segmentation(recipe: "FederateRecipe") -> None:
    """
    Refuses fields that do not belong to the task, and values that mean nothing to it, before any data are read.

    Raises:
        ConfigurationError: With field, value and remedy.
        InputError: If MONAI is missing.
    """
    fields = _OF_OTHERS if recipe.task == "segmentation" else _OF_THIS
    for name, default in fields.items():
        if getattr(recipe, name) != default:
            raise ConfigurationError(name, getattr(recipe, name), f"does not belong to --task {recipe.task}")
    if recipe.task != "segmentation":
        return
    if importlib.util.find_spec("monai") is None:
        raise InputError("task='segmentation': metrics and U-Net are MONAI's; install the extra hf-mlopt[medical]")
    recipe.site_names = _site_names(recipe.site_names)
    if recipe.site_datasets is None:
        recipe.dataset = recipe.dataset or DISCS
    elif recipe.dataset is not None:
        raise ConfigurationError("dataset", recipe.dataset, "leave it out: site_datasets has a source a site")
    else:
        recipe.num_sites = len(recipe.site_datasets)
    if recipe.overlay_every < 0:
        raise ConfigurationError("overlay_every", recipe.overlay_every, "must be at least 0")
    if not 0 <= recipe.site_eval_share < 1:
        raise ConfigurationError("site_eval_share", recipe.site_eval_share, "must be at least 0 and below 1")
    if recipe.pool_sites and recipe.algorithm == "fedsm":
        raise ConfigurationError(
            "pool_sites", True, "leaves one site, of which there is nothing to select; take fedavg"
        )
    if recipe.site_datasets is None and recipe.dataset.split(":")[0] == DISCS:
        num_disc_images(recipe.dataset)
        if not 1 <= recipe.num_sites <= MAX_DISC_SITES:
            raise ConfigurationError("num_sites", recipe.num_sites, f"of discs there are 1 to {MAX_DISC_SITES} sites")
    if recipe.site_names is not None and not str(recipe.dataset).endswith(".npz"):
        raise ConfigurationError("site_names", recipe.site_names, "is for an .npz file; folders have names")
    _check_volumes(recipe)
    if recipe.augmentation is not None:
        from hf_mlopt.workflows.segmentation_data import monai_transform

        monai_transform(recipe.augmentation)


def _check_volumes(recipe: "FederateRecipe") -> None:
    if (recipe.model_type == "unet3d") != (recipe.volumes == "whole"):
        raise ConfigurationError("model_type", recipe.model_type, "unet3d and volumes: whole belong to one another")
    window = recipe.intensity_window
    if recipe.volumes is None:
        if window is not None:
            raise ConfigurationError("intensity_window", window, "is for volumes; set volumes")
        return
    if importlib.util.find_spec("nibabel") is None:
        raise InputError("volumes: NIfTI files need nibabel; install the extra hf-mlopt[medical]")
    if recipe.image_size is None:
        raise ConfigurationError("image_size", None, "is needed with volumes, whose sizes differ")
    if window is not None and not (len(window) == 2 and -math.inf < window[0] < window[1] < math.inf):
        raise ConfigurationError("intensity_window", window, "must be [low, high] with low below high")
    recipe.label_names = ["labels", "case"]  # so that the Trainer's metrics know which slices are of one volume


def num_disc_images(source: str) -> int:
    """Images a site of `discs` or `discs:NUMBER`."""
    number = source.partition(":")[2]
    if not number:
        return _IMAGES
    if not number.isdecimal() or int(number) < 2:
        raise ConfigurationError("dataset", source, "must be discs, or discs:NUMBER with 2 images a site or more")
    return int(number)


def _site_names(given: Any) -> dict[int, str] | None:
    try:
        names = json.loads(given) if isinstance(given, str) else given
        return names if names is None else {int(number): str(name) for number, name in names.items()}
    except (ValueError, AttributeError):
        raise ConfigurationError("site_names", given, "must be numbers to names: {0: north, 1: south}") from None
