"""Rows of results as tables of Markdown, with what was aimed at. What goes into which table: `result_specs.py`."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


# A key of a row, or a function of the row; None where the row has no such value.
Value = str | Callable[[dict], object]
ROWS_SHOWN = 40  # of a kind that no specification names


@dataclass(frozen=True)
class Target:
    """
    What was aimed at.

    Args:
        value (`Value`): What is compared; rows without it have no target.
        at_most (`float` or `Value`, *optional*): Limit from above, a number or of the row itself, which may have none.
        at_least (`float` or `Value`, *optional*): Limit from below.
    """

    value: Value
    at_most: float | Value | None = None
    at_least: float | Value | None = None

    def verdict(self, rows: list[dict]) -> tuple[str, str, bool] | None:
        """What was measured, the limit in words, and whether it is held; the mean, where several rows are one line."""
        measured = [value for row in rows if (value := get(row, self.value)) is not None]
        if not measured:
            return None
        mean = statistics.mean(measured)
        for sign, limit in ("≤", self.at_most), ("≥", self.at_least):
            limit = limit if isinstance(limit, (int, float)) else limit and get(rows[0], limit)
            if limit is not None:
                return shown(mean), f"{sign} {shown(limit)}", mean <= limit if sign == "≤" else mean >= limit
        return None


@dataclass(frozen=True)
class Table:
    """
    Args:
        title (`str`): Heading.
        rows (`str` or `Callable`): A kind of row, or a function that makes rows of the whole record.
        by (`dict[str, Value]`): Title to what tells lines apart: rows that agree in all of it share a line.
        columns (`dict[str, Value]`): Title to what is shown; several values are their mean (lowest to highest).
        across (`Value`, *optional*): One column for each of its values, of the only entry of `columns`.
        split (`str`, *optional*): One table for each value of this key.
        where (`Callable`, *optional*): Which rows are shown.
        targets (`tuple[Target]`, *optional*): What was aimed at; the first that applies to a line is its target.
        is_sorted (`bool`, *optional*): Lines by name, where rows come as runs happen to finish.
    """

    title: str
    rows: str | Callable[[dict], list[dict]]
    by: dict[str, Value]
    columns: dict[str, Value]
    across: Value | None = None
    split: str | None = None
    where: Callable[[dict], bool] = lambda row: True
    targets: tuple[Target, ...] = ()
    is_sorted: bool = False


@dataclass(frozen=True)
class Spec:
    """
    What is shown of one file.

    Args:
        title (`str`): Heading.
        tables (`tuple[Table]`): In their order.
        facts (`dict[str, str]`, *optional*): Title to a key of the record, shown above the tables.
        omit (`tuple[str]`, *optional*): Kinds of row that stay in the file. Kinds that nothing names are shown as they
            are.
    """

    title: str
    tables: tuple[Table, ...]
    facts: dict[str, str] | None = None
    omit: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A finished table: `lines` of Markdown, and of each line with a target `(what, measured, limit, is_met)`."""

    title: str
    lines: list[str]
    verdicts: list[tuple[str, str, str, bool]] = field(default_factory=list)


def blocks(table: Table, record: dict) -> list[Block]:
    """The table for a record, or one for each value that it is split by; none without rows."""
    rows = record["rows"] if isinstance(table.rows, str) else table.rows(record)
    rows = [row for row in rows if not isinstance(table.rows, str) or row.get("kind") == table.rows]
    rows = [row for row in rows if table.where(row)]
    parts: dict[str, list[dict]] = {}
    for row in rows:
        title = f"{table.title}, {shown(row.get(table.split))}" if table.split else table.title
        parts.setdefault(title, []).append(row)
    return [_block(title, table, part, record["environment"]["machine"]) for title, part in parts.items()]


