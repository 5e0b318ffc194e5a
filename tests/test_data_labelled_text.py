"""Texts with labels: tables of a user, and chapters that need no network."""

import csv
import json

import pytest

from hf_mlopt.data import load_labelled_text
from hf_mlopt.errors import InputError


ROWS = [("it runs", 10, "north"), ("it walks", 2, "south"), ("it flies", 10, "south"), ("it swims", 3, "7")]


def table(path, rows=ROWS, columns=("text", "label", "hospital")):
    """Writes rows as the ending of the path says."""
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_a_table_has_labels_in_order_of_their_numbers_and_sites(ending, tmp_path):
    rows = [(text, label, str(site)) for text, label, site in ROWS]
    data = load_labelled_text(table(tmp_path / f"reports.{ending}", rows), site_column="hospital")
    assert data.texts == ["it runs", "it walks", "it flies", "it swims"]
    assert data.label_names == ["2", "3", "10"] and data.labels == [2, 0, 2, 1]  # 10 is after 3, not before 2
    assert data.sites == ["north", "south", "south", "7"]
    assert data.provenance == {"source": f"reports.{ending}"}  # not where it lies on this machine


def test_labels_are_names_or_numbers(tmp_path):
    def names(*labels):
        path = table(tmp_path / "any.jsonl", [("a", label) for label in labels], ("text", "label"))
        data = load_labelled_text(path)
        assert data.sites is None
        return data.label_names, data.labels

    assert names("yes", "no", "yes") == (["no", "yes"], [1, 0, 1])
    assert names("x", "9", "10") == (["9", "10", "x"], [2, 0, 1])  # numbers before words
    assert names(-1.5, 2.0, -1.5) == (["-1.5", "2.0"], [0, 1, 0])
    assert names(True, False) == (["False", "True"], [1, 0])


def test_a_column_that_knows_its_classes_keeps_their_numbers(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "m"])})
    path = tmp_path / "classes.parquet"
    Dataset.from_dict({"text": ["one", "two"], "label": [2, 0]}, features).to_parquet(path)
    data = load_labelled_text(str(path))
    assert data.label_names == ["z", "a", "m"] and data.labels == [2, 0]  # also of the class that has no rows


def test_the_embedded_chapters_are_split_by_pieces_and_tell_nothing_by_their_titles():
    train, test = load_labelled_text("embedded"), load_labelled_text("embedded", "test")
    assert train.label_names == test.label_names and len(train.label_names) >= 3
    assert set(train.labels) == set(test.labels) == set(range(len(train.label_names)))
    assert not set(train.texts) & set(test.texts)
    assert 0.08 < len(test.texts) / len(train.texts + test.texts) < 0.1  # every tenth, of each the rest left over
    assert max(len(text.split()) for text in train.texts) == 40
    for label, name in enumerate(train.label_names):
        first = train.texts[train.labels.index(label)]
        assert not first.startswith(name)
    assert load_labelled_text("embedded").texts == train.texts and train.provenance["source"] == "embedded"


@pytest.mark.parametrize(
    "rows, columns, site_column, message",
    [
        (ROWS, ("text", "topic", "site"), None, "no column 'label', only ['text', 'topic', 'site']; rename one"),
        (ROWS, ("body", "label", "site"), None, "no column 'text'"),
        (ROWS, ("text", "label", "site"), "hospital", "no column 'hospital'"),
        ([("a", 1, "x"), ("b", None, "y")], ("text", "label", "site"), None, "column 'label' is empty in 1 rows"),
        ([(None, 1, "x"), ("b", 2, "y")], ("text", "label", "site"), None, "column 'text' is empty in 1 rows"),
        ([("a", 1, None), ("b", 2, "y")], ("text", "label", "site"), "site", "column 'site' is empty in 1 rows"),
        ([("a", 1, "x"), ("b", 1, "y")], ("text", "label", "site"), None, "all rows have the label ['1']; at least"),
    ],
)
def test_a_table_that_lacks_something_is_refused(rows, columns, site_column, message, tmp_path):
    path = table(tmp_path / "bad.jsonl", rows, columns)
    with pytest.raises(InputError) as caught:
        load_labelled_text(path, "train", site_column)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_source_that_is_none_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "empty.csv").write_text("")
    for source, message in (
        (str(tmp_path / "notes.md"), "not a table of texts; give a file that ends in .csv, .json, .jsonl, .parquet"),
        (str(tmp_path / "empty.csv"), "the file is empty"),
        (str(tmp_path / "none.csv"), "none.csv"),
        ("nobody/nothing", "neither a local file nor a data set"),
    ):
        with pytest.raises(InputError, match=source) as caught:
            load_labelled_text(source)
        assert message in str(caught.value)
    with pytest.raises(InputError, match="embedded: has no column 'hospital'; leave site_column out"):
        load_labelled_text("embedded", site_column="hospital")
