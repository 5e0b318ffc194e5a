"""
What a streamed run has finished, on disk, so that it can be gone on with after it was killed at any moment.

Beside the output stands a hidden directory until the run is complete:

    .NAME.unfinished/
        manifest.json     what the run is: recipe, source, versions
        checkpoint/       the output shards, at full size from the start
        layers/00003.json the report of a layer whose weights are in the shards
        states/           the input of the layer to go on with
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from hf_mlopt import ranks
from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import ShardReader, ShardWriter, write_error
from hf_mlopt.pruning.report import LayerReport
from hf_mlopt.pruning.states import States
from hf_mlopt.streaming.states import DiskStates, StateFiles


SWEEP_FORMAT = 1  # raised when the same recipe would give other weights, or this directory another form
_SAMPLE_BYTES = 4096


class Journal:
    """
    The record of one run.

    Args:
        directory (`Path`): See [`unfinished_directory`].
        identity (`dict`): Everything the weights depend on; a run is gone on with only by an equal one.
        resume (`bool`): Whether to go on with a run that is there already.
        save_states_every (`int`): Layers between two states to go on from.
        offload (`Path`, *optional*): Directory where the states live instead of in memory; saved at every layer then.
        report_type (`type`, *optional*, defaults to `LayerReport`): The dataclass of what is noted of a layer.

    With several processes each keeps its own states; the first writes everything else.

    Raises:
        InputError: If there is an unfinished run and `resume` was not asked for, it is another run, or one that still
            goes on.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict,
        *,
        resume: bool,
        save_states_every: int,
        offload: Path | None = None,
        report_type: type = LayerReport,
    ):
        self.directory, self.every = directory, save_states_every
        self._report_type = report_type
        self.offloaded = offload is not None
        self.checkpoint = directory / "checkpoint"
        self._syncing: Future | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self.writer: ShardWriter | None = None
        self._lock = None
        try:
            if ranks.rank() == 0:
                self._lock = begin_run(directory, identity, resume)
            ranks.wait_for_all()
            # A name of its own in a directory that the user gave: several runs may share it.
            name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
            parent = offload / f"states-{name}" if offload else directory / "states"
            self.files = StateFiles(parent / f"rank-{ranks.rank()}")
            self.reports, self._complete, self._recorded = ranks.from_first(self._finished())
        except BaseException:
            self.close()
            raise

    def _finished(self) -> tuple[list, bool, int]:
        """
        Reports of the layers that need not be done again, whether nothing is left to be calibrated, and how many
        layers were ever done.
        """
        done = []
        while (file := self._layer_file(len(done))).is_file():
            done.append(json.loads(file.read_text(encoding="utf-8")))
        recorded = len(done)
        # Layers since the last saved states are done again.
        while done and not (done[-1]["next"] == "complete" or self.files.path(len(done)).is_file()):
            done.pop()
        reports = [self._report_type(**record["report"]) for record in done]
        return reports, bool(done) and done[-1]["next"] == "complete", recorded

    def _layer_file(self, index: int) -> Path:
        return self.directory / "layers" / f"{index:05d}.json"

    def first_states(self, embedded: Iterator[torch.Tensor], shapes, device: torch.device):
        """Keeps the input of the first layer, in memory or on disk."""
        if not self.offloaded:
            return States(embedded)
        self.files.save(0, embedded, shapes)
        return DiskStates(self.files, 0, device)

    def saved_states(self, device: torch.device):
        """The input of the layer to go on with."""
        if self._complete:
            return States()
        if self.offloaded:
            return DiskStates(self.files, len(self.reports), device)
        return self.files.load(len(self.reports), device)

    def record(self, index: int, report, states, last: bool) -> None:
        """A layer is done: its weights are written, its outputs are in `states`."""
        following = "complete"  # what is needed to go on after this layer: nothing
        if self.writer is not None:
            self._wait()
            self._syncing = self._pool.submit(self.writer.sync)
        if isinstance(states, DiskStates):
            following = "states"
        elif len(states) and (index + 1) % self.every == 0 and not last:
            self.files.save(index + 1, states, [state.shape[:2] for state in states])
            following = "states"
        elif len(states):
            following = "states that were not saved"
        following = "complete" if last else following
        if not following.endswith("not saved"):
            self._wait()
            ranks.wait_for_all()  # the states of all are there before anybody relies on them
        if ranks.rank() == 0:
            write_json(self._layer_file(index), {"next": following, "report": asdict(report)})
        if following == "states":
            ranks.wait_for_all()
            self.files.keep_only(index + 1)

    def remembered(self, name: str, compute):
        """A result of an earlier pass over the model: computed once, and kept for when the run is gone on with."""
        path = self.directory / f"{name}.json"
        if ranks.from_first(path.is_file()):
            return ranks.from_first(json.loads(path.read_text(encoding="utf-8")) if ranks.rank() == 0 else None)
        result = compute()
        if ranks.rank() == 0:
            write_json(path, result)
        return result

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def progress(self, num_layers: int) -> str:
        """Where a run goes on, in words."""
        if not self._recorded:
            return f"nothing to go on with in {self.directory}: starting"
        again = self._recorded - len(self.reports)
        return f"going on with layer {len(self.reports)} of {num_layers}" + (
            f"; {again} later ones are done again, from the last saved states" if again else ""
        )

    def forget_if_nothing_was_done(self) -> None:
        """A run that was refused before its first layer leaves nothing in the way of the next."""
        remembered = [file.name for file in self.directory.glob("*.json") if file.name != "manifest.json"]
        if ranks.rank() == 0 and not remembered and not self._layer_file(0).exists():
            self._wait()
            self._remove_states()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _remove_states(self) -> None:
        shutil.rmtree(self.files.directory.parent, ignore_errors=True)

    def finish(self, output: Path) -> None:
        """The checkpoint is complete: it gets its name, and the rest goes."""
        self._wait()
        if self.writer is not None:
            self.writer.sync()
            self.writer.close()
        self._remove_states()
        if output.is_dir():
            output.rmdir()  # it is empty, and rename replaces no directory on some systems
        os.replace(self.checkpoint, output)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def close(self) -> None:
        self._pool.shutdown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def source_identity(reader: ShardReader) -> dict[str, str]:
    """
    A hash per file of a checkpoint, of its header and the first 4 KiB of every tensor: it tells another fine-tune of
    the same shape, without reading hundreds of gigabytes.
    """
    hashes = {}
    for file, tensors in reader.layout.items():
        digest = hashlib.sha256()
        for name, info in tensors.items():
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            sample = bytearray(min(_SAMPLE_BYTES, info.nbytes))
            reader.read_into(name, sample)
            digest.update(sample)
        hashes[file] = digest.hexdigest()
    return hashes


