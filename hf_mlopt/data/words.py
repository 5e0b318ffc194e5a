"""Tokenizers trained on the text at hand, where there is no model to bring one."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARKS = ["<unk>", "<eos>"]


def word_tokenizer(documents: Iterable[str], max_words: int | None = None) -> "PreTrainedTokenizerFast":
    """
    Words between white space, with `<eos>` for every end of a line, as pytorch/examples `word_language_model` reads
    the word-level files of WikiText-2. A line that the text breaks off in, such as a prompt, gets no `<eos>`.

    Args:
        documents (`Iterable[str]`): Text to take the words from.
        max_words (`int`, *optional*): Size of the vocabulary, `<unk>` and `<eos>` included; the most frequent words
            are kept, of equally frequent ones those that come first. All of them by default.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: Without a pad token. Decoding puts single spaces between the words.

    Raises:
        ConfigurationError: If `max_words` leaves no room for a word.
        InputError: If the text holds no words.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if max_words is not None and max_words <= len(_MARKS):
        raise ConfigurationError("max_words", max_words, "must be at least 3: <unk>, <eos> and a word")
    counts = Counter()
    for document in documents:
        counts.update(document.split())
    for mark in _MARKS:
        counts.pop(mark, None)
    if not counts:
        raise InputError("the text holds no words to make a vocabulary of")
    room = None if max_words is None else max_words - len(_MARKS)
    vocabulary = _MARKS + [word for word, _ in counts.most_common(room)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", " <eos> ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def byte_tokenizer(documents: Iterable[str], vocab_size: int = 2048) -> "PreTrainedTokenizerFast":
    """
    A byte-level BPE: no text is unknown to it.

    Args:
        documents (`Iterable[str]`): Text to learn the merges from.
        vocab_size (`int`, *optional*, defaults to 2048): Entries, of which `<s>`, `</s>`, `<pad>` and the 256 bytes
            are always there. Fewer if the text gives no more merges.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: It adds no special tokens by itself.

    Raises:
        ConfigurationError: If `vocab_size` is below 259.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(special_tokens) + len(alphabet)
    if vocab_size < least:
        raise ConfigurationError("vocab_size", vocab_size, f"must be at least {least}: 256 bytes and 3 special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
