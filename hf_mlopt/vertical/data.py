"""
One party's columns: from CSV, Parquet or LIBSVM to ids, features and perhaps a label.

Encoding is local: categories, means and scales are learnt from the party's own training rows and told to no one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse

from hf_mlopt.errors import ConfigurationError, InputError


CONSTANT = ("raise", "drop", "keep")
SCALES = ("standard", "none")
UNKNOWN = ("raise", "ignore")


@dataclass(frozen=True, eq=False)
class VerticalData:
    """
    Rows of one party.

    Args:
        ids (`list`): `[n]`, text or whole numbers, as [`~align.prepare_ids`] takes them.
        features (`np.ndarray` or `scipy.sparse.csr_array`): `[n, d]`, float64.
        names (`tuple[str, ...]`): Of the features.
        label (`np.ndarray`, *optional*): `[n]`, float64; `None` at a party without labels.

    Raises:
        InputError: If the parts disagree in size, or a feature or a label is not finite.
    """

    ids: list
    features: np.ndarray | scipy.sparse.csr_array
    names: tuple[str, ...]
    label: np.ndarray | None = None

    def __post_init__(self):
        rows, columns = self.features.shape
        if len(self.ids) != rows or len(self.names) != columns or (self.label is not None and len(self.label) != rows):
            labels = "no" if self.label is None else len(self.label)
            text = f"{len(self.ids)} ids, {labels} labels and {len(self.names)} names for features of shape"
            raise InputError(f"{text} {[rows, columns]}: read them from one table")
        if not rows or not columns:
            raise InputError(f"features of shape {[rows, columns]}: a party needs rows and columns")
        values = self.features.data if scipy.sparse.issparse(self.features) else self.features
        if not np.isfinite(values).all():
            coordinates = scipy.sparse.coo_array(self.features)
            bad = np.flatnonzero(~np.isfinite(coordinates.data))[0]
            row, column = int(coordinates.row[bad]), self.names[coordinates.col[bad]]
            raise InputError(f"column {column!r}, row {row}: {coordinates.data[bad]}; fill it in or drop the row")
        if self.label is not None and not np.isfinite(self.label).all():
            row = int(np.flatnonzero(~np.isfinite(self.label))[0])
            raise InputError(f"the label of row {row} is missing: drop the row at this party, alignment does the rest")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "VerticalData":
        """The rows in this order, such as those of an [`~align.Alignment`]."""
        label = None if self.label is None else self.label[rows]
        return replace(self, ids=[self.ids[row] for row in rows], features=self.features[rows], label=label)

    def select(self, columns: np.ndarray, *, with_label: bool) -> "VerticalData":
        """The features in these places, for experiments that split one table among parties."""
        names = tuple(self.names[column] for column in columns)
        features = self.features[:, columns]
        return replace(self, features=features, names=names, label=self.label if with_label else None)


def read_table(path: str | os.PathLike) -> pa.Table:
    """
    Args:
        path (path): `.csv` with a header, or `.parquet`.

    Raises:
        InputError: If it cannot be read or its name ends otherwise.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(
            f"{path}: columns are read from {' and '.join(readers)}; LIBSVM files have a reader of their own"
        )
    try:
        return readers[path.suffix](path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


class ColumnEncoder:
    """
    Turns a table into numbers: text, dictionaries and truth values to one column a category, numbers scaled to mean 0
    and standard deviation 1 of the training rows.

    Args:
        id_column (`str`): Holds the ids.
        label_column (`str`, *optional*): Holds the label, a number. Only a party that contributes labels names one.
        columns (sequence of `str`, *optional*): The features; all other columns if absent.
        categorical (sequence of `str`, *optional*): Columns of numbers that are categories.
        scale (`str`, *optional*, defaults to `"standard"`): `"none"` leaves numbers as they are.
        constant (`str`, *optional*, defaults to `"raise"`): What to do about columns with one value: `"raise"`,
            `"drop"` or `"keep"`.
        unknown (`str`, *optional*, defaults to `"raise"`): What to do about categories that training rows lack;
            `"ignore"` makes them zeros.
        sparse (`bool`, *optional*): Whether the result is CSR.

    Raises:
        ConfigurationError: If a field is out of range.
    """

    def __init__(
        self,
        id_column: str,
        label_column: str | None = None,
        columns: Sequence[str] | None = None,
        categorical: Sequence[str] = (),
        scale: str = "standard",
        constant: str = "raise",
        unknown: str = "raise",
        sparse: bool = False,
    ):
        for name, value, allowed in (("scale", scale, SCALES), ("constant", constant, CONSTANT)):
            _check_choice(name, value, allowed)
        _check_choice("unknown", unknown, UNKNOWN)
        self.id_column, self.label_column, self.columns = id_column, label_column, columns
        self.categorical, self.scale, self.constant = tuple(categorical), scale, constant
        self.unknown, self.sparse = unknown, sparse
        self._fitted = False

    def fit(self, table: pa.Table) -> "ColumnEncoder":
        """
        Learns categories, means and scales.

        Args:
            table (`pa.Table`): Training rows.

        Raises:
            InputError: If a column is absent, of another type, has missing values, or is constant.
        """
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        names = self._feature_names(table)
        is_category = {name: name in self.categorical or _is_categorical(table.column(name)) for name in names}
        self._categories = [name for name in names if is_category[name]]
        self._numbers = [name for name in names if not is_category[name]]
        handle = "error" if self.unknown == "raise" else "ignore"
        self._one_hot = OneHotEncoder(handle_unknown=handle, sparse_output=True) if self._categories else None
        self._scaler = StandardScaler() if self._numbers and self.scale == "standard" else None
        if self._one_hot:
            self._one_hot.fit(_categories(table, self._categories))
        if self._numbers:
            numbers = _numbers(table, self._numbers)
            if self._scaler:
                self._scaler.fit(numbers)
        names = list(self._numbers)
        if self._one_hot:
            for name, values in zip(self._categories, self._one_hot.categories_, strict=True):
                names += [f"{name}={value}" for value in values]
        self._all_names, self._fitted, self._kept = tuple(names), True, None
        self._kept = kept_columns(self.transform(table), self.constant)
        return self

    def transform(self, table: pa.Table) -> VerticalData:
        """
        Args:
            table (`pa.Table`): With the columns of the training rows. A label column that is absent gives no label.

        Raises:
            InputError: If a column is absent or has missing values, or a category is new.
        """
        if not self._fitted:
            raise InputError("the encoder has seen no training rows: call fit first")
        blocks = []
        if self._numbers:
            numbers = _numbers(table, self._numbers)
            blocks.append(self._scaler.transform(numbers) if self._scaler else numbers)
        if self._one_hot:
            categories = _categories(table, self._categories)
            try:
                blocks.append(self._one_hot.transform(categories))
            except ValueError as error:
                raise InputError(f"{error}: these training rows lack; choose unknown='ignore'") from error
        if self.sparse:
            features = scipy.sparse.csr_array(scipy.sparse.hstack(blocks, format="csr"))
        else:
            features = np.hstack([b.toarray() if scipy.sparse.issparse(b) else b for b in blocks])
        ids = _column(table, self.id_column, "id_column").to_pylist()
        data = VerticalData(ids, features, self._all_names, self._label(table))
        return data if self._kept is None else data.select(self._kept, with_label=True)

    def _label(self, table: pa.Table) -> np.ndarray | None:
        if self.label_column is None or (self._kept is not None and self.label_column not in table.column_names):
            return None
        column = _column(table, self.label_column, "label_column")
        if column.null_count:
            row = _first_null(column)
            text = f"label_column={self.label_column!r}: the label of row {row} is missing"
            raise InputError(f"{text}; drop the row at this party, alignment does the rest")
        if not _is_number(column.type):
            remedy = "map the labels to numbers first"
            raise InputError(f"label_column={self.label_column!r} holds {column.type}, expected numbers: {remedy}")
        return column.to_numpy().astype(np.float64)

    def _feature_names(self, table: pa.Table) -> list[str]:
        _column(table, self.id_column, "id_column")
        if self.label_column is not None:
            _column(table, self.label_column, "label_column")
        others = [name for name in table.column_names if name not in (self.id_column, self.label_column)]
        names = list(self.columns) if self.columns is not None else others
        for name in (*names, *self.categorical):
            _column(table, name, "columns")
            if name not in others or name not in names:
                raise ConfigurationError("columns", name, f"a feature is one of {others}, and listed in columns")
        if not names:
            raise InputError(f"the table has no columns beside {table.column_names}: a party needs features")
        return names


def read_libsvm(
    path: str | os.PathLike, num_features: int | None = None, *, with_label: bool, constant: str = "raise"
) -> VerticalData:
    """
    Rows of `label index:value ...`, indices from 1, as CSR. The ids are the numbers of the rows, from 0.

    Args:
        path (path): The file.
        num_features (`int`, *optional*): Columns; the largest index if absent.
        with_label (`bool`): Whether the label is this party's to use. Files of parties without one often carry it.
        constant (`str`, *optional*, defaults to `"raise"`): As in [`ColumnEncoder`].

    Raises:
        InputError: If the file cannot be read or an index is above `num_features`.
    """
    from sklearn.datasets import load_svmlight_file

    _check_choice("constant", constant, CONSTANT)
    try:
        features, label = load_svmlight_file(str(path), n_features=num_features, zero_based=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as LIBSVM: {error}") from error
    names = tuple(f"x{number}" for number in range(1, features.shape[1] + 1))
    ids = list(range(features.shape[0]))
    data = VerticalData(ids, scipy.sparse.csr_array(features), names, label if with_label else None)
    return data.select(kept_columns(data, constant), with_label=True)


def kept_columns(data: VerticalData, constant: str) -> np.ndarray:
    """
    Places of the columns that are not constant, or of all with `"keep"`.

    Raises:
        InputError: If columns are constant and `constant` is `"raise"`, or none is left.
    """
    if constant == "keep":
        return np.arange(len(data.names))
    features = data.features
    high, low = (getattr(features, kind)(axis=0) for kind in ("max", "min"))
    if scipy.sparse.issparse(high):
        high, low = high.toarray(), low.toarray()
    varies = np.ravel(high) > np.ravel(low)
    flat = [data.names[column] for column in np.flatnonzero(~varies)]
    if flat and constant == "raise":
        text = f"{len(flat)} columns have one value in all rows, such as {flat[:3]}"
        raise InputError(f"{text}: they say nothing; drop them, or choose constant='drop' or 'keep'")
    if not varies.any():
        raise InputError("every column is constant: a party needs features that differ between rows")
    return np.flatnonzero(varies)


def sign_labels(label: np.ndarray) -> np.ndarray:
    """
    Labels of two classes as -1 and 1, the larger value being 1.

    Raises:
        InputError: If there are not two values.
    """
    values = np.unique(label)
    if len(values) != 2:
        raise InputError(
            f"the label has {len(values)} values, such as {values[:4].tolist()}: two classes are expected"
        )
    return np.where(label == values[1], 1.0, -1.0)


def _read_csv(path: Path) -> pa.Table:
    from pyarrow import csv

    return csv.read_csv(path)


def _read_parquet(path: Path) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def _check_choice(name: str, value: str, allowed: Sequence[str]):
    if value not in allowed:
        raise ConfigurationError(name, value, f"must be one of {list(allowed)}")


def _column(table: pa.Table, name: str, field: str) -> pa.ChunkedArray:
    if table.column_names.count(name) != 1:
        raise ConfigurationError(field, name, f"must be one of the table's columns {table.column_names}")
    return table.column(name)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_categorical(column: pa.ChunkedArray) -> bool:
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    return text or pa.types.is_boolean(kind)


def _first_null(column: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy())[0])


def _checked(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = _column(table, name, "columns")
    if column.null_count:
        raise InputError(f"column {name!r}, row {_first_null(column)}: missing; fill it in or drop the row")
    return column


def _numbers(table: pa.Table, names: list[str]) -> np.ndarray:
    blocks = []
    for name in names:
        column = _checked(table, name)
        if not _is_number(column.type):
            raise InputError(f"column {name!r} holds {column.type}: numbers, text and truth values can be encoded")
        values = column.to_numpy().astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InputError(f"column {name!r}, row {bad[0]}: {values[bad[0]]}; fill it in or drop the row")
        blocks.append(values)
    return np.column_stack(blocks)


def _categories(table: pa.Table, names: list[str]) -> np.ndarray:
    values = [np.array([str(value) for value in _checked(table, name).to_pylist()], object) for name in names]
    return np.column_stack(values)
