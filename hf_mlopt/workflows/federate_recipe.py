"""The recipe of `hf-mlopt federate`, and what is refused as soon as it is read."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated import FederatedTrainingArguments
from hf_mlopt.training.arguments import json_object
from hf_mlopt.workflows.segmentation_recipe import check_segmentation
from hf_mlopt.workflows.train_data import TRAINED_TOKENIZERS, is_image_source
from hf_mlopt.workflows.train_recipe import check_model, check_numbers, default_of, refuse_bad_optimizer


# Of the machine or the occasion, not of the recipe; or secret.
_NOT_WRITTEN = ("output_dir", "resume_from_checkpoint", "hub_token", "local_rank")
# How a data set is dealt to sites, and the field that says how.
_PARTITIONS = {"iid": None, "dirichlet": "dirichlet_alpha", "label-sorted": "similarity", "column": "site_column"}


@dataclass(repr=False)  # the inherited one keeps tokens out of logs
class FederateRecipe(FederatedTrainingArguments):
    """
    Everything one run of `hf-mlopt federate` is given; the keys of a recipe. All fields of `TrainingArguments` are
    among them, and are those of a site's local training.

    Args:
        task (`str`, *optional*, defaults to `"image-classification"`): `image-classification`, `text-classification`,
            `causal-lm`, or `segmentation` of images into two classes.
        model (`str`, *optional*): Local directory or Hub id of a checkpoint to go on from.
        model_type (`str`, *optional*): Architecture to train from random weights instead, such as `resnet` or `bert`;
            of segmentation `unet` (MONAI) or `segformer`.
        model_config (`dict`, *optional*): Fields of its configuration that differ from the defaults. Vocabulary,
            special tokens, labels and image size come from the data.
        lora (`dict`, *optional*): Trains and exchanges adapters only: fields of peft's `LoraConfig`, such as
            `{"r": 8, "target_modules": ["c_attn"]}`.
        tokenizer (`str`, *optional*): `byte-bpe` or `words`, trained on the text that all sites share (a simulation),
            or a local directory or Hub id. By default that of `model`, else `byte-bpe`.
        vocab_size (`int`, *optional*): Entries of a tokenizer that is trained.
        dataset (`str`, *optional*): One source that is dealt to the sites: of images as for `hf-mlopt train`; of text
            `embedded` or a file; of texts with labels `embedded`, a table with columns `text` and `label`, or a data
            set on the Hub. Of images with masks, which belong to sites by themselves: `discs` (drawn; `discs:100` has
            100 images a site), an .npz file with `images`, `masks` and `site`, or a folder with `SITE/images` and
            `SITE/masks`. By default `digits`, `embedded` or `discs`.
        eval_dataset (`str`, *optional*): What the server evaluates on. By default the test split of `dataset`.
        site_datasets (`dict` or `str`, *optional*): In place of `dataset`: site to the source of its own.
        num_sites (`int`, *optional*, defaults to 4): Sites that `dataset` is dealt to.
        partition (`str`, *optional*, defaults to `"iid"`): How: `iid`; `dirichlet` by label; `label-sorted`; or by
            what stands in a `column`.
        dirichlet_alpha (`float`, *optional*, defaults to 0.5): Concentration; the smaller, the more the sites differ.
        similarity (`float`, *optional*, defaults to 0.1): Part of the rows that is dealt at random where the rest goes
            by label.
        site_column (`str`, *optional*): Column that names a row's site.
        site_names (`dict` or `str`, *optional*): Of an .npz file with masks: number in `site` to the name; sites
            without a name are left out.
        unseen_site (`str`, *optional*): Of images with masks: this site takes no part; the server evaluates on its
            images.
        pool_sites (`bool`, *optional*, defaults to `False`): Of images with masks: one site has the data of all, as a
            centralised training would.
        volumes (`str`, *optional*): Folders hold NIfTI volumes (`SITE/images/CASE.nii.gz` and `SITE/masks`): `slices`
            trains on their axial slices, `whole` on volumes. Dice is per volume.
        intensity_window (`list`, *optional*): Of volumes: intensities that become 0 and 1, `[-160, 240]`; by default
            percentiles of each volume.
        augmentation (`dict`, *optional*): Of images with masks: dictionary transforms of MONAI and their arguments,
            `{"RandRotate90d": {"prob": 0.5}}`; `keys` are `pixel_values` and `labels` unless they are given.
        overlay_every (`int`, *optional*, defaults to 10): Of images with masks: rounds between two pictures of
            predictions against truth, a file a site; 0 draws them at the end only.
        site_eval_share (`float`, *optional*, defaults to 0.1): Part of its rows that each site keeps to evaluate on.
        sequence_length (`int`, *optional*, defaults to 128): Most tokens of a text, or tokens in a window of text.
        image_size (`int`, *optional*): Pixels on a side that images are resized to.
        label_names (`list[str]`, *optional*): Of images or texts with labels: all of them, in order of their numbers;
            needed where the server has no data to read them from.
        num_channels (`int`, *optional*): Of images: 1 or 3; needed, with `image_size`, where the server has no images.
        engine (`str`, *optional*, defaults to `"in-process"`): `in-process`, or `flower`.
        superlink (`str`, *optional*): With Flower: address of the SuperLink that the sites are connected to; by
            default one of this machine, with all sites on it, that ends with the run.
        root_certificates (`str`, *optional*): With `superlink`: certificate of the authority that signed its own.
        flower_nodes (`dict` or `str`, *optional*): With `superlink`: site to its node id, as `flwr supernode register`
            printed it; a site that takes another's name is then refused.
        flower_simulation (`bool`, *optional*, defaults to `False`): With Flower on this machine: sites are actors of
            Ray, in place of SuperNodes.
        plot (`str` or `bool`, *optional*, defaults to `True`): PNG to draw the course of the rounds to; `true` is
            `curves.png` in `output_dir`.
        resume_from_checkpoint (`str` or `bool`, *optional*): Server's checkpoint to go on from; `true` is the last one
            in `output_dir`.
    """

    task: Literal["image-classification", "text-classification", "causal-lm", "segmentation"] = "image-classification"
    model: str | None = None
    model_type: str | None = None
    model_config: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    site_datasets: dict[str, Any] | str | None = None
    num_sites: int = 4
    partition: Literal["iid", "dirichlet", "label-sorted", "column"] = "iid"
    dirichlet_alpha: float | None = None
    similarity: float | None = None
    site_column: str | None = None
    site_names: dict[Any, str] | str | None = None
    unseen_site: str | None = None
    pool_sites: bool = False
    volumes: Literal["slices", "whole"] | None = None
    intensity_window: list[float] | None = None
    augmentation: dict[str, Any] | None = None
    overlay_every: int = 10
    site_eval_share: float = 0.1
    sequence_length: int = 128
    image_size: int | None = None
    label_names: list[str] | None = None
    num_channels: int | None = None
    engine: Literal["in-process", "flower"] = "in-process"
    superlink: str | None = None
    root_certificates: str | None = None
    flower_nodes: dict[str, Any] | str | None = None
    flower_simulation: bool = False
    plot: str | bool = True
    resume_from_checkpoint: str | bool | None = None

    def __post_init__(self):
        # Before TrainingArguments puts in what it derives.
        self.given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _NOT_WRITTEN and getattr(self, field.name) != default_of(field)
        }
        # To a Trainer `label_names` are the columns that it takes for labels.
        self.class_names, self.label_names = self.label_names, None
        check_numbers(self)
        check_model(self)
        self.site_datasets = _by_site("site_datasets", self.site_datasets, str, '{"north": "north.csv"}')
        self.flower_nodes = _by_site("flower_nodes", self.flower_nodes, int, '{"north": 1234}')
        _check_flower(self)
        check_segmentation(self)
        if self.task != "segmentation":
            _check_sites(self)
            _check_sources(self)
        if self.plot not in (True, False) and Path(self.plot).suffix != ".png":
            raise ConfigurationError("plot", self.plot, "must end in .png, or be true or false")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        refuse_bad_optimizer(self)

    @property
    def is_text(self) -> bool:
        """Whether the model reads tokens."""
        return self.task in ("text-classification", "causal-lm")


def _by_site(name: str, given: dict | str | None, kind: type, example: str) -> dict | None:
    value = json_object(name, given)
    if value is None:
        return None
    if not value or not all(type(one) is kind for one in value.values()):
        raise ConfigurationError(name, given, f"must name one a site, as in {example}")
    return {str(site): one for site, one in value.items()}


def _check_flower(recipe: FederateRecipe) -> None:
    for name in ("superlink", "root_certificates", "flower_nodes", "flower_simulation"):
        if getattr(recipe, name) and recipe.engine != "flower":
            raise ConfigurationError(name, getattr(recipe, name), "belongs to engine flower")
    for name in ("root_certificates", "flower_nodes"):
        if getattr(recipe, name) and recipe.superlink is None:
            raise ConfigurationError(name, getattr(recipe, name), "belongs to a superlink")
    if recipe.flower_simulation and recipe.superlink is not None:
        raise ConfigurationError("flower_simulation", True, "runs on this machine; leave superlink out")
    if recipe.superlink is not None:
        _check_superlink(recipe)
    if recipe.root_certificates is not None and not Path(recipe.root_certificates).is_file():
        raise ConfigurationError("root_certificates", recipe.root_certificates, "no such file")
    for site in (recipe.site_datasets or {}) if recipe.engine == "flower" else ():
        if set(site) & set(",= "):
            raise ConfigurationError("site_datasets", site, "a site's name may hold no comma, = or space with flower")
    if recipe.num_workers and recipe.engine == "flower":
        raise ConfigurationError("num_workers", recipe.num_workers, "is of the engine in-process")


def _check_superlink(recipe: FederateRecipe) -> None:
    """The server has no data to read anything from, unless `dataset` is one that all machines have."""
    if recipe.task == "segmentation" or recipe.dataset is not None:
        return
    needed = {"site_datasets": recipe.site_datasets}
    needed |= {} if recipe.task == "causal-lm" else {"label_names": recipe.class_names}
    if recipe.task == "image-classification":
        needed |= {"num_channels": recipe.num_channels, "image_size": recipe.image_size}
    for name, value in needed.items():
        if value is None:
            remedy = "is needed with a superlink, for the server has no data to read it from"
            raise ConfigurationError(name, None, f"{remedy}; or name a dataset that all machines have")


def _check_sites(recipe: FederateRecipe) -> None:
    if recipe.num_sites < 1:
        raise ConfigurationError("num_sites", recipe.num_sites, "must be at least 1")
    if not 0 <= recipe.site_eval_share < 1:
        raise ConfigurationError("site_eval_share", recipe.site_eval_share, "must be at least 0 and below 1")
    for name in filter(None, _PARTITIONS.values()):
        wanted = _PARTITIONS[recipe.partition] == name
        if getattr(recipe, name) is not None and not wanted:
            which = next(partition for partition, field in _PARTITIONS.items() if field == name)
            raise ConfigurationError(name, getattr(recipe, name), f"belongs to partition {which}")
    if recipe.partition == "dirichlet":
        recipe.dirichlet_alpha = 0.5 if recipe.dirichlet_alpha is None else recipe.dirichlet_alpha
        if not 0 < recipe.dirichlet_alpha < float("inf"):
            raise ConfigurationError("dirichlet_alpha", recipe.dirichlet_alpha, "must be above 0")
    if recipe.partition == "label-sorted":
        recipe.similarity = 0.1 if recipe.similarity is None else recipe.similarity
        if not 0 <= recipe.similarity <= 1:
            raise ConfigurationError("similarity", recipe.similarity, "must be from 0 (sorted by label) to 1 (i.i.d.)")
    if recipe.partition == "column" and recipe.site_column is None:
        raise ConfigurationError("site_column", None, "is needed with partition column")


def _check_sources(recipe: FederateRecipe) -> None:
    if recipe.site_datasets is not None:
        if recipe.dataset is not None:
            raise ConfigurationError("dataset", recipe.dataset, "leave it out: site_datasets has a source a site")
        if recipe.partition != "iid":
            raise ConfigurationError("partition", recipe.partition, "leave it out: site_datasets has a source a site")
        recipe.num_sites = len(recipe.site_datasets)
    elif recipe.dataset is None:
        recipe.dataset = "embedded" if recipe.is_text else "digits"
    by_label = recipe.partition in ("dirichlet", "label-sorted")
    if by_label and recipe.task == "causal-lm":
        raise ConfigurationError("partition", recipe.partition, "deals by label, and causal-lm has none; take iid")
    if recipe.partition == "column" and recipe.task != "text-classification":
        raise ConfigurationError("partition", "column", "needs a table of texts: task text-classification")
    sources = {"dataset": recipe.dataset, "eval_dataset": recipe.eval_dataset}
    sources |= {f"site_datasets.{site}": source for site, source in (recipe.site_datasets or {}).items()}
    for name, source in sources.items():
        if source is not None and is_image_source(source) == recipe.is_text:
            raise ConfigurationError(name, source, f"is no source for --task {recipe.task}")
    for name in ("image_size",) if recipe.is_text else ("tokenizer", "vocab_size"):
        if getattr(recipe, name) is not None:
            raise ConfigurationError(name, getattr(recipe, name), f"does not belong to --task {recipe.task}")
    is_trained = recipe.tokenizer in TRAINED_TOKENIZERS or recipe.tokenizer is None and not recipe.model
    if recipe.is_text and recipe.site_datasets is not None and is_trained:
        raise ConfigurationError(
            "tokenizer", recipe.tokenizer, "would be trained on every site's text; name a directory or a Hub id"
        )
    if recipe.vocab_size is not None and not is_trained:
        raise ConfigurationError(
            "vocab_size", recipe.vocab_size, f"is of a tokenizer that is trained: {', '.join(TRAINED_TOKENIZERS)}"
        )
