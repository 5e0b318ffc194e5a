"""
`hf-mlopt prune --stream` killed with SIGKILL at any moment, and gone on with by `--resume`: the same bytes each time.

A process dies at the n-th of the calls by which it reads and writes, before, in the middle of or after it. Most are
forks of this one, which has everything imported; some are started anew.
"""

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from command_line import hf_mlopt, succeed
from families import make_family, token_ids


pytestmark = pytest.mark.e2e

CALLS = (
    "fdatasync", "fsync", "ftruncate", "mkdir", "open", "posix_fallocate", "preadv", "pwrite", "rename", "replace",
    "rmdir", "unlink",
)  # fmt: skip
HALF = ("--sparsity", "0.5")
RUNS = {
    "states after every layer": (*HALF, "--save-states-every", "1"),
    "states after two layers": (*HALF, "--save-states-every", "2", "--scope", "all-linear"),
    "no states": (*HALF, "--propagate", "dense"),  # fewer layers than the default of --save-states-every
    "states on disk": (*HALF, "--offload-states", "STATES"),
    "magnitude": (*HALF, "--method", "magnitude"),
    "fewer experts": (*HALF, "--drop-experts", "0.25", "--allocation", "owl", "--save-states-every", "1"),
}
PROGRAM = """
import json, sys
sys.path[:0] = [sys.argv[1]]
from test_workflow_stream_kill import prune_and_die
prune_and_die(json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def prune_and_die(words, at, where):
    """Runs a command and dies at the `at`-th call; returns status and number of calls of one that did not."""
    count = 0

    def deadly(name, call):
        def counting(*args, **kwargs):
            nonlocal count
            count += 1
            if count != at:
                return call(*args, **kwargs)
            if where == "half" and name == "pwrite":
                call(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
            elif where == "after":
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return counting

    for name in CALLS:
        setattr(os, name, deadly(name, getattr(os, name)))
    outcome = hf_mlopt(*words)
    return outcome.status, count, outcome.err


def in_a_fork(words, at=0, where="before"):
    """Status of the command, or None if it was killed; number of calls; what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = prune_and_die(words, at, where)
        except BaseException:
            answer = 1, 0, traceback.format_exc()
        os.write(writing, json.dumps(answer).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None, 0, ""
    return json.loads(answer)


def in_a_new_process(words, at, where):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), json.dumps([str(word) for word in words]),
         str(at), where],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def command(work):
    """The words of a run, up to its output."""
    make_family("mixtral", num_hidden_layers=3).save_pretrained(work / "source", max_shard_size="40KB")
    (work / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids().tolist()))
    common = (
        "prune", work / "source", "--stream", "--calibration", work / "ids.jsonl", "--samples", 6,
        "--sequence-length", 24, "--min-tokens", 0, "--batch-size", 2, "--output",
    )  # fmt: skip

    def command(name, output):
        words = (str(output.parent / "states") if word == "STATES" else word for word in RUNS[name])
        return [*map(str, common), str(output), *words]

    return command


@pytest.fixture(scope="module")
def whole(work, command):
    """For every run: what it writes if nobody stops it, and the number of its calls."""
    found = {}

    def whole(name):
        if name not in found:
            output = work / name / "whole"
            status, count, said = in_a_fork(command(name, output))
            assert status == 0, said
            found[name] = files(output), count
        return found[name]

    return whole


def files(directory):
    """The bytes of all files; in reports the times are left out, and the memory, and the card that shows them."""
    found = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "README.md"}
    report = json.loads(found["pruning_report.json"])
    for layer in (report, *report["layers"]):
        layer.pop("seconds")
    report.pop("peak_memory_bytes")
    return found | {"pruning_report.json": report}


def assert_nothing_is_left(output):
    assert not [path.name for path in output.parent.iterdir() if path.name.startswith(".pruned")]
    states = output.parent / "states"
    assert not states.exists() or not any(states.iterdir())


def finish(words, output, expected, seed=None):
    """Goes on with a killed run, killed again now and then, until it is done."""
    rng = random.Random(seed)
    for _ in range(2 if seed is not None else 0):
        if output.exists():
            break
        in_a_fork([*words, "--resume"], rng.randrange(1, 300), rng.choice(("before", "half", "after")))
    if output.exists():  # it was complete, and only what stands beside it was still to be removed
        assert files(output) == expected
        assert hf_mlopt(*words, "--resume").status == 2
        output.rename(output.with_name("moved"))
    succeed(*words, "--resume")
    assert files(output) == expected
    assert_nothing_is_left(output)


def points(name, count, number):
    """Moments spread over a run, at random within equal parts of it."""
    rng = random.Random(name)
    bounds = [1 + count * part // number for part in range(number + 1)]
    return [
        (rng.randrange(low, max(low + 1, high)), rng.choice(("before", "half", "after")))
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]


def kill_everywhere(tmp_path, command, whole, name, number):
    expected, count = whole(name)
    assert count > 50
    killed = 0
    for at, where in points(name, count, number):
        output = tmp_path / f"{at}" / "pruned"
        words = command(name, output)
        status, _, said = in_a_fork(words, at, where)
        assert status in (None, 0), said  # threads do not always read as much
        killed += status is None
        if status is None:
            finish(words, output, expected, seed=at)
    assert killed >= number * 2 // 3


@pytest.mark.parametrize("name", RUNS)
def test_killed_anywhere(tmp_path, command, whole, name):
    kill_everywhere(tmp_path, command, whole, name, 3)


@pytest.mark.parametrize("name", ("states after every layer", "magnitude"))
def test_killed_in_a_process_of_its_own(tmp_path, command, whole, name):
    expected, count = whole(name)
    output = tmp_path / "pruned"
    words = command(name, output)
    assert in_a_new_process(words, count * 2 // 3, "before") == -signal.SIGKILL
    assert not output.exists() and (tmp_path / ".pruned.unfinished").is_dir()
    finish(words, output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_in_processes_of_their_own(tmp_path, command, whole, name):
    expected, count = whole(name)
    for at, where in points(f"slow {name}", count, 5):
        output = tmp_path / f"{at}" / "pruned"
        words = command(name, output)
        if in_a_new_process(words, at, where) != 0:
            finish(words, output, expected, seed=at)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_many_moments(tmp_path, command, whole, name):
    kill_everywhere(tmp_path, command, whole, name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("where", ("before", "half", "after"))
def test_killed_at_every_moment_of_the_end(tmp_path, command, whole, where):
    """From the last layer on, call by call."""
    name = "states after every layer"
    expected, count = whole(name)
    for at in range(count - 60, count + 1):
        output = tmp_path / f"{at}" / "pruned"
        words = command(name, output)
        if in_a_fork(words, at, where)[0] is None:
            finish(words, output, expected)
