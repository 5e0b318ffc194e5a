"""
Runs the commands of README.md, CONTRIBUTING.md and docs/*.md as a reader does who copies them, without a network.

    python docs/run_commands.py                        # every page
    python docs/run_commands.py --pages docs/train.md  # one page

A fence without a language holds commands, one a line; indented text does as well. Those of a page run one after the
other in a copy of this checkout, those of a block that begins by copying the recipes in an empty folder. Statements of
a Python fence run up to what refers to names of the reader. `tests/test_documented_commands.py` says when a command
is in no class.
"""

import argparse
import ast
import builtins
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SHOWN = ("text", "json", "yaml", "toml")  # languages of what is no command

# What readers have under these names, here made by `hf-mlopt demo --short`.
MODELS = {
    "demo_output": ".",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-demo",
    "mixtral-8x7b": "mixtral-demo",
    "mixtral-8x7b-50": "mixtral-8x7b-50",
    "dense": "mixtral-demo",
    "pruned": "mixtral-demo-50",
    "distilled": "mixtral-demo-50-distilled",
    "path/to/model": "mixtral-demo",
    "path/to/my-mixtral-fine-tune": "mixtral-demo",
}
TASKS = ("zeroshot/arc_easy.jsonl", "zeroshot/piqa.jsonl", "capitals.jsonl")

# (pattern, what stands in its place where there is no network and one machine)
STAND_INS = (
    (r"^pip install ", "python -m pip install --no-index --dry-run "),
    (r"--perplexity wikitext", "--perplexity embedded"),
    (r"--tasks (moe-pruner-suite|arc_easy,piqa)(?!.*--task-data)", r"--tasks \1 --task-data zeroshot"),
    (
        r"^(hf-mlopt (?:prune|plan) +\S+)(?=.* --(?:sparsity|drop-experts) )(?!.*--calibration )",
        r"\1 --calibration embedded",
    ),
    (r"^(hf-mlopt (?:distill|plan) +\S+)(?=.* --teacher )(?!.*--dataset )", r"\1 --dataset embedded --samples 64"),
    (r"^hf-mlopt push (?!.*--dry-run)", "hf-mlopt push --dry-run "),
    (r"--num_processes 8 -m hf_mlopt evaluate", "--num_processes 2 -m hf_mlopt evaluate --device cpu"),
    (r"^(openssl|echo)(.*)SERVER", r"\1\2localhost"),
    (r"sign ca request\.pem", "sign ca shop-keys/request.pem"),
)

RUNS, WITH_ALL = "", "--all: it installs and takes long"
# (pattern, what it needs that is not here); the first row that fits counts.
CLASSES = (
    (r"^make ", WITH_ALL),
    (r"openai-community/gpt2|recipes/optimizers/gpt2_small", "the Hub, and a GPU"),
    (r"Mixtral-8x22B|_fsdp2\.yaml", "the Hub, and GPUs"),
    (
        r"^(flower-superlink|until flower-supernode|flwr) |--superlink ",
        "machines: tests/test_workflow_federate_flower.py",
    ),
    (r"^hf-mlopt vertical party ", "two parties with data of their own: tests/test_vertical_processes.py"),
    (r'load_file\("packed-', "the name of a tensor: tests/test_hub_packed.py follows the page"),
    (rf"^hf-mlopt (prune|distill|plan|evaluate|push|pack|unpack|masks|speed) .*({'|'.join(MODELS)})", RUNS),
    (r"^hf-mlopt (train --config|federate|vertical simulate) recipes/\w+/\w+\.yaml ", RUNS),
    (r"^hf-mlopt (recipes copy|plan-pipeline --model-type|vertical pki|demo) ", RUNS),
    (r"^accelerate launch .*(recipes/train\.py|-m hf_mlopt) .*(recipes/\w+/\w+\.yaml|pruned/)", RUNS),
    (r"^torchrun .*-m hf_mlopt .*recipes/\w+/\w+\.yaml", RUNS),
    (r"^lm_eval .*pretrained=pruned/", RUNS),
    (r"^python (docs/dependencies|benchmarks/(scaling_tables|render_results)|hub_scripts/collect_results)\.py", RUNS),
    (r"^(openssl|ssh-keygen|echo|pip install) ", RUNS),
)


@dataclass(frozen=True)
class Command:
    """A line of a page, or a Python fence."""

    page: str
    line: int
    text: str
    is_python: bool = False
    outside: bool = False  # it begins in an empty folder, not in a checkout

    @property
    def to_run(self) -> str:
        """With stand-ins; of Python the statements that need nothing of the reader's."""
        if self.is_python:
            return statements_that_run(self.text)[0]
        text = self.text
        for pattern, replacement in STAND_INS:
            text = re.sub(pattern, replacement, text)
        return text

    @property
    def needs(self) -> str | None:
        """What is not here, `RUNS`, or `None` where no row of the table fits."""
        found = (needs for pattern, needs in CLASSES if re.search(pattern, self.text))
        return next(found, RUNS if self.is_python else None)


def fences(page: str) -> Iterator[tuple[int, str, str]]:
    """First line, language and text of every fence of a page; indented text is a fence without a language."""
    page_text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"^```(?P<language>\S*)\n(?P<text>[\s\S]*?)^```$|(?<=\n\n)(?P<indented>(?:    \S.*\n)+)"
    for match in re.finditer(pattern, page_text, re.MULTILINE):
        line = page_text.count("\n", 0, match.start()) + 1
        if match["indented"]:
            yield line, "", re.sub("^    ", "", match["indented"], flags=re.MULTILINE)
        else:
            yield line + 1, match["language"], match["text"]


