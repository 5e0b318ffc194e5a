"""What `hf-mlopt train` reads: text as windows of tokens, or labelled images, to train on and to evaluate on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mlopt.data import (
    byte_tokenizer,
    image_dataset,
    label_sorted_shares,
    load_images,
    load_text,
    token_windows,
    tokenize_corpus,
    word_tokenizer,
)
from hf_mlopt.data.text import JOINER
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import Checkpoint, resolve_checkpoint
from hf_mlopt.workflows.loading import load_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_mlopt.data import ImageData

TRAINED_TOKENIZERS = ("byte-bpe", "words")
_VOCAB_SIZE = 2048  # of byte-bpe
_HELD_OUT = 0.1  # share of the characters
_TEXT_FILES = (".txt", ".json", ".jsonl", ".parquet", ".gz")
_SPLIT_SEED = 0  # not the seed of the run: all runs have the same images


@dataclass
class TrainData:
    """
    Both data sets of a run.

    Args:
        train, evaluation (`datasets.Dataset` or `torch.utils.data.Dataset`): Rows that a Trainer takes.
        record (`dict`): Where they came from, JSON-able.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of text.
        shape (`tuple[int]`, *optional*): Of an image: channels, height, width.
        label_names (`list[str]`, *optional*): Of images.
    """

    train: Any
    evaluation: Any
    record: dict
    tokenizer: "PreTrainedTokenizerBase | None" = None
    shape: tuple[int, int, int] | None = None
    label_names: list[str] = field(default_factory=list)


def is_image_source(source: str) -> bool:
    """Whether [`load_images`] takes it, as far as the name tells."""
    return source == "digits" or ".npz" in Path(source).name or Path(source).expanduser().is_dir()


def is_text_file(source: str) -> bool:
    """Whether a name can only mean a local file of text."""
    return Path(source).suffix in _TEXT_FILES


def load_text_data(recipe, checkpoint: Checkpoint | None) -> TrainData:
    """
    Windows of tokens; the tokenizer is trained on the training text where the recipe says so.

    Args:
        recipe (`TrainRecipe`): What to read.
        checkpoint (`Checkpoint`, *optional*): The model that training starts from; its tokenizer is the default.

    Raises:
        InputError: If a text cannot be read or is shorter than a window, or there is no tokenizer.
    """
    documents, source = read_text("dataset", recipe.dataset, "train")
    if recipe.eval_dataset:
        held_out, eval_source = read_text("eval_dataset", recipe.eval_dataset, "test")
    else:
        documents, held_out, eval_source = held_out_text(recipe, documents)
    tokenizer = recipe_tokenizer(recipe, checkpoint, documents)
    names = ("dataset", "eval_dataset" if recipe.eval_dataset else "dataset")
    token_ids = [tokenize_corpus(text, tokenizer) for text in (documents, held_out)]
    windows = [
        recipe_windows(recipe, name, ids, what)
        for name, ids, what in zip(names, token_ids, ("", "held-out "), strict=True)
    ]
    record = {
        "train": source | {"tokens": len(token_ids[0]), "windows": len(windows[0])},
        "eval": eval_source | {"tokens": len(token_ids[1]), "windows": len(windows[1])},
        "sequence_length": recipe.sequence_length,
        "vocab_size": len(tokenizer),
    }
    return TrainData(*windows, record, tokenizer)


def load_image_data(recipe) -> TrainData:
    """
    Labelled images.

    Args:
        recipe (`TrainRecipe`): What to read.

    Raises:
        InputError: If images cannot be read, or those to evaluate on have another shape or other labels.
    """
    train = read_images("dataset", recipe.dataset, None if recipe.eval_dataset else "train")
    evaluation = read_images("eval_dataset", recipe.eval_dataset, None) if recipe.eval_dataset else None
    if evaluation is None:
        evaluation = read_images("dataset", recipe.dataset, "test")
    for what in ("label_names", "num_classes"):
        if getattr(train, what) != getattr(evaluation, what):
            raise ConfigurationError("eval_dataset", recipe.eval_dataset, f"has other {what} than {recipe.dataset}")
    if recipe.image_size:
        for data in (train, evaluation):
            data.images = resized(data.images, recipe.image_size)
    if train.images.shape[1:] != evaluation.images.shape[1:]:
        raise ConfigurationError(
            "eval_dataset",
            recipe.eval_dataset,
            f"images of shape {evaluation.images.shape[1:]}, but {recipe.dataset} has {train.images.shape[1:]}; "
            "image_size brings both to one size",
        )
    shape = train.images.shape[1:]
    record = {"train": train.provenance, "eval": evaluation.provenance, "image_shape": list(shape)}
    if recipe.similarity is not None:
        shares = label_sorted_shares(train.labels, recipe.world_size, recipe.similarity, _SPLIT_SEED)
        own = shares[recipe.process_index]
        train.images, train.labels = train.images[own], train.labels[own]
        record |= {"similarity": recipe.similarity, "images_of_each_process": list(map(len, shares))}
    return TrainData(
        image_dataset(train), image_dataset(evaluation), record, shape=shape, label_names=train.label_names
    )


def read_text(name: str, source: str, split: str) -> tuple[list[str], dict]:
    """Documents of a source and the record of it; errors name the field it stands in."""
    try:
        return load_text(source, split)
    except InputError as error:  # it says what the options of other verbs are called
        text = str(error).removeprefix(f"{source}: ").replace(" (`--perplexity embedded`)", "")
        raise ConfigurationError(name, source, text.replace("--calibration embedded", "--dataset embedded")) from error


def held_out_text(recipe, documents: list[str]) -> tuple[list[str], list[str], dict]:
    """The documents left for training, those to evaluate on, and where the latter came from."""
    if not is_text_file(recipe.dataset):
        for split in ("test",) if recipe.dataset == "embedded" else ("test", "validation"):
            try:
                return documents, *load_text(recipe.dataset, split)
            except InputError:  # it has no such split; what the training text says of network and columns is known
                continue
    text = JOINER.join(documents)
    cut = text.rfind("\n", 0, int((1 - _HELD_OUT) * len(text))) + 1 or int((1 - _HELD_OUT) * len(text))
    return [text[:cut]], [text[cut:]], {"source": "the last tenth of the training text"}


def recipe_tokenizer(recipe, checkpoint: Checkpoint | None, documents: list[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer a recipe names, trained on `documents` where it says so."""
    if recipe.tokenizer is None and checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is None:
            raise ConfigurationError("model", recipe.model, "has no tokenizer; name one with tokenizer")
        return tokenizer
    try:
        if recipe.tokenizer == "words":
            return word_tokenizer(documents, recipe.vocab_size)
        if recipe.tokenizer in (None, "byte-bpe"):
            return byte_tokenizer(documents, _VOCAB_SIZE if recipe.vocab_size is None else recipe.vocab_size)
        path = Path(recipe.tokenizer).expanduser()
        # A directory may hold a tokenizer alone.
        named = Checkpoint(str(path), path) if path.is_dir() else resolve_checkpoint(recipe.tokenizer)
        tokenizer = load_tokenizer(named)
    except ConfigurationError as error:
        raise ConfigurationError("vocab_size", recipe.vocab_size, str(error).partition(": ")[2]) from error
    except InputError as error:
        raise ConfigurationError("tokenizer", recipe.tokenizer, str(error).partition(": ")[2] or str(error)) from error
    if tokenizer is None:
        raise ConfigurationError("tokenizer", recipe.tokenizer, "holds no tokenizer")
    return tokenizer


def recipe_windows(recipe, name: str, token_ids, what: str):
    """Windows of the length a recipe says; errors name the field the text stands in."""
    try:
        return token_windows(token_ids, recipe.sequence_length)
    except InputError as error:
        raise ConfigurationError(
            name,
            getattr(recipe, name),
            f"{what}{error}".replace("shorten it", "lower sequence_length"),
        ) from error


def read_images(name: str, source: str, split: str | None) -> "ImageData":
    """Images of a source; errors name the field it stands in."""
    try:
        return load_images(source, split, _SPLIT_SEED)
    except InputError as error:
        raise ConfigurationError(name, source, str(error).removeprefix(f"{source}: ")) from error


def resized(images, size: int):
    """Images `[images, channels, height, width]` with both sides of one size, bilinear and antialiased."""
    import torch
    from torch.nn.functional import interpolate

    images = torch.from_numpy(images)
    return interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1).numpy()
