"""
A large real text that every machine has: the Python sources installed beside the interpreter.

Whole packages are held out, one group to evaluate on and one to calibrate and distil on. A file that stands in several
packages is kept once, in the evaluation packages first; folders of vendored copies are left out.
"""

import hashlib
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SHARES = {"evaluation": 0.015, "calibration": 0.03}  # of all characters, at least; the others are for training
_LEFT_OUT = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals", "site-packages", "dist-packages"}
_LONGEST, _DIGITS = 200_000, 0.2  # characters, and share of digits; beyond are tables that a program wrote
_BATCH = 1000  # files that are encoded at a time


def installed() -> list[Path]:
    """Folders that hold the standard library and the installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("purelib", "platlib", "stdlib")))


def read_packages(roots: list[Path]) -> dict[str, list[str]]:
    """The sources of every package or module at the top of the given folders, by its name."""
    packages = defaultdict(list)
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if _LEFT_OUT.isdisjoint(parts):
                text = path.read_text(encoding="utf-8", errors="replace")
                if text.strip() and len(text) <= _LONGEST and _digits(text) <= _DIGITS:
                    packages[parts[0].removesuffix(".py")].append(text)
    return dict(packages)


def _digits(text: str) -> float:
    return sum(map(text.count, "0123456789")) / len(text)


def split(packages: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """
    Divides packages into `evaluation`, `calibration` and `train`.

    The largest packages, which together hold half of the text, are for training. The others are taken in the order of
    a hash of their names, so that machines with other packages agree about those they share.

    Returns:
        `dict`: Per part, the documents of each package, no document twice, shuffled by their own hashes.
    """
    sizes = {name: sum(map(len, texts)) for name, texts in packages.items()}
    total, large, held = sum(sizes.values()), set(), 0
    for name in sorted(sizes, key=sizes.get, reverse=True):
        if held >= total / 2:
            break
        large.add(name)
        held += sizes[name]
    waiting = sorted(sizes.keys() - large, key=_digest)
    parts, seen = {}, set()
    for part, share in SHARES.items():
        parts[part], taken = {}, 0
        while waiting and taken < share * total:
            name = waiting.pop(0)
            parts[part][name] = _new(packages[name], seen)
            taken += sizes[name]
    parts["train"] = {name: _new(packages[name], seen) for name in sorted(large | set(waiting))}
    empty = [part for part, documents in parts.items() if not any(documents.values())]
    if empty:
        raise SystemExit(f"no package is left for {', '.join(empty)}: give folders with more packages in --roots")
    return parts


def _new(texts: list[str], seen: set[str]) -> list[str]:
    documents = {digest: text for text in texts if (digest := _digest(text)) not in seen}
    seen.update(documents)
    return [documents[digest] for digest in sorted(documents)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()


def shuffled(part: dict[str, list[str]]) -> list[str]:
    """The documents of all packages of a part, mixed the same way on every machine."""
    return sorted((text for texts in part.values() for text in texts), key=_digest)


def train_tokenizer(documents: list[str], vocabulary: int, characters: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first so many characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(documents, characters), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerFast, characters: float = float("inf")):
    """Token ids of the first so many characters, `[tokens]`, int32; a document ends with `</s>`."""
    documents, pieces = list(_first(documents, characters)), []
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for first in range(0, len(documents), _BATCH):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents[first : first + _BATCH]):
            pieces += [np.array(encoding.ids, dtype=np.int32), end]
    return torch.from_numpy(np.concatenate(pieces))


def _first(documents: list[str], characters: float) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
