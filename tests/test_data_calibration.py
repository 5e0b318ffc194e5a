import gzip
import hashlib
import json
import logging
import subprocess
import sys

import pytest
import torch

from hf_mlopt.data import CalibrationConfig, embedded_corpus, load_calibration, load_text, sketch, tokenize_corpus
from hf_mlopt.errors import ConfigurationError, InputError


def config(source, samples=4, sequence_length=16, seed=0, packing=None) -> CalibrationConfig:
    return CalibrationConfig(str(source), samples, sequence_length, seed, packing)


@pytest.fixture
def rows_file(tmp_path):
    """60 documents of 10, 20, ... 600 characters, in each of which one character tells which it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": chr(256 + i) * (10 * i + 10)}) for i in range(60)))
    return path


def is_part_of(window: torch.Tensor, stream: torch.Tensor) -> bool:
    return bool((stream.unfold(0, len(window), 1) == window).all(dim=1).any())


# Embedded corpus


def test_embedded_corpus_is_split_without_shared_paragraphs():
    train, test = embedded_corpus("train"), embedded_corpus("test")
    sizes = [sum(map(len, documents)) for documents in (train, test)]
    assert sum(sizes) > 300_000
    assert 0.08 < sizes[1] / sum(sizes) < 0.25
    paragraphs = [{" ".join(p.split()) for d in documents for p in d.split("\n\n")} for documents in (train, test)]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    assert embedded_corpus() == train
    with pytest.raises(InputError, match="split='dev'"):
        embedded_corpus("dev")


# Packing


def test_stream_windows_are_disjoint_parts_of_the_text(tiny_tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    # Every position of the text is told by the two characters there, so that a window is found at one place only.
    path.write_text("".join(chr(0x4E00 + i) for i in range(300)), encoding="utf-8")
    stream = tokenize_corpus(load_text(str(path))[0], tiny_tokenizer)
    calibration = load_calibration(config(path, samples=25, sequence_length=36), tiny_tokenizer)
    assert calibration.token_ids.shape == (25, 36) and calibration.token_ids.dtype == torch.long
    starts = [(stream.unfold(0, 36, 1) == window).all(dim=1).nonzero().item() for window in calibration.token_ids]
    assert all(second - first >= 36 for first, second in zip(starts, starts[1:], strict=False))
    assert calibration.source["packing"] == "stream"
    assert calibration.source["stream_tokens"] == len(stream) == 900
    assert calibration.source["windows_per_token"] == 1.0


def test_a_short_stream_overlaps_and_says_so(tiny_tokenizer, tmp_path, caplog):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10)
    with caplog.at_level(logging.INFO):
        calibration = load_calibration(config(path, samples=20), tiny_tokenizer)
    assert calibration.token_ids.shape == (20, 16)
    assert calibration.source["windows_per_token"] == 3.2
    assert "100 tokens are fewer than samples=20 x 16" in caplog.text
    assert "3.2 times on average" in caplog.text


def test_documents_give_one_window_each(tiny_tokenizer, rows_file):
    calibration = load_calibration(config(rows_file, samples=40, sequence_length=300), tiny_tokenizer)
    assert calibration.source["packing"] == "documents"
    # A window holds one character of two bytes; no document is taken twice.
    pairs = {tuple(window[:-1].unique().tolist()) for window in calibration.token_ids}
    assert len(pairs) == 40
    assert all(len(pair) == 2 for pair in pairs)


def test_too_few_documents_are_counted(tiny_tokenizer, rows_file):
    with pytest.raises(
        InputError, match=r"31 of 60 documents have 600 tokens or more, but samples=40.*packing stream"
    ):
        load_calibration(config(rows_file, samples=40, sequence_length=600), tiny_tokenizer)
    calibration = load_calibration(config(rows_file, 40, 600, packing="stream"), tiny_tokenizer)
    assert calibration.token_ids.shape == (40, 600)


def test_embedded_uses_the_training_split_and_can_be_packed_by_document(tiny_tokenizer):
    train = tokenize_corpus(embedded_corpus("train"), tiny_tokenizer)
    for packing in (None, "documents"):
        calibration = load_calibration(config("embedded", sequence_length=64, packing=packing), tiny_tokenizer)
        assert calibration.source["split"] == "train"
        assert all(is_part_of(window, train) for window in calibration.token_ids)


# Seed, fingerprint, record


@pytest.mark.parametrize("source", ["embedded", "rows"])
def test_the_seed_decides_the_windows(tiny_tokenizer, rows_file, source):
    source = rows_file if source == "rows" else source
    first, again, other = (load_calibration(config(source, seed=seed), tiny_tokenizer) for seed in (0, 0, 1))
    assert torch.equal(first.token_ids, again.token_ids) and first.source == again.source
    assert not torch.equal(first.token_ids, other.token_ids)
    assert first.source["fingerprint"] != other.source["fingerprint"]


def test_record_is_json_and_says_what_was_used(tiny_tokenizer, rows_file):
    calibration = load_calibration(config(rows_file, sequence_length=64), tiny_tokenizer)
    tokens = b"".join(int(token).to_bytes(8, "little") for token in calibration.token_ids.flatten())
    assert json.loads(json.dumps(calibration.source)) == {
        "source": "rows.jsonl",
        "packing": "documents",
        "seed": 0,
        "samples": 4,
        "sequence_length": 64,
        "fingerprint": hashlib.sha256(tokens).hexdigest(),
    }
    assert calibration.sketch == sketch(calibration.token_ids) != []


def test_a_window_longer_than_the_context_is_cut(tiny_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        calibration = load_calibration(config("embedded", sequence_length=2048), tiny_tokenizer, max_length=512)
    assert calibration.token_ids.shape == (4, 512)
    assert calibration.source["sequence_length"] == 512
    assert "sequence_length=2048 is cut to the model's context of 512 tokens" in caplog.text


# File formats


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_table_formats_give_the_same_tokens(tiny_tokenizer, rows_file, tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl.gz":
        path.write_bytes(gzip.compress(rows_file.read_bytes()))
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else rows_file.read_text())
    expected = load_calibration(config(rows_file), tiny_tokenizer).token_ids
    assert torch.equal(load_calibration(config(path), tiny_tokenizer).token_ids, expected)


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_token_ids_need_no_tokenizer(tmp_path, packing):
    path = tmp_path / "ids.jsonl"
    rows = [list(range(start, start + 16)) for start in range(0, 160, 16)]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    windows = load_calibration(config(path, packing=packing)).token_ids.tolist()
    assert len(windows) == 4
    if packing == "documents":  # rows of exactly one window are taken whole
        assert all(window in rows for window in windows)


# Bad input


def test_text_without_tokenizer_is_refused():
    with pytest.raises(InputError, match="calibration='embedded': text needs a tokenizer.*'input_ids'"):
        load_calibration(config("embedded"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 50, "latin.txt: not UTF-8 .* at byte 3"),
        ("empty.txt", b" \n", "empty.txt: the file is empty"),
        ("empty.jsonl", b"", "empty.jsonl: the file is empty"),
        ("short.txt", b"short", "short.txt': 5 tokens of text, less than one window of 16"),
        ("broken.jsonl", b"not json\n", "broken.jsonl: cannot be read as json .*JSON parse error"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "latin.jsonl: column 'text' is not UTF-8"),
        ("broken.parquet", b"no", "broken.parquet: cannot be read as parquet"),
        ("column.jsonl", b'{"body": "a"}\n', r"no column 'text' or 'input_ids', only \['body'\]"),
        ("numbers.jsonl", b'{"text": 3}\n', "numbers.jsonl: column 'text' holds 3, not str"),
        ("negative.jsonl", b'{"input_ids": [%s]}\n' % b",".join([b"-1"] * 80), "holds negative values"),
        ("notes.md", b"text", "notes.md: not a text source; give a file that ends in .txt"),
        ("absent.txt", None, "absent.txt: no such file"),
    ],
)
def test_bad_files_are_named(tiny_tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_calibration(config(path, samples=1), tiny_tokenizer)


@pytest.mark.parametrize("source", ["allenai/c4", "wikitext"])
def test_without_network_the_remedy_is_named(tiny_tokenizer, source):
    with pytest.raises(InputError, match=f"{source}: neither a local file nor .*--calibration embedded"):
        load_calibration(config(source), tiny_tokenizer)


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 0), ("sequence_length", 0), ("seed", -1), ("calibration", ""), ("calibration_packing", "rows")],
)
def test_configuration_refuses_values_out_of_range(field, value):
    with pytest.raises(ConfigurationError, match=f"{field}={value!r}: must"):
        CalibrationConfig(**{field: value})


# Hub data sets, as far as they go without network


@pytest.fixture
def fake_hub(monkeypatch):
    """`load_dataset` and the commit lookup answered here: 5,000 streamed rows, and a list of the calls."""
    import datasets
    import huggingface_hub

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        rows = datasets.Dataset.from_list([{"text": f"document {i} " * 4} for i in range(5000)])
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    class Info:
        sha = "0123abc"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: Info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_c4_is_streamed_in_the_manner_of_wanda(tiny_tokenizer, fake_hub):
    calibration = load_calibration(config("c4"), tiny_tokenizer)
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    options = {"split": "train", "revision": "0123abc", "streaming": True, "data_files": files}
    assert fake_hub == [(("allenai/c4",), options)]
    record = {"source": "c4", "dataset": "allenai/c4", "revision": "0123abc", "split": "train", "data_files": files}
    assert record.items() <= calibration.source.items()
    assert calibration.source["packing"] == "documents"


def test_a_streamed_source_is_read_no_further_than_needed(tiny_tokenizer, fake_hub):
    calibration = load_calibration(config("user/corpus", packing="stream"), tiny_tokenizer)
    assert 2 * 4 * 16 <= calibration.source["stream_tokens"] < 250


def test_evaluation_text_is_not_shuffled(fake_hub):
    documents, provenance = load_text("wikitext")
    assert documents[:2] == ["document 0 " * 4, "document 1 " * 4]
    assert (provenance["dataset"], provenance["name"], provenance["split"]) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert fake_hub[0][1]["streaming"] is False


def test_import_is_light():
    code = (
        "import sys; from hf_mlopt.data import CalibrationConfig; CalibrationConfig()\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_held_out_windows_share_nothing_with_the_others_where_the_text_is_short(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": list(range(100))}) + "\n")
    config = CalibrationConfig(str(path), samples=23, sequence_length=10, calibration_packing="stream")
    windows = load_calibration(config, held_out=3).token_ids
    assert windows[-3:].flatten().tolist() == list(range(70, 100))
    assert windows[:-3].max() < 70
    with pytest.raises(InputError, match="one window of 10 and 10 held out"):
        load_calibration(config, held_out=10)
