"""
Makes docs/results.md, and the numbers of README.md, of benchmarks/results/*.json.

    python benchmarks/render_results.py

Every file has a section; `result_specs.py` says what of it is shown. A short form never stands in for a full one:
kinds of row that only the short form has are shown as such, and all else of it is named, no more.
"""

import json
from pathlib import Path

from readme_numbers import RESULTS, with_numbers
from result_specs import SPECS
from result_tables import Block, Spec, blocks, markdown, other_blocks, shown


README = Path(__file__).resolve().parent.parent / "README.md"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
SHORT = "_short"
INTRODUCTION = """\
# Results

    make bench                            # the short form of every benchmark, in at most 40 minutes on 2 cores
    python benchmarks/render_results.py   # this page, from benchmarks/results/*.json

Numbers are those of the files, and hold for the machine and the day that stand beside them. Where a line stands for
several runs (seeds, steps) a cell is their mean, with the lowest and the highest in parentheses; of a ratio taken in
pairs it is the median. What was aimed at stands in the column `target`, met or missed."""


def render(folder: Path = RESULTS) -> str:
    """
    The page.

    Args:
        folder (`Path`, *optional*): With the files of results and their plots.

    Returns:
        `str`: Markdown.
    """
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    names = dict.fromkeys(name.removesuffix(SHORT) for name in records)
    sections, verdicts = [], {}
    for name in sorted(names, key=lambda name: (list(SPECS).index(name) if name in SPECS else len(SPECS), name)):
        lines, found = _section(name, records, folder)
        sections.append("\n".join(lines))
        verdicts[name] = found
    return "\n\n".join([INTRODUCTION, *_targets(verdicts), *sections]) + "\n"


def _targets(verdicts: dict[str, list[tuple]]) -> list[str]:
    """How many targets were met, file by file, and every one that was missed."""
    counts = [
        {"file": f"`{name}`", "met": str(sum(row[3] for row in rows)), "missed": str(sum(not row[3] for row in rows))}
        for name, rows in verdicts.items()
        if rows
    ]
    missed = [
        {"file": f"`{name}`", "missed": what, "measured": measured, "target": limit}
        for name, rows in verdicts.items()
        for what, measured, limit, is_met in rows
        if not is_met
    ]
    tables = [markdown(rows) for rows in (counts, missed) if rows]
    return (
        ["## Targets\n\nThose of short forms are not counted.", *("\n".join(table) for table in tables)]
        if tables
        else []
    )


def _section(name: str, records: dict[str, dict], folder: Path) -> tuple[list[str], list[tuple]]:
    """Lines of a file and of its short form, and the verdicts on the targets of the full form."""
    spec = SPECS.get(name, Spec(name, ()))
    full, short = records.get(name), records.get(name + SHORT)
    lines, verdicts, kinds = [f"## {spec.title}"], [], set()
    if full:
        kinds = {row.get("kind") for row in full["rows"]}
        lines += _source(name, full, spec, folder)
        for block in _blocks(spec, full):
            lines += ["", f"### {block.title}", "", *block.lines]
            verdicts += block.verdicts
    if short:
        lines += [""] + _short_section(name + SHORT, short, spec, folder, kinds if full else None)
    return lines, verdicts


def _short_section(name: str, record: dict, spec: Spec, folder: Path, full: set | None) -> list[str]:
    """What only the short form has, or all of it where there is no full form (`full`: kinds of row of that)."""
    rows = [row for row in record["rows"] if row.get("kind") not in (full or ())]
    # Its summaries lie beside the rows, and belong to a full form as well.
    own = record | {"rows": rows} if full is None else {"rows": rows, "environment": record["environment"]}
    found = _blocks(spec, own)
    if not found:
        return [f"A short form, which checks that all of it runs, is in {_file(name)}: {_where(record)}."]
    lines = [f"**Short form**, {'where the full form has no rows' if full else 'as there is no full form'}: little of"]
    lines[0] += " everything, to see that it runs."
    lines += _source(name, record, spec, folder, plot=full is None)
    for block in found:
        lines += ["", f"### {block.title} (short form)", "", *block.lines]
    return lines


def _blocks(spec: Spec, record: dict) -> list[Block]:
    named = {table.rows for table in spec.tables} | set(spec.omit)
    others = [row for row in record["rows"] if row.get("kind") not in named]
    found = [block for table in spec.tables for block in blocks(table, record)]
    return found + other_blocks(others, record["environment"]["machine"])


def _source(name: str, record: dict, spec: Spec, folder: Path, plot: bool = True) -> list[str]:
    """Command, machine, date, facts, what was not run or is not shown, and the plot."""
    lines = ["", f"`{record['command']}`: {_where(record)}; {_file(name)}"]
    kinds = {row.get("kind") for row in record["rows"]}
    facts = {title: record[key] for title, key in (spec.facts or {}).items() if key in record}
    not_run = record.get("not_run") or []
    not_run = [not_run] if isinstance(not_run, str) else [part for part in not_run if part not in kinds]
    left = [kind for kind in spec.omit if kind in kinds]
    for title, text in (
        ("", ", ".join(f"{fact}: {shown(value)}" for fact, value in facts.items())),
        ("Not run: ", shown(not_run)),
        ("In the file alone, rows of: ", shown(left)),
    ):
        lines += ["", f"{title}{text}"] if text else []
    if plot and (folder / f"{name}.png").is_file():
        lines += ["", f"![{spec.title}](../benchmarks/results/{name}.png)"]
    return lines


def _where(record: dict) -> str:
    """Machines and versions in words, and the date; parts may have run on several machines."""
    own = record["environment"]
    by_machine: dict[str, list[str]] = {}
    for part, environment in record.get("machines", {}).items():
        by_machine.setdefault(_machine(environment), []).append(part)
    machines = _machine(own)
    if len(by_machine) > 1 or (by_machine and machines not in by_machine):
        machines = "; ".join(f"{', '.join(parts)} on {machine}" for machine, parts in by_machine.items())
    return f"{machines}, {record['date']}"


def _machine(environment: dict) -> str:
    return f"{environment['machine']} (torch {environment['torch']}, transformers {environment['transformers']})"


def _file(name: str) -> str:
    return f"[`{name}.json`](../benchmarks/results/{name}.json)"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    README.write_text(with_numbers(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE} and {README}")
