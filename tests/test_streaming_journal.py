"""The record of a run: what is gone on with, what is refused, and in which order things reach the disk."""

import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_mlopt.errors import InputError
from hf_mlopt.hub.output import unfinished_directory
from hf_mlopt.hub.shards import ShardReader
from hf_mlopt.pruning.report import LayerReport
from hf_mlopt.pruning.states import States
from hf_mlopt.streaming.journal import Journal, source_identity, write_json


CPU = torch.device("cpu")
IDENTITY = {"hf_mlopt": "1", "recipe": {"sparsity": 0.5, "pattern": None}, "source": {"model.safetensors": "abc"}}


def states_of(layer):
    """The input of a layer: two batches."""
    return States(torch.full((2, 3, 4), float(10 * layer + number)) for number in range(2))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "pruned"


@pytest.fixture
def begin(output):
    """Opens journals, and closes them at the end of the test as the end of their process would."""
    opened = []

    def begin(resume=False, identity=IDENTITY, every=2, **settings):
        journal = Journal(unfinished_directory(output), identity, resume=resume, save_states_every=every, **settings)
        opened.append(journal)
        return journal

    yield begin
    for journal in opened:
        journal.close()


def start(journal, offloaded=False, calibrated=True):
    if not calibrated:
        return States()
    return journal.first_states(iter(states_of(0)), [(2, 3)] * 2, CPU)


def run(journal, states, layers, total=6):
    """Goes through layers as the sweep does."""
    for index in layers:
        for number, value in enumerate(states_of(index + 1) if len(states) and index + 1 < total else ()):
            states[number] = value
        states.advance()
        journal.record(index, LayerReport(index, f"layer {index}", seconds=1.5), states, index + 1 == total)
    return states


def kill(journal):
    """What the end of the process does, and no more."""
    journal._pool.shutdown()
    if journal._lock is not None:
        os.close(journal._lock)
        journal._lock = None


def saved_layers(journal):
    return sorted(int(file.stem.rpartition("-")[2]) for file in journal.files.directory.glob("input*.safetensors"))


def everything(directory):
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_a_new_run(begin, output):
    journal = begin()
    assert journal.directory == output.parent / ".pruned.unfinished" and journal.checkpoint.is_dir()
    assert json.loads((journal.directory / "manifest.json").read_text()) == IDENTITY
    assert journal.reports == []


def test_resuming_where_nothing_is_begins(begin):
    assert begin(resume=True).reports == []


def test_an_unfinished_run_is_not_begun_again(begin):
    journal = begin()
    run(journal, start(journal), range(3))
    kill(journal)
    before = everything(journal.directory)
    with pytest.raises(InputError, match=r"unfinished run.*\.pruned\.unfinished.*--resume"):
        begin()
    assert everything(journal.directory) == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"recipe": {"sparsity": 0.6, "pattern": None}}, "recipe.sparsity was 0.5 and is 0.6"),
        ({"recipe": {"sparsity": None, "pattern": "2:4"}}, "recipe.pattern was None and is '2:4'"),
        ({"hf_mlopt": "2"}, "hf_mlopt was '1' and is '2'"),
        ({"source": {"model.safetensors": "abd"}}, "source.model.safetensors was 'abc' and is 'abd'"),
        ({"more": 1}, "more was None and is 1"),
    ],
)
def test_another_run_is_refused_and_told_what_differs(begin, change, words):
    journal = begin()
    run(journal, start(journal), range(3))
    kill(journal)
    before = everything(journal.directory)
    with pytest.raises(InputError, match="is another one") as error:
        begin(resume=True, identity=IDENTITY | change)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert everything(journal.directory) == before
    assert len(begin(resume=True).reports) == 2


@pytest.mark.parametrize("resume", (False, True))
def test_two_at_once(begin, resume):
    """Whoever comes second is told so, not to remove what the first is working in, and leaves no trace."""
    journal = begin()
    before = everything(journal.directory)
    with pytest.raises(InputError, match="another process is at work"):
        begin(resume=resume)
    with pytest.raises(InputError, match="another process is at work"):
        begin(resume=resume, identity=IDENTITY | {"hf_mlopt": "2"})
    assert everything(journal.directory) == before
    journal.close()
    begin(resume=True)


