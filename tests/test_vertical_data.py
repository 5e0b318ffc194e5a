"""A party's columns: read from three kinds of files, encoded on training rows, refused with the column named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.sparse

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.data import (
    ColumnEncoder,
    VerticalData,
    kept_columns,
    read_libsvm,
    read_table,
    sign_labels,
)
from hf_mlopt.vertical.splits import split_contiguous


CSV = """id,y,age,city,vip
p1,0,30,Bern,true
p2,1,40,Rome,false
p3,0,50,Bern,true
p4,1,20,Oslo,true
"""


def dense(features):
    return features.toarray() if scipy.sparse.issparse(features) else features


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "bank.csv"
    path.write_text(CSV)
    return read_table(path)


@pytest.mark.parametrize("sparse", [False, True])
def test_encoding(table, sparse):
    data = ColumnEncoder("id", "y", sparse=sparse).fit(table).transform(table)
    assert data.names == ("age", "city=Bern", "city=Oslo", "city=Rome", "vip=False", "vip=True")
    age = (np.array([30, 40, 50, 20]) - 35) / np.sqrt(125)
    expected = [
        [age[0], 1, 0, 0, 0, 1],
        [age[1], 0, 0, 1, 1, 0],
        [age[2], 1, 0, 0, 0, 1],
        [age[3], 0, 1, 0, 0, 1],
    ]
    assert np.allclose(dense(data.features), expected, atol=1e-15)
    assert data.ids == ["p1", "p2", "p3", "p4"] and data.label.tolist() == [0, 1, 0, 1]
    assert isinstance(data.features, scipy.sparse.csr_array) == sparse and data.features.dtype == np.float64


def test_means_scales_and_categories_are_those_of_the_training_rows(table):
    encoder = ColumnEncoder("id", "y", ["age", "city"], unknown="ignore", constant="keep").fit(table.slice(0, 3))
    data = encoder.transform(table)
    assert data.names == ("age", "city=Bern", "city=Rome")
    assert np.allclose(data.features[3], [(20 - 40) / np.sqrt(200 / 3), 0, 0])
    strict = ColumnEncoder("id", "y", ["age", "city"], constant="keep").fit(table.slice(0, 3))
    with pytest.raises(InputError, match="(?s)Oslo.*unknown='ignore'"):
        strict.transform(table)
    assert encoder.transform(table.drop_columns(["y"])).label is None  # rows to predict carry no label


def test_numbers_as_categories_and_unscaled(table):
    encoder = ColumnEncoder("id", columns=["age", "y"], categorical=["y"], scale="none").fit(table)
    data = encoder.transform(table)
    assert data.names == ("age", "y=0", "y=1") and data.label is None
    assert data.features.tolist() == [[30, 1, 0], [40, 0, 1], [50, 1, 0], [20, 0, 1]]


def test_csv_and_parquet_give_the_same(table, tmp_path):
    pyarrow.parquet.write_table(table, tmp_path / "bank.parquet")
    stored = read_table(tmp_path / "bank.parquet")
    ours, theirs = (ColumnEncoder("id", "y").fit(some).transform(some) for some in (stored, table))
    assert ours.ids == theirs.ids and ours.names == theirs.names
    assert np.array_equal(ours.features, theirs.features) and np.array_equal(ours.label, theirs.label)


def test_libsvm(tmp_path):
    path = tmp_path / "rows"
    path.write_text("+1 1:0.5 3:2\n-1 2:1\n+1 1:-1 3:2\n")
    data = read_libsvm(path, with_label=True)
    assert data.features.toarray().tolist() == [[0.5, 0, 2], [0, 1, 0], [-1, 0, 2]]
    assert data.names == ("x1", "x2", "x3") and data.ids == [0, 1, 2] and data.label.tolist() == [1, -1, 1]
    assert read_libsvm(path, 4, with_label=False, constant="keep").features.shape == (3, 4)
    assert read_libsvm(path, 4, with_label=False, constant="drop").names == ("x1", "x2", "x3")
    assert read_libsvm(path, with_label=False).label is None
    with pytest.raises(InputError, match=r"1 columns have one value in all rows, such as \['x4'\]"):
        read_libsvm(path, 4, with_label=True)
    with pytest.raises(InputError, match="cannot be read as LIBSVM"):
        read_libsvm(path, 2, with_label=True)
    with pytest.raises(InputError, match="cannot be read as LIBSVM"):
        read_libsvm(tmp_path / "absent", with_label=True)


def changed(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("age", [1.0, None, 2.0, 3.0], "column 'age', row 1: missing; fill it in"),
        ("age", [1.0, 2.0, float("nan"), 3.0], "column 'age', row 2: nan; fill it in"),
        ("age", [1.0, 2.0, float("inf"), 3.0], "column 'age', row 2: inf"),
        ("city", ["a", "b", None, "c"], "column 'city', row 2: missing"),
        ("age", [7, 7, 7, 7], r"1 columns have one value in all rows, such as \['age'\]: .* constant='drop'"),
        ("city", ["a"] * 4, r"such as \['city=a'\]"),
        ("y", [0, 1, None, 1], "label_column='y': the label of row 2 is missing"),
        ("y", [0.0, 1.0, float("nan"), 1.0], "the label of row 2 is missing"),
        ("y", ["no", "yes", "no", "yes"], "label_column='y' holds string, expected numbers"),
        ("age", [[1], [2], [3], [4]], "column 'age' holds list"),
    ],
)
def test_columns_that_cannot_be_used(table, name, values, message):
    with pytest.raises(InputError, match=message):
        ColumnEncoder("id", "y").fit(changed(table, name, values))


def test_rows_to_predict_are_checked_as_well(table):
    encoder = ColumnEncoder("id", "y").fit(table)
    with pytest.raises(InputError, match="column 'age', row 0: nan"):
        encoder.transform(changed(table, "age", [float("nan"), 1.0, 2.0, 3.0]))
    with pytest.raises(ConfigurationError, match="columns='city': must be one of"):
        encoder.transform(table.drop_columns(["city"]))
    with pytest.raises(InputError, match="no training rows: call fit first"):
        ColumnEncoder("id").transform(table)


def test_constant_columns_are_dropped_by_what_training_rows_say(table):
    train = changed(table, "age", [7, 7, 7, 7])
    encoder = ColumnEncoder("id", "y", ["age", "vip"], constant="drop").fit(train)
    assert encoder.transform(table).names == ("vip=False", "vip=True")
    assert ColumnEncoder("id", "y", ["age", "vip"], constant="keep").fit(train).transform(table).names[0] == "age"
    with pytest.raises(InputError, match="every column is constant"):
        ColumnEncoder("id", "y", ["age"], constant="drop").fit(train)


def test_negative_and_sparse_columns_are_not_taken_for_constant():
    ids, names = [1, 2], ("a", "b", "c", "d")
    features = np.array([[0, -1, 2, 0], [0, 0, 2, -3.0]])
    for block in (features, scipy.sparse.csr_array(features)):
        assert kept_columns(VerticalData(ids, block, names), "drop").tolist() == [1, 3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"id_column": "no"}, "id_column='no': must be one of the table's columns"),
        ({"label_column": "no"}, "label_column='no'"),
        ({"columns": ["age", "no"]}, "columns='no'"),
        ({"columns": ["age", "y"]}, r"columns='y': a feature is one of \['age', 'city', 'vip'\]"),
        ({"columns": ["id"]}, "columns='id'"),
        ({"categorical": ["y"]}, "columns='y'"),
        ({"columns": ["age"], "categorical": ["city"]}, "columns='city'"),
        ({"scale": "max"}, "scale='max'"),
        ({"constant": "no"}, "constant='no'"),
        ({"unknown": "no"}, "unknown='no'"),
        ({"columns": []}, "a party needs features"),
    ],
)
def test_fields_of_the_encoder(table, settings, message):
    with pytest.raises(InputError, match=message):
        ColumnEncoder(**{"id_column": "id", "label_column": "y", **settings}).fit(table)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.parquet").write_text("nothing")
    (tmp_path / "rows.txt").write_text("nothing")
    for name, message in (("bad.parquet", "cannot be read"), ("no.csv", "cannot be read"), ("rows.txt", "read from")):
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / name)


def test_parts_of_different_sizes():
    features = np.arange(6.0).reshape(3, 2)
    for ids, names, label in (([1, 2], ("a", "b"), None), ([1, 2, 3], ("a",), None), ([1, 2, 3], ("a", "b"), [1])):
        with pytest.raises(InputError, match="read them from one table"):
            VerticalData(ids, features, names, label)
    with pytest.raises(InputError, match="needs rows and columns"):
        VerticalData([], np.zeros((0, 2)), ("a", "b"))
    features[1, 1] = np.nan
    for block in (features, scipy.sparse.csr_array(features)):
        with pytest.raises(InputError, match="column 'b', row 1: nan"):
            VerticalData([1, 2, 3], block, ("a", "b"))


@pytest.mark.parametrize("form", [np.array, scipy.sparse.csr_array])
def test_rows_and_columns(form):
    data = VerticalData([1, 2, 3], form(np.arange(6.0).reshape(3, 2)), ("a", "b"), np.array([1.0, -1, 1]))
    taken = data.take(np.array([2, 0]))
    assert (taken.ids, dense(taken.features).tolist(), taken.label.tolist()) == ([3, 1], [[4, 5], [0, 1]], [1, 1])
    other = data.select(np.array([1]), with_label=False)
    assert other.names == ("b",) and other.label is None and dense(other.features).tolist() == [[1], [3], [5]]


def test_labels():
    assert sign_labels(np.array([0, 1, 1])).tolist() == [-1, 1, 1]
    assert sign_labels(np.array([1, -1, 1.0])).tolist() == [1, -1, 1]
    for values in ([1, 1], [0, 1, 2]):
        with pytest.raises(InputError, match=f"the label has {len(set(values))} values"):
            sign_labels(np.array(values))


@pytest.mark.parametrize("num_features, num_parties", [(5, 1), (5, 2), (5, 5), (90, 8), (123, 16)])
def test_a_split_gives_every_column_to_one_party(num_features, num_parties):
    parts, more = split_contiguous(num_features, num_parties), num_features % num_parties
    assert [len(part) for part in parts] == [num_features // num_parties + (i < more) for i in range(num_parties)]
    assert np.concatenate(parts).tolist() == list(range(num_features))


@pytest.mark.parametrize("num_parties", [0, 6, -1, 2.0])
def test_more_parties_than_columns(num_parties):
    with pytest.raises(ConfigurationError, match="num_parties="):
        split_contiguous(5, num_parties)


def test_the_credit_guest_reads_as_its_file_says(shared_data):
    path = shared_data / "vertical" / "default_credit_hetero_guest.csv"
    if not path.is_file():
        pytest.skip(f"credit data not found at {path}")
    table = read_table(path)
    data = ColumnEncoder("id", "y").fit(table).transform(table)
    assert data.features.shape == (30_000, 13) and data.names[-1] == "x12"
    assert data.label.mean() == pytest.approx(0.2212)
    assert np.allclose(data.features.mean(0), 0, atol=1e-12) and np.allclose(data.features.std(0), 1)


def test_the_census_host_ignores_the_labels_its_file_carries(shared_data):
    path = shared_data / "vertical" / "a9a_vertical_p1"
    if not path.is_file():
        pytest.skip(f"a9a not found at {path}")
    data = read_libsvm(path, 62, with_label=False, constant="keep")
    assert data.features.shape == (32_561, 62) and data.label is None
