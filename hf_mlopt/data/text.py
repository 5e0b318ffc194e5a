"""Text by name: the embedded corpus, a local file, or a data set of the Hub, with a record of where it came from."""

import platform
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.data.embedded import embedded_corpus
from hf_mlopt.errors import InputError


if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

JOINER = "\n\n"  # between documents, as in Wanda's `lib/data.py`

_ALIASES = {"c4": "allenai/c4", "wikitext": "Salesforce/wikitext"}
# What `load_dataset` needs to give the text that papers on pruning mean by these names.
_HUB_OPTIONS = {
    "allenai/c4": {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}},
    "Salesforce/wikitext": {"name": "wikitext-2-raw-v1"},
}
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_FORMATS = ".txt, .json, .jsonl (also .gz) or .parquet"
_PROBE_SECONDS = 10
_SHUFFLE_BUFFER = 10_000  # rows of a streamed data set held at a time


@dataclass
class Corpus:
    """
    Documents of one source.

    Args:
        documents (`Iterable[str]` or `Iterable[list[int]]`): Text, or token ids if `tokenized`; to be read once.
        provenance (`dict`): JSON-able record: `source`, and what identifies it (`dataset`, `revision`, `file`, ...).
        tabular (`bool`): Whether a document is a row of a data set.
        streamed (`bool`): Whether the rows come over the network as they are read.
        tokenized (`bool`): Whether the documents are lists of token ids.
    """

    documents: Iterable[str] | Iterable[list[int]]
    provenance: dict
    tabular: bool = False
    streamed: bool = False
    tokenized: bool = False


def open_corpus(source: str, split: str = "train", seed: int | None = None) -> Corpus:
    """
    Opens a source of text or token ids.

    Args:
        source (`str`): `embedded`; a local file (UTF-8 text, or rows with a column `text` or `input_ids`); or the id
            of a data set on the Hub with a column `text` (`c4` and `wikitext` are short for the ones papers use).
        split (`str`, *optional*, defaults to `"train"`): Split of the embedded corpus or Hub data set. A local file
            has only one.
        seed (`int`, *optional*): If given, documents are shuffled, and a Hub data set is streamed (shuffled through a
            buffer of 10,000 rows) instead of downloaded.

    Raises:
        InputError: If the source cannot be read, is empty, or has no usable column.
    """
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if source == "embedded":
        documents = embedded_corpus(split)
        provenance = {"source": source, "split": split, "python": platform.python_version()}
    elif path.suffix == ".txt":
        documents, provenance = [_read_text(path)], {"source": path.name}
    elif suffix in _BUILDERS:
        return _open_rows(load_local(path, _BUILDERS[suffix]), {"source": path.name}, seed)
    elif path.exists():
        raise InputError(f"{source}: not a text source; give a file that ends in {_FORMATS}")
    else:
        dataset, provenance = load_hub(source, split, streaming=seed is not None)
        return _open_rows(dataset, provenance, seed)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    return Corpus(documents, provenance)


def load_text(source: str, split: str = "test") -> tuple[list[str], dict]:
    """
    All documents of a source, in order, and the record of where they came from.

    Args:
        source (`str`): As for [`open_corpus`].
        split (`str`, *optional*, defaults to `"test"`): As for [`open_corpus`].

    Raises:
        InputError: As for [`open_corpus`], and if the source holds token ids instead of text.
    """
    corpus = open_corpus(source, split)
    if corpus.tokenized:
        raise InputError(f"{source}: holds token ids; a column 'text' is needed here")
    return list(corpus.documents), corpus.provenance


def tokenize_corpus(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", joiner: str = JOINER
) -> "torch.LongTensor":
    """
    Joins the documents and tokenizes them in one go, so that special tokens stand only where the tokenizer puts them
    around a whole text.

    Args:
        documents (`Iterable[str]`): Text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        joiner (`str`, *optional*, defaults to a blank line): Put between two documents.

    Returns:
        `torch.LongTensor`: `[tokens]`.
    """
    import torch

    # verbose=False: a corpus longer than the model's context is meant, it is cut into windows afterwards.
    return torch.tensor(tokenizer(joiner.join(documents), verbose=False).input_ids, dtype=torch.long)


def _read_text(path: Path) -> str:
    _require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file")


def load_local(path: Path, builder: str) -> "datasets.Dataset":
    """All rows of a local file, by a builder of `datasets`; an `InputError` where it cannot be read."""
    from datasets import load_dataset

    _require_file(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        return load_dataset(builder, data_files={"train": str(path)}, split="train")
    except Exception as error:  # pyarrow, json and unicode errors, some of them wrapped by datasets
        raise InputError(f"{path}: cannot be read as {builder} ({_reason(error)})") from error


def load_hub(source: str, split: str, streaming: bool) -> tuple["datasets.Dataset | datasets.IterableDataset", dict]:
    """A split on the Hub and the record of it; an `InputError` where the Hub gives none."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    name = _ALIASES.get(source, source)
    options = _HUB_OPTIONS.get(name, {})
    try:
        # Pins the commit for the record, and fails at once where `load_dataset` would retry for half a minute.
        revision = None if constants.HF_HUB_OFFLINE else HfApi().dataset_info(name, timeout=_PROBE_SECONDS).sha
        dataset = load_dataset(name, split=split, revision=revision, streaming=streaming, **options)
    except Exception as error:  # transport errors differ between versions of huggingface_hub
        raise InputError(
            f"{source}: neither a local file nor a data set that the Hub gives ({_reason(error)}); without network "
            f"use `--calibration embedded` (`--perplexity embedded`) or a local file that ends in {_FORMATS}"
        ) from error
    return dataset, {"source": source, "dataset": name, "revision": revision, "split": split, **options}


def _reason(error: Exception) -> str:
    error = error.__cause__ or error
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _open_rows(dataset: "datasets.Dataset | datasets.IterableDataset", provenance: dict, seed: int | None) -> Corpus:
    from datasets import IterableDataset

    columns = dataset.column_names or list(next(iter(dataset), {}))
    column = next((name for name in ("text", "input_ids") if name in columns), None)
    if column is None:
        raise InputError(f"{provenance['source']}: no column 'text' or 'input_ids', only {columns}; rename one")
    dataset, streamed = dataset.select_columns(column), isinstance(dataset, IterableDataset)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, **({"buffer_size": _SHUFFLE_BUFFER} if streamed else {}))
    kind = str if column == "text" else list
    documents = _column(dataset, column, kind, provenance["source"])
    return Corpus(documents, provenance, tabular=True, streamed=streamed, tokenized=kind is list)


def _column(dataset: Iterable[dict], column: str, kind: type, source: str) -> Iterator:
    try:
        for row in dataset:
            if not isinstance(row[column], kind):
                raise InputError(f"{source}: column {column!r} holds {row[column]!r:.50}, not {kind.__name__}")
            yield row[column]
    except UnicodeDecodeError as error:  # pyarrow decodes no earlier than here
        raise InputError(f"{source}: column {column!r} is not UTF-8; convert the file first") from error
