"""What the experts of one layer are given for every window, kept while they are trained: in memory or on disk."""

# N windows   B windows of a batch   S sequence   T tokens = B * S   H hidden   K experts per token

from pathlib import Path

import torch

from hf_mlopt.hub.shards import ShardReader, ShardWriter, TensorInfo, write_error
from hf_mlopt.streaming.skeleton import DTYPES, WORDS, bytes_of


class ExpertInputs:
    """
    Inputs and routing of one layer after the other, in memory.

    Args:
        num_windows (`int`): Windows of tokens.
    """

    def __init__(self, num_windows: int):
        self.num_windows = num_windows
        self._hidden_NSH = self._index_NSK = torch.empty(0)

    def write(self, first: int, hidden_BSH: torch.Tensor, index_BSK: torch.Tensor) -> None:
        """
        Keeps a batch, in place of what is known of an earlier layer.

        Args:
            first (`int`): The window it begins with.
            hidden_BSH (`torch.Tensor`): Input of the experts, `[windows, length, hidden]`.
            index_BSK (`torch.Tensor`): Experts of each token, `[windows, length, top-k]`.
        """
        if first == 0:
            self._hidden_NSH = self._room(self._hidden_NSH, hidden_BSH)
            self._index_NSK = self._room(self._index_NSK, index_BSK)
        self._hidden_NSH[first : first + len(hidden_BSH)] = hidden_BSH
        self._index_NSK[first : first + len(index_BSK)] = index_BSK

    def _room(self, before: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        shape = (self.num_windows, *batch.shape[1:])
        fits = before.shape == shape and before.dtype == batch.dtype
        return before if fits else torch.empty(shape, dtype=batch.dtype)

    def read(self, windows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs `[tokens, hidden]` and experts `[tokens, top-k]` of some windows, in their order."""
        hidden_BSH, index_BSK = self._hidden_NSH[windows], self._index_NSK[windows]
        return hidden_BSH.flatten(0, 1).to(device), index_BSK.flatten(0, 1).to(device)

    def close(self) -> None:
        """They are not read again."""


class ExpertInputsOnDisk:
    """
    As [`ExpertInputs`], in a file.

    Args:
        num_windows (`int`): Windows of tokens.
        directory (`Path`): Where the file is while this is open.
    """

    def __init__(self, num_windows: int, directory: Path):
        self.num_windows = num_windows
        self._file = directory / "input-of-experts.safetensors"
        self._writer: ShardWriter | None = None
        self._reader: ShardReader | None = None

    def write(self, first: int, hidden_BSH: torch.Tensor, index_BSK: torch.Tensor) -> None:
        """As [`ExpertInputs.write`]."""
        values = {"hidden": hidden_BSH, "index": index_BSK}
        if first == 0:
            self.close()
            shapes = {name: (self.num_windows, *value.shape[1:]) for name, value in values.items()}
            layout = {name: TensorInfo(WORDS[value.dtype], shapes[name]) for name, value in values.items()}
            self._writer = ShardWriter(self._file.parent, {self._file.name: layout})
        for name, value in values.items():
            self._writer.write(name, bytes_of(value.cpu().contiguous()), first * value[0].nbytes)

    def read(self, windows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`ExpertInputs.read`]."""
        if self._reader is None:
            self._reader = ShardReader([self._file])
        return tuple(self._read(name, windows).flatten(0, 1).to(device) for name in ("hidden", "index"))

    def _read(self, name: str, windows: list[int]) -> torch.Tensor:
        info = self._reader.tensors[name]
        value = torch.empty((len(windows), *info.shape[1:]), dtype=DTYPES[info.dtype])
        for row, window in zip(value, windows, strict=True):
            self._reader.read_into(name, bytes_of(row), window * row.nbytes)
        return value

    def close(self) -> None:
        """They are not read again: the file goes."""
        for opened in (self._reader, self._writer):
            if opened is not None:
                opened.close()
        self._reader = self._writer = None
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(self._file, error, 0) from None
