"""The packed layout against a decoder that follows docs/pack.md literally, and files that are not what they say."""

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_mlopt.errors import InputError
from hf_mlopt.hub.packed import (
    header_tensors,
    original_header,
    packed_bytes,
    packed_layout,
    raw_header,
    unpacked,
    write_file,
    write_packed,
)
from hf_mlopt.hub.shards import ShardReader


WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
NEVER_PACKED = ("int", "bool", "fp8", "fp8_wide", "empty", "scalar", "dense", "few")


def half_zero(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator).to(dtype)
    return value.masked_fill(torch.rand(shape, generator=generator) < 0.5, 0)  # a product would leave -0.0


def special(dtype):
    """Half zeros; the other half -0.0, NaN, infinities and the smallest subnormal of either sign, by turns."""
    value = torch.zeros(2, 7, 111, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    kinds = torch.tensor([-0.0, math.nan, math.inf, -math.inf, tiny, -tiny], dtype=dtype)
    value.view(-1)[1::2] = kinds.repeat(200)[: value.numel() // 2]
    return value


def sample():
    return {
        "z.last": half_zero(61, 33, dtype=torch.bfloat16),
        **{f"special.{word}": special(dtype) for dtype, word in WORDS.items()},
        "all zero": torch.zeros(40, 41, dtype=torch.float16),
        "int": torch.zeros(4096, dtype=torch.int32),
        "bool": torch.zeros(4096, dtype=torch.bool),
        "fp8": torch.zeros(4096).to(torch.float8_e4m3fn),
        "fp8_wide": torch.zeros(4096).to(torch.float8_e5m2),
        "empty": torch.zeros(3, 0, 5),
        "scalar": torch.tensor(0.0),
        "dense": torch.full((4096,), -0.0),  # not one of these is zero by its bits
        "few": torch.zeros(8),
    }


def pack(source: Path, target: Path) -> Path:
    header = raw_header(source)
    with ShardReader([source]) as reader:
        layout = packed_layout(reader)
        write_packed(reader, header, layout, target)
    assert target.stat().st_size == packed_bytes(header, layout)
    return target


def unpack(source: Path, target: Path) -> Path:
    header = original_header(source)
    with ShardReader([source]) as reader:
        tensors = header_tensors(header, source)
        write_file(target, header, (piece for name in tensors for piece in unpacked(reader, name, tensors[name])))
    return target


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def decode(file: Path) -> dict[str, bytes]:
    """The bytes of every original tensor, as docs/pack.md says they are found: bit by bit."""
    held = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["hf_mlopt_packed"] == "1"
    original = json.loads(metadata["original_header"])
    original.pop("__metadata__", None)
    found = {}
    for name, entry in original.items():
        if name in held:
            found[name] = raw(held[name])
            continue
        bits, values = held[f"{name}.bitmask"], held[f"{name}.values"]
        assert bits.dtype == torch.uint8 and bits.shape == (math.ceil(math.prod(entry["shape"]) / 8),)
        assert WORDS[values.dtype] == entry["dtype"] and values.ndim == 1
        width, rest, out = values.element_size(), raw(values), b""
        for index in range(math.prod(entry["shape"])):
            if int(bits[index // 8]) & (1 << (index % 8)):
                out, rest = out + rest[:width], rest[width:]
            else:
                out += bytes(width)
        assert rest == b""
        found[name] = out
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(sample(), path, metadata={"format": "pt", "note": 'quotes " and ünïcode'})
    return path


def test_the_documented_layout_gives_every_bit_back(source, tmp_path):
    found = decode(pack(source, tmp_path / "packed.safetensors"))
    assert {name: raw(value) for name, value in sample().items()} == found


def test_unpacking_gives_the_file_back_to_the_byte(source, tmp_path):
    again = unpack(pack(source, tmp_path / "packed.safetensors"), tmp_path / "again.safetensors")
    assert again.read_bytes() == source.read_bytes()


def test_only_floats_that_get_smaller_are_packed(source):
    with ShardReader([source]) as reader:
        layout = packed_layout(reader)
    assert set(sample()) & set(layout) == set(NEVER_PACKED)
    assert layout["all zero.values"].shape == (0,) and layout["all zero.bitmask"].nbytes == 205


@pytest.mark.parametrize("fraction, is_packed", [(0.04, False), (0.09, True)])  # it pays from 1/16 on
def test_enough_zeros_are_more_than_the_bitmask_costs(fraction, is_packed, tmp_path):
    value = torch.ones(100_000, dtype=torch.bfloat16)
    value[: int(fraction * len(value))] = 0
    save_file({"w": value}, tmp_path / "a.safetensors")
    with ShardReader([tmp_path / "a.safetensors"]) as reader:
        assert ("w.bitmask" in packed_layout(reader)) == is_packed


def test_half_zeros_in_bf16_take_at_most_57_percent(tmp_path):
    save_file({"w": half_zero(512, 512, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with ShardReader([tmp_path / "a.safetensors"]) as reader:
        packed = sum(info.nbytes for info in packed_layout(reader).values())
    assert 0.55 < packed / (512 * 512 * 2) <= 0.57


def test_names_that_the_layout_would_use_twice(tmp_path):
    tensors = {"a": half_zero(999), "a.values": half_zero(999, seed=1), "b.bitmask": half_zero(999, seed=2)}
    save_file(tensors, tmp_path / "a.safetensors")
    packed = pack(tmp_path / "a.safetensors", tmp_path / "packed.safetensors")
    assert set(load_file(packed)) == {"a", "a.values.bitmask", "a.values.values"} | {
        "b.bitmask.bitmask",
        "b.bitmask.values",
    }
    assert decode(packed) == {name: raw(value) for name, value in tensors.items()}


def write_by_hand(path, entries, data, pad=3):
    text = json.dumps(entries).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_header_that_no_library_writes_comes_back_too(tmp_path):
    """Names in another order than the data, spaces, an odd length, no metadata."""
    data = half_zero(600), half_zero(300, seed=1)
    entries = {
        "b": {"shape": [300], "dtype": "F32", "data_offsets": [2400, 3600]},
        "nothing": {"shape": [0], "dtype": "F32", "data_offsets": [0, 0]},
        "a": {"shape": [20, 30], "dtype": "F32", "data_offsets": [0, 2400]},
    }
    file = write_by_hand(tmp_path / "odd.safetensors", entries, raw(data[0]) + raw(data[1]))
    packed = pack(file, tmp_path / "packed.safetensors")
    assert "a.bitmask" in load_file(packed)
    assert unpack(packed, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path):
    entries = {"a": {"shape": [4], "dtype": "F32", "data_offsets": [4, 20]}}
    file = write_by_hand(tmp_path / "hole.safetensors", entries, bytes(20))
    with pytest.raises(InputError, match="hole.safetensors: .*a is not 16 bytes that begin where"):
        header_tensors(raw_header(file), file)


def test_large_tensors_pass_in_pieces(tmp_path):
    """Several pieces, the last one odd; the peak is that of a piece, not of a tensor."""
    numel = 3 * (1 << 23) + 13
    bits = np.random.default_rng(0).integers(0, 2, numel, np.uint16) * np.arange(numel).astype(np.uint16)
    tensors = {"half": torch.from_numpy(bits).view(torch.bfloat16), "dense": torch.ones(numel, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors")
    tracemalloc.start()
    try:
        packed = pack(tmp_path / "a.safetensors", tmp_path / "packed.safetensors")
        again = unpack(packed, tmp_path / "again.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 33e6  # a tensor has 50 MB
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    held = load_file(packed)
    assert held["half.bitmask"].numpy().tobytes() == np.packbits(bits != 0, bitorder="little").tobytes()
    assert raw(held["half.values"]) == bits[bits != 0].tobytes()


# Files that are not what they say


@pytest.fixture
def small(tmp_path):
    """A packed file of one tensor, and where its bitmask begins: `[0, 1, 0, 1, ...]`, the values come first."""
    save_file({"w": torch.arange(2000) % 2 * torch.arange(2000.0)}, tmp_path / "small.safetensors")
    file = pack(tmp_path / "small.safetensors", tmp_path / "packed.safetensors")
    return file, len(raw_header(file)) + 4 * 1000


@pytest.mark.parametrize("byte", [0b10101011, 0b10101000], ids=["one bit more", "one bit less"])
@pytest.mark.parametrize("place", [0, 249], ids=["first", "last"])
def test_a_bitmask_that_does_not_fit_its_values_is_noticed(small, byte, place, tmp_path):
    file, start = small
    content = bytearray(file.read_bytes())
    assert content[start + place] == 0b10101010
    content[start + place] = byte
    file.write_bytes(content)
    with pytest.raises(InputError, match="w: its bitmask and its 1,000 values do not fit each other"):
        unpack(file, tmp_path / "again.safetensors")


def test_a_file_cut_short_is_refused(small):
    small[0].write_bytes(small[0].read_bytes()[:-1])
    with pytest.raises(InputError, match="packed.safetensors: .*download it again"):
        original_header(small[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, _: metadata.clear(), r"no packed file of format 1 \(it says None\)"),
        (lambda metadata, _: metadata.update(hf_mlopt_packed="2"), r"no packed file of format 1 \(it says '2'\)"),
        (lambda metadata, _: metadata.update(original_header="{"), "its header cannot be used"),
        (lambda metadata, _: metadata.update(original_header="{}"), "w.bitmask is not what the original needs"),
        (lambda _, held: held.pop("w.values"), "w.values is not what the original needs"),
        (lambda _, held: held.update({"w.bitmask": torch.zeros(249, dtype=torch.uint8)}), "w.bitmask is not what"),
        (lambda _, held: held.update({"w.values": held["w.values"].double()}), "w.values is not what"),
        (lambda _, held: held.update({"v": torch.zeros(1)}), "v is not what the original needs"),
    ],
)
def test_a_file_that_cannot_give_its_original_is_refused_before_anything_is_written(small, change, message):
    held = load_file(small[0])
    with safe_open(small[0], framework="pt") as opened:
        metadata = opened.metadata()
    change(metadata, held)
    save_file(held, small[0], metadata=metadata)
    with pytest.raises(InputError, match=message):
        original_header(small[0])
