"""Drives `hf-mlopt` in this process, and makes the checkpoints that it is given."""

import io
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from hf_mlopt.cli import main


@dataclass(frozen=True)
class Outcome:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


def hf_mlopt(*words) -> Outcome:
    """Runs one command as the entry point would."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("hf_mlopt")
    logger.handlers.clear()  # the handler of an earlier call writes to the stream of an earlier call
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:  # argparse
            status = end.code
    logger.handlers.clear()
    return Outcome(status, out.getvalue(), err.getvalue())


def succeed(*words) -> Outcome:
    """Runs one command that must succeed."""
    outcome = hf_mlopt(*words)
    assert outcome.status == 0, outcome.err
    return outcome


def refused(*words) -> str:
    """Runs one command that must be refused; what it printed to stderr."""
    outcome = hf_mlopt(*words)
    assert outcome.status == 2 and "Traceback" not in outcome.err, outcome.out + outcome.err
    return outcome.err


def save(model, tokenizer, directory: Path) -> Path:
    """Writes a checkpoint the way its author would."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def weights(directory: Path) -> dict:
    """All tensors of a checkpoint by the names in its files."""
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def python(program: str, *words, **environment) -> str:
    """Output of a program in a process of its own; fails with what it printed to stderr."""
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
