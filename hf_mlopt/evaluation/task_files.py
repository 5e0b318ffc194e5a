"""Rows of an evaluation task from a local .json or .jsonl file, each of them checked."""

import json
from collections.abc import Iterator
from pathlib import Path

from hf_mlopt.errors import InputError


SUFFIXES = (".json", ".jsonl")
# What a row holds; the first row decides for the whole file.
SCHEMAS = {
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "text": ("text",),
}


def read_rows(path: str | Path) -> tuple[str, list[dict]]:
    """
    Reads a task: rows of `{query, choices, gold}`, of `{context_options, continuation, gold}` or of `{text}`.

    Args:
        path (`str` or `Path`): A .jsonl file (an object a line) or a .json file (one list of objects), in UTF-8.

    Returns:
        `tuple[str, list[dict]]`: The name of the schema in `SCHEMAS`, and the rows with its fields alone.

    Raises:
        InputError: If the file cannot be read or is empty, or a row does not follow the schema. The message begins
            with the file and the line (the number of the row in a .json file).
    """
    path = Path(path)
    schema, rows = None, []
    for place, row in _parsed(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{place}: must be an object, not {row!r:.60}")
        schema = schema or next((name for name, fields in SCHEMAS.items() if set(fields) <= set(row)), None)
        if schema is None:
            forms = " or ".join("{" + ", ".join(fields) + "}" for fields in SCHEMAS.values())
            raise InputError(f"{path}:{place}: has the fields {sorted(row)}; a row is {forms}")
        problem = _problem(row, schema)
        if problem:
            raise InputError(f"{path}:{place}: {problem}")
        rows.append({field: row[field] for field in SCHEMAS[schema]})
    if not rows:
        raise InputError(f"{path}: the file has no rows")
    return schema, rows


def _parsed(path: Path) -> Iterator[tuple[str, object]]:
    """Pairs of a place in the file and what stands there."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a task file ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
    if path.suffix == ".jsonl":
        # Not `splitlines`: a string in JSON may hold the other line separators of Unicode.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield str(number), _json(line, path, number)
        return
    content = _json(text, path, 1) if text.strip() else []
    if not isinstance(content, list):
        raise InputError(f"{path}: a .json file holds one list of rows; for an object a line, name it .jsonl")
    yield from ((f"row {number}", row) for number, row in enumerate(content, start=1))


def _json(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: not JSON ({error.msg} in column {error.colno})") from None


def _problem(row: dict, schema: str) -> str | None:
    """What is wrong with a row, or None."""
    missing = [field for field in SCHEMAS[schema] if field not in row]
    if missing:
        return f"lacks {', '.join(map(repr, missing))}, which earlier rows have"
    for field in ("query", "continuation", "text"):
        if field in SCHEMAS[schema] and not _is_text(row[field]):
            return f"{field!r} must be text that is not empty, not {row[field]!r:.60}"
    if schema == "text":
        return None
    field = "choices" if schema == "choices" else "context_options"
    options, gold = row[field], row["gold"]
    if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
        return f"{field!r} must be a list of at least two texts, none of them empty, not {options!r:.60}"
    if type(gold) is not int or not 0 <= gold < len(options):
        return f"'gold' must be an index of {field!r}, 0 to {len(options) - 1}, not {gold!r:.60}"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
