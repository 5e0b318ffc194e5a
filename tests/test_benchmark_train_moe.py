"""The GPU benchmark that trains a mixture of experts, prunes and distils it: from end to end on a CPU, killed once."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.command_line import python


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PROGRAM = """
import sys

for absent in ("datasets", "lm_eval", "evaluate", "psutil"):  # the machine with the GPU may not have them
    sys.modules[absent] = None
sys.path.insert(0, sys.argv[1])
import train_moe
stages, words = sys.argv[2].split(";"), sys.argv[3:]

def killed(training, file):
    whole(training, file)
    train_moe.Training.save = whole
    raise KeyboardInterrupt

whole, train_moe.Training.save = train_moe.Training.save, killed
for stage in stages:
    try:
        train_moe.main([*stage.split(), *words])
    except KeyboardInterrupt:
        print("killed")
"""
PACKAGES = ("concurrent", "ctypes", "dbm", "http", "importlib", "json", "logging", "urllib", "wsgiref")
TINY = (
    "--device cpu --hidden 32 --intermediate 32 --layers 2 --experts 4 --heads 2 --kv-heads 1 --vocabulary 320 "
    "--length 32 --batch-size 8 --micro-batch 4 --windows 24 --samples 16 --learning-rate 0.02 --save-seconds 0.2"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_moe")
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        shutil.copytree(library / name, folder / "packages" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(folder / "packages" / "json", folder / "packages" / "copied" / "json")
    (folder / "packages" / "table.py").write_text("table = [123, 4567]\n")
    stages = "train --minutes 0.015;train --minutes 0.015;train;quality --rows 8;quality --rows 1;plot"
    words = ["--folder", folder / "run", "--out", folder / "out", "--roots", folder / "packages", *TINY.split()]
    said = python(PROGRAM, BENCHMARKS, stages, *words, OMP_NUM_THREADS="1")
    return folder, said, json.loads((folder / "out" / "train_moe.json").read_text())


def rows(record, **wanted):
    return [row for row in record["rows"] if wanted.items() <= row.items()]


def test_training_goes_on_where_it_was_killed_and_learns(ran):
    folder, said, record = ran
    training = record["training"]
    assert said.index("killed") < said.index("going on at step") < said.index("is trained")
    assert 0.9 <= training["seconds"] < 10 and training["tokens"] == training["step"] * 8 * 32
    first, last = training["curve"][0], training["curve"][-1]
    assert [row["step"] for row in training["curve"]] == sorted({row["step"] for row in training["curve"]})
    assert first["ce"] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.2)
    assert last["ce"] < first["ce"] - 0.1
    assert 1.9 < last["aux"] < 4  # 2 experts of a token, evenly
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    assert record["parameters_active"] == record["parameters"] - 2 * (2 * 3 * 32 * 32)  # of 2 layers, 2 of 4 experts
    assert not (folder / "run" / "state.pt").exists()


def test_whole_packages_are_held_out_and_no_document_is_in_two_parts(ran, monkeypatch):
    folder, _, record = ran
    monkeypatch.syspath_prepend(BENCHMARKS)
    import python_sources

    packages = python_sources.read_packages([folder / "packages"])
    parts = python_sources.split(packages)
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted([*PACKAGES, "copied"])
    assert {part: sorted(parts[part]) for part in record["held_out"]} == record["held_out"]
    documents = [text for part in parts.values() for texts in part.values() for text in texts]
    assert len(documents) == len(set(documents)) == len({text for texts in packages.values() for text in texts})
    tokenizer = Tokenizer.from_file(str(folder / "run" / "model" / "tokenizer.json"))
    tokens = torch.load(folder / "run" / "text.pt")
    for part, texts in parts.items():
        text = "</s>".join(python_sources.shuffled({"": sum(texts.values(), [])})) + "</s>"
        assert tokenizer.decode(tokens[part].tolist(), skip_special_tokens=False) == text


def test_the_table_begins_with_what_is_most_wanted(ran):
    _, said, record = ran
    found = [(row["kind"], row["pattern"], row["method"]) for row in record["rows"]]
    methods = ["magnitude", "wanda", "moe-pruner"]
    assert found[:6] == [("pruned", pattern, method) for pattern in ("50%", "2:4") for method in methods]
    assert found[6:] == [("distilled", pattern, "moe-pruner") for pattern in ("50%", "2:4", "50%")]
    assert len({(row["rate"], row["pattern"]) for row in rows(record, kind="distilled")}) == 3
    assert "rows are left" in said and "nothing is left" not in said
    for row in record["rows"]:
        assert row["perplexity"] > 1 and row["scope"] == "experts" and row["row_seconds"] > 0
    for row in rows(record, kind="pruned"):
        assert row["sparsity"] == 0.5


def test_distillation_starts_from_the_pruned_row_and_keeps_its_zeros(ran):
    _, _, record = ran
    for row in rows(record, kind="distilled"):
        (pruned,) = rows(record, kind="pruned", pattern=row["pattern"], method="moe-pruner")
        assert row["pruned"] == pytest.approx(pruned["perplexity"])
        gap = row["pruned"] - record["dense_perplexity"]
        assert row["gap_closed"] == pytest.approx((row["pruned"] - row["perplexity"]) / gap)
        assert (row["mask_violations"], row["tokens"], row["steps_per_layer"]) == (0, 2 * 24 * 32, 6)


def test_no_row_is_asked_for_twice_and_all_are_valid(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import moe_quality

    from hf_mlopt.pruning import PruningConfig

    wanted = moe_quality.jobs()
    assert len({tuple(job.items()) for job in wanted}) == len(wanted)
    for job in wanted:
        PruningConfig(method=job["method"], scope=job["scope"], **moe_quality.PATTERNS[job["pattern"]])


def test_the_learning_rate_is_chosen_on_text_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import moe_quality

    found = [("50%", 5.0, 9.0), ("50%", 4.0, 10.0), ("2:4", 7.0, 8.0)]
    found = [
        {"kind": "distilled", "pattern": pattern, "tuning_perplexity": tuning, "perplexity": value}
        for pattern, tuning, value in found
    ]
    assert moe_quality.chosen_rates(found) == found[1:]


def test_the_plot_is_written(ran):
    folder, _, _ = ran
    for name in ("run", "out"):
        assert (folder / name / "train_moe.png").stat().st_size > 10_000


def test_bad_input_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common
    import train_moe

    with pytest.raises(SystemExit, match="needs no_such_package, not installed here"):
        common.require("json", "no_such_package")
    with pytest.raises(SystemExit, match="no trained model in .*train. with this --folder first"):
        train_moe.main(["quality", "--folder", str(tmp_path), "--device", "cpu"])
    (tmp_path / "train_moe.json").write_text(json.dumps({"rows": [], "sizes": {**train_moe.SIZES, "layers": 3}}))
    with pytest.raises(SystemExit, match="was begun with --layers 3: give that, or another --folder"):
        train_moe.main(["train", "--folder", str(tmp_path), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["train_moe.json"]