def test_whoever_begins_holds_the_lock(begin, monkeypatch):
    """Otherwise a second one, at the same moment, would write its own manifest over that of the first."""
    import hf_mlopt.streaming.journal as module

    held, write = [], module.write_json

    def writing(path, record):
        with pytest.raises(InputError, match="another process"):
            module._lock(path.parent)
        held.append(path.name)
        write(path, record)

    monkeypatch.setattr(module, "write_json", writing)
    begin()
    assert held == ["manifest.json"]


def test_the_reports_come_back(begin):
    journal = begin()
    run(journal, start(journal), range(4))
    kill(journal)
    reports = begin(resume=True).reports
    assert [(report.index, report.name, report.seconds) for report in reports] == [
        (index, f"layer {index}", 1.5) for index in range(4)
    ]


@pytest.mark.parametrize("every, done, left", [(1, 3, 3), (2, 3, 2), (2, 4, 4), (3, 5, 3), (4, 3, 0), (100, 5, 0)])
def test_it_goes_on_from_the_last_states_that_were_saved(begin, every, done, left):
    journal = begin(every=every)
    run(journal, start(journal), range(done))
    assert saved_layers(journal) == ([left] if left else [])
    kill(journal)
    journal = begin(resume=True, every=every)
    assert len(journal.reports) == left
    if left:
        states = journal.saved_states(CPU)
        assert all(torch.equal(*pair) for pair in zip(states, states_of(left), strict=True))
        run(journal, states, range(left, 6))
    assert [report.index for report in begin_again(begin, journal).reports] == list(range(6 if left else 0))


def begin_again(begin, journal):
    kill(journal)
    return begin(resume=True)


def test_a_complete_sweep_needs_no_states(begin):
    journal = begin()
    run(journal, start(journal), range(6))
    journal = begin_again(begin, journal)
    assert len(journal.reports) == 6 and list(journal.saved_states(CPU)) == []


def test_without_calibration_every_layer_counts(begin):
    journal = begin(every=100)
    run(journal, start(journal, calibrated=False), range(4))
    journal = begin_again(begin, journal)
    assert len(journal.reports) == 4 and list(journal.saved_states(CPU)) == []
    run(journal, States(), range(4, 6))
    assert len(begin_again(begin, journal).reports) == 6


@pytest.mark.parametrize("done", (0, 1, 3, 6))
def test_offloaded_states_are_there_after_every_layer(begin, tmp_path, done):
    (shared := tmp_path / "fast").mkdir()
    (shared / "of-somebody-else").touch()
    journal = begin(every=100, offload=shared)
    run(journal, start(journal), range(done))
    kill(journal)
    journal = begin(resume=True, every=100, offload=shared)
    assert len(journal.reports) == done
    if done in (1, 3):
        states = journal.saved_states(CPU)
        assert all(torch.equal(*pair) for pair in zip(states, states_of(done), strict=True))
        run(journal, states, range(done, 6))
    journal.finish(tmp_path / "pruned")
    assert os.listdir(shared) == ["of-somebody-else"]


def test_two_runs_may_share_a_directory_for_states(tmp_path):
    shared = tmp_path / "fast"
    journals = [Journal(tmp_path / name, IDENTITY, resume=False, save_states_every=1, offload=shared) for name in "ab"]
    for number, journal in enumerate(journals):
        journal.first_states(iter(states_of(number)), [(2, 3)] * 2, CPU)
    for number, journal in enumerate(journals):
        assert torch.equal(journal.files.load(0, CPU)[0], states_of(number)[0])
        journal.close()


