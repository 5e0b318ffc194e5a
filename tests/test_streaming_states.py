"""Hidden states on disk: the same values as in memory, a complete file or none, and nothing left behind."""

import os

import pytest
import torch
from safetensors.torch import load_file

from hf_mlopt.pruning.states import States
from hf_mlopt.streaming.states import DiskStates, StateFiles


CPU = torch.device("cpu")
SHAPES = [(2, 5), (2, 5), (1, 3)]


def values(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, 4, generator=generator).to(dtype) for shape in SHAPES]


def same(states, expected):
    return len(states) == len(expected) and all(
        torch.equal(states[number], value) and states[number].dtype == value.dtype
        for number, value in enumerate(expected)
    )


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def files(tmp_path):
    files = StateFiles(tmp_path / "deep" / "states")
    files.save(3, iter(values()), SHAPES)
    return files


@pytest.fixture
def states(files):
    states = DiskStates(files, 3, CPU)
    yield states
    states.close()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_what_is_saved_is_loaded(tmp_path, dtype):
    files = StateFiles(tmp_path)
    files.save(0, (value for value in values(dtype=dtype)), SHAPES)
    loaded = files.load(0, CPU)
    assert isinstance(loaded, States) and same(loaded, values(dtype=dtype))
    assert os.listdir(tmp_path) == ["input-of-layer-00000.safetensors"]


def test_a_view_is_saved_by_its_values(tmp_path):
    files, whole = StateFiles(tmp_path), torch.randn(2, 4, 6)
    files.save(0, [whole.transpose(1, 2)], [(2, 6)])
    assert same(files.load(0, CPU), [whole.transpose(1, 2)])


def test_more_than_ten_keep_their_order(tmp_path):
    files = StateFiles(tmp_path)
    expected = [torch.full((1, 1, 2), float(number)) for number in range(23)]
    files.save(0, expected, [(1, 1)] * 23)
    assert same(files.load(0, CPU), expected)
    states = DiskStates(files, 0, CPU)
    assert same(states, expected)
    states.close()


def test_it_is_an_ordinary_safetensors_file(files):
    found = load_file(files.path(3))
    assert same([found[str(number)] for number in range(3)], values())


def test_a_save_that_stops_half_way_leaves_the_file_of_before(files):
    def failing():
        yield values(1)[0]
        raise KeyboardInterrupt

    before = open_descriptors()
    with pytest.raises(KeyboardInterrupt):
        files.save(3, failing(), SHAPES)
    with pytest.raises(KeyboardInterrupt):
        files.save(4, failing(), SHAPES)
    assert same(files.load(3, CPU), values()) and files.layers() == [3]
    assert open_descriptors() == before
    files.keep_only(3)
    assert os.listdir(files.directory) == ["input-of-layer-00003.safetensors"]


def test_nothing_has_the_final_name_before_it_is_on_the_disk(files, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: done.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("name") or replace(*paths))
    files.save(4, values(), SHAPES)
    assert done == ["sync", "name"]


def test_the_list_is_that_of_the_layers(files):
    files.save(12, values(), SHAPES)
    assert files.layers() == [3, 12]
    files.keep_only(12)
    assert files.layers() == [12]
    (files.directory / "of-somebody-else").touch()
    files.keep_only(13)
    assert os.listdir(files.directory) == ["of-somebody-else"]


def test_items_read_are_of_this_layer_and_items_set_of_the_next(files, states):
    new = values(1)
    for number, value in enumerate(new):
        states[number] = value
        assert torch.equal(states[number], values()[number])
    states.advance()
    assert states.layer == 4 and same(states, new) and same(files.load(4, CPU), new)
    assert files.layers() == [3, 4]  # the earlier one is needed until the layer is recorded
    states.forget_earlier()
    assert files.layers() == [4] and same(states, new)


def test_used_like_a_list(states):
    assert len(states) == 3 and same(list(states), values())
    for number in (-1, 3):
        with pytest.raises(IndexError):
            states[number]


def test_they_may_change_their_dtype(states):
    for number, value in enumerate(values(1, torch.float32)):
        states[number] = value
    states.advance()
    assert same(states, values(1, torch.float32))


def test_after_the_last_layer_nothing_is_written(files, states):
    states.advance()
    assert files.layers() == [3] and same(states, values())
    assert os.listdir(files.directory) == [files.path(3).name]


def test_what_a_killed_run_left_half_written_is_written_anew(files, states):
    half = files.directory / (files.path(4).name + ".unfinished")
    half.write_bytes(b"\xff" * 10_000)
    for number, value in enumerate(values(1)):
        states[number] = value
    states.advance()
    assert same(states, values(1)) and not half.exists()


def test_nothing_stays_open(files):
    before = open_descriptors()
    states = DiskStates(files, 3, CPU)
    for number, value in enumerate(values(1)):
        states[number] = value
    states.advance()
    states[0] = values(2)[0]
    states.close()
    files.load(4, CPU)
    assert open_descriptors() == before
