"""Texts with labels, and where wanted with the site that each belongs to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_mlopt.data.embedded import embedded_corpus
from hf_mlopt.data.text import load_hub, load_local
from hf_mlopt.errors import InputError


if TYPE_CHECKING:
    import datasets

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_LONG = 8000  # characters of a document that is a class of its own
_PIECE = 40  # words


@dataclass
class LabelledText:
    """
    Texts of one split.

    Args:
        texts (`list[str]`): `[texts]`.
        labels (`list[int]`): `[texts]`, from 0.
        label_names (`list[str]`): In the order of the numbers.
        sites (`list[str]`, *optional*): `[texts]`, what the site column says.
        provenance (`dict`): JSON-able record of the source.
    """

    texts: list[str]
    labels: list[int]
    label_names: list[str]
    sites: list[str] | None
    provenance: dict


def load_labelled_text(source: str, split: str = "train", site_column: str | None = None) -> LabelledText:
    """
    Reads texts with labels.

    Args:
        source (`str`): `embedded`: pieces of the longer chapters of Python's language reference, whose chapter is the
            label, every tenth piece in the test split. Or a local .csv, .json, .jsonl or .parquet file, or a data set
            on the Hub, with columns `text` and `label`. A local file has only one split.
        split (`str`, *optional*, defaults to `"train"`): `train` or `test`, or another of a data set on the Hub.
        site_column (`str`, *optional*): Column that names the site of a row.

    Raises:
        InputError: If the source cannot be read, has no such column, or fewer than two labels.
    """
    if source == "embedded":
        if site_column is not None:
            raise InputError(f"{source}: has no column {site_column!r}; leave site_column out")
        return _chapters(split)
    path = Path(source)
    if path.suffix in _BUILDERS:
        dataset, provenance = load_local(path, _BUILDERS[path.suffix]), {"source": path.name}
    elif path.exists():
        raise InputError(f"{source}: not a table of texts; give a file that ends in {', '.join(_BUILDERS)}")
    else:
        dataset, provenance = load_hub(source, split, streaming=False)
    return _from_table(source, dataset, provenance, site_column)


def _from_table(source: str, dataset: "datasets.Dataset", provenance: dict, site_column: str | None) -> LabelledText:
    for column in ("text", "label", *([site_column] if site_column else [])):
        if column not in dataset.column_names:
            raise InputError(f"{source}: no column {column!r}, only {dataset.column_names}; rename one")
        missing = sum(value is None for value in dataset[column])
        if missing:
            raise InputError(f"{source}: column {column!r} is empty in {missing} rows; fill or drop them")
    feature = dataset.features["label"]
    given = dataset["label"]
    names = getattr(feature, "names", None) or sorted({str(label) for label in given}, key=_as_number)
    if len(names) < 2:
        raise InputError(f"{source}: all rows have the label {names}; at least two labels are needed")
    numbers = {name: number for number, name in enumerate(names)}
    is_numbered = getattr(feature, "names", None) is not None
    labels = [label if is_numbered else numbers[str(label)] for label in given]
    sites = [str(site) for site in dataset[site_column]] if site_column else None
    return LabelledText([str(text) for text in dataset["text"]], labels, list(names), sites, provenance)


def _as_number(label: str) -> tuple[int, float | str]:
    try:
        return 0, float(label)
    except ValueError:
        return 1, label


def _chapters(split: str) -> LabelledText:
    chapters = [document for document in embedded_corpus("train") if len(document) >= _LONG]
    names = [chapter.partition("\n")[0].strip() for chapter in chapters]
    texts, labels = [], []
    for label, chapter in enumerate(chapters):
        words = chapter.split()[len(names[label].split()) :]  # without the title
        pieces = [" ".join(words[start : start + _PIECE]) for start in range(0, len(words), _PIECE)]
        held_out = [number % 10 == 9 for number in range(len(pieces))]
        kept = [piece for piece, is_out in zip(pieces, held_out, strict=True) if is_out == (split == "test")]
        texts += kept
        labels += [label] * len(kept)
    return LabelledText(texts, labels, names, None, {"source": "embedded", "split": split, "texts": len(texts)})
