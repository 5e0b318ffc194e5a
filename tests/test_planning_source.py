"""Where a plan takes configuration and headers from."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError, RepositoryNotFoundError
from huggingface_hub.utils import SafetensorsRepoMetadata

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import read_header
from hf_mlopt.planning import read_source
from tests.command_line import save
from tests.families import make_family


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository `org/model` on a Hub that hands out `config.json` and headers, and counts what it is asked for."""
    repository = tmp_path / "repository"
    # In bfloat16 its biases come first in the files, not in the order of their names.
    make_family("glm4_moe", torch.bfloat16).save_pretrained(repository, max_shard_size="60KB")
    snapshot = tmp_path / "cache" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        target = snapshot / filename
        target.write_bytes((repository / filename).read_bytes())
        return str(target)

    def metadata(repo, *, revision=None):
        asked.append((repo, "headers", revision))
        files = {file.name: parse_local_safetensors_file_metadata(file) for file in repository.glob("*.safetensors")}
        weight_map = {name: file for file, found in files.items() for name in found.tensors}
        return SafetensorsRepoMetadata(metadata=None, sharded=True, weight_map=weight_map, files_metadata=files)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return repository, snapshot, asked


def test_of_a_model_on_the_hub_only_its_configuration_and_headers_are_fetched(hub):
    repository, snapshot, asked = hub
    source = read_source("org/model", "main")
    assert asked == [("org/model", "config.json", "main"), ("org/model", "headers", "0123abc")]
    local = read_source(str(repository))
    assert (source.config, source.layout) == (local.config, local.layout)
    assert [list(tensors) for tensors in source.layout.values()] == [list(t) for t in local.layout.values()]
    assert (source.revision, source.to_download) == ("0123abc", source.nbytes)
    assert source.download_to == snapshot.parent.parent
    assert [file.name for file in snapshot.iterdir()] == ["config.json"]


def test_what_is_in_the_cache_needs_no_download(hub):
    repository, snapshot, asked = hub
    first, *others = sorted(repository.glob("*.safetensors"))
    (snapshot / first.name).write_bytes(first.read_bytes())
    source = read_source("org/model")
    assert source.to_download == source.nbytes - sum(info.nbytes for info in source.layout[first.name].values())
    for file in (*others, repository / "model.safetensors.index.json"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    asked.clear()
    source = read_source("org/model")
    assert source.to_download == 0 and source.revision == "0123abc"
    assert asked == [("org/model", "config.json", None)]


@pytest.mark.parametrize(
    "function, error, message",
    [
        ("get_safetensors_metadata", NotASafetensorsRepoError("none"), "no safetensors files"),
        ("hf_hub_download", EntryNotFoundError("none"), "it has no config.json"),
    ],
)
def test_a_repository_without_what_a_plan_reads(hub, monkeypatch, function, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"huggingface_hub.{function}", fail)
    with pytest.raises(InputError, match=f"model='org/model': .*{message}"):
        read_source("org/model")


def test_a_name_that_is_nowhere(tmp_path, hub, monkeypatch):
    def fail(*_, **__):
        raise RepositoryNotFoundError("404", response=type("R", (), {"headers": {}, "request": None})())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(InputError, match="neither a directory here nor a model on the Hub"):
        read_source("org/model")
    with pytest.raises(InputError, match="no such directory"):
        read_source(str(tmp_path / "nothing"))


def test_a_directory_gives_its_headers_in_the_order_of_its_files(tmp_path, tiny_mixtral):
    directory = save(tiny_mixtral(), None, tmp_path)
    source = read_source(str(directory))
    assert source.config == json.loads((directory / "config.json").read_text())
    found, _ = read_header(Path(directory) / "model.safetensors")
    assert list(source.layout["model.safetensors"].items()) == [(name, info) for name, (info, _) in found.items()]
    assert source.nbytes == sum(info.nbytes for info, _ in found.values()) and source.revision is None


def test_weights_in_another_format_are_refused_by_name(tmp_path, tiny_mixtral):
    directory = save(tiny_mixtral(), None, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin"):
        read_source(str(directory))


def test_a_type_that_nobody_knows_is_named(hub, monkeypatch):
    monkeypatch.setattr("hf_mlopt.planning.source.DTYPE_BYTES", {"BF16": 2})
    with pytest.raises(InputError, match="holds tensors of type "):
        read_source("org/model")
