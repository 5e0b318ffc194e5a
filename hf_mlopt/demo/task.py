"""A multiple-choice task from the held-out part of the embedded text: in which order do the next words stand?"""

import json
import random
from pathlib import Path

from hf_mlopt.data import embedded_corpus


_QUERY, _CHOICE, _CHOICES = 30, 8, 4  # words, words, choices a question


def write_task(path: Path, questions: int, seed: int = 0) -> None:
    """
    Writes rows of `{query, choices, gold}`: a beginning of 30 words, its next 8, and these three times with two of
    them exchanged. As all choices are made of the same words, a model cannot go by length or by how common they are.

    Args:
        path (`Path`): A .jsonl file.
        questions (`int`): How many to write, at most; the text has about 100.
        seed (`int`, *optional*, defaults to 0): Seed of the questions and of the wrong orders.
    """
    words = " ".join(embedded_corpus("test")).split()
    pieces = [words[start : start + _QUERY + _CHOICE] for start in range(0, len(words), _QUERY + _CHOICE)]
    pieces = [piece for piece in pieces if len(piece) == _QUERY + _CHOICE and _is_prose(piece)]
    chance = random.Random(seed)
    lines = []
    for number in chance.sample(range(len(pieces)), min(questions, len(pieces))):
        following = pieces[number][_QUERY:]
        choices = [" ".join(following)]
        while len(choices) < _CHOICES:
            first, second = chance.sample(range(_CHOICE), 2)
            wrong = [*following]
            wrong[first], wrong[second] = wrong[second], wrong[first]
            choices += [" ".join(wrong)] if " ".join(wrong) not in choices else []
        order = chance.sample(range(_CHOICES), _CHOICES)
        row = {
            "query": " ".join(pieces[number][:_QUERY]),
            "choices": [choices[place] for place in order],
            "gold": order.index(0),
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _is_prose(words: list[str]) -> bool:
    """Whether it is neither code nor a table."""
    return sum(word[0].isalpha() for word in words) > 0.8 * len(words)
