"""Safetensors files read and written in place: against the safetensors library, damaged files, and full disks."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import (
    ShardReader,
    ShardWriter,
    TensorInfo,
    header_bytes,
    index_json,
    read_header,
)
from hf_mlopt.streaming.skeleton import DTYPES, bytes_of


WORDS = {dtype: word for word, dtype in DTYPES.items()}


def tensors():
    """One tensor of every kind that a checkpoint may hold; the names are not in the order of the alphabet."""
    torch.manual_seed(0)
    return {
        "z.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "Gewicht.größe.重み": torch.randn(7).half(),
        "mask": torch.rand(9) > 0.5,
        "ids": torch.arange(6).reshape(2, 3),
        "small": torch.randn(8).to(torch.float8_e4m3fn),
        "double": torch.randn(2).double(),
    }


def layout_of(values):
    return {name: TensorInfo(WORDS[value.dtype], tuple(value.shape)) for name, value in values.items()}


def read_all(reader):
    found = {}
    for name, info in reader.tensors.items():
        found[name] = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        reader.read_into(name, bytes_of(found[name]))
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.shape == right[name].shape, name
        assert bytes(bytes_of(value)) == bytes(bytes_of(right[name])), name


def damaged(path, header, data=b""):
    """A file with a header of our own making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_what_is_written_is_read_by_the_library(tmp_path):
    values = tensors()
    with ShardWriter(tmp_path, {"x.safetensors": layout_of(values)}, {"format": "pt", "who": "ü"}) as writer:
        for name in reversed(values):  # in any order
            writer.write(name, bytes_of(values[name]))
        writer.sync()
    assert_same(values, load_file(tmp_path / "x.safetensors"))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "ü"}


def test_what_the_library_writes_is_read(tmp_path):
    values = tensors()
    save_file(values, tmp_path / "x.safetensors", {"format": "pt"})
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        assert_same(values, {name: read_all(reader)[name] for name in values})
        assert set(reader.layout["x.safetensors"]) == set(values)


def test_our_own_file_is_read_in_the_order_it_was_laid_out(tmp_path):
    values = tensors()
    with ShardWriter(tmp_path, {"x.safetensors": layout_of(values)}):
        pass
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        assert list(reader.layout["x.safetensors"].items()) == list(layout_of(values).items())


def test_the_data_begins_at_a_multiple_of_eight_bytes():
    for name in ("a", "ab", "abc", "größe", "x" * 40):
        assert len(header_bytes({name: TensorInfo("F32", (1,))}, {"format": "pt"})) % 8 == 0


def test_empty_tensors(tmp_path):
    values = {"before": torch.randn(3), "nothing": torch.empty(0, 4), "after": torch.randn(2)}
    save_file(values, tmp_path / "x.safetensors")
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        assert_same({name: values[name] for name in sorted(values)}, dict(sorted(read_all(reader).items())))
        with ShardWriter(tmp_path, {"y.safetensors": layout_of(values)}) as writer:
            for name, value in values.items():
                writer.copy(name, reader) if name == "after" else writer.write(name, bytes_of(value))
            writer.copy("nothing", reader)
    assert_same(values, load_file(tmp_path / "y.safetensors"))


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        assert reader.layout == {"x.safetensors": {}}
    with ShardWriter(tmp_path, {"y.safetensors": {}}):
        pass
    assert load_file(tmp_path / "y.safetensors") == {}


def test_parts_of_a_tensor(tmp_path):
    value = torch.arange(100, dtype=torch.int32)
    with ShardWriter(tmp_path, {"x.safetensors": layout_of({"pad": torch.zeros(3), "x": value})}) as writer:
        writer.write("x", bytes_of(value[40:]), offset=160)
        writer.write("x", bytes_of(value[:40]))
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        part = torch.empty(10, dtype=torch.int32)
        reader.read_into("x", bytes_of(part), offset=120)
        assert part.tolist() == list(range(30, 40))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], value)


