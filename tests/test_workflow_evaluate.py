"""`hf-mlopt evaluate`: the number of the library, what it refuses, and the warning about calibration text."""

import json
import math

import pytest
from command_line import hf_mlopt, save, succeed
from transformers import AutoModelForCausalLM

from hf_mlopt.data import embedded_corpus, load_text, tokenize_corpus
from hf_mlopt.evaluation import perplexity


pytestmark = pytest.mark.e2e

WARNING = "of the calibration text also stands in the evaluation text"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def source(work, tiny_mixtral, tiny_tokenizer):
    return save(tiny_mixtral(), tiny_tokenizer, work / "source")


@pytest.fixture(scope="module")
def texts(work):
    """Two files of English without a line in common."""
    paths = {}
    for split in ("train", "test"):
        paths[split] = work / f"{split}.txt"
        paths[split].write_text("\n\n".join(embedded_corpus(split))[:10_000], encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def pruned(work, source, texts):
    calibration = ("--calibration", texts["train"], "--samples", "16", "--sequence-length", "128")
    succeed("prune", source, "--output", work / "pruned", "--sparsity", "0.5", *calibration)
    return work / "pruned"


def evaluate(model, text, *words, output):
    outcome = succeed("evaluate", model, "--perplexity", text, "--window", "64", *words, "--output", output)
    return json.loads(output.read_text()), outcome


def refused(*words):
    outcome = hf_mlopt("evaluate", *words)
    assert outcome.status == 2 and "Traceback" not in outcome.err
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and outcome.err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("hf-mlopt evaluate: error: ")


@pytest.fixture
def no_weights(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded, though the input is refused")

    monkeypatch.setattr("hf_mlopt.workflows.evaluate.load_model", never)


def test_the_number_is_that_of_the_library(source, texts, tiny_tokenizer, tmp_path):
    record, outcome = evaluate(source, texts["test"], "--max-windows", "20", output=tmp_path / "result.json")
    documents, _ = load_text(str(texts["test"]))
    token_ids = tokenize_corpus(documents, tiny_tokenizer)[: 20 * 64]
    expected = perplexity(AutoModelForCausalLM.from_pretrained(source), token_ids, window=64)
    assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert record["nll"] == pytest.approx(math.log(record["perplexity"]))
    assert (record["windows"], record["window"], record["tokens"]) == (20, 64, 20 * 63)
    assert f"perplexity {record['perplexity']:.3f} ({record['nll']:.4f} nats per token)" in outcome.out
    assert "split test, 20 windows of 64 tokens, not overlapping, tail dropped" in outcome.out


def test_the_batch_size_changes_no_number(source, texts, tmp_path):
    words = ("--max-windows", "10", "--batch-size")
    first, second = (
        evaluate(source, texts["test"], *words, size, output=tmp_path / f"{size}.json")[0] for size in (1, 7)
    )
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-6)


def test_the_record_says_on_what(source, tmp_path):
    words = ("--split", "test", "--max-windows", "4")
    record, _ = evaluate(source, "embedded", *words, output=tmp_path / "made" / "result.json")
    assert record["dataset"]["source"] == "embedded" and record["dataset"]["split"] == "test"
    assert record["model"] == str(source) and record["calibration_overlap"] is None


def test_the_window_is_the_context_by_default(source, texts):
    outcome = succeed("evaluate", source, "--perplexity", texts["test"], "--max-windows", "2")
    assert "2 windows of 512 tokens" in outcome.out


def test_its_own_calibration_text_is_warned_about(pruned, texts, tmp_path):
    record, outcome = evaluate(pruned, texts["train"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] > 0.95
    assert f"WARNING: {100 * record['calibration_overlap']:.0f} % {WARNING}" in outcome.err


def test_another_text_is_not_warned_about(pruned, texts, tmp_path):
    record, outcome = evaluate(pruned, texts["test"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] == 0 and WARNING not in outcome.err


def test_an_unpruned_model_is_not_warned_about(source, texts, tmp_path):
    record, outcome = evaluate(source, texts["train"], output=tmp_path / "result.json")
    assert record["calibration_overlap"] is None and WARNING not in outcome.err


def test_a_window_longer_than_the_context(source, texts):
    line = refused(source, "--perplexity", texts["test"], "--window", "513")
    assert "window=513" in line and "context of 512 tokens" in line


def test_a_missing_tokenizer(tiny_mixtral, texts, no_weights, tmp_path):
    source = save(tiny_mixtral(), None, tmp_path / "source")
    line = refused(source, "--perplexity", texts["test"])
    assert str(source) in line and "no tokenizer" in line and "save one beside the weights" in line


def test_a_text_shorter_than_a_window(source, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    line = refused(source, "--perplexity", text, "--window", "64")
    assert "9 tokens" in line and "one window of 64" in line


def test_an_earlier_result_is_kept(source, texts, no_weights, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("mine")
    assert "exists already" in refused(source, "--perplexity", texts["test"], "--output", result)
    assert result.read_text() == "mine"


def test_weights_that_are_not_finite(tiny_mixtral, tiny_tokenizer, texts, tmp_path):
    model = tiny_mixtral()
    model.lm_head.weight.data[0, 0] = float("nan")
    source = save(model, tiny_tokenizer, tmp_path / "source")
    line = refused(source, "--perplexity", texts["test"], "--window", "64", "--output", tmp_path / "result.json")
    assert "NaN or Inf" in line and "windows 0 to 7" in line and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["perplexity=None", "is needed"]),
        (["--perplexity", "embedded", "--window", "1"], ["window=1", "at least 2"]),
        (["--perplexity", "embedded", "--max-windows", "0"], ["max_windows=0", "at least 1"]),
        (["--perplexity", "embedded", "--batch-size", "0"], ["batch_size=0", "at least 1"]),
        (["--perplexity", "embedded", "--device", "tpu"], ["device='tpu'", "must be auto, cpu"]),
        (["--perplexity", "none.txt"], ["none.txt", "no such file"]),
        (["--perplexity", "wikitext"], ["wikitext", "--perplexity embedded"]),
    ],
)
def test_wrong_words(source, no_weights, words, parts):
    line = refused(source, *words)
    assert all(part in line for part in parts), line


def test_a_directory_that_is_not_a_checkpoint(texts, no_weights, tmp_path):
    assert "not a checkpoint" in refused(tmp_path, "--perplexity", texts["test"])


def test_a_model_is_needed():
    assert "MODEL" in refused("--perplexity", "embedded")


def test_the_reference_model_has_its_known_perplexity(shared_data, tmp_path):
    words = ("--window", "128", "--max-windows", "200")
    model, text = shared_data / "models" / "mixtral-8x-wiki", shared_data / "text" / "wikitext2-test.txt"
    succeed("evaluate", model, "--perplexity", text, *words, "--output", tmp_path / "result.json")
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["perplexity"] == pytest.approx(37.8, abs=0.1) and record["tokens"] == 200 * 127
