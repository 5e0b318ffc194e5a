"""
Runs the short form of every benchmark that has one, one after the other, then makes docs/results.md.

    python benchmarks/short_forms.py                 # `make bench`: at most 40 minutes on 2 cores
    python benchmarks/short_forms.py pruning         # this alone, or several
    python benchmarks/short_forms.py --list

A short form writes benchmarks/results/NAME_short.json, never what a full run or a GPU has left. One that fails, or
takes longer than four minutes, does not keep the others from running; the names of all that did are told at the end,
with exit status 1.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
SECONDS_AT_MOST = 240
# One process each, which may use all cores. Others start several, and two OpenMP threads each run far slower than one.
ALL_CORES = ("pruning", "pruning_scale")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def short_forms(folder: Path = FOLDER) -> dict[str, Path]:
    """Name to program of every benchmark that takes --short."""
    option = re.compile(r"""add_argument\(\s*["']--short["']""")
    return {path.stem: path for path in sorted(folder.glob("*.py")) if option.search(path.read_text(encoding="utf-8"))}


def run_all(programs: dict[str, Path], seconds: float = SECONDS_AT_MOST) -> dict[str, str]:
    """
    Runs them.

    Args:
        programs (`dict[str, Path]`): Of [`short_forms`].
        seconds (`float`, *optional*, defaults to 240): How long each may take.

    Returns:
        `dict[str, str]`: Name to what went wrong, of those that failed.
    """
    failed = {}
    for name, path in programs.items():
        print(f"\n=== {name} --short", flush=True)
        started = time.perf_counter()
        problem = _run([sys.executable, str(path), "--short"], seconds, {} if name in ALL_CORES else ONE_THREAD)
        if problem:
            failed[name] = problem
        print(f"=== {name}: {problem or 'done'}, {time.perf_counter() - started:.0f} s", flush=True)
    return failed


def _run(command: list[str], seconds: float, environment: dict[str, str]) -> str | None:
    """What went wrong. A benchmark that takes too long is ended with all the processes that it has started."""
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        status = process.wait(seconds)
        return f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:g} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what a benchmark leaves would slow the next one down
        except ProcessLookupError:
            pass
        process.wait()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Benchmarks to run (default: all).")
    parser.add_argument("--list", action="store_true", help="Print the names, and run nothing.")
    args = parser.parse_args(words)
    known = short_forms()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such short form; known are {', '.join(known)}")
    if args.list:
        print("\n".join(known))
        return 0
    failed = run_all({name: known[name] for name in args.names or known})
    rendered = _run([sys.executable, str(FOLDER / "render_results.py")], SECONDS_AT_MOST, {})
    failed |= {"render_results": rendered} if rendered else {}
    for name, problem in failed.items():
        print(f"failed: {name}, {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
