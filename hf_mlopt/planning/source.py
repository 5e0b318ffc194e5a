"""The configuration and the tensor headers of a checkpoint, here or on the Hub; no weight is read or fetched."""

from dataclasses import dataclass
from pathlib import Path

from hf_mlopt.errors import InputError
from hf_mlopt.hub import Checkpoint, hub_errors, resolve_checkpoint, safetensors_files
from hf_mlopt.hub.checkpoint import read_config
from hf_mlopt.hub.provenance import is_local_name
from hf_mlopt.hub.shards import DTYPE_BYTES, Layout, ShardReader, TensorInfo


@dataclass(frozen=True)
class Source:
    """
    What is known of a checkpoint without its weights.

    Args:
        name (`str`): Directory or Hub id.
        config (`dict`): Its `config.json`.
        layout (`dict[str, dict[str, TensorInfo]]`): Its safetensors files and what is in them, in their order.
        revision (`str`, *optional*): Commit on the Hub; None for a directory.
        to_download (`int`): Bytes of weights that are on the Hub only.
        download_to (`Path`, *optional*): The cache they would go to.
    """

    name: str
    config: dict
    layout: Layout
    revision: str | None = None
    to_download: int = 0
    download_to: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for tensors in self.layout.values() for info in tensors.values())


def read_source(model: str, revision: str | None = None) -> Source:
    """
    Reads a checkpoint's configuration and headers.

    Args:
        model (`str`): A local directory, or the id of a model on the Hub; of the latter only `config.json` and the
            headers of its safetensors files are fetched.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        InputError: If it is no checkpoint, has no safetensors files, or the Hub cannot provide it.
    """
    path = Path(model).expanduser()
    if path.exists() or is_local_name(model):
        checkpoint = resolve_checkpoint(model)
        return Source(model, read_config(checkpoint.directory), _local_layout(checkpoint))
    return _hub_source(model, revision)


def _hub_source(model: str, revision: str | None) -> Source:
    from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, NotASafetensorsRepoError

    with hub_errors(model):
        try:
            config_file = Path(hf_hub_download(model, "config.json", revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise InputError(f"model={model!r}: not a checkpoint, it has no config.json") from None
    config, snapshot = read_config(config_file.parent), config_file.parent
    try:
        layout = _local_layout(Checkpoint(model, snapshot))  # it is in the cache already
    except InputError:
        pass
    else:
        return Source(model, config, layout, snapshot.name)
    with hub_errors(model):
        try:
            files = get_safetensors_metadata(model, revision=snapshot.name).files_metadata
        except NotASafetensorsRepoError:
            raise InputError(f"model={model!r}: has no safetensors files; a plan reads their headers") from None
    layout = {file: _tensors(model, file, found.tensors) for file, found in sorted(files.items())}
    missing = [tensors for file, tensors in layout.items() if not (snapshot / file).is_file()]
    to_download = sum(info.nbytes for tensors in missing for info in tensors.values())
    return Source(model, config, layout, snapshot.name, to_download, Path(constants.HF_HUB_CACHE))


def _tensors(model: str, file: str, found) -> dict[str, TensorInfo]:
    unknown = next((info.dtype for info in found.values() if info.dtype not in DTYPE_BYTES), None)
    if unknown is not None:
        raise InputError(f"model={model!r}: {file} holds tensors of type {unknown}, which is not understood.")
    ordered = sorted(found.items(), key=lambda item: item[1].data_offsets[0])
    return {name: TensorInfo(info.dtype, tuple(info.shape)) for name, info in ordered}


def _local_layout(checkpoint: Checkpoint) -> Layout:
    with ShardReader(safetensors_files(checkpoint)) as reader:
        return reader.layout
