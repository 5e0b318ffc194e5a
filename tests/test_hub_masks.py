"""Masks of a pruned checkpoint, applied to another fine-tune of the same base."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from command_line import hf_mlopt, save, succeed, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_mlopt import __version__
from hf_mlopt.errors import InputError
from hf_mlopt.hub.masks import masked, pruned_tensors, read_masks, write_masks
from hf_mlopt.hub.packed import _PIECE
from hf_mlopt.hub.shards import ShardReader


RECORD = {"weights": 1, "zeros": 1}
BLOCK = {"method": "wanda", "sparsity": 0.5, "version": "0.1.0"}
NUM_EXPERT_WEIGHTS = 2 * 4 * 3 * 32 * 64  # layers, experts, matrices


def with_zeros(*shape, fraction, dtype=torch.float32, zero=0.0):
    """Ones, but for zeros at the start of the tensor."""
    value = torch.ones(shape, dtype=dtype)
    value.view(-1)[: round(fraction * value.numel())] = zero
    return value


# The file


def test_matrices_with_enough_zeros_are_the_pruned_ones(tmp_path):
    tensors = {
        "half": with_zeros(10, 10, fraction=0.5),
        "bf16": with_zeros(4, 5, 5, fraction=0.3, dtype=torch.bfloat16),
        "fp16": with_zeros(10, 10, fraction=0.2, dtype=torch.float16),
        "negative": with_zeros(10, 10, fraction=0.4, zero=-0.0),  # what multiplying with a mask leaves
        "just": with_zeros(10, 10, fraction=0.1),
        "few": with_zeros(10, 10, fraction=0.09),
        "vector": with_zeros(100, fraction=0.5),
        "empty": torch.ones(0, 10),
        "int": torch.zeros(10, 10, dtype=torch.int32),
        "fp8": torch.zeros(10, 10).to(torch.float8_e4m3fn),
        "tiny": torch.full((10, 10), 1e-45),  # subnormal: not zero
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with ShardReader([tmp_path / "a.safetensors"]) as reader:
        found = pruned_tensors(reader, 0.1)
        assert found == {"half": 50, "bf16": 30, "fp16": 20, "negative": 40, "just": 10}
        assert set(pruned_tensors(reader, 0.35)) == {"half", "negative"}


def test_the_bits_are_those_of_the_documentation(tmp_path):
    value = torch.tensor([[0.0, 1.0, -0.0], [2.0, torch.nan, 0.0], [0.0, 0.0, 3.0]])
    save_file({"w": value, "v": torch.ones(3)}, tmp_path / "a.safetensors")
    with ShardReader([tmp_path / "a.safetensors"]) as reader:
        write_masks(reader, {"w": reader.tensors["w"]}, RECORD, tmp_path / "masks.safetensors")
    held = load_file(tmp_path / "masks.safetensors")
    assert list(held) == ["w.bitmask"] and held["w.bitmask"].tolist() == [0b00011010, 0b1]
    assert read_masks(tmp_path / "masks.safetensors") == ({"w": (3, 3)}, RECORD)


def test_masks_of_several_pieces(tmp_path):
    """A mask goes by its weight, whatever the piece; other bits, NaN's included, stay."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(3, _PIECE - 5, generator=generator) < 0.5
    bits = torch.randint(1, 2**15, kept.shape, generator=generator, dtype=torch.int16)
    save_file({"w": (bits * kept).view(torch.bfloat16)}, tmp_path / "pruned.safetensors")
    save_file({"w": bits.view(torch.bfloat16), "v": bits.view(-1)[:9].clone()}, tmp_path / "other.safetensors")
    with ShardReader([tmp_path / "pruned.safetensors"]) as reader:
        write_masks(reader, reader.tensors, RECORD, tmp_path / "masks.safetensors")
    with (
        ShardReader([tmp_path / "other.safetensors"]) as reader,
        ShardReader([tmp_path / "masks.safetensors"]) as masks,
    ):
        found = {name: b"".join(piece.tobytes() for piece in masked(reader, name, masks)) for name in ("w", "v")}
    assert found["w"] == (bits * kept).numpy().tobytes()
    assert found["v"] == bits.view(-1)[:9].numpy().tobytes()


# The commands


