import pytest
import torch
from transformers import AutoTokenizer

from hf_mlopt.data import (
    byte_tokenizer,
    embedded_corpus,
    load_text,
    token_windows,
    tokenize_corpus,
    window_dataset,
    word_tokenizer,
)
from hf_mlopt.errors import ConfigurationError, InputError


TEXT = " = Fish = \n \n the fish , the <unk> fish\n a bird <eos> the\n"


def as_the_example_reads(text: str) -> list[str]:
    """`Corpus.tokenize` of pytorch/examples `word_language_model`."""
    words = []
    for line in text.splitlines():
        words += [*line.split(), "<eos>"]
    return words


# Words


def test_words_are_those_of_the_example():
    tokenizer = word_tokenizer([TEXT])
    ids = tokenize_corpus([TEXT], tokenizer).tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == as_the_example_reads(TEXT)
    assert set(tokenizer.get_vocab()) == set(as_the_example_reads(TEXT))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (0, 1, None)
    assert tokenizer("the fish").input_ids == tokenizer.convert_tokens_to_ids(["the", "fish"])
    assert tokenizer.decode(tokenizer("a\nbird").input_ids) == "a <eos> bird"


def test_the_most_frequent_words_are_kept_and_the_marks_count():
    # "the" stands three times, "=" and "fish" twice, and "=" comes first.
    assert word_tokenizer([TEXT], 4).get_vocab() == {"<unk>": 0, "<eos>": 1, "the": 2, "=": 3}
    assert word_tokenizer([TEXT], 5).get_vocab() == {"<unk>": 0, "<eos>": 1, "the": 2, "=": 3, "fish": 4}
    assert word_tokenizer([TEXT], 4)("the bird\n= fish").input_ids == [2, 0, 1, 3, 0]
    assert len(word_tokenizer([TEXT], 1000)) == len(word_tokenizer([TEXT]))


def test_documents_count_together():
    tokenizer = word_tokenizer(iter(["a b", "b c", "c b"]), 4)
    assert tokenizer.get_vocab() == {"<unk>": 0, "<eos>": 1, "b": 2, "c": 3}


def test_words_survive_a_save(tmp_path):
    tokenizer = word_tokenizer([TEXT])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert (loaded.unk_token_id, loaded.eos_token_id) == (0, 1)


@pytest.mark.parametrize("max_words", [0, 2])
def test_a_vocabulary_without_room_is_refused(max_words):
    with pytest.raises(ConfigurationError, match=f"max_words={max_words}: must be at least 3"):
        word_tokenizer([TEXT], max_words)


@pytest.mark.parametrize("documents", [[], [" \n"], ["<unk> <eos>\n"]])
def test_a_text_without_words_is_refused(documents):
    with pytest.raises(InputError, match="no words"):
        word_tokenizer(documents)


def test_wikitext_has_its_published_counts(shared_data):
    (valid, _), (test, _) = (load_text(str(shared_data / "text" / f"wikitext2-{s}.txt")) for s in ("valid", "test"))
    tokenizer = word_tokenizer(valid, max_words=4000)
    assert len(tokenizer) == 4000
    assert len(tokenize_corpus(valid, tokenizer)) == 217_646
    tokens = tokenize_corpus(test, tokenizer)
    assert len(tokens) == 245_569
    written = test[0].split().count("<unk>")
    assert ((tokens == 0).sum().item() - written) / len(tokens) == pytest.approx(0.144, abs=0.0005)


# Bytes


def test_bytes_know_any_text_and_learn_the_frequent_pairs():
    tokenizer = byte_tokenizer(["abab abab abab"], vocab_size=261)
    assert len(tokenizer) == 261
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abab ab").input_ids) == ["abab", "Ġ", "ab"]
    text = "日本\x00\n\tÜ  abab"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_demo_has_this_tokenizer():
    from hf_mlopt.demo.model import CONTEXT, train_tokenizer

    ours, demo = byte_tokenizer(embedded_corpus("train"), 400), train_tokenizer(400)
    assert ours.get_vocab() == demo.get_vocab()
    assert demo.model_max_length == CONTEXT < ours.model_max_length


def test_fewer_entries_than_bytes_are_refused():
    with pytest.raises(ConfigurationError, match="vocab_size=258: must be at least 259"):
        byte_tokenizer(["abc"], 258)
    assert len(byte_tokenizer(["abc"], 259)) == 259


# Windows


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_windows_follow_each_other_and_the_rest_is_dropped(make):
    dataset = token_windows(make(list(range(11))), 3)
    assert dataset["input_ids"][:] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert dataset["labels"][:] == dataset["input_ids"][:]
    assert sorted(dataset.column_names) == ["input_ids", "labels"]


def test_one_window_is_enough_and_less_is_not():
    assert len(token_windows(range(3), 3)) == 1
    with pytest.raises(InputError, match="2 tokens of text, less than one window of 3"):
        token_windows(range(2), 3)
    with pytest.raises(ConfigurationError, match="length=1: must be at least 2"):
        token_windows(range(9), 1)


def test_windows_as_they_are():
    assert window_dataset(torch.tensor([[5, 6], [7, 8]]))[1] == {"input_ids": [7, 8], "labels": [7, 8]}
