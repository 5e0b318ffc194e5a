"""Hidden states on disk: the input of one decoder layer for every batch, as one safetensors file a layer."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from hf_mlopt.hub.shards import ShardReader, ShardWriter, TensorInfo, write_error
from hf_mlopt.pruning.states import States
from hf_mlopt.streaming.skeleton import DTYPES, WORDS, bytes_of


class StateFiles:
    """
    The files that hold states, one a layer.

    Args:
        directory (`Path`): Made if it does not exist.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(directory, error, 0) from None

    def path(self, layer: int) -> Path:
        """The file with the input of `layer`; complete if it exists."""
        return self.directory / f"input-of-layer-{layer:05d}.safetensors"

    def layers(self) -> list[int]:
        """Layers whose input is here."""
        return sorted(
            int(file.stem.rpartition("-")[2]) for file in self.directory.glob("input-of-layer-*.safetensors")
        )

    def keep_only(self, layer: int) -> None:
        """Removes all but one, and what a killed run left half written."""
        for file in self.directory.glob("input-of-layer-*"):
            if file != self.path(layer):
                file.unlink()

    def writer(self, layer: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> ShardWriter:
        """An unfinished file with room for states of these shapes."""
        info = {str(number): TensorInfo(WORDS[dtype], tuple(shape)) for number, shape in enumerate(shapes)}
        return ShardWriter(self.directory, {self.path(layer).name + ".unfinished": info})

    def finish(self, layer: int, writer: ShardWriter) -> None:
        """Gives a file its name, when all of it is on the disk."""
        writer.sync()
        writer.close()
        os.replace(self.path(layer).with_name(self.path(layer).name + ".unfinished"), self.path(layer))

    def save(self, layer: int, states: Iterable[torch.Tensor], shapes) -> None:
        """Writes the input of `layer`: states that may come one by one, `[batch, length, hidden]`, and their
        `(batch, length)`."""
        writer = None
        try:
            for number, state in enumerate(states):
                if writer is None:
                    writer = self.writer(layer, [(*shape, state.shape[-1]) for shape in shapes], state.dtype)
                writer.write(str(number), bytes_of(state.cpu().contiguous()))
            self.finish(layer, writer)
        finally:
            if writer is not None:
                writer.close()

    def load(self, layer: int, device: torch.device) -> States:
        """Reads the input of `layer` back."""
        with ShardReader([self.path(layer)]) as reader:
            return States(_read(reader, number, device) for number in range(len(reader.tensors)))


class DiskStates:
    """
    States that live on disk, used like the list of tensors that the sweep works on: an item that is read is the input
    of the current layer, one that is set is the input of the next.

    Args:
        files (`StateFiles`): Where they are.
        layer (`int`): The layer whose input is there already.
        device (`torch.device`): Where items go when they are read.
    """

    def __init__(self, files: StateFiles, layer: int, device: torch.device):
        self.files, self.layer, self.device = files, layer, device
        self._reader = ShardReader([files.path(layer)])
        self._writer: ShardWriter | None = None

    def __len__(self) -> int:
        return len(self._reader.tensors)

    def __getitem__(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return _read(self._reader, number, self.device)

    def __setitem__(self, number: int, state: torch.Tensor) -> None:
        if self._writer is None:
            shapes = [self._reader.tensors[str(index)].shape for index in range(len(self))]
            self._writer = self.files.writer(self.layer + 1, shapes, state.dtype)
        self._writer.write(str(number), bytes_of(state.cpu().contiguous()))

    def advance(self) -> None:
        """The next layer's turn: its input is complete."""
        self.layer += 1
        if self._writer is None:
            return  # nothing came out of the last layer
        self.files.finish(self.layer, self._writer)
        self._writer = None
        self._reader.close()
        self._reader = ShardReader([self.files.path(self.layer)])

    def forget_earlier(self) -> None:
        """Removes the files of earlier layers."""
        self.files.keep_only(self.layer)

    def close(self) -> None:
        self._reader.close()
        if self._writer is not None:
            self._writer.close()


def _read(reader: ShardReader, number: int, device: torch.device) -> torch.Tensor:
    info = reader.tensors[str(number)]
    state = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    reader.read_into(str(number), bytes_of(state))
    return state.to(device)