def write_json(path: Path, record: dict) -> None:
    """Writes a file that is there completely or not at all, whatever happens."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise write_error(path, error, 0) from None


def begin_run(directory: Path, identity: dict, resume: bool, parts: tuple[str, ...] = ("layers", "checkpoint")) -> int:
    """
    Finds or makes the directory of a run.

    Args:
        directory (`Path`), identity (`dict`), resume (`bool`): As for [`Journal`].
        parts (`tuple[str]`): Directories in it; a run has begun when the last of them is there.

    Returns:
        `int`: The descriptor of the lock on it, to be closed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
    except OSError as error:
        raise write_error(directory, error, 0) from None
    try:
        manifest = directory / "manifest.json"
        # Without one of them a run was killed before it began or when it was complete.
        if manifest.is_file() and (directory / parts[-1]).is_dir():
            _refuse_other(directory, json.loads(manifest.read_text(encoding="utf-8")), identity, resume)
            return lock
        for leftover in directory.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != "lock":
                leftover.unlink()
        for part in parts:
            (directory / part).mkdir()
        write_json(manifest, identity)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _refuse_other(directory: Path, before: dict, identity: dict, resume: bool) -> None:
    if not resume:
        raise InputError(
            f"output: an unfinished run stands in {directory}; add --resume to go on with it, or remove it"
        )
    differing = _differences(before, json.loads(json.dumps(identity)))
    if differing:
        raise InputError(
            f"resume: the unfinished run in {directory} is another one: {'; '.join(differing)}. Give what it was "
            "started with, or remove it"
        )


def _differences(before, now, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {before!r} and is {now!r}"]


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its holder has just finished, and removed it with the directory
            raise OSError
    except OSError:
        os.close(descriptor)
        raise InputError(f"output: another process is at work in {directory}; wait for it or stop it") from None
    return descriptor