def _block(title: str, table: Table, rows: list[dict], machine: str) -> Block:
    pools: dict[tuple, list[dict]] = {}
    for row in rows:
        pools.setdefault(tuple(shown(get(row, value)) for value in table.by.values()), []).append(row)

    def across_of(row: dict) -> str:
        return shown(get(row, table.across)) or "none"

    across = list(dict.fromkeys(map(across_of, rows))) if table.across else None
    lines, verdicts = [], []
    for names, pool in sorted(pools.items()) if table.is_sorted else pools.items():
        line = dict(zip(table.by, names, strict=True))
        if across:
            (value,) = table.columns.values()
            line |= {head: pooled([get(row, value) for row in pool if across_of(row) == head]) for head in across}
        else:
            line |= {head: pooled([get(row, value) for row in pool]) for head, value in table.columns.items()}
            line["runs"] = str(len(pool)) if any(len(other) > 1 for other in pools.values()) else ""
        verdict = next(filter(None, (target.verdict(pool) for target in table.targets)), None)
        if verdict:
            measured, limit, is_met = verdict
            line |= {"target": limit, "": "met" if is_met else "**missed**"}
            told = [
                name if head == "what" else f"{head} {name}"
                for head, name in zip(table.by, names, strict=True)
                if name
            ]
            verdicts.append((f"{title}: {', '.join(told)}", measured, limit, is_met))
        if any("machine" in row for row in rows):
            line["machine"] = pooled([row.get("machine", machine) for row in pool])
        lines.append(line)
    caption = f"{title}: {next(iter(table.columns))}" if across else title
    return Block(caption, markdown(lines), verdicts)


def other_blocks(rows: list[dict], machine: str) -> list[Block]:
    """Kinds of row that no table names, as they are: what is a number, a text or a truth value."""
    found = []
    for kind in dict.fromkeys(row.get("kind", "rows") for row in rows):
        of_kind = [row for row in rows if row.get("kind", "rows") == kind]
        names = dict.fromkeys(name for row in of_kind for name in row if name != "kind")
        scalars = [
            name
            for name in names
            if not any(isinstance(row.get(name), (dict, list)) for row in of_kind) and name != "machine"
        ]
        table = Table(kind, kind, {}, {})
        lines = [{name: shown(row.get(name)) for name in scalars} for row in of_kind[:ROWS_SHOWN]]
        if any("machine" in row for row in of_kind):
            for line, row in zip(lines, of_kind, strict=False):
                line["machine"] = shown(row.get("machine", machine))
        left = len(of_kind) - len(lines)
        found.append(Block(table.title, markdown(lines) + ([f"\nand {left} more rows in the file"] if left else [])))
    return found


def markdown(lines: list[dict[str, str]]) -> list[str]:
    """A table without the columns that are empty in every line."""
    heads = [
        head for head in dict.fromkeys(head for line in lines for head in line) if any(x.get(head) for x in lines)
    ]
    cells = [heads, ["---"] * len(heads), *([line.get(head, "") for head in heads] for line in lines)]
    return [f"| {' | '.join(row)} |" for row in cells]


def get(row: dict, value: Value) -> object:
    """The value, or None where the row lacks what it is made of."""
    try:
        return value(row) if callable(value) else row.get(value)
    except (KeyError, TypeError):
        return None


def pooled(values: list) -> str:
    """One value as it is, several numbers as mean (lowest to highest), other things one after the other."""
    values = [value for value in values if value is not None]
    texts = list(dict.fromkeys(map(shown, values)))
    if len(texts) > 1 and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return f"{shown(statistics.mean(values))} ({shown(min(values))}–{shown(max(values))})"
    return ", ".join(texts)


def shown(value: object) -> str:
    """As a cell of a table: four digits, no exponent where none is needed."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items())
    if not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int) or (abs(value) >= 1e4 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def spread(prefix: str, end: str = "_median") -> Callable[[dict], str | None]:
    """`median (lowest–highest)` of what a row holds in three keys."""

    def text(row: dict) -> str | None:
        middle, low, high = (row.get(prefix + suffix) for suffix in (end, "_min", "_max"))
        if middle is None or low == high:
            return None if middle is None else shown(middle)
        return f"{shown(middle)} ({shown(low)}–{shown(high)})"

    return text


def scaled(key: str, factor: float) -> Callable[[dict], float | None]:
    """In another unit."""
    return lambda row: None if row.get(key) is None else row[key] * factor


def last(key: str) -> Callable[[dict], object]:
    """The last entry of what a row holds by round or step; of `[mean, deviation]`, the mean."""

    def value(row: dict) -> object:
        entry = list(row[key].values())[-1] if row.get(key) else None
        return entry[0] if isinstance(entry, list) else entry

    return value


def with_deviation(*keys: str) -> Callable[[dict], object]:
    """Of `[mean, deviation]`, which may lie in a mapping of the row: `mean ± deviation`, or the mean of one run."""

    def value(row: dict) -> object:
        entry: object = row
        for key in keys:
            entry = entry[key]
        mean, deviation = entry
        return mean if deviation is None else f"{shown(mean)} ± {shown(deviation)}"

    return value


# Of times that were taken in pairs.
CLAIM = Target("ratio_median", at_most="claim_at_most")
RATIO = {"ratio": spread("ratio"), "pairs": "pairs"}
