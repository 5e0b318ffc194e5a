"""What stops a streamed run, what is said then, and that nothing done before is lost."""

import errno
import fcntl
import json
import os
import shutil
import subprocess

import pytest
import torch
from command_line import hf_mlopt, succeed, weights
from families import make_family, token_ids
from safetensors.torch import load_file, save_file

from hf_mlopt.streaming.journal import _SAMPLE_BYTES, Journal


pytestmark = pytest.mark.e2e

HALF = ("--sparsity", "0.5")
LAYERS = 4


def write_ids(path, seed):
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_ids(seed=seed).tolist()))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def original(work):
    make_family("mixtral", num_hidden_layers=LAYERS).save_pretrained(work / "original", max_shard_size="60KB")
    return work / "original"


@pytest.fixture(scope="module")
def settings(work):
    return (
        "--stream", "--samples", 6, "--sequence-length", 24, "--min-tokens", 0, "--batch-size", 2,
        "--save-states-every", 2, "--calibration", write_ids(work / "ids.jsonl", 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(work, original, settings):
    succeed("prune", original, "--output", work / "expected", *HALF, *settings)
    return weights(work / "expected")


@pytest.fixture
def source(original, tmp_path):
    """A copy of the checkpoint that a test may spoil."""
    return shutil.copytree(original, tmp_path / "source")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "pruned"


@pytest.fixture
def words(source, output, settings):
    return ("prune", source, "--output", output, *HALF, *settings)


def unfinished(output):
    return output.with_name(".pruned.unfinished")


def refused(*words):
    """The one line a refused command says."""
    outcome = hf_mlopt(*words)
    assert outcome.status == 2, outcome.out + outcome.err
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in outcome.err and "written to" not in outcome.out, outcome.err
    return lines[0].removeprefix("hf-mlopt prune: error: ")


def mentions(line, *parts):
    missing = [part for part in parts if str(part) not in line]
    assert not missing, f"{missing} not in {line!r}"


def interrupt(words, monkeypatch, after=3):
    """Stops a run when it has recorded some layers."""
    record = Journal.record

    def interrupted(journal, index, *args):
        if index == after:
            raise KeyboardInterrupt
        record(journal, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", interrupted)
        assert hf_mlopt(*words).status == 130


def assert_resumes(words, output, expected, monkeypatch=None, layers=None):
    """The run goes on with what it has, and ends as one that was never stopped."""
    if layers is not None:
        loaded = []
        load = Journal.__init__
        with monkeypatch.context() as patch:
            patch.setattr(
                Journal,
                "__init__",
                lambda journal, *args, **kwargs: load(journal, *args, **kwargs) or loaded.append(len(journal.reports)),
            )
            succeed(*words, "--resume")
        assert loaded == [layers]
    else:
        succeed(*words, "--resume")
    found = weights(output)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert os.listdir(output.parent) == ["pruned"]


def content(directory):
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_ctrl_c_and_resume(words, output, expected, monkeypatch):
    interrupt(words, monkeypatch)
    assert not output.exists() and unfinished(output).is_dir()
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def test_an_unfinished_run_is_not_overwritten(words, output, expected, monkeypatch):
    interrupt(words, monkeypatch)
    before = content(unfinished(output))
    mentions(refused(*words), "unfinished run", unfinished(output), "--resume")
    assert content(unfinished(output)) == before
    assert_resumes(words, output, expected, monkeypatch, layers=2)


@pytest.mark.parametrize(
    "change, differs",
    [
        (("--sparsity", "0.6"), "recipe.sparsity was 0.5 and is 0.6"),
        (("--method", "wanda"), "recipe.method was 'moe-pruner' and is 'wanda'"),
        (("--scope", "all-linear"), "recipe.scope was 'experts' and is 'all-linear'"),
        (("--batch-size", "3"), "recipe.batch_size was 2 and is 3"),
        (("--seed", "1"), "calibration was"),
        (("--samples", "5"), "calibration was"),
    ],
)
def test_another_recipe(words, output, expected, monkeypatch, change, differs):
    interrupt(words, monkeypatch)
    before = content(unfinished(output))
    mentions(refused(*words, "--resume", *change), "another one", differs)
    assert content(unfinished(output)) == before
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def test_other_calibration_tokens(words, output, expected, monkeypatch, tmp_path):
    interrupt(words, monkeypatch)
    other = write_ids(tmp_path / "other.jsonl", seed=1)
    mentions(refused(*words, "--resume", "--calibration", other), "another one", "calibration was")
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def test_what_does_not_matter_may_change(words, output, expected, monkeypatch, tmp_path, settings):
    """Where the tokens and the checkpoint lie, and how often states are saved."""
    interrupt(words, monkeypatch)
    moved = (tmp_path / "source").rename(tmp_path / "moved")
    shutil.copy(settings[-1], tmp_path / "moved.jsonl")
    words = ("prune", moved, *words[2:-1], tmp_path / "moved.jsonl", "--save-states-every", 1)
    assert_resumes(words, output, expected, monkeypatch, layers=2)


@pytest.mark.parametrize("first", (True, False))
def test_states_that_are_to_live_elsewhere(words, output, expected, monkeypatch, tmp_path, first):
    """Those of before are not where they are looked for: the layers are done again, with the same result."""
    elsewhere = (*words, "--offload-states", tmp_path / "states")
    interrupt(elsewhere if first else words, monkeypatch)
    assert_resumes(words if first else elsewhere, output, expected, monkeypatch, layers=0)


def test_another_source_of_the_same_shape(words, source, output, expected, monkeypatch, tmp_path):
    interrupt(words, monkeypatch)
    shutil.copytree(source, tmp_path / "kept")
    make_family("mixtral", num_hidden_layers=LAYERS, seed=1).save_pretrained(source, max_shard_size="60KB")
    mentions(refused(*words, "--resume"), "another one", "source.model-00001-of-")
    shutil.rmtree(source)
    (tmp_path / "kept").rename(source)
    assert_resumes(words, output, expected, monkeypatch, layers=2)


@pytest.mark.parametrize("key, value", [("num_experts_per_tok", 1), ("rope_theta", 5.0), ("rms_norm_eps", 0.1)])
def test_another_configuration_of_the_source(words, source, output, expected, monkeypatch, key, value):
    """The weights are the same, what they compute is not."""
    interrupt(words, monkeypatch)
    before = (source / "config.json").read_text()
    config = json.loads(before)
    if key == "rope_theta":
        config["rope_parameters"] = config["rope_parameters"] | {key: value}
    else:
        assert key in config
        config[key] = value
    (source / "config.json").write_text(json.dumps(config))
    mentions(refused(*words, "--resume"), "another one", "config")
    (source / "config.json").write_text(before)
    assert_resumes(words, output, expected, monkeypatch, layers=2)


@pytest.mark.parametrize("place", ("hf_mlopt.workflows.stream.__version__", "transformers.__version__"))
def test_another_version(words, output, expected, monkeypatch, place):
    interrupt(words, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(place, "99.0")
        mentions(refused(*words, "--resume"), "another one", place.split(".")[0], "is '99.0'")
    assert_resumes(words, output, expected, monkeypatch, layers=2)


@pytest.mark.parametrize("resume", ((), ("--resume",)))
def test_two_processes_at_once(words, output, expected, monkeypatch, resume):
    interrupt(words, monkeypatch)
    before = content(unfinished(output))
    with open(unfinished(output) / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mentions(refused(*words, *resume), "another process is at work", unfinished(output))
    assert content(unfinished(output)) == before
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def test_an_output_that_holds_something(words, output, monkeypatch):
    interrupt(words, monkeypatch)
    output.mkdir()
    (output / "mine").touch()
    for resume in ((), ("--resume",)):
        mentions(refused(*words, *resume), "output=", "not empty")
    assert (output / "mine").exists() and (unfinished(output) / "manifest.json").exists()


def test_resuming_nothing_begins(words, output, expected):
    assert_resumes(words, output, expected)


def test_resuming_streams_whatever_fits(words, output, expected, monkeypatch):
    """`--stream` need not be repeated."""
    interrupt(words, monkeypatch)
    words = [word for word in words if word != "--stream"]
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def test_a_truncated_shard(words, source, output, expected, monkeypatch):
    interrupt(words, monkeypatch)
    shard = sorted(source.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    mentions(refused(*words, "--resume"), shard, "download it again")
    shard.write_bytes(whole)
    assert_resumes(words, output, expected, monkeypatch, layers=2)


def spoil(source, name):
    """Puts a NaN where the identity of a source does not look; a function that repairs it."""
    shard = next(file for file in source.glob("*.safetensors") if name in load_file(file))
    before = shard.read_bytes()
    tensors = load_file(shard)
    assert tensors[name].nbytes > _SAMPLE_BYTES
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    return lambda: shard.write_bytes(before)


@pytest.mark.parametrize("layer, layers", [(1, 0), (2, 2), (3, 2)])
def test_a_weight_that_is_not_finite(words, source, output, expected, monkeypatch, layer, layers):
    repair = spoil(source, f"model.layers.{layer}.block_sparse_moe.experts.2.w2.weight")
    mentions(refused(*words), f"model.layers.{layer}.mlp.experts.down_proj", "NaN or Inf")
    assert not output.exists()
    repair()
    assert_resumes(words, output, expected, monkeypatch, layers)


def test_a_head_that_is_not_finite_is_refused_before_any_layer(words, source, output, monkeypatch):
    spoil(source, "lm_head.weight")
    monkeypatch.setattr("hf_mlopt.pruning.sweep._sweep_layer", never)
    mentions(refused(*words), "lm_head.weight", "NaN or Inf")


def never(*_args):
    raise AssertionError("reached, though the input is refused")


def failing(code, name="", real=None, after=0):
    """A system call that fails for files whose path holds `name`, from the `after`-th on."""
    calls = []

    def call(descriptor, *args):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(1)
            if len(calls) > after:
                raise OSError(code, os.strerror(code))
        return real(descriptor, *args)

    return call


@pytest.mark.parametrize(
    "function, name, after, layers",
    [
        ("posix_fallocate", "checkpoint", 3, 0),
        ("posix_fallocate", "input-of-layer-00002", 0, 0),
        ("pwrite", "checkpoint", 40, None),
        ("fdatasync", "checkpoint", 20, None),
        ("fsync", "00001.json", 0, 0),
    ],
)
def test_a_full_disk(words, output, expected, monkeypatch, function, name, after, layers):
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(errno.ENOSPC, name, getattr(os, function), after))
        mentions(refused(*words), name, "no room on the disk", "--resume")
    assert not output.exists()
    assert_resumes(words, output, expected, monkeypatch, layers)


def test_a_disk_for_states_that_is_full(words, output, expected, monkeypatch, tmp_path):
    words = (*words, "--offload-states", tmp_path / "states")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC, "input-of-layer-00003", os.posix_fallocate))
        mentions(refused(*words), tmp_path / "states", "no room on the disk")
    assert_resumes(words, output, expected, monkeypatch, layers=2)
    assert not any((tmp_path / "states").iterdir())


@pytest.mark.slow
def test_a_disk_that_is_really_full(words, output, expected, monkeypatch, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        words = (*words, "--offload-states", disk / "states")
        mentions(refused(*words), disk, "no room on the disk")
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert_resumes(words, output, expected, monkeypatch, layers=0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_target_that_cannot_be_written(source, settings):
    mentions(
        refused("prune", source, "--output", "/proc/pruned", *HALF, *settings), "output=", "cannot write in /proc"
    )


def test_a_directory_for_states_that_cannot_be_made(words, output, expected, tmp_path):
    (tmp_path / "file").touch()
    mentions(refused(*words, "--offload-states", tmp_path / "file" / "states"), "file", "cannot be written")
    assert_resumes(words, output, expected)


@pytest.mark.parametrize("removed", (0, 3))
def test_a_finish_that_is_killed(words, source, output, settings, expected, monkeypatch, removed):
    """The checkpoint has its name; what stands beside it is in nobody's way, whatever the next run is."""
    unlink, count = os.unlink, []

    def failing(path, *args, **kwargs):
        count.append(path)
        if len(count) > removed:
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    replace = os.replace

    def armed(source, target):
        replace(source, target)
        if str(target) == str(output):
            monkeypatch.setattr(os, "unlink", failing)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", armed)
        assert hf_mlopt(*words).status == 130
        monkeypatch.setattr(os, "unlink", unlink)
    found = weights(output)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    mentions(refused(*words, "--resume"), "is complete")
    assert not unfinished(output).exists()
    output.rename(output.with_name("kept"))
    other = ("prune", source, "--output", output, "--sparsity", "0.75", *settings)
    succeed(*other)
    zeros = (weights(output)["model.layers.1.block_sparse_moe.experts.0.w1.weight"] == 0).double().mean()
    assert zeros == 0.75 and sorted(os.listdir(output.parent)) == ["kept", "pruned"]


@pytest.mark.parametrize(
    "change, parts",
    [
        (("--save-states-every", "0"), ("save_states_every=0", "at least 1")),
        (("--in-memory", "--resume"), ("resume=True", "--in-memory")),
        (("--no-stream", "--resume"), ("resume=True", "--in-memory")),
    ],
)
def test_options_that_do_not_fit_together(words, output, change, parts):
    mentions(refused(*words, *change), *parts)
    assert not output.parent.exists()


def test_weights_that_are_not_in_safetensors(source, output, settings):
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (source / "model.safetensors.index.json").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    line = refused("prune", source, "--output", output, *HALF, *settings)
    mentions(line, "pytorch_model.bin", "safetensors", "--in-memory")
    assert not output.parent.exists()


def test_an_expert_that_is_not_covered(words, output, expected, monkeypatch):
    """The run stops before a layer is done, and leaves nothing in the way of the corrected one."""
    uncovered = ("--min-tokens", "10000", "--on-uncovered", "error")
    mentions(refused(*words, *uncovered), "min_tokens")
    assert not output.exists() and not unfinished(output).exists()
    assert_resumes(words, output, expected)