def commands(page: str) -> list[Command]:
    """
    What a reader of a page would copy, in its order.

    Raises:
        ValueError: If a fence has a language that is neither Python nor in `SHOWN`.
    """
    found = []
    for line, language, text in fences(page):
        if language == "python":
            found.append(Command(page, line, text, is_python=True))
        elif not language:
            outside = text.startswith("hf-mlopt recipes copy all ")
            start = line
            for one in re.findall(r"(?:.*\\\n)*.*\n", text):  # a line that ends with \ goes on in the next
                if one.strip():
                    found.append(Command(page, start, one.strip(), outside=outside))
                start += one.count("\n")
        elif language not in SHOWN:
            raise ValueError(f"{page}:{line}: a fence of {language}; commands have none, others one of {SHOWN}")
    return found


def statements_that_run(code: str) -> tuple[str, list[str]]:
    """The statements of a snippet whose names are all known, and the names that it leaves to the reader."""
    known, lacking, kept = set(dir(builtins)), {}, []
    for statement in ast.parse(code).body:
        nodes = list(ast.walk(statement))
        if isinstance(statement, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        read = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        unknown = [name for name in read if name not in known]
        lacking |= dict.fromkeys(unknown)
        if unknown:
            known -= stored  # whatever comes of it is not there
        else:
            kept.append(ast.unparse(statement))
            known |= stored
    return "\n".join(kept), list(lacking)


def place_of(command: Command, folder: Path) -> Path:
    """Where a command is run, with the files it takes for given; made when absent."""
    place = folder / command.page.replace("/", "-") / ("outside" if command.outside else "checkout")
    if not place.exists():
        hidden = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "demo_output", "dist", "build")
        if command.outside:
            place.mkdir(parents=True)
        else:
            shutil.copytree(ROOT, place, ignore=hidden)
    for name, source in {**MODELS, "zeroshot": "zeroshot", "capitals.jsonl": "capitals.jsonl"}.items():
        given = re.search(rf"(?<!--output )(?<![\w/.-]){name}(?![\w.-])", command.to_run)
        if given and not (place / name).exists():
            copy = shutil.copytree if (demo(folder) / source).is_dir() else shutil.copy
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            copy(demo(folder) / source, place / name)
    return place


def demo(folder: Path) -> Path:
    """What `hf-mlopt demo --short` leaves, and tasks made of the row that docs/evaluate.md shows."""
    output = folder / "demo"
    if not output.exists():
        prune = "hf-mlopt prune demo/mixtral-demo --sparsity 0.5 --calibration embedded --output demo/mixtral-8x7b-50"
        for text in ("hf-mlopt demo --short --output demo", prune):  # cards know the name that a model was given
            with (folder / "log.txt").open("a") as log:
                if run(["bash", "-c", text], folder, log, timeout=600) != 0:
                    raise SystemExit(f"{text} failed: {log.name}")
        rows = next(text for _, language, text in fences("docs/evaluate.md") if language == "json")
        for task in TASKS:
            (output / task).parent.mkdir(exist_ok=True)
            (output / task).write_text(4 * f"{rows.splitlines()[0]}\n")
    return output


def run(words: list[str], place: Path, log, timeout: float) -> int | None:
    """Exit status of a command, whose output goes to `log`; `None` if it took longer. Nothing of it runs on."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place),  # nobody's caches and settings
        "HF_HUB_OFFLINE": "1",
    }
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, cwd=place, env=environment, start_new_session=True, **streams)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # launchers end what they started when they are asked to
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=20)


def try_out(command: Command, folder: Path, timeout: float, with_all: bool) -> tuple[str, str]:
    """`ok`, `failed` or `not run`, and why."""
    if command.needs is None:
        return "failed", "is in no class: add a row to CLASSES in docs/run_commands.py"
    if command.needs != RUNS and not (with_all and command.needs == WITH_ALL):
        return "not run", f"needs {command.needs}"
    place = place_of(command, folder)
    words = [sys.executable, "-c", command.to_run] if command.is_python else ["bash", "-c", command.to_run]
    with (folder / "log.txt").open("a+") as log:
        log.write(f"\n=== {command.page}:{command.line} in {place}\n{command.to_run}\n---\n")
        log.flush()
        begin = log.tell()
        status = run(words, place, log, timeout)
        log.seek(begin)
        last = [line for line in log.read().splitlines() if line.strip()][-3:]
    if status is None:
        return "failed", f"took longer than {timeout:g} s"
    if status:
        return "failed", "\n    ".join([f"exit status {status}", *last])
    if command.is_python:
        lacking = statements_that_run(command.text)[1]
        return "ok", f"up to what refers to {', '.join(lacking)}" if lacking else ""
    return "ok", "" if command.to_run == command.text else f"as {command.to_run}"


def main(argv: list[str] | None = None) -> int:
    """Runs the pages; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--pages", nargs="+", default=PAGES, metavar="PAGE", help="For instance docs/train.md.")
    parser.add_argument("--timeout", type=float, default=600, help="Seconds that a command may take (default: 600).")
    parser.add_argument("--all", action="store_true", help="Also `make`, which installs.")
    parser.add_argument("--folder", type=Path, help="For the log and what commands write (default: a new one).")
    args = parser.parse_args(argv)
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="documented-commands-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for page in args.pages:
        shutil.rmtree(folder / page.replace("/", "-"), ignore_errors=True)  # of an earlier run
        for command in commands(page):
            start = time.monotonic()
            outcome, why = try_out(command, folder, args.timeout, args.all)
            failures += outcome == "failed"
            first = command.text.partition("\n")[0]
            note = f"\n    {why}" if why else ""
            seconds = time.monotonic() - start
            print(f"{outcome:7} {seconds:5.0f} s  {page}:{command.line}  {first}{note}", flush=True)
    print(f"{failures} failed; log and outputs are in {folder}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
