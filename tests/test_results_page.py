"""docs/results.md against benchmarks/results/*.json, and `make bench`, which writes short forms."""

import fcntl
import json
import re
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def page(tmp_path):
    """Writes files of results, and gives the page that is made of them."""
    from render_results import render

    def write(**files):
        for name, content in files.items():
            given = {"command": f"python benchmarks/{name}.py", "date": "2031-02-03", "environment": where("8 cores")}
            (tmp_path / f"{name}.json").write_text(json.dumps(given | content))
        return render(tmp_path)

    return write


def where(machine: str) -> dict:
    return {"python": "3.11", "torch": "2.9", "transformers": "5.17", "hf_mlopt": "0", "machine": machine}


def cost(name: str, ratio: float, claim: float | None) -> dict:
    return {"kind": "cost", "name": name, "ratio_median": ratio, "pairs": 3, "claim_at_most": claim}


def quality(method: str, pattern: str, seed: int, perplexity: float, **more) -> dict:
    row = {"kind": "quality", "scope": "experts", "method": method, "pattern": pattern, "seed": seed}
    return row | {"perplexity": perplexity, **more}


def test_the_page_is_that_of_the_files():
    from render_results import PAGE, render

    assert PAGE.read_text(encoding="utf-8") == render(), "run python benchmarks/render_results.py"


def test_every_file_and_plot_is_on_the_page():
    from render_results import render

    text = render()
    for path in RESULTS.glob("*.json"):
        assert f"](../benchmarks/results/{path.name})" in text
        if not path.stem.endswith("_short") and path.with_suffix(".png").is_file():
            assert f"](../benchmarks/results/{path.stem}.png)" in text
    for link in re.findall(r"\]\(\.\./(.*?)\)", text):
        assert (ROOT / link).is_file()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_another_value_is_another_page(path, tmp_path):
    """Of every file one number that is shown, of the first row of whichever kind holds it."""
    from render_results import render

    record = json.loads(path.read_text())
    (tmp_path / path.name).write_text(json.dumps(record))
    before = render(tmp_path)
    assert before.count("\n| ") > 2  # it has a table
    for row in {row["kind"]: row for row in reversed(record["rows"])}.values():
        for key in [key for key, value in row.items() if isinstance(value, float)]:
            changed = [one | {key: 3 * one[key] + 1} if one is row else one for one in record["rows"]]
            (tmp_path / path.name).write_text(json.dumps(record | {"rows": changed}))
            if render(tmp_path) != before:
                return
    pytest.fail("no number of this file is on the page")


