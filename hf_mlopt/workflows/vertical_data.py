"""Columns of a party from its file, and those of a simulation dealt to its parties."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse

from hf_mlopt.errors import InputError
from hf_mlopt.secure_sum.keys import encode_parts
from hf_mlopt.vertical.align import Alignment, AlignmentManifest, prepare_ids
from hf_mlopt.vertical.data import ColumnEncoder, VerticalData, kept_columns, read_libsvm, read_table, sign_labels
from hf_mlopt.vertical.splits import split_contiguous
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.workflows.vertical_recipe import EMBEDDED, PartyRecipe, SimulationRecipe


def read_party(recipe: PartyRecipe, other: str | None = None) -> VerticalData:
    """
    Own rows, encoded by what the training rows say.

    Args:
        recipe ([`PartyRecipe`]): Names the file and its columns.
        other (`str`, *optional*): A file of other rows, to predict; the training rows are read in any case.

    Raises:
        InputError: If the file cannot be used, its ids repeat, or its labels are none of the loss: before anyone is
            connected.
    """
    data = _read(recipe, other)
    for field, check in (("id_column", _check_ids), ("label_column", _check_labels)):
        try:
            check(recipe, data)
        except InputError as error:
            where = f"{field}={getattr(recipe, field)!r}" if recipe.is_table else recipe.data
            raise InputError(f"{where}: {error}") from error
    return data


def _check_ids(recipe: PartyRecipe, data: VerticalData):
    prepare_ids(data.ids, recipe.duplicates)


def _check_labels(recipe: PartyRecipe, data: VerticalData):
    if data.label is not None:
        make_loss(recipe.loss, recipe.num_labels).check_labels(training_labels(data.label, recipe.loss))


def _read(recipe: PartyRecipe, other: str | None) -> VerticalData:
    is_owner = recipe.party == recipe.label_owner
    if not recipe.is_table:
        data = read_libsvm(recipe.data, recipe.num_features, with_label=is_owner, constant="keep")
        kept = kept_columns(data, recipe.constant)
        if other is not None:
            data = read_libsvm(other, len(data.names), with_label=False, constant="keep")
        return data.select(kept, with_label=True)
    how = (recipe.id_column, recipe.label_column, recipe.columns, recipe.categorical)
    encoder = ColumnEncoder(*how, recipe.scale, recipe.constant, recipe.unknown, recipe.sparse)
    table = read_table(Path(recipe.data))
    encoder.fit(table)
    data = encoder.transform(table if other is None else read_table(Path(other)))
    return data if other is None else replace(data, label=None)


def training_labels(label: np.ndarray, loss: str) -> np.ndarray:
    """Labels as the loss takes them: two classes as -1 and 1, the larger value being 1."""
    return sign_labels(label) if loss == "logistic" else label


def as_is(data: VerticalData, duplicates: str) -> Alignment:
    """The alignment of parties that have the same rows in the same order: the digest tells whether they have."""
    ids, rows = prepare_ids(data.ids, duplicates)
    digest = hashlib.sha256(encode_parts(*ids)).hexdigest()
    return Alignment(rows, AlignmentManifest(len(rows), digest, "as-is"))


def save_alignment(alignment: Alignment, path: Path):
    """JSON: own rows in the common order, and the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"manifest": alignment.manifest.to_dict(), "rows": alignment.rows.tolist()}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_alignment(path: Path, num_rows: int) -> Alignment:
    """
    Raises:
        InputError: If the file cannot be read, or names rows that own data lack.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, manifest = np.array(content["rows"], np.int64), AlignmentManifest(**content["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no alignment can be read there ({error}); remove it and align anew") from error
    if len(rows) != manifest.rows or len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
        raise InputError(f"{path}: names rows that the data lack, which have {num_rows}; remove it and align anew")
    return Alignment(rows, manifest)


def hold_out(num_rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of rows to train on and to evaluate on, the same at all parties."""
    digest = hashlib.sha256(f"hf_mlopt/vertical/hold out/{seed}".encode()).digest()
    words = np.random.Philox(int.from_bytes(digest, "little")).random_raw(num_rows)
    order, count = np.argsort(words, kind="stable"), int(share * num_rows)
    return np.sort(order[count:]), np.sort(order[:count])


