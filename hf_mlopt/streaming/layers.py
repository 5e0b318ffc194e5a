"""Decoder layers that come from the shards of a checkpoint and go to new ones; one is in memory at a time."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import ShardReader, ShardWriter
from hf_mlopt.moe import MoELayer
from hf_mlopt.pruning.removal import keep_experts_
from hf_mlopt.pruning.validation import require_finite
from hf_mlopt.streaming.skeleton import (
    DTYPES,
    are_views,
    bytes_of,
    materialize_,
    release_,
    stored_tensors,
)


class StreamedLayers:
    """
    A `LayerSource` over files.

    Args:
        model (`PreTrainedModel`): Skeleton of the source, see [`~streaming.skeleton.load_skeleton`].
        smaller (`PreTrainedModel`, *optional*): Skeleton with the experts that stay, where some are removed.
        prefix (`str`), moe (`list[MoELayer]`): The decoder layers' name and their view as mixtures of experts.
        reader (`ShardReader`), writer (`ShardWriter`, *optional*): Source and target files. Without a writer, layers
            are only read.
        device (`torch.device`): Where layers are run.
    """

    def __init__(self, model, prefix, moe, reader: ShardReader, writer: ShardWriter | None, device, smaller=None):
        self.model, self.smaller, self.prefix, self.device = model, smaller, prefix, device
        self.reader, self.writer = reader, writer
        self.moe = {layer.index: layer for layer in moe}
        self.layers = model.get_submodule(prefix)
        self._kind = model  # the model whose tensors the loaded layer has: this or, once experts are gone, `smaller`
        self._stored_names = [sorted(self._names_in_file(index), key=dot_natural_key) for index in range(len(self))]
        self._ahead = _ReadAhead(reader)
        self._before: dict[str, torch.Tensor] = {}  # what stands in the place of the loaded layer's tensors otherwise

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Holds what the decoder has outside its layers; it is read for this and dropped again."""
        root = next(name for name, module in self.model.named_modules() if module is self.model.base_model)
        inside = [f"{root}.{name}".lstrip(".") for name in self.model.base_model.state_dict()]
        names = [name for name in inside if not name.startswith(f"{self.prefix}.")]
        before = load_parameters(self.model, names, self.reader)
        try:
            yield
        finally:
            release_(self.model, before)

    def _parameter_names(self, model, index: int) -> list[str]:
        prefix = f"{self.prefix}.{index}"
        return [f"{prefix}.{name}" for name in model.get_submodule(prefix).state_dict()]

    def _names_in_file(self, index: int) -> list[str]:
        state = self.model.state_dict()
        return list(
            stored_tensors(self.model, {name: state[name] for name in self._parameter_names(self.model, index)})
        )

    def load(self, index: int) -> tuple[str, nn.Module, MoELayer | None]:
        self._ahead.stop()
        prefix, layer = f"{self.prefix}.{index}", self.layers[index]
        self._before = load_parameters(self.model, self._parameter_names(self.model, index), self.reader)
        if index + 1 < len(self):
            self._ahead.start(self._stored_names[index + 1])
        self._kind = self.model
        return prefix, layer.to(self.device), self.moe.get(index)

    def remove_experts(self, index: int, keep: list[int]) -> None:
        keep_experts_(self.layers[index], self.smaller.get_submodule(f"{self.prefix}.{index}"), keep)
        self._kind = self.smaller

    def store(self, index: int, changed: bool = True) -> None:
        layer, names = self.layers[index], self._parameter_names(self._kind, index)
        if changed and self.writer is not None:
            state = layer.state_dict()
            values = {name: state[name.removeprefix(f"{self.prefix}.{index}.")].cpu() for name in names}
            for name, value in stored_tensors(self._kind, values).items():
                self.writer.write(name, bytes_of(value.contiguous()))
        release_(self.model, self._before)
        _return_memory()

    def copy_rest(self) -> None:
        """
        Copies everything outside the decoder layers.

        Raises:
            InputError: If a weight there is not finite.
        """
        inside = {name for names in self._stored_names for name in names}
        for file in self.writer.layout.values():
            for name, info in file.items():
                if name in inside:
                    continue
                value = torch.empty(info.shape, dtype=DTYPES[info.dtype])
                read_tensor(self.reader, name, value)
                require_finite(name, value)
                self.writer.write(name, bytes_of(value))

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._ahead.close()


def load_parameters(model, names: list[str], reader: ShardReader) -> dict[str, torch.Tensor]:
    """
    Reads parameters and buffers of a skeleton, straight to where they belong.

    Args:
        model (`PreTrainedModel`): The skeleton.
        names (`list[str]`): Everything that is stored together, such as all of a layer.
        reader (`ShardReader`): The files.

    Returns:
        `dict[str, torch.Tensor]`: What [`~streaming.skeleton.release_`] puts back.

    Raises:
        InputError: If a weight is not finite.
    """
    parameters, before = materialize_(model, names)
    stored = stored_tensors(model, parameters)
    if not are_views(stored, parameters):
        raise InputError(
            f"{names[0]}: the checkpoint stores it in a way that cannot be read piece by piece; use --in-memory."
        )
    for name, value in stored.items():
        read_tensor(reader, name, value)
    for name, value in parameters.items():
        require_finite(name, value)
    return before


def read_tensor(reader: ShardReader, name: str, target: torch.Tensor) -> None:
    """Reads one stored tensor into a tensor, which may be a view of a larger one and of another dtype."""
    info = reader.tensors[name]
    if DTYPES[info.dtype] == target.dtype and target.is_contiguous():
        reader.read_into(name, bytes_of(target))
        return
    value = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    reader.read_into(name, bytes_of(value))
    target.copy_(value)


def _return_memory() -> None:
    """Gives freed memory back: glibc keeps blocks as large as a layer's matrices, and its heap grows with depth."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class _ReadAhead:
    """Brings the next layer into the system's cache while this one is computed; takes no memory of the process."""

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._enough = threading.Event()
        self._running: Future | None = None

    def start(self, names: list[str]) -> None:
        self._enough.clear()
        self._running = self._pool.submit(self.reader.read_ahead, names, self._enough.is_set)

    def stop(self) -> None:
        """The layer is wanted now: whoever waits reads it faster than we do. Errors are left to that read."""
        self._enough.set()
        if self._running is not None:
            self._running.exception()
            self._running = None

    def close(self) -> None:
        self.stop()
        self._pool.shutdown()