def prune_experts(model):
    """Zeroes half of the experts' weights at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < 0.5, 0)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_mixtral, tiny_tokenizer):
    """The model `dense`, what was `pruned` of it, and another fine-tune as single file, in shards and in float16."""
    folder = tmp_path_factory.mktemp("masks")
    save(tiny_mixtral().bfloat16(), tiny_tokenizer, folder / "dense")
    pruned = prune_experts(tiny_mixtral().bfloat16())
    pruned.config.hf_mlopt = BLOCK
    save(pruned, tiny_tokenizer, folder / "pruned")
    save(tiny_mixtral(seed=7).bfloat16(), tiny_tokenizer, folder / "tuned")
    (folder / "tuned" / "LICENSE").write_text("do what you like\n")
    config = read_json(folder / "tuned" / "config.json")
    (folder / "tuned" / "config.json").write_text(json.dumps({"note": "ü", **dict(reversed(config.items()))}))
    tiny_mixtral(seed=7).bfloat16().save_pretrained(folder / "shards", max_shard_size="60KB")
    tiny_mixtral(seed=7).half().save_pretrained(folder / "half")
    succeed("masks", "export", folder / "pruned", "--output", folder / "masks.safetensors")
    return folder


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def bits(tensor):
    return tensor.view(torch.int16)


def refused(*words):
    outcome = hf_mlopt("masks", *words)
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1 and "written" not in outcome.out
    return outcome.err


@pytest.mark.e2e
def test_the_export_holds_a_bit_for_every_weight_of_the_experts(work, tmp_path):
    outcome = succeed("masks", "export", work / "pruned", "--output", tmp_path / "new" / "masks.safetensors")
    assert (tmp_path / "new" / "masks.safetensors").read_bytes() == (work / "masks.safetensors").read_bytes()
    assert os.listdir(tmp_path / "new") == ["masks.safetensors"]
    experts = {name: value for name, value in weights(work / "pruned").items() if ".experts." in name}
    held = load_file(work / "masks.safetensors")
    assert set(held) == {f"{name}.bitmask" for name in experts}
    assert sum(value.numel() for value in held.values()) == NUM_EXPERT_WEIGHTS / 8
    with safe_open(work / "masks.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    zeros = sum(int((value == 0).sum()) for value in experts.values())
    assert json.loads(metadata["shapes"]) == {name: list(value.shape) for name, value in experts.items()}
    assert json.loads(metadata["source"]) == {
        "model": "pruned",
        "revision": None,
        "hf_mlopt": BLOCK,
        "weights": NUM_EXPERT_WEIGHTS,
        "zeros": zeros,
    }
    share = 100 * zeros / NUM_EXPERT_WEIGHTS
    assert f"masks of 24 tensors leave out {share:.1f} % of their 49,152 weights\n" in outcome.out


@pytest.mark.e2e
def test_masks_of_a_model_give_its_pruned_weights(work, tmp_path):
    succeed("masks", "apply", work / "masks.safetensors", work / "dense", "--output", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (work / "pruned/model.safetensors").read_bytes()


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["tuned", "shards", "half"])
def test_another_fine_tune_keeps_its_own_values_elsewhere(work, kind, tmp_path):
    outcome = succeed("masks", "apply", work / "masks.safetensors", work / kind, "--output", tmp_path / "out")
    before, after, pruned = weights(work / kind), weights(tmp_path / "out"), weights(work / "pruned")
    assert list(after) == list(before)
    for name, value in after.items():
        is_zero = pruned[name] == 0 if ".experts." in name else torch.zeros_like(value, dtype=torch.bool)
        assert (bits(value)[is_zero] == 0).all(), name
        assert torch.equal(bits(value)[~is_zero], bits(before[name])[~is_zero]), name
    assert "of their 49,152 weights" in outcome.out


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["tuned", "shards"])
def test_the_result_is_an_ordinary_checkpoint_that_says_what_it_is(work, kind, tmp_path):
    succeed("masks", "apply", work / "masks.safetensors", work / kind, "--output", tmp_path / "out")
    before, after = ({path.name: path for path in folder.iterdir()} for folder in (work / kind, tmp_path / "out"))
    assert set(after) == set(before)
    for name in set(before) - {"config.json"}:
        if name.endswith(".safetensors"):
            assert after[name].stat().st_size == before[name].stat().st_size
        else:
            assert after[name].read_bytes() == before[name].read_bytes(), name
    config = read_json(after["config.json"])
    block = config.pop("hf_mlopt")
    assert config == read_json(before["config.json"]) and list(config) == list(read_json(before["config.json"]))
    with safe_open(work / "masks.safetensors", framework="pt") as opened:
        source = json.loads(opened.metadata()["source"])
    assert block == {
        "method": "mask",
        "masks": source,
        "version": __version__,
        "base_model": kind,
        "revision": None,
    }
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.e2e
def test_what_was_done_before_is_kept(work, tmp_path):
    succeed("masks", "apply", work / "masks.safetensors", work / "pruned", "--output", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["hf_mlopt"]["derived_from"] == BLOCK


@pytest.mark.e2e
def test_a_repository_of_the_hub(work, monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("pruned", "shards"):
        repository = tmp_path / "cache" / f"models--someone--{name}"
        shutil.copytree(work / name, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    succeed("masks", "export", "someone/pruned", "--output", tmp_path / "masks.safetensors")
    succeed("masks", "apply", tmp_path / "masks.safetensors", "someone/shards", "--output", tmp_path / "out")
    block = read_json(tmp_path / "out" / "config.json")["hf_mlopt"]
    assert (block["base_model"], block["revision"]) == ("someone/shards", commit)
    assert (block["masks"]["model"], block["masks"]["revision"]) == ("someone/pruned", commit)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruned", "--output", "masks.bin"], "output='.*masks.bin': is a safetensors file; name it so"),
        (["dense", "--output", "m.safetensors"], "model='.*dense': no matrix of it has 10 % zeros; prune it first"),
        (["pruned", "--output", "m.safetensors", "--min-zeros", "0.7"], "no matrix of it has 70 % zeros"),
        (["pruned", "--output", "m.safetensors", "--min-zeros", "0"], r"min_zeros=0.0: must be in \(0, 1\]"),
        (["pruned", "--output", "m.safetensors", "--min-zeros", "nan"], r"min_zeros=nan: must be in \(0, 1\]"),
        (["missing", "--output", "m.safetensors"], "no such directory"),
    ],
)
def test_an_export_that_is_refused(work, words, message, tmp_path):
    words = [work / words[0], "--output", tmp_path / words[2], *words[3:]]
    assert re.search(message, refused("export", *words))
    assert os.listdir(tmp_path) == []


@pytest.mark.e2e
def test_a_file_that_is_there_is_not_overwritten(work):
    before = (work / "masks.safetensors").read_bytes()
    line = refused("export", work / "pruned", "--output", work / "masks.safetensors")
    assert "exists already; name a new file" in line
    assert (work / "masks.safetensors").read_bytes() == before


@pytest.mark.e2e
@pytest.mark.parametrize("action", ["export", "apply"])
def test_an_interruption_leaves_nothing(work, action, monkeypatch, tmp_path):
    def interrupt(*_):
        assert os.listdir(tmp_path)
        raise KeyboardInterrupt

    words = [work / "pruned", "--output", tmp_path / "new.safetensors"]
    if action == "export":
        monkeypatch.setattr("hf_mlopt.hub.shards.ShardWriter.write", interrupt)
    else:
        monkeypatch.setattr("hf_mlopt.workflows.masks._mark", interrupt)
        words = [work / "masks.safetensors", work / "dense", "--output", tmp_path / "out"]
    assert hf_mlopt("masks", action, *words).status == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.e2e
@pytest.mark.parametrize("action", ["export", "apply"])
def test_a_disk_that_is_too_small_is_refused(work, action, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    words = [work / "pruned", "--output", tmp_path / "new.safetensors"]
    if action == "apply":
        words = [work / "masks.safetensors", work / "dense", "--output", tmp_path / "out"]
    assert "free some space" in refused(action, *words)
    assert os.listdir(tmp_path) == []


# What masks do not fit

NAME = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(NAME), f"has no tensor {NAME}; masks fit other fine-tunes"),
        (
            lambda held: held.update({NAME: held[NAME][:16].clone()}),
            rf"{NAME} has shape \[16, 64\], its mask \[32, 64\]",
        ),
        (
            lambda held: held.update({NAME: held[NAME].T.contiguous()}),
            rf"{NAME} has shape \[64, 32\], its mask \[32, 64",
        ),
        (
            lambda held: held.update({NAME: held[NAME].to(torch.float8_e4m3fn)}),
            f"{NAME} is stored as F8_E4M3, which cannot be masked",
        ),
    ],
)
def test_a_model_that_masks_do_not_fit_is_refused_with_the_tensor(work, change, message, tmp_path):
    shutil.copytree(work / "tuned", tmp_path / "other")
    held = load_file(tmp_path / "other" / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    line = refused("apply", work / "masks.safetensors", tmp_path / "other", "--output", tmp_path / "out")
    assert re.search(message, line), line
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, _: metadata.pop("hf_mlopt_masks"), r"no file of masks of format 1 \(it says None\)"),
        (lambda metadata, _: metadata.update(hf_mlopt_masks="2"), r"no file of masks of format 1 \(it says '2'\)"),
        (lambda metadata, _: metadata.update(shapes="[1]"), "its metadata cannot be used"),
        (lambda metadata, _: metadata.update(source="{}"), "its metadata cannot be used"),
        (
            lambda _, held: held.update({f"{NAME}.bitmask": torch.zeros(9, dtype=torch.uint8)}),
            f"{NAME}.bitmask does not",
        ),
        (lambda _, held: held.pop(f"{NAME}.bitmask"), f"{NAME}.bitmask does not fit the shapes it names"),
        (lambda _, held: held.update({"x": torch.zeros(1)}), "x does not fit the shapes it names"),
    ],
)
def test_a_file_that_is_no_file_of_masks_is_refused(work, change, message, tmp_path):
    held = load_file(work / "masks.safetensors")
    with safe_open(work / "masks.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    change(metadata, held)
    save_file(held, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=message):
        read_masks(tmp_path / "bad.safetensors")


@pytest.mark.e2e
def test_masks_that_are_missing_or_no_safetensors_file(work, tmp_path):
    words = (work / "dense", "--output", tmp_path / "out")
    assert "no such file" in refused("apply", tmp_path / "missing.safetensors", *words)
    (tmp_path / "text.safetensors").write_text("text")
    assert "no safetensors file" in refused("apply", tmp_path / "text.safetensors", *words)
