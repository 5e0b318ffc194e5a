"""Real English text that every Python installation carries: the language reference behind `help()`."""

from hf_mlopt.errors import InputError


HELD_OUT = 0.1  # share of the characters in the test split
_SHORTEST = 200  # characters; a topic whose paragraphs all stand in earlier topics is no document


def embedded_corpus(split: str = "train") -> list[str]:
    """
    Documents of `pydoc_data.topics` in the order of their keys; the last ones, about 10 %, are the test split.

    Topics quote each other at length ("with" stands again in "compound"). A paragraph is kept where it occurs first,
    so that no paragraph of the test split was seen in training. The text changes a little between Python versions.

    Args:
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`.

    Returns:
        `list[str]`: The documents, about 330,000 characters for training and 40,000 for the test.

    Raises:
        InputError: If the split has another name.
    """
    from pydoc_data.topics import topics

    if split not in ("train", "test"):
        raise InputError(f"split={split!r}: the embedded corpus has the splits 'train' and 'test'")
    seen, documents = set(), []
    for key in sorted(topics):
        paragraphs = []
        for paragraph in topics[key].split("\n\n"):
            words = " ".join(paragraph.split())  # the same paragraph is indented differently elsewhere
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        document = "\n\n".join(paragraphs)
        if len(document) >= _SHORTEST:
            documents.append(document)
    wanted, first = HELD_OUT * sum(map(len, documents)), len(documents)
    while wanted > 0:
        first -= 1
        wanted -= len(documents[first])
    return documents[:first] if split == "train" else documents[first:]
