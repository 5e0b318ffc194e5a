"""`hf-mlopt pack` and `hf-mlopt unpack` from one directory to the next."""

import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from command_line import hf_mlopt, save, succeed, weights
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_mlopt.hub.shards import ShardWriter, TensorInfo, index_json


pytestmark = pytest.mark.e2e

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@torch.no_grad()
def zero_half(model):
    """Zeroes half of every expert matrix, the first half of each row."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter[..., : parameter.shape[-1] // 2] = 0
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("pack")


def by_shard_writer(single, directory):
    """The same tensors in two files as our streamed pruning writes them, in an order that safetensors does not use."""
    shutil.copytree(single, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    layout = {
        f"model-0000{number}-of-00002.safetensors": {
            name: TensorInfo("BF16", tuple(tensors[name].shape)) for name in names[number - 1 :: 2]
        }
        for number in (1, 2)
    }
    with ShardWriter(directory, layout) as writer:
        for name, value in tensors.items():
            writer.write(name, value.view(torch.uint16).numpy())
    (directory / "model.safetensors.index.json").write_text(index_json(layout))
    return directory


@pytest.fixture(scope="module")
def sources(work, tiny_mixtral, tiny_tokenizer):
    """Pruned checkpoints by how they were written."""
    model = zero_half(tiny_mixtral().to(torch.bfloat16))
    found = {"single": save(model, tiny_tokenizer, work / "single")}
    (found["single"] / "LICENSE").write_text("do what you like\n")
    (found["single"] / "recipe.yaml").write_bytes(b"method: wanda\r\n")
    model.save_pretrained(work / "shards", max_shard_size="60KB")
    zero_half(tiny_mixtral()).save_pretrained(work / "float32")
    zero_half(tiny_mixtral().half()).save_pretrained(work / "float16")
    found |= {name: work / name for name in ("shards", "float32", "float16")}
    return found | {"our own": by_shard_writer(found["single"], work / "our own")}


@pytest.fixture(scope="module")
def packed(work, sources):
    outputs = {name: work / f"{name} packed" for name in sources}
    for name, source in sources.items():
        succeed("pack", source, "--output", outputs[name])
    return outputs


@pytest.fixture(params=["single", "shards", "float32", "float16", "our own"])
def kind(request):
    return request.param


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def weight_bytes(directory):
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def data_bytes(directory):
    return sum(value.nbytes for value in weights(directory).values())


def refused(*words, nothing_at=None):
    """Runs a command that must be refused with one line and write nothing."""
    outcome = hf_mlopt(*words)
    assert outcome.status == 2 and "written" not in outcome.out
    assert len(outcome.err.splitlines()) == 1, outcome.err
    if nothing_at is not None:
        assert not nothing_at.exists() and not list(nothing_at.parent.glob(".*incomplete*"))
    return outcome.err


def test_unpacking_gives_every_file_back_to_the_byte(sources, packed, kind, tmp_path):
    succeed("unpack", packed[kind], "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(sources[kind])
    assert os.listdir(tmp_path) == ["again"]


def test_every_weight_file_has_its_packed_one_and_all_else_is_copied(sources, packed, kind):
    before, after = contents(sources[kind]), contents(packed[kind])
    files = sorted(name for name in before if name.endswith(".safetensors"))
    assert (len(files) > 2) == (kind == "shards")
    names = [f"packed-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert set(after) == (set(before) - set(files)) | {*names, "packed.index.json"}
    assert all(after[name] == before[name] for name in before if name not in files)
    assert json.loads(after["packed.index.json"]) == {
        "format": 1,
        "files": dict(zip(names, files, strict=True)),
        "dense_bytes": weight_bytes(sources[kind]),
        "packed_bytes": weight_bytes(packed[kind]),
    }


def test_the_sizes_are_said_both_ways(sources, packed, tmp_path):
    outcome = succeed("pack", sources["single"], "--output", tmp_path / "packed")
    dense, small = weight_bytes(sources["single"]), weight_bytes(packed["single"])
    # 2 layers of 4 experts of 3 matrices: half of their 2 bytes a weight go, and a bit comes.
    weights_of_experts = 2 * 4 * 3 * 32 * 64
    assert data_bytes(packed["single"]) == data_bytes(sources["single"]) - weights_of_experts * (1 - 1 / 8)
    assert f"dense {dense:,} bytes, packed {small:,} bytes, ratio {small / dense:.3f}\n" in outcome.out
    assert "packed 24 of 41 tensors\n" in outcome.out
    outcome = succeed("unpack", tmp_path / "packed", "--output", tmp_path / "again")
    assert f"packed {small:,} bytes, dense {dense:,} bytes" in outcome.out and "unpacked 24 of 41" in outcome.out


def test_transformers_refuses_a_packed_directory(packed, kind):
    with pytest.raises(OSError, match="model(-00001-of-0000.)?.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed[kind])


@pytest.mark.parametrize(
    "words", [("pack",), ("masks", "export"), ("prune", "--sparsity", "0.5"), ("evaluate", "--perplexity", "embedded")]
)
@pytest.mark.parametrize("kind", ["single", "shards"])
def test_other_verbs_say_that_it_is_packed(packed, kind, words, tmp_path):
    output = tmp_path / "out.safetensors"
    line = refused(*words, packed[kind], "--output", output, nothing_at=output)
    assert f"model='{packed[kind]}': is packed; unpack it first" in line and "hf-mlopt unpack" in line


def spy_on_downloads(monkeypatch):
    """What every call of `snapshot_download` is told to leave out."""
    found, download = [], huggingface_hub.snapshot_download

    def spy(*args, **kwargs):
        found.append(kwargs["ignore_patterns"])
        return download(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    return found


def test_a_repository_of_the_hub_is_packed_and_unpacked(sources, packed, monkeypatch, tmp_path):
    for name, directory in (("dense", sources["shards"]), ("packed", packed["shards"])):
        repository = tmp_path / "cache" / f"models--someone--{name}"
        shutil.copytree(directory, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    patterns = spy_on_downloads(monkeypatch)
    succeed("pack", "someone/dense", "--output", tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(packed["shards"])
    succeed("unpack", "someone/packed", "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(sources["shards"])
    # Not the same weights a second time, neither for packing nor for unpacking.
    assert [{"*/*", "pytorch_model*", "consolidated*"} <= set(ignored) for ignored in patterns] == [False, True, True]
    (tmp_path / "cache/models--someone--dense/snapshots" / COMMIT / "model-00002-of-00003.safetensors").unlink()
    line = refused("pack", "someone/dense", "--output", tmp_path / "more", nothing_at=tmp_path / "more")
    assert "1 of 3 shards are missing, model-00002-of-00003.safetensors" in line


def test_a_cache_that_lacks_small_files_is_used_offline(sources, packed, monkeypatch, tmp_path):
    """As transformers fills it: config and weights, but perhaps no licence."""

    def incomplete(*_, **__):
        raise IncompleteSnapshotError("the LICENSE is missing", snapshot_path=str(sources["shards"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", incomplete)
    succeed("pack", "someone/dense", "--output", tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(packed["shards"])


def test_the_same_weights_in_another_format_are_left_out(sources, packed, tmp_path):
    shutil.copytree(sources["single"], tmp_path / "source")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (tmp_path / "source" / name).write_bytes(b"dense")
    (tmp_path / "source" / "original").mkdir()
    outcome = succeed("pack", tmp_path / "source", "--output", tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(packed["single"])
    left_out = "consolidated.safetensors, model.gguf, pytorch_model.bin"
    assert f"INFO: not copied, weights in another format: {left_out}\n" in outcome.err


def test_a_read_only_file_is_copied_as_one_that_can_be_written(sources, tmp_path):
    shutil.copytree(sources["single"], tmp_path / "source")
    (tmp_path / "source" / "LICENSE").chmod(0o400)
    succeed("pack", tmp_path / "source", "--output", tmp_path / "packed")
    assert (tmp_path / "packed" / "LICENSE").stat().st_mode & 0o200


# What is refused


def test_a_model_without_zeros_is_refused(tiny_mixtral, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "dense")
    line = refused("pack", tmp_path / "dense", "--output", tmp_path / "packed", nothing_at=tmp_path / "packed")
    assert f"model='{tmp_path / 'dense'}': no tensor has enough zeros to get smaller; prune it first" in line


def test_weights_that_are_not_in_safetensors_are_refused(sources, tmp_path):
    shutil.copytree(sources["single"], tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "pytorch_model.bin")
    line = refused("pack", tmp_path / "source", "--output", tmp_path / "packed", nothing_at=tmp_path / "packed")
    assert "has no safetensors file" in line


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_an_output_that_is_taken_is_refused(sources, packed, verb, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    source = sources["single"] if verb == "pack" else packed["single"]
    assert "the directory is not empty" in refused(verb, source, "--output", tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(sources, packed, verb, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    source = sources["single"] if verb == "pack" else packed["single"]
    line = refused(verb, source, "--output", tmp_path / "out", nothing_at=tmp_path / "out")
    assert "needs 0.00 GB, but the disk has 0.00 GB free" in line


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_disk_that_fills_up_leaves_nothing(sources, packed, verb, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, {"pack": "posix_fallocate", "unpack": "fsync"}[verb], full)
    source = sources["single"] if verb == "pack" else packed["single"]
    line = refused(verb, source, "--output", tmp_path / "out", nothing_at=tmp_path / "out")
    assert "model.safetensors" in line if verb == "unpack" else "packed-00001-of-00001.safetensors" in line
    assert "no room on the disk" in line


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_an_interruption_leaves_nothing(sources, packed, verb, monkeypatch, tmp_path):
    def interrupt(files, directory):
        assert list(directory.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_mlopt.workflows.pack.copy_files", interrupt)
    source = sources["single"] if verb == "pack" else packed["single"]
    assert hf_mlopt(verb, source, "--output", tmp_path / "out").status == 130
    assert os.listdir(tmp_path) == []


def remove(directory):
    (directory / "packed-00002-of-00002.safetensors").unlink()


def cut(directory):
    file = directory / "packed-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def replace(directory):
    save_file({"w": torch.zeros(1)}, directory / "packed-00002-of-00002.safetensors", metadata={"format": "pt"})


def point_outside(directory):
    index = directory / "packed.index.json"
    index.write_text(index.read_text().replace('"model-00002', '"../model-00002'))


def point_at_another_kind(directory):
    index = directory / "packed.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "config.json"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "1 of 2 files are missing, packed-00002-of-00002.safetensors"),
        (cut, r"packed-00002-of-00002.safetensors: has .* bytes, its header says .*; download it again"),
        (replace, "packed-00002-of-00002.safetensors: is no packed file of format 1"),
        (point_outside, "'../model-00002-of-00002.safetensors' is no name of a safetensors file"),
        (point_at_another_kind, "'config.json' is no name of a safetensors file"),
        (lambda directory: (directory / "packed.index.json").write_text("[]"), "packed.index.json: cannot be used"),
        (lambda directory: (directory / "packed.index.json").unlink(), "is not packed, it has no packed.index.json"),
    ],
)
def test_a_damaged_packed_directory_is_refused(packed, damage, message, tmp_path):
    shutil.copytree(packed["our own"], tmp_path / "packed")
    damage(tmp_path / "packed")
    line = refused("unpack", tmp_path / "packed", "--output", tmp_path / "out", nothing_at=tmp_path / "out")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "no such directory"),
        ("someone/unknown", "the Hub cannot be reached"),
        ("a b", "form of a Hub id"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message, tmp_path):
    line = refused("unpack", name, "--output", tmp_path / "out", nothing_at=tmp_path / "out")
    assert f"model='{name}'" in line and message in line