def test_states_that_are_saved_but_whose_layer_is_not_recorded(begin, monkeypatch):
    """Killed between the two: the layer is done again, from the states before it."""
    journal = begin()
    states = run(journal, start(journal), range(3))
    monkeypatch.setattr("hf_mlopt.streaming.journal.write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(journal, states, [3])
    assert saved_layers(journal) == [2, 4]
    assert len(begin_again(begin, journal).reports) == 2


def test_killed_before_the_earlier_states_are_removed(begin, monkeypatch):
    journal = begin()
    states = run(journal, start(journal), range(3))
    monkeypatch.setattr("hf_mlopt.streaming.states.StateFiles.keep_only", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(journal, states, [3])
    monkeypatch.undo()
    journal = begin_again(begin, journal)
    assert len(journal.reports) == 4
    run(journal, journal.saved_states(CPU), [4, 5])
    assert len(begin_again(begin, journal).reports) == 6


def test_records_of_layers_that_are_done_again_are_not_counted(begin):
    journal = begin(every=4)
    run(journal, start(journal), range(3))
    journal = begin_again(begin, journal)
    assert journal.reports == []
    journal.every = 4
    run(journal, start(journal), range(1))
    assert begin_again(begin, journal).reports == []


def test_a_record_that_is_half_written_is_none(begin):
    journal = begin(every=1)
    run(journal, start(journal), range(2))
    (journal.directory / "layers" / "00002.json.unfinished").write_text('{"next": "sta')
    assert len(begin_again(begin, journal).reports) == 2


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_what_has_no_manifest_is_no_run(begin, monkeypatch, output):
    """
    A run that was killed while it removed its directory, when its checkpoint had its name already: what it left says
    that every layer is done, in a checkpoint that is no longer there.
    """
    journal = begin(every=1)
    journal.remembered("owl", lambda: [0.5])
    run(journal, start(journal), range(6))
    (journal.directory / "manifest.json").unlink()
    (journal.checkpoint / "model-00009-of-00009.safetensors").touch()
    journal.close()
    journal = begin(identity=IDENTITY | {"recipe": {"sparsity": 0.6}})
    assert journal.reports == [] and not list(journal.checkpoint.iterdir())
    assert journal.remembered("owl", lambda: [0.25]) == [0.25]
    run(journal, start(journal), range(1))
    assert len(begin_again_with(begin, journal, {"sparsity": 0.6}).reports) == 0


def begin_again_with(begin, journal, recipe):
    kill(journal)
    return begin(resume=True, identity=IDENTITY | {"recipe": recipe})


@pytest.mark.parametrize("removed", range(5))
def test_a_finish_that_is_killed_leaves_nothing_to_go_on_with(begin, monkeypatch, output, removed):
    """Whatever of the directory is gone by then, the next run with the same output starts anew."""
    journal = begin(every=1)
    run(journal, start(journal), range(6))
    (journal.checkpoint / "config.json").write_text("{}")
    unlink, count = os.unlink, []

    def failing(*args, **kwargs):
        count.append(1)
        if len(count) > removed:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", failing)
    with pytest.raises(KeyboardInterrupt):
        journal.finish(output)
    monkeypatch.undo()
    if not output.exists():  # killed when the states went: all layers are done, and none is needed
        assert len(begin_again(begin, journal).reports) == 6
        return
    assert (output / "config.json").read_text() == "{}"
    kill(journal)
    output.rename(output.with_name("elsewhere"))
    journal = begin(resume=False, identity=IDENTITY | {"recipe": {"sparsity": 0.6}})
    assert journal.reports == [] and journal.checkpoint.is_dir()


def test_finishing(begin, output):
    journal = begin(every=1)
    run(journal, start(journal), range(6))
    (journal.checkpoint / "config.json").write_text("{}")
    output.mkdir()  # an empty one may be there
    journal.finish(output)
    assert [path.name for path in output.parent.iterdir()] == ["pruned"]
    assert [path.name for path in output.iterdir()] == ["config.json"]


class Writer(SimpleNamespace):
    """Notes when it is told to flush, and takes its time, as a disk does."""

    def sync(self):
        self.begun.set()
        self.may_end.wait(5)
        self.done.append("sync")

    def close(self):
        self.done.append("close")


@pytest.fixture
def writer():
    return Writer(done=[], begun=threading.Event(), may_end=threading.Event())


@pytest.mark.parametrize("offloaded", (False, True))
def test_weights_are_on_the_disk_before_a_layer_counts(begin, writer, monkeypatch, tmp_path, offloaded):
    import hf_mlopt.streaming.journal as module

    journal = begin(every=1, offload=tmp_path / "fast" if offloaded else None)
    journal.writer = writer
    write = module.write_json
    monkeypatch.setattr(module, "write_json", lambda *args: writer.done.append(args[0].name) or write(*args))
    timer = threading.Timer(0.05, writer.may_end.set)
    timer.start()
    run(journal, start(journal), range(2))
    timer.join()
    assert writer.done == ["sync", "00000.json", "sync", "00001.json"]


def test_the_disk_is_not_waited_for_where_nothing_relies_on_it(begin, writer):
    journal = begin(every=3)
    journal.writer = writer
    states = run(journal, start(journal), [0])
    assert writer.begun.wait(5) and writer.done == []
    writer.may_end.set()
    run(journal, states, [1, 2])
    assert writer.done == ["sync"] * 3


def test_everything_is_on_the_disk_before_the_checkpoint_gets_its_name(begin, writer, output, monkeypatch):
    """What is outside the decoder layers is written after the last record."""
    writer.may_end.set()
    journal = begin(every=1)
    journal.writer = writer
    run(journal, start(journal), range(6))
    journal._wait()
    writer.done.clear()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: writer.done.append("name") or replace(*paths))
    journal.finish(output)
    assert [what for what in writer.done if what != "close"] == ["sync", "name"]


def test_a_disk_that_fails_is_heard_of(begin, writer):
    journal = begin(every=3)
    journal.writer = writer
    writer.sync = lambda: (_ for _ in ()).throw(InputError("x: cannot be written (Input/output error)"))
    states = run(journal, start(journal), [0])
    with pytest.raises(InputError, match="Input/output error"):
        run(journal, states, [1, 2])
    assert len(begin_again(begin, journal).reports) == 0


def test_nothing_stays_open(begin, tmp_path, output):
    before = open_descriptors()
    for offload in (None, tmp_path / "fast"):
        journal = begin(every=1, offload=offload)
        journal.writer = SimpleNamespace(sync=lambda: None, close=lambda: None)
        states = run(journal, start(journal), range(6))
        if offload is not None:
            states.close()
        journal.finish(output)
        output.rmdir()
        journal.close()  # twice does no harm
    assert open_descriptors() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sync")]


def test_a_directory_for_states_that_cannot_be_made(begin, tmp_path):
    """The lock is let go: within the same process the run can be begun again."""
    (tmp_path / "file").touch()
    before = open_descriptors()
    with pytest.raises(InputError, match="file"):
        begin(offload=tmp_path / "file")
    assert open_descriptors() == before
    begin(resume=True)


def test_a_refused_run_leaves_nothing_open(begin):
    journal = begin()
    kill(journal)
    before = open_descriptors()
    with pytest.raises(InputError):
        begin()
    with pytest.raises(InputError):
        begin(resume=True, identity={})
    assert open_descriptors() == before


def test_a_result_is_remembered(begin):
    journal, computed = begin(), []
    assert journal.remembered("owl", lambda: computed.append(1) or [0.25, 0.5]) == [0.25, 0.5]
    journal = begin_again(begin, journal)
    assert journal.remembered("owl", lambda: computed.append(1)) == [0.25, 0.5] and len(computed) == 1


def test_what_was_refused_before_its_first_layer_is_forgotten(begin):
    journal = begin()
    journal.forget_if_nothing_was_done()
    assert not journal.directory.exists()


def test_a_pass_over_the_model_is_not_forgotten(begin):
    journal = begin()
    journal.remembered("owl", lambda: [0.25])
    journal.forget_if_nothing_was_done()
    assert begin_again(begin, journal).remembered("owl", lambda: None) == [0.25]


def test_json_is_there_completely_or_not_at_all(tmp_path, monkeypatch):
    path, order = tmp_path / "x.json", []
    write_json(path, {"a": 1})
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("sync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("name") or replace(*paths))
    write_json(path, {"a": 2})
    assert order == ["sync", "name"] and json.loads(path.read_text()) == {"a": 2}
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 2}


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"x\.json: cannot be written"):
        write_json(tmp_path / "absent" / "x.json", {})


def identity_of(directory):
    with ShardReader(sorted(directory.glob("*.safetensors"))) as reader:
        return source_identity(reader)


def test_the_identity_of_a_source(tmp_path):
    """It is that of the content, whatever the directory; another name, shape, dtype or value changes it."""
    torch.manual_seed(0)
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(3)}
    changed = tensors["a"].clone()
    changed[0, 0] += 1
    versions = {
        "same": tensors,
        "value": tensors | {"a": changed},
        "shape": tensors | {"a": tensors["a"].reshape(32, 128)},
        "dtype": tensors | {"a": tensors["a"].view(torch.int32)},
        "name": {"a": tensors["a"], "c": tensors["b"]},
        "order": {"a": tensors["b"], "b": tensors["a"]},
    }
    found = {}
    for name, values in {"first": tensors, **versions}.items():
        (tmp_path / name).mkdir()
        save_file(values, tmp_path / name / "model.safetensors")
        found[name] = identity_of(tmp_path / name)
    assert found["first"] == found["same"] and list(found["first"]) == ["model.safetensors"]
    assert len({json.dumps(identity) for identity in found.values()}) == len(versions)