def test_a_short_read_or_write_is_gone_on_with(tmp_path, monkeypatch):
    """The system may do less than it was asked for, and does above 2 GiB."""
    value = torch.randn(100)
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:7], place))
    with ShardWriter(tmp_path, {"x.safetensors": layout_of({"x": value})}) as writer:
        writer.write("x", bytes_of(value))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, place: pread(file, [buffers[0][:13]], place))
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        assert torch.equal(read_all(reader)["x"], value)


def test_copying_goes_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlopt.hub.shards.COPY_BYTES", 16)
    value = torch.randn(25)
    save_file({"x": value}, tmp_path / "x.safetensors")
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        with ShardWriter(tmp_path, {"y.safetensors": layout_of({"renamed": value})}) as writer:
            writer.copy("renamed", reader, "x")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["renamed"], value)


def test_reading_ahead_stops_when_told(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mlopt.hub.shards.COPY_BYTES", 16)
    save_file({"x": torch.zeros(64)}, tmp_path / "x.safetensors")
    asked = []
    with ShardReader([tmp_path / "x.safetensors"]) as reader:
        reader.read_ahead(["x"], lambda: asked.append(1) or len(asked) > 3)
        assert len(asked) == 4
        reader.read_ahead(["x"], lambda: False)


def test_an_existing_file_is_gone_on_with(tmp_path):
    values = {"a": torch.randn(4), "b": torch.randn(4)}
    layout = {"x.safetensors": layout_of(values)}
    with ShardWriter(tmp_path, layout) as writer:
        writer.write("a", bytes_of(values["a"]))
    with ShardWriter(tmp_path, layout) as writer:
        writer.write("b", bytes_of(values["b"]))
    assert_same(values, load_file(tmp_path / "x.safetensors"))


def test_the_file_has_its_full_size_before_anything_is_written(tmp_path):
    layout = {"x.safetensors": {"x": TensorInfo("BF16", (1 << 18,))}}
    with ShardWriter(tmp_path, layout):
        size = os.stat(tmp_path / "x.safetensors")
    assert size.st_size == len(header_bytes(layout["x.safetensors"], {"format": "pt"})) + (1 << 19)
    assert size.st_blocks * 512 >= 1 << 19  # reserved on the disk, not only promised


def test_several_files_are_one_reader(tmp_path):
    values = tensors()
    for number, (name, value) in enumerate(values.items()):
        save_file({name: value}, tmp_path / f"{number}.safetensors")
    with ShardReader(sorted(tmp_path.iterdir())) as reader:
        assert_same(values, read_all(reader))
        assert [list(tensors) for tensors in reader.layout.values()] == [[name] for name in values]


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in ("1.safetensors", "2.safetensors"):
        save_file({"x": torch.zeros(2)}, tmp_path / file)
    before = open_descriptors()
    with pytest.raises(InputError, match=r"2\.safetensors: holds x, as another file"):
        ShardReader(sorted(tmp_path.iterdir()))
    assert open_descriptors() == before


@pytest.mark.parametrize("cut", (0, 5, 8, 40, -1))
def test_a_truncated_file(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(64)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"x\.safetensors: .*download it again") as error:
        ShardReader([path])
    assert "\n" not in str(error.value)


def test_a_file_with_more_than_its_header_says(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(64)}, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="its header says.*download it again"):
        ShardReader([path])


@pytest.mark.parametrize(
    "header",
    [
        b"\x00\xff\xfe garbage",
        b"[1, 2]",
        b"null",
        b"{}}",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1]}}',
        b'{"x": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_is_none(tmp_path, header):
    with pytest.raises(InputError, match=r"x\.safetensors"):
        ShardReader([damaged(tmp_path / "x.safetensors", header, b"\0" * 4)])


@pytest.mark.parametrize("length", (1 << 20, 1 << 40, (1 << 64) - 1))
def test_a_header_longer_than_the_file(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"x": 1}')
    with pytest.raises(InputError, match=r"x\.safetensors: .*download it again"):
        read_header(path)