def test_the_numbers_of_the_readme_are_those_of_the_files(tmp_path):
    from readme_numbers import with_numbers

    readme = (ROOT / "README.md").read_text()
    assert with_numbers(readme) == readme
    for name in ("pruning", "distillation", "communication", "federated_medical"):
        for path in RESULTS.glob("*.json"):
            (tmp_path / path.name).write_text(path.read_text())
        record = json.loads((RESULTS / f"{name}.json").read_text())
        for row in record["rows"]:
            for key in {"perplexity", "gap_closed", "step_seconds_median"} & row.keys():
                row[key] = 7.0
            if row["kind"] == "nuclei":
                row["dice"] = {model: {"mean": 0.5} for model in row["dice"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        assert with_numbers(readme, tmp_path) != readme, name


def test_keys_that_are_shown_are_keys_that_benchmarks_write():
    from result_specs import SPECS

    sources = "\n".join(path.read_text() for path in BENCHMARKS.glob("*.py"))
    for name, spec in SPECS.items():
        for table in spec.tables:
            values = (*table.by.values(), *table.columns.values(), table.across, table.split)
            keys = [value for value in values if isinstance(value, str)] if isinstance(table.rows, str) else []
            kinds = [table.rows] if isinstance(table.rows, str) else []
            for key in (*keys, *kinds, *spec.omit, *(spec.facts or {}).values()):
                first, _, rest = key.partition("_")
                # Computed: f"{kind}_speed_up", or f"{when}_{way}" with both words in quotes somewhere.
                parts = rf'f"\{{\w+\}}_{re.escape(rest)}"'
                both = f'"{first}"' in sources and f'"{rest}"' in sources
                is_written = re.search(rf'\b{re.escape(key)}=|"{re.escape(key)}"|{parts}', sources) or both
                assert is_written, (name, key)


def test_what_is_missed_is_told_as_plainly_as_what_is_met(page):
    text = page(pruning={"rows": [cost("slow", 2.5, 2.0), cost("quick", 1.5, 2.0), cost("free", 9.0, None)]})
    assert "| `pruning` | 1 | 1 |" in text
    assert "| `pruning` | Cost: slow | 2.5 | ≤ 2 |" in text
    assert "| slow | 2.5 | 3 | ≤ 2 | **missed** |" in text
    assert "| quick | 1.5 | 3 | ≤ 2 | met |" in text
    assert "| free | 9 | 3 |  |  |" in text


def test_a_target_from_below(page):
    rows = [{"kind": "late", "way": way, "ratio": 0.5} for way in ("pushed", "asked")]
    text = page(vertical={"rows": [*rows, {"kind": "late", "way": "pushed again"}]})
    assert "| `vertical` | 0 | 1 |" in text
    assert "| pushed | 0.5 | ≥ 0.9 | **missed** |" in text and "| asked | 0.5 |  |  |" in text


def test_command_machine_and_date_stand_by_the_numbers(page):
    text = page(pruning={"rows": [], "dense_perplexity": 12.345, "not_run": ["quality", "cost"]})
    assert (
        "`python benchmarks/pruning.py`: 8 cores (torch 2.9, transformers 5.17), 2031-02-03; [`pruning.json`]" in text
    )
    assert "perplexity of the dense model: 12.35" in text and "Not run: quality, cost" in text
    # What an earlier run has left is no longer missing, and parts may be of several machines.
    machines = {"quality": where("a GPU"), "cost": where("8 cores"), "more": where("8 cores")}
    text = page(pruning={"rows": [cost("a", 1.0, None)], "not_run": ["quality", "cost"], "machines": machines})
    assert "Not run: quality\n" in text
    assert "quality on a GPU (torch 2.9, transformers 5.17); cost, more on 8 cores (torch 2.9, " in text


def test_runs_of_one_line_are_their_mean_and_their_range(page):
    rows = [quality("wanda", "50%", 0, 10.0), quality("wanda", "50%", 1, 13.0), quality("wanda", "2:4", 0, 20.0)]
    text = page(pruning={"rows": [*rows, quality("a|b", "2:4", 0, 12345.6)]})
    assert "### Quality, experts: perplexity" in text
    assert "| method | 50% | 2:4 |" in text
    assert "| wanda | 11.5 (10–13) | 20 |" in text
    assert "| a\\|b |  | 12,346 |" in text


def test_the_machine_of_a_row_is_shown(page):
    rows = [quality("wanda", "50%", 0, 10.0, machine="another"), quality("ria", "50%", 0, 11.0)]
    text = page(pruning={"rows": rows}, new={"rows": [{"kind": "any", "x": 1, "machine": "another"}]})
    assert "| method | 50% | machine |" in text and "| x | machine |" in text
    assert "| wanda | 10 | another |" in text and "| ria | 11 | 8 cores |" in text
    assert "| 1 | another |" in text


def test_files_and_kinds_that_nothing_names_are_shown_as_they_are(page):
    new = [{"kind": "speed", "name": "x", "value": 0.25, "is_good": True, "curve": [1, 2]}] * 41
    text = page(new={"rows": new}, pruning={"rows": [{"kind": "other", "value": 7}]})
    assert "## new" in text and "### speed" in text and "| x | 0.25 | yes |" in text
    assert text.count("| x | 0.25 | yes |") == 40 and "and 1 more rows in the file" in text
    assert text.index("## Pruning") < text.index("### other") < text.index("## new")
    assert "| 7 |" in text


def test_a_short_form_never_stands_for_a_full_one(page, tmp_path):
    (tmp_path / "pruning.png").touch(), (tmp_path / "pruning_short.png").touch()
    full = {"rows": [cost("a", 1.5, 1.0)], "dense_perplexity": 5.0}
    short = {"rows": [cost("a", 7.5, 1.0), quality("wanda", "50%", 0, 10.0)], "environment": where("2 cores")}
    text = page(pruning=full, pruning_short=short)
    assert "| a | 1.5 | 3 | ≤ 1 | **missed** |" in text and "7.5" not in text
    assert "| `pruning` | 0 | 1 |" in text
    after = text[text.index("**Short form**, where the full form has no rows") :]
    assert (
        "2 cores" in after and "### Quality, experts: perplexity (short form)" in after and "| wanda | 10 |" in after
    )
    assert "results/pruning.png" in text and "results/pruning_short.png" not in text

    text = page(pruning=full, pruning_short={**short, "rows": short["rows"][:1]})
    assert "7.5" not in text and "(short form)" not in text and "[`pruning_short.json`]" in text

    (tmp_path / "pruning.json").unlink()
    text = page(pruning_short=short)
    assert "**Short form**, as there is no full form" in text and "| a | 7.5 | 3 | ≤ 1 | **missed** |" in text
    assert "## Targets" not in text and "results/pruning_short.png" in text


def test_every_benchmark_with_a_short_form_is_run():
    from short_forms import short_forms

    wanted = {
        "communication",
        "distillation",
        "federated",
        "optimizers",
        "pipeline",
        "pruning",
        "pruning_scale",
        "vertical",
    }
    assert wanted <= set(short_forms()) and "short_forms" not in short_forms()
    assert "benchmarks/short_forms.py" in (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]


def test_no_short_form_writes_over_a_full_one(monkeypatch, tmp_path):
    """Every program with --short is followed to the name of its file, which is all that is done of it."""
    import importlib
    import sys

    import common
    from short_forms import short_forms

    class Named(Exception):
        pass

    def stop(self, name, command):
        raise Named(name)

    monkeypatch.setattr(common.Results, "__init__", stop)
    for name in short_forms():
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "SHARED", tmp_path, raising=False)
        for heavy in ("load_reference", "Setting"):
            monkeypatch.setattr(module, heavy, lambda *args: (None,) * 4, raising=False)
        monkeypatch.setattr(sys, "argv", [name, "--short"])
        with pytest.raises(Named) as named:
            module.main()
        assert str(named.value) == f"{name}_short"


def test_a_check_on_a_cpu_never_writes_over_what_a_gpu_has_left(monkeypatch, tmp_path):
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "environment", lambda: where("2 CPU cores"))
    assert common.Results("new_gpu", "").path.name == "new_gpu.json"
    for machine, name in ("16 CPU cores", "any_gpu.json"), ("1 x NVIDIA H100, 16 CPU cores", "any_gpu_short.json"):
        (tmp_path / "any_gpu.json").write_text(json.dumps({"environment": where(machine), "rows": []}))
        assert common.Results("any_gpu", "").path.name == name
    monkeypatch.setattr(common, "environment", lambda: where("1 x NVIDIA H200, 16 CPU cores"))
    assert common.Results("any_gpu", "").path.name == "any_gpu.json"


