"""Images with masks of all sites, for `hf-mlopt federate --task segmentation`."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated import SiteData
from hf_mlopt.federated.segmentation_data import (
    disc_sites,
    site_from_folder,
    sites_from_folders,
    sites_from_npz,
)
from hf_mlopt.federated.volume_data import site_from_volumes, sites_from_volumes
from hf_mlopt.hub.provenance import shown_name
from hf_mlopt.workflows.segmentation_recipe import DISCS, num_disc_images


if TYPE_CHECKING:
    from datasets import Dataset

    from hf_mlopt.workflows.federate_recipe import FederateRecipe

logger = logging.getLogger(__name__)

POOLED = "all"
_SPLIT_SEED = 0  # not the seed of the run: all runs have the same sites
_COLUMNS = ("pixel_values", "labels")


@dataclass
class SegmentationData:
    """
    Data of all sites, read when they are asked for. Has the interface of `FederatedData`.

    Args:
        recipe (`FederateRecipe`): What to read.
    """

    recipe: "FederateRecipe"
    tokenizer: None = None
    label_names: tuple[str, ...] = ()
    _of_sites: dict[str, SiteData] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The sites that train."""
        return [POOLED] if self.recipe.pool_sites else self.parts

    @property
    def parts(self) -> list[str]:
        """The sites that have data of their own; with `pool_sites` others than those that train."""
        recipe = self.recipe
        names = list(self._common if recipe.site_datasets is None else recipe.site_datasets)
        if recipe.unseen_site is not None and recipe.unseen_site not in names:
            raise ConfigurationError("unseen_site", recipe.unseen_site, f"the sites are {', '.join(names)}")
        names = [name for name in names if name != recipe.unseen_site]
        if not names:
            raise ConfigurationError("unseen_site", recipe.unseen_site, "leaves no site to train")
        return names

    def site(self, name: str) -> SiteData:
        """
        What a site has; of its images `site_eval_share` are held out.

        Raises:
            InputError: If the source cannot be read, or there is no such site.
        """
        if name not in self._of_sites:
            if name not in {*self.names, *self.parts}:
                raise InputError(f"site {name!r} is not among {self.names}")
            self._of_sites[name] = data = self._pooled() if name == POOLED else self._split(self._rows(name))
            plain = data.train if data.plain is None else data.plain
            if not any(bool(labels.any()) for labels in plain["labels"]):
                logger.warning("all masks that site %r trains on are empty; it teaches to find nothing", name)
        return self._of_sites[name]

    @cached_property
    def evaluation(self) -> "Dataset | None":
        """What the server evaluates on: the images of `unseen_site`."""
        return None if self.recipe.unseen_site is None else self._rows(self.recipe.unseen_site)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: channels, height, width."""
        return tuple(self._rows(self.parts[0])[0]["pixel_values"].shape)

    @property
    def record(self) -> dict:
        """Where the data came from, JSON-able; without where they lie on this machine."""
        recipe = self.recipe
        if recipe.site_datasets is not None:
            return {"sites": {site: shown_name(source) for site, source in recipe.site_datasets.items()}}
        rows = {name: len(rows) for name, rows in self._common.items() if name != recipe.unseen_site}
        return {"train": {"source": shown_name(recipe.dataset)}, "rows": rows, "unseen": recipe.unseen_site}

    def _rows(self, name: str) -> "Dataset":
        if self.recipe.site_datasets is None:
            return self._common[name]
        return self._of_source(f"site_datasets.{name}", self.recipe.site_datasets[name])

    @cached_property
    def _common(self) -> dict[str, "Dataset"]:
        recipe, size = self.recipe, self.recipe.image_size
        source = Path(recipe.dataset)
        if recipe.volumes is not None:
            return sites_from_volumes(source, *self._of_volumes)
        if recipe.dataset.split(":")[0] == DISCS:
            names = [f"site_{number}" for number in range(recipe.num_sites)]
            return disc_sites(names, num_disc_images(recipe.dataset), size or 32, _SPLIT_SEED)
        if source.suffix == ".npz":
            return sites_from_npz(source, recipe.site_names, size)
        if source.is_dir():
            return sites_from_folders(source, size)
        raise ConfigurationError("dataset", recipe.dataset, "no such .npz file or folder of sites, and not discs")

    def _of_source(self, name: str, source: str) -> "Dataset":
        if not Path(source).is_dir():
            raise ConfigurationError(name, source, "no such folder; it must hold images/ and masks/")
        if self.recipe.volumes is not None:
            return site_from_volumes(source, *self._of_volumes)
        return site_from_folder(Path(source), self.recipe.image_size)

    @property
    def _of_volumes(self) -> tuple[int, list[float] | None, bool]:
        return self.recipe.image_size, self.recipe.intensity_window, self.recipe.volumes == "whole"

    def _split(self, rows: "Dataset") -> SiteData:
        # Slices of one volume are nearly alike, so a volume is held out whole.
        cases = np.asarray(rows["case"]) if "case" in rows.column_names else np.arange(len(rows))
        count, share = len(np.unique(cases)), self.recipe.site_eval_share
        num_held_out = min(count - 1, max(1, round(share * count))) if share and count > 1 else 0
        held_out = np.random.default_rng(_SPLIT_SEED).permutation(count)[:num_held_out]
        is_held_out = np.isin(cases, held_out)
        train, evaluation = (rows.select(np.flatnonzero(chosen)) for chosen in (~is_held_out, is_held_out))
        return self._site_data(train, evaluation if num_held_out else None)

    def _site_data(self, train: "Dataset", evaluation: "Dataset | None") -> SiteData:
        if self.recipe.augmentation is None:
            return SiteData(train, evaluation)
        return SiteData(AugmentedRows(train, self.recipe.augmentation), evaluation, plain=train)

    def _pooled(self) -> SiteData:
        from datasets import concatenate_datasets

        of_parts = [self.site(name) for name in self.parts]
        held_out = [data.evaluation for data in of_parts if data.evaluation is not None]
        plain = [data.train if data.plain is None else data.plain for data in of_parts]
        train = concatenate_datasets(plain)
        return self._site_data(train, concatenate_datasets(held_out) if held_out else None)


class AugmentedRows(torch.utils.data.Dataset):
    """
    Rows changed at random whenever they are read. Random numbers follow torch's generator, which a site's training
    seeds, so that a round done again is the same.

    Args:
        rows (`Dataset`): `pixel_values` `[C, H, W]` and `labels` `[1, H, W]`.
        augmentation (`dict`): See `FederateRecipe`.
    """

    def __init__(self, rows: "Dataset", augmentation: dict[str, Any]):
        self.rows, self.augmentation = rows, augmentation

    @cached_property
    def _transform(self):
        return monai_transform(self.augmentation)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self._transform.set_random_state(seed=int(torch.randint(2**31, ())))
        row = self.rows[index]
        plain = {name: value for name, value in row.items() if name not in _COLUMNS}
        for name, changed in self._transform({name: row[name] for name in _COLUMNS}).items():
            plain[name] = changed.as_subclass(torch.Tensor).contiguous()  # MONAI's tensors carry more
        return plain

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_transform"}


def monai_transform(augmentation: dict[str, Any]):
    """
    The transforms named, one after the other.

    Raises:
        ConfigurationError: If MONAI has no dictionary transform of a name, or it does not take the arguments.
    """
    from monai import transforms

    made = []
    for name, given in augmentation.items():
        kind = getattr(transforms, str(name), None)
        if not isinstance(kind, type) or not issubclass(kind, transforms.MapTransform):
            remedy = "is no dictionary transform of monai.transforms, such as RandRotate90d or RandAxisFlipd"
            raise ConfigurationError(f"augmentation.{name}", given, remedy)
        try:
            made.append(kind(**{"keys": list(_COLUMNS), **(given or {})}))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"augmentation.{name}", given, " ".join(str(error).split())) from error
    return transforms.Compose(made)
