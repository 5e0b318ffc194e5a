"""`hf-mlopt train` in two processes: started by it, by accelerate, and the same weights as in one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from command_line import hf_mlopt, succeed, weights
from processes import together

from hf_mlopt.data import load_images
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.launch import launch
from hf_mlopt.workflows.train_data import load_image_data
from hf_mlopt.workflows.train_recipe import TrainRecipe


pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

RECIPES = resource_dir("recipes")
WORDS = ("--task", "causal-lm", "--tokenizer", "words", "--sequence-length", 8, "--max-steps", 4, "--disable-tqdm")
WORDS += ("--model-config", '{"hidden_size": 8, "num_layers": 1, "dropout": 0.0}', "--learning-rate", "0.5")
SGD = ("--mlopt-optim", "sgd", "--mlopt-optim-args", '{"momentum": 0.9}')


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"{who} {what} the {where} ." for who in "abc" for what in "defgh" for where in ("sea", "hill", "town")]
    path.write_text("\n".join(lines * 8), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def in_one(text, tmp_path_factory):
    """The same steps in one process; its weights."""
    output = tmp_path_factory.mktemp("one") / "output"
    succeed("train", "--dataset", text, "--output-dir", output, *WORDS, *SGD, "--per-device-train-batch-size", 8)
    return weights(output)


def read(output):
    return json.loads((output / "train_results.json").read_text(encoding="utf-8"))


def forget_the_parent():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
        state._reset_state()


def test_two_processes_are_started_and_only_the_first_prints(text, in_one, tmp_path, capfd):
    words = ("--dataset", text, "--output-dir", tmp_path / "output", *WORDS, *SGD, "--per-device-train-batch-size", 4)
    outcome = hf_mlopt("train", *words, "--num-processes", 2)
    printed = capfd.readouterr()
    assert outcome.status == 0, printed.err
    assert read(tmp_path / "output")["world_size"] == 2
    assert printed.out.count("perplexity") == 1 and printed.out.count("written to") == 1
    assert printed.err.count("2 processes on cpu") == 1
    found = weights(tmp_path / "output")
    assert all(torch.allclose(found[name], in_one[name], atol=1e-6) for name in in_one)  # half the batch in each
    assert "num_processes: 2" in (tmp_path / "output" / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_accelerate_starts_two_processes_for_the_script(text, tmp_path):
    """Local steps, with the configuration for a CPU that the documentation names."""
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        RECIPES / "accelerate" / "cpu2.yaml",
    )
    words = ("--use-cpu", "--dataset", text, "--output-dir", tmp_path / "output", *WORDS)
    words += ("--mlopt-optim", "domo", "--local-steps", "2", "--num-processes", "2")
    command = [str(word) for word in (*launcher, RECIPES / "train.py", *words)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    results = read(tmp_path / "output")
    assert (results["world_size"], results["local_steps"], results["steps"]) == (2, 2, 4)
    assert result.stdout.count("perplexity") == 1


@pytest.fixture
def instead_of_python(tmp_path, monkeypatch):
    """A script that is started in place of the interpreter; it writes down how, then does what a test wants."""

    def make(action):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" "$@" > {tmp_path}/seen\n{action}\n')
        script.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(script))
        return tmp_path / "seen"

    return make


@pytest.mark.parametrize("threads, use_cpu, expected", [(None, True, "1"), ("4", True, "4"), (None, False, "")])
def test_how_processes_are_started_and_that_their_exit_status_comes_through(
    threads, use_cpu, expected, instead_of_python, monkeypatch
):
    seen = instead_of_python("exit 3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert launch(["train", "--plot=a b.png"], 2, use_cpu) == 3
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 -m hf_mlopt train --plot=a b.png"
    assert seen.read_text() == f"{expected} {words}\n"


def test_a_schedulers_end_goes_on_to_the_processes(instead_of_python):
    seen = instead_of_python("exec sleep 60")
    before = signal.getsignal(signal.SIGTERM)

    def end():
        while not seen.exists() or not seen.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    assert launch(["train"], 2, use_cpu=True) == -signal.SIGTERM
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_started_for_a_recipe_that_cannot_be_carried_out(text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlopt.workflows.launch.subprocess", None)
    words = ("--dataset", text, "--output-dir", tmp_path / "output", "--num-processes", 2, "--use-cpu")
    for more, message in (
        (("--model-config", '{"hidden": 1}'), "model_config.hidden=1: word_lm has no such field"),
        (("--eval-dataset", "missing.txt"), "no such file"),
        (("--output-dir", text.parent), "is not empty"),
    ):
        outcome = hf_mlopt("train", *words, *more)
        assert outcome.status == 2 and message in outcome.err


def _run_rank(rank, words):
    forget_the_parent()
    outcome = hf_mlopt("train", *WORDS, *SGD, "--ddp-backend", "gloo", "--use-cpu", *words)
    return outcome.status, outcome.err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--output-dir", "new", "--num-processes", 3), "num_processes=3: but the launcher has started 2"),
        (("--output-dir", "."), "is not empty"),
        (("--output-dir", "new", "--sequence-length", 2000), "less than one window of 2000"),
    ],
)
def test_what_is_refused_is_refused_by_every_process(words, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine")
    answers = together(lambda rank: _run_rank(rank, ("--dataset", text, *words)), group=False)
    assert [status for status, _ in answers] == [2, 2], answers
    assert all(message in err for _, err in answers)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def _silo(rank, similarity):
    forget_the_parent()
    overrides = {"task": "image-classification", "model_type": "convnext", "similarity": similarity, "use_cpu": True}
    recipe = TrainRecipe(output_dir="unused", ddp_backend="gloo", **overrides)
    data = load_image_data(recipe)
    rows = [[int(row["labels"]), *row["pixel_values"].flatten().tolist()] for row in data.train]
    return recipe.world_size, recipe.per_rank_data, rows, len(data.evaluation), data.record["images_of_each_process"]


@pytest.mark.parametrize("similarity, num_common", [(0.0, 1), (1.0, 10)])
def test_silos_have_images_of_their_own_and_one_test_set(similarity, num_common):
    answers = together(lambda rank: _silo(rank, similarity), group=False)
    assert [answer[0] for answer in answers] == [2, 2] and all(answer[1] for answer in answers)
    assert [answer[3] for answer in answers] == [397, 397] and answers[0][4] == [700, 700]
    digits = load_images("digits", "train")
    everything = [
        [int(label), *image.ravel().tolist()] for image, label in zip(digits.images, digits.labels, strict=True)
    ]
    shares = [rows for _, _, rows, _, _ in answers]
    assert sorted(shares[0] + shares[1]) == sorted(everything)
    labels = [{row[0] for row in share} for share in shares]
    assert len(labels[0] & labels[1]) == num_common