def simulated_parties(recipe: SimulationRecipe) -> tuple[dict[str, VerticalData], np.ndarray]:
    """
    Returns:
        `tuple`: Rows of each party, the first with the labels, in one order; and the labels as the loss takes them.

    Raises:
        InputError: If a file cannot be read, rows do not align, or there are fewer columns than parties.
    """
    files = _embedded(recipe.data[0]) if recipe.data[0] in EMBEDDED else _files(recipe)
    first = files[0]
    if first.label is None:
        raise InputError(f"label_column={recipe.label_column!r}: {recipe.data[0]} gives no labels; name its column")
    labels = training_labels(first.label, recipe.loss)
    make_loss(recipe.loss, recipe.num_labels).check_labels(labels)
    if len(files) != recipe.parties:
        joined = _joined(files)
        columns = split_contiguous(joined.features.shape[1], recipe.parties)
        files = [joined.select(part, with_label=False) for part in columns]
    blocks = [VerticalData(first.ids, file.features, file.names) for file in files]  # the first alone has labels
    blocks[0] = VerticalData(first.ids, files[0].features, files[0].names, labels)
    return dict(zip(recipe.names, blocks, strict=True)), labels


def _embedded(name: str) -> list[VerticalData]:
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    features = (bunch.data - bunch.data.mean(0)) / bunch.data.std(0)
    label = bunch.target.astype(np.float64)
    if name == "diabetes":
        label = (label - label.mean()) / label.std()
    names = tuple(str(feature) for feature in bunch.feature_names)
    return [VerticalData(list(range(len(label))), features, names, label)]


def _files(recipe: SimulationRecipe) -> list[VerticalData]:
    found: list[VerticalData] = []
    for number, path in enumerate(recipe.data):
        if Path(path).suffix in (".csv", ".parquet"):
            table = read_table(path)
            has_label = recipe.label_column in table.column_names or not number
            encoder = ColumnEncoder(recipe.id_column, recipe.label_column if has_label else None)
            data = encoder.fit(table).transform(table)
        else:
            count = recipe.num_features[number] if recipe.num_features else None
            data = read_libsvm(path, count, with_label=True, constant="drop")
        if found:
            data = _in_order(data, found[0].ids, path)
            _check_second_label(data.label, found[0].label, path)
        found.append(data)
    return found


def _check_second_label(label: np.ndarray | None, first: np.ndarray | None, path: str):
    """The first file's labels are used. Others may lack them, or have one value everywhere as LIBSVM needs some."""
    if label is None or first is None or (label == label[0]).all() or np.array_equal(label, first):
        return
    row = int(np.flatnonzero(label != first)[0])
    text = f"{path}: row {row} has the label {label[row]:g}, and in the first file {first[row]:g}; the rows do not "
    raise InputError(f"{text}align, or the label is another: correct or drop it")


def _in_order(data: VerticalData, ids: list, path: str) -> VerticalData:
    places = {identity: row for row, identity in enumerate(data.ids)}
    missing = [identity for identity in ids if identity not in places]
    if missing or len(places) != len(data.ids):
        text = f"{path}: lacks {len(missing)} ids of the first file, or has some twice; parties of a simulation have"
        raise InputError(f"{text} the same rows")
    return data.take(np.array([places[identity] for identity in ids]))


def _joined(files: list[VerticalData]) -> VerticalData:
    is_sparse = any(scipy.sparse.issparse(file.features) for file in files)
    blocks = [file.features for file in files]
    features = scipy.sparse.csr_array(scipy.sparse.hstack(blocks, format="csr")) if is_sparse else np.hstack(blocks)
    names = tuple(f"{number}.{name}" for number, file in enumerate(files) for name in file.names)
    return VerticalData(files[0].ids, features, names if len(files) > 1 else files[0].names)
