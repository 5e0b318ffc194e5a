"""Small tasks of every form, and files of them."""

import json
import random
from pathlib import Path


WORDS = "the quick brown fox jumps over the lazy dog".split()


def choices(count: int = 12, seed: int = 0) -> list[dict]:
    """Rows whose choices differ in length, so that `acc` and `acc_norm` differ."""
    draw = random.Random(seed)
    return [
        {
            "query": " ".join(draw.choices(WORDS, k=5)),
            "choices": [" ".join(draw.choices(WORDS, k=length)) for length in (1, 4, 2, 3)],
            "gold": draw.randrange(4),
        }
        for _ in range(count)
    ]


def contexts(count: int = 12, seed: int = 1) -> list[dict]:
    """Rows as of winogrande."""
    draw = random.Random(seed)
    return [
        {
            "context_options": [" ".join(draw.choices(WORDS, k=5)) for _ in range(2)],
            "continuation": " ".join(draw.choices(WORDS, k=3)),
            "gold": draw.randrange(2),
        }
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