@pytest.mark.parametrize(
    "header, size",
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24),  # overlapping
        ({"a": entry(0, 16), "b": entry(0, 16)}, 16),
        ({"a": entry(0, 16), "b": entry(32, 48)}, 48),  # a hole
        ({"a": entry(4, 20)}, 20),
        ({"a": entry(0, 12), "b": entry(12, 28)}, 28),  # shorter than its shape
        ({"a": entry(0, 20), "b": entry(20, 36)}, 36),  # longer than its shape
        ({"a": entry(16, 0), "b": entry(0, 16)}, 16),
        ({"a": entry(-16, 0), "b": entry(0, 16)}, 16),
        ({"a": entry(0, 16, shape=(-2, -2)), "b": entry(16, 32)}, 32),
    ],
)
def test_tensors_that_are_not_one_after_the_other(tmp_path, header, size):
    """The library refuses these too; whoever read them would take one tensor's bytes for another's."""
    path = damaged(tmp_path / "x.safetensors", header, b"\0" * size)
    before = open_descriptors()
    with pytest.raises(InputError, match=r"x\.safetensors"):
        ShardReader([path])
    assert open_descriptors() == before


def test_a_type_that_is_not_understood(tmp_path):
    path = damaged(tmp_path / "x.safetensors", {"x": entry(0, 4, dtype="F4")}, b"\0" * 4)
    with pytest.raises(InputError, match=r"x\.safetensors: holds tensors of type F4"):
        ShardReader([path])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"x\.safetensors"):
        ShardReader([tmp_path / "x.safetensors"])


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(64)}, path)
    with ShardReader([path]) as reader:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(InputError, match="x: the file ended before the tensor did"):
            read_all(reader)


def failing(code):
    def call(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EDQUOT))
@pytest.mark.parametrize("function", ("posix_fallocate", "pwrite"))
def test_a_full_disk(tmp_path, monkeypatch, function, code):
    monkeypatch.setattr(os, function, failing(code))
    before = open_descriptors()
    with pytest.raises(InputError, match=r"x\.safetensors: no room on the disk.*free some space") as error:
        ShardWriter(tmp_path, {"x.safetensors": {"x": TensorInfo("F32", (3 << 28,))}} if function != "pwrite" else
                    {"x.safetensors": {"x": TensorInfo("F32", (3,))}})  # fmt: skip
    assert "3.22 GB" in str(error.value) or function == "pwrite"
    assert open_descriptors() == before


def test_a_disk_that_gets_full_later(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, {"x.safetensors": layout_of({"x": torch.zeros(4)})}) as writer:
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(InputError, match="no room on the disk"):
            writer.write("x", bytes_of(torch.zeros(4)))


def test_a_disk_that_fails(tmp_path, monkeypatch):
    """What the system held back may fail only when it is flushed."""
    with ShardWriter(tmp_path, {"x.safetensors": layout_of({"x": torch.zeros(4)})}) as writer:
        monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(InputError, match=r"cannot be written \(Input/output error\)"):
            writer.sync()


@pytest.mark.parametrize("code", (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS))
def test_a_file_system_that_reserves_no_room(tmp_path, monkeypatch, code):
    """Some network and copy-on-write file systems cannot; the file is then made in the plain way."""
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    value = torch.randn(4)
    with ShardWriter(tmp_path, {"x.safetensors": layout_of({"x": value})}) as writer:
        writer.write("x", bytes_of(value))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], value)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be written \(No such file or directory\)"):
        ShardWriter(tmp_path / "absent", {"x.safetensors": layout_of({"x": torch.zeros(4)})})
    monkeypatch.setattr(os, "open", failing(errno.EROFS))  # modes do not stop root
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be written \(Read-only file system\)"):
        ShardWriter(tmp_path, {"x.safetensors": layout_of({"x": torch.zeros(4)})})


def test_nothing_stays_open(tmp_path):
    before = open_descriptors()
    layout = {f"{number}.safetensors": {str(number): TensorInfo("F32", (2,))} for number in range(3)}
    with ShardWriter(tmp_path, layout) as writer:
        writer.close()  # twice does no harm
    with ShardReader(sorted(tmp_path.iterdir())):
        assert len(open_descriptors()) == len(before) + 3
    assert open_descriptors() == before


def test_the_index_is_that_of_transformers(tmp_path, tiny_mixtral):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    with ShardReader(files) as reader:
        assert json.loads(index_json(reader.layout)) == json.loads(
            (tmp_path / "model.safetensors.index.json").read_text()
        )