def test_one_that_fails_or_hangs_does_not_keep_the_others(tmp_path, capfd, monkeypatch):
    from short_forms import run_all

    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    lock = tmp_path / "lock"
    child = f"import fcntl, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(600)"
    programs = {
        "fails": "raise SystemExit(3)",
        "hangs": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        "works": "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'])",
        "pruning": "import os; print('threads', os.environ['OMP_NUM_THREADS'])",
    }
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
    failed = run_all({name: tmp_path / f"{name}.py" for name in programs}, seconds=3)
    assert failed == {"fails": "exit status 3", "hangs": "not done after 3 s"}
    out = capfd.readouterr().out
    assert "['--short'] 1" in out and "=== works: done" in out and "threads 7" in out
    with lock.open() as file:
        for _ in range(100):  # the process that it started is gone as well, at once or very soon
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("a process was left")


def test_the_names_of_those_that_failed_are_told(monkeypatch, capsys):
    import short_forms

    monkeypatch.setattr(short_forms, "_run", lambda command, *_: "broken" if "pruning.py" in command[1] else None)
    assert short_forms.main(["pruning", "vertical"]) == 1
    assert capsys.readouterr().err == "failed: pruning, broken\n"
    assert short_forms.main(["vertical"]) == 0
    with pytest.raises(SystemExit):
        short_forms.main(["prunning"])
    assert "prunning: no such short form; known are communication, " in capsys.readouterr().err
