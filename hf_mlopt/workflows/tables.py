"""Rows of a result as the lines of a table."""


def text_table(rows: list[dict]) -> list[str]:
    """
    A line with the names of the columns, then one a row.

    Args:
        rows (`list[dict]`): Column to value; a column that a row lacks is shown as `-`.

    Returns:
        `list[str]`: The first column to the left, the others to the right; floats with four digits.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_shown(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
