"""What `hf-mlopt federate` reads: what every site has, and what the server evaluates on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_mlopt.data import (
    ImageData,
    LabelledText,
    dirichlet_shares,
    image_dataset,
    label_sorted_shares,
    load_labelled_text,
    tokenize_corpus,
)
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated import SiteData
from hf_mlopt.hub import Checkpoint
from hf_mlopt.workflows.federate_recipe import FederateRecipe
from hf_mlopt.workflows.train_data import (
    held_out_text,
    read_images,
    read_text,
    recipe_tokenizer,
    recipe_windows,
    resized,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPLIT_SEED = 0  # not the seed of the run: all runs have the same sites


@dataclass
class Rows:
    """
    Rows of one source, any of which can be taken.

    Args:
        take (`Callable`): Ascending indices to a data set for a Trainer.
        labels (`np.ndarray`): `[rows]`, to deal them by; zeros where there are none.
        record (`dict`): Where they came from, JSON-able.
        sites (`list[str]`, *optional*): `[rows]`, whose each row is.
    """

    take: Callable[[np.ndarray], Any]
    labels: np.ndarray
    record: dict
    sites: list[str] | None = None


@dataclass
class FederatedData:
    """
    Data of all sites, read when they are asked for.

    Args:
        recipe (`FederateRecipe`): What to read.
        checkpoint (`Checkpoint`, *optional*): The model that training starts from; its tokenizer is the default.
    """

    recipe: FederateRecipe
    checkpoint: Checkpoint | None
    _of_sites: dict[str, SiteData] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        """The sites."""
        if self.recipe.site_datasets is not None:
            return list(self.recipe.site_datasets)
        return list(self._shares)

    def site(self, name: str) -> SiteData:
        """
        What a site has; of its rows `site_eval_share` are held out.

        Raises:
            InputError: If the source cannot be read, or there is no such site.
        """
        if name not in self._of_sites:
            if name not in self.names:
                raise InputError(f"site {name!r} is not among {self.names}")
            if self.recipe.site_datasets is not None:
                rows = self._read(f"site_datasets.{name}", self.recipe.site_datasets[name], "train")
                share = np.arange(len(rows.labels))
            else:
                rows, share = self._common, self._shares[name]
            self._of_sites[name] = _split(rows, share, self.recipe.site_eval_share)
        return self._of_sites[name]

    @cached_property
    def evaluation(self) -> Any:
        """What the server evaluates on; none where only sites have data."""
        recipe = self.recipe
        if recipe.eval_dataset is None and recipe.site_datasets is not None:
            return None
        if recipe.task == "causal-lm":
            documents, name = self._documents[1], "eval_dataset" if recipe.eval_dataset else "dataset"
            return recipe_windows(recipe, name, tokenize_corpus(documents, self.tokenizer), "held-out ")
        if recipe.eval_dataset is not None:
            rows = self._read("eval_dataset", recipe.eval_dataset, None)
        elif recipe.task == "text-classification" and recipe.dataset != "embedded":
            if Path(recipe.dataset).is_file():  # all of its rows are dealt to the sites
                return None
            try:
                rows = self._read("dataset", recipe.dataset, "test")
            except InputError:  # it has no such split
                return None
        else:
            rows = self._read("dataset", recipe.dataset, "test")
        return rows.take(np.arange(len(rows.labels)))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Of text."""
        if not self.recipe.is_text:
            return None
        if self.recipe.site_datasets is not None:
            documents = []
        else:
            documents = self._documents[0] if self.recipe.task == "causal-lm" else self._labelled.texts
        tokenizer = recipe_tokenizer(self.recipe, self.checkpoint, documents)
        if self.recipe.task == "text-classification" and tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ConfigurationError(
                    "tokenizer", self.recipe.tokenizer, "has no pad_token for texts of different lengths; give it one"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def shape(self) -> tuple[int, int, int] | None:
        """Of an image: channels, height, width."""
        recipe = self.recipe
        if recipe.is_text:
            return None
        if recipe.num_channels and recipe.image_size:
            return (recipe.num_channels, recipe.image_size, recipe.image_size)
        return self._first.images.shape[1:]

    @cached_property
    def label_names(self) -> list[str]:
        """Of images, or of texts with labels."""
        if self.recipe.class_names is not None or self.recipe.task == "causal-lm":
            return self.recipe.class_names or []
        return (self._labelled if self.recipe.is_text else self._first).label_names

    @cached_property
    def record(self) -> dict:
        """Where the data came from, JSON-able."""
        recipe = self.recipe
        if recipe.site_datasets is not None:
            return {"sites": dict(recipe.site_datasets)}
        how = {"dirichlet": recipe.dirichlet_alpha, "label-sorted": recipe.similarity, "column": recipe.site_column}
        sizes = {name: len(share) for name, share in self._shares.items()}
        partition = {"partition": recipe.partition, "of": how.get(recipe.partition)}
        return {"train": self._common.record, **partition, "rows": sizes}

    @cached_property
    def _shares(self) -> dict[str, np.ndarray]:
        recipe, rows = self.recipe, self._common
        if recipe.partition == "column":
            return {name: np.flatnonzero([site == name for site in rows.sites]) for name in sorted(set(rows.sites))}
        try:
            if recipe.partition == "dirichlet":
                shares = dirichlet_shares(rows.labels, recipe.num_sites, recipe.dirichlet_alpha, _SPLIT_SEED)
            else:
                similarity = 1.0 if recipe.partition == "iid" else recipe.similarity
                shares = label_sorted_shares(rows.labels, recipe.num_sites, similarity, _SPLIT_SEED)
        except ConfigurationError as error:
            raise ConfigurationError("num_sites", error.value, str(error).partition(": ")[2]) from None
        width = len(str(recipe.num_sites - 1))
        return {f"site_{number:0{width}}": share for number, share in enumerate(shares)}

    @cached_property
    def _common(self) -> Rows:
        return self._read("dataset", self.recipe.dataset, None if self.recipe.eval_dataset else "train")

    def _read(self, name: str, source: str, split: str | None) -> Rows:
        if self.recipe.task == "image-classification":
            return self._image_rows(name, source, split)
        if self.recipe.task == "causal-lm":
            documents = self._documents[0] if name == "dataset" else read_text(name, source, "train")[0]
            windows = recipe_windows(self.recipe, name, tokenize_corpus(documents, self.tokenizer), "")
            return Rows(windows.select, np.zeros(len(windows), dtype=np.int64), {"source": source})
        return self._labelled_rows(name, source, split)

    def _image_rows(self, name: str, source: str, split: str | None) -> Rows:
        data = self._sized(read_images(name, source, split))
        data.labels, data.label_names = self._renumbered(name, source, data.labels, data.label_names)
        if name != "dataset" and (data.label_names, data.images.shape[1:]) != (self.label_names, self.shape):
            raise ConfigurationError(
                name,
                source,
                f"has images of {list(data.images.shape[1:])} with labels {data.label_names}, others "
                f"{list(self.shape)} with {self.label_names}; image_size brings images to one size",
            )

        def take(rows: np.ndarray) -> Any:
            return image_dataset(replace(data, images=data.images[rows], labels=data.labels[rows]))

        return Rows(take, data.labels, data.provenance)

    def _labelled_rows(self, name: str, source: str, split: str | None) -> Rows:
        data = self._labelled if name == "dataset" and split != "test" else _labelled(name, source, split or "test")
        labels, names = self._renumbered(name, source, np.asarray(data.labels), data.label_names)
        if names != self.label_names:
            raise ConfigurationError(
                name, source, f"has labels {names}, others {self.label_names}; list all in label_names"
            )
        from datasets import Dataset

        encoded = self.tokenizer(data.texts, truncation=True, max_length=self.recipe.sequence_length)
        dataset = Dataset.from_dict({**encoded, "labels": labels})
        return Rows(dataset.select, labels, data.provenance, data.sites)

    def _renumbered(
        self, name: str, source: str, labels: np.ndarray, names: list[str]
    ) -> tuple[np.ndarray, list[str]]:
        """Labels by the numbers that `label_names` of the recipe gives them: a site may not have all."""
        wanted = self.recipe.class_names
        if wanted is None:
            return labels, names
        unknown = sorted(set(names) - set(wanted))
        if unknown:
            raise ConfigurationError(name, source, f"has labels {unknown}, which label_names does not list")
        return np.asarray([wanted.index(label) for label in names])[labels], wanted

    def _sized(self, data: ImageData) -> ImageData:
        if self.recipe.image_size:
            data.images = resized(data.images, self.recipe.image_size)
        return data

    @cached_property
    def _first(self) -> ImageData:
        """What all other images must look like."""
        recipe = self.recipe
        if recipe.site_datasets is not None:
            site, source = next(iter(recipe.site_datasets.items()))
            return self._sized(read_images(f"site_datasets.{site}", source, "train"))
        return self._sized(read_images("dataset", recipe.dataset, None if recipe.eval_dataset else "train"))

    @cached_property
    def _labelled(self) -> LabelledText:
        recipe = self.recipe
        if recipe.site_datasets is not None:
            site, source = next(iter(recipe.site_datasets.items()))
            return _labelled(f"site_datasets.{site}", source, "train")
        return _labelled("dataset", recipe.dataset, "train", recipe.site_column)

    @cached_property
    def _documents(self) -> tuple[list[str], list[str]]:
        recipe = self.recipe
        documents = read_text("dataset", recipe.dataset, "train")[0]
        if recipe.eval_dataset is not None:
            return documents, read_text("eval_dataset", recipe.eval_dataset, "test")[0]
        return held_out_text(recipe, documents)[:2]


def _labelled(name: str, source: str, split: str, site_column: str | None = None) -> LabelledText:
    try:
        return load_labelled_text(source, split, site_column)
    except InputError as error:
        raise ConfigurationError(name, source, str(error).removeprefix(f"{source}: ")) from error


def _split(rows: Rows, share: np.ndarray, held_out: float) -> SiteData:
    """Some of a site's rows for training, the rest for evaluating; at least one for each where there are two."""
    count = min(len(share) - 1, max(1, round(held_out * len(share)))) if held_out and len(share) > 1 else 0
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(share))
    train, evaluation = np.sort(share[order[count:]]), np.sort(share[order[:count]])
    return SiteData(rows.take(train), rows.take(evaluation) if count else None)
