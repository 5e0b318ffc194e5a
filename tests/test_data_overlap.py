import numpy as np
import pytest
import torch

from hf_mlopt.data import load_text, overlap, sketch, tokenize_corpus


@pytest.fixture
def tokens():
    return torch.randint(0, 32000, (4, 4096), generator=torch.Generator().manual_seed(0))


def _hash(run: list[int]) -> int:
    """The definition in plain integers."""
    mask, value = 2**64 - 1, 0
    for token in run:
        value = (value * 0x9E3779B97F4A7C15 + token) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return (value ^ (value >> 31)) >> 11


def test_sketch_holds_the_smallest_hashes_by_definition(tokens):
    rows = tokens[:2, :200].tolist()
    expected = sorted({_hash(row[start : start + 32]) for row in rows for start in range(200 - 31)})
    assert sketch(tokens[:2, :200]) == expected
    assert sketch(tokens[:2, :200], size=10) == expected[:10]


def test_sketch_is_small_and_exact_in_json(tokens):
    hashes = sketch(tokens)
    assert len(hashes) == 1024
    assert all(type(value) is int and 0 <= value < 2**53 for value in hashes)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_overlap_is_the_share_that_stands_in_the_text(tokens, share):
    generator = torch.Generator().manual_seed(1)
    rest = torch.randint(0, 32000, (4096,), generator=generator)
    text = torch.cat([rest[:17], *tokens[: int(4 * share)], rest])  # at other offsets than in the calibration set
    assert overlap(sketch(tokens), text) == pytest.approx(share, abs=0.05)
    assert overlap(sketch(tokens), np.asarray(text).tolist()) == overlap(sketch(tokens), text)


def test_texts_shorter_than_a_run_do_not_overlap(tokens):
    assert sketch(tokens[:, :31]) == []
    assert overlap([], tokens) == 0.0
    assert overlap(sketch(tokens), tokens[0, :31]) == 0.0


def test_train_and_test_of_the_embedded_corpus_do_not_overlap(tiny_tokenizer):
    train, test = (tokenize_corpus(load_text("embedded", split)[0], tiny_tokenizer) for split in ("train", "test"))
    # Bytes as tokens: 32 of them are half a line of grammar or code, of which a few recur.
    assert overlap(sketch(test), train) < 0.1
    assert overlap(sketch(test, width=128), train, width=128) < 0.01
    assert overlap(sketch(train), train) == 1.0
