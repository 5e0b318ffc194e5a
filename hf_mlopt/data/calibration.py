"""The calibration set of a one-shot method: token windows from a named source, seeded and recorded."""

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from hf_mlopt.data.overlap import sketch
from hf_mlopt.data.text import Corpus, open_corpus, tokenize_corpus
from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# The logger that transformers' `get_logger` returns, without its import: parsers read `CalibrationConfig`.
logger = logging.getLogger(__name__)


@dataclass
class CalibrationConfig:
    """
    Where the calibration tokens come from. The defaults are those of
    [Wanda](https://huggingface.co/papers/2306.11695).

    Args:
        calibration (`str`, *optional*, defaults to `"allenai/c4"`): Source of the text: `embedded` (no network), a
            local .txt, .jsonl or .parquet file (column `text`, or `input_ids` for token ids), or a data set on the
            Hub.
        samples (`int`, *optional*, defaults to 128): Number of windows.
        sequence_length (`int`, *optional*, defaults to 2048): Tokens in a window; cut to the model's context.
        seed (`int`, *optional*, defaults to 0): Seed of the choice of documents and windows.
        calibration_packing (`str`, *optional*): `documents` takes one random window out of each document that is long
            enough, `stream` joins the documents and takes random windows. By default `stream` for plain text and the
            embedded corpus, `documents` for data sets.
    """

    calibration: str = "allenai/c4"
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    calibration_packing: Literal["documents", "stream"] | None = None

    def __post_init__(self):
        for field, least in (("samples", 1), ("sequence_length", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise ConfigurationError(field, getattr(self, field), f"must be at least {least}")
        if not self.calibration:
            raise ConfigurationError("calibration", self.calibration, "must name a source, for example 'embedded'")
        if self.calibration_packing not in (None, "documents", "stream"):
            raise ConfigurationError("calibration_packing", self.calibration_packing, "must be documents or stream")


@dataclass
class CalibrationSet:
    """
    Windows of tokens and where they came from.

    Args:
        token_ids (`torch.LongTensor`): `[samples, length]`, without padding.
        source (`dict`): JSON-able record. `source` and what identifies it (see [`~hf_mlopt.data.Corpus`]); `packing`,
            `seed`, `samples`, `sequence_length` (after the cut to the model's context); `fingerprint`, the sha256 of
            the token ids as little-endian int64; for `stream` also `stream_tokens` and `windows_per_token`, the mean
            number of windows that a token of the text lies in (above 1 the windows overlap).
        sketch (`list[int]`): For [`~hf_mlopt.data.overlap`] with an evaluation text.
    """

    token_ids: "torch.LongTensor"
    source: dict
    sketch: list[int]


def load_calibration(
    config: CalibrationConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_length: int | None = None,
    held_out: int = 0,
) -> CalibrationSet:
    """
    Draws the calibration windows. The same configuration, source and tokenizer give the same tokens.

    Args:
        config ([`CalibrationConfig`]): Source, number and length of the windows, seed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The model's tokenizer. Not needed if the
            source holds token ids.
        max_length (`int`, *optional*): The model's context in tokens; longer windows are cut to it.
        held_out (`int`, *optional*, defaults to 0): The last so many windows share no token with the others.

    Raises:
        InputError: If the source cannot be read, a tokenizer is missing, or there is too little text.
    """
    length = config.sequence_length
    if max_length is not None and length > max_length:
        logger.info(f"sequence_length={length} is cut to the model's context of {max_length} tokens")
        length = max_length
    corpus = open_corpus(config.calibration, "train", seed=config.seed)
    if tokenizer is None and not corpus.tokenized:
        raise InputError(
            f"calibration={config.calibration!r}: text needs a tokenizer, and the model has none; save one beside the "
            "model, or give a .jsonl or .parquet file with a column 'input_ids'"
        )
    packing = config.calibration_packing or ("documents" if corpus.tabular else "stream")
    rng = random.Random(config.seed)
    if packing == "documents":
        documents = (_token_ids(document, tokenizer) for document in corpus.documents)
        token_ids, record = _document_windows(documents, config, length, rng), {}
    else:
        stream = _join(corpus, tokenizer, 2 * config.samples * length)
        token_ids, record = _stream_windows(stream, config, length, rng, held_out)
    if token_ids.min() < 0:
        raise InputError(f"calibration={config.calibration!r}: column 'input_ids' holds negative values")
    source = corpus.provenance | {
        "packing": packing,
        "seed": config.seed,
        "samples": config.samples,
        "sequence_length": length,
        "fingerprint": hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).hexdigest(),
    }
    return CalibrationSet(token_ids, source | record, sketch(token_ids))


def _token_ids(document: str | list[int], tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    return tokenizer(document, verbose=False).input_ids if isinstance(document, str) else document


def _document_windows(
    documents: Iterable[list[int]], config: CalibrationConfig, length: int, rng: random.Random
) -> "torch.LongTensor":
    """
    A random window out of each of the first documents that are long enough, `[samples, length]`.

    After `get_c4` of Wanda's `lib/data.py`, which draws documents with replacement and wants one token more than the
    window; here no document is taken twice, and rows of exactly one window, as packed data sets have, are accepted.
    """
    import torch
    from tqdm import tqdm

    windows, seen = [], 0
    with tqdm(total=config.samples, desc="calibration windows", leave=False, disable=None) as progress:
        for tokens in documents:
            seen += 1
            if len(tokens) >= length:
                start = rng.randint(0, len(tokens) - length)
                windows.append(tokens[start : start + length])
                progress.update()
                if len(windows) == config.samples:
                    return torch.tensor(windows, dtype=torch.long)
    raise InputError(
        f"calibration={config.calibration!r}: {len(windows)} of {seen} documents have {length} tokens or more, but "
        f"samples={config.samples}; lower samples or sequence_length, or use `--calibration-packing stream`"
    )


def _join(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase | None", enough: int) -> "torch.LongTensor":
    """All tokens of the source as one stream; of a streamed data set, which may be huge, about `enough` of them."""
    import torch

    documents = _first_tokens(corpus.documents, tokenizer, enough) if corpus.streamed else corpus.documents
    if corpus.tokenized:
        return torch.tensor(list(chain.from_iterable(documents)), dtype=torch.long)
    return tokenize_corpus(documents, tokenizer)


def _first_tokens(
    documents: Iterable[str | list[int]], tokenizer: "PreTrainedTokenizerBase | None", enough: int
) -> Iterator[str | list[int]]:
    for document in documents:
        yield document
        enough -= len(_token_ids(document, tokenizer))
        if enough <= 0:
            return


def _stream_windows(
    stream: "torch.LongTensor", config: CalibrationConfig, length: int, rng: random.Random, held_out: int
) -> tuple["torch.LongTensor", dict]:
    """
    Random windows of a stream, disjoint if it is long enough for that, `[samples, length]`; else the last `held_out`
    of them are its end, and the others come from what is before.
    """
    import torch

    spare = len(stream) - config.samples * length
    before = len(stream) - held_out * length
    if before < length:
        raise InputError(
            f"calibration={config.calibration!r}: {len(stream)} tokens of text, less than one window of {length}"
            f"{f' and {held_out} held out' if held_out else ''}: lower sequence_length or give more text"
        )
    if spare >= 0:  # the spare tokens fall at random between the windows
        gaps = sorted(rng.randint(0, spare) for _ in range(config.samples))
        starts = [gap + index * length for index, gap in enumerate(gaps)]
    else:
        starts = [rng.randint(0, before - length) for _ in range(config.samples - held_out)]
        starts += [before + index * length for index in range(held_out)]
    uses = config.samples * length / len(stream)
    if uses > 1:
        logger.info(
            f"calibration={config.calibration!r}: {len(stream)} tokens are fewer than samples={config.samples} x "
            f"{length}; the windows overlap, a token is used {uses:.1f} times on average"
        )
    windows = torch.stack([stream[start : start + length] for start in starts])
    return windows, {"stream_tokens": len(stream), "windows_per_token": round(uses, 3)}
