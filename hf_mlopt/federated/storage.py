"""Messages in files: what a server keeps of a round, and a site of itself."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message


_HEADER = "message"


def save_message(message: Message, path: Path) -> None:
    """
    Writes a message as one safetensors file, `group/name` to tensor, whole or not at all.

    Args:
        message (`Message`): Any.
        path (`Path`): File; its folder is made, and a file of that name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, storages = {}, set()
    for group, group_tensors in message.groups.items():
        for name, tensor in group_tensors.items():
            storage = tensor.untyped_storage().data_ptr()
            is_shared = storage in storages and tensor.numel() > 0  # which the format refuses
            contiguous = tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()
            tensors[f"{group}/{name}"] = contiguous
            storages.add(storage)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial, metadata={_HEADER: message.header()})
    os.replace(partial, path)


def load_message(path: Path) -> Message:
    """
    Reads what [`save_message`] wrote, bit for bit.

    Raises:
        InputError: If the file is no such message.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER, "")
            return Message.from_header(header, lambda group, name, *_: file.get_tensor(f"{group}/{name}"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: holds no message ({error})") from error


class SpooledReplies(Mapping[str, Message]):
    """
    Replies that lie in files and are read when they are asked for, so that a server holds one at a time.

    Args:
        folder (`Path`): An empty folder of their own.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Path] = {}

    def add(self, site: str, message: Message) -> None:
        """Takes a reply; a second one of the same site replaces the first."""
        path = self._files.get(site, self.folder / f"{len(self._files)}.safetensors")
        save_message(message, path)
        self._files[site] = path

    def __getitem__(self, site: str) -> Message:
        return load_message(self._files[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class SiteStore:
    """
    What sites keep for themselves from round to round. A site cannot know whether its last reply was used, so it keeps
    what it was before as well: the server says which of the two it builds on. Another training has another folder.

    Args:
        folder (`Path`): A folder for each site is made in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, site: str, training: str, round: int) -> Message | None:
        """
        The state that the site's reply of `round` left.

        Args:
            site (`str`): Its name.
            training (`str`): What the server calls this training.
            round (`int`): Counted from 0.

        Returns:
            `Message`, *optional*: `None` if nothing was kept.

        Raises:
            InputError: If the file cannot be read.
        """
        path = self._path(site, training, round)
        return load_message(path) if path.is_file() else None

    def save(self, site: str, training: str, round: int, state: Message, before: int) -> None:
        """Keeps the state after `round`, and of the older ones of this training only that after `before`."""
        kept = [self._path(site, training, number) for number in (round, before)]
        save_message(state, kept[0])
        for path in kept[0].parent.glob("round-*.safetensors"):
            if path not in kept:
                path.unlink()

    def _path(self, site: str, training: str, round: int) -> Path:
        if not training.isalnum():  # it comes from another machine, and must not lead out of the folder
            raise InputError(f"training={training!r}: letters and digits name a training")
        return self.folder / site / training / f"round-{round}.safetensors"
