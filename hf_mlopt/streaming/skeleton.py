"""
A model without weights that knows where each of its parameters lies in the files of a checkpoint.

Everything that depends on how transformers loads and saves checkpoints is in this file: it loads from headers alone,
and reverts its conversions on empty parameters to see which part of which parameter a tensor of the file is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from hf_mlopt.errors import InputError
from hf_mlopt.hub.checkpoint import mismatch_errors
from hf_mlopt.hub.shards import Layout, ShardReader, TensorInfo
from hf_mlopt.pruning.removal import tensor_place


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def load_skeleton(model_class: type, config, reader: ShardReader, name: str) -> PreTrainedModel:
    """
    What `from_pretrained` would give, with every parameter on the meta device in the shape and dtype it would have.

    Buffers that no file holds, such as rotary frequencies, are real.

    Args:
        model_class (`type`): Class of the model.
        config (`PreTrainedConfig`): Its configuration.
        reader (`ShardReader`): The files of the checkpoint.
        name (`str`): What the user called it, for messages and provenance.

    Raises:
        InputError: If tensors are missing in the files or have another shape than the configuration says.
    """
    headers = {
        key: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for key, info in reader.tensors.items()
    }
    with _no_progress_bar(), mismatch_errors(name):  # the bar would say that weights are loaded
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=headers,
            dtype=getattr(config, "dtype", None) or _main_dtype(reader),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    absent = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if absent:
        raise InputError(
            f"model={name!r}: {len(absent)} tensors are missing in its weight files or have another shape than its "
            f"config.json says, {absent[0]} first; download it again"
        )
    _compute_buffers(model)
    model.config.name_or_path = name
    return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _main_dtype(reader: ShardReader) -> torch.dtype:
    """The dtype of the first tensor of floats, as transformers takes it where the configuration names none."""
    first = next(iter(reader.layout.values()))
    dtypes = (DTYPES[first[name].dtype] for name in sorted(first))  # the library lists them by name
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _compute_buffers(model: PreTrainedModel) -> None:
    """Gives the buffers that are computed, not stored, their values."""
    computed = [name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()]
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    for name in computed:
        module = model.get_submodule(name)
        module._is_hf_initialized = False
        model._initialize_weights(module)


class _NeverCopied(torch.Tensor):
    """Stays the same memory where saving would make a contiguous copy."""

    def contiguous(self, *_args, **_kwargs):
        return self


def stored_tensors(model: PreTrainedModel, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors that a checkpoint's files hold for some parameters, by their names there.

    Args:
        model (`PreTrainedModel`): From [`load_skeleton`], which has noted the conversions of the checkpoint.
        parameters (`dict[str, torch.Tensor]`): Parameters and buffers by their names in the model; all of a layer.

    Returns:
        `dict[str, torch.Tensor]`: Views of the parameters, except where a conversion does not only place tensors
        beside one another: there, copies (see [`are_views`]).
    """
    with torch.no_grad():
        wrapped = {name: value.detach().as_subclass(_NeverCopied) for name, value in parameters.items()}
        found = revert_weight_conversion(model, wrapped)
        return {name: value.as_subclass(torch.Tensor) for name, value in found.items()}


def are_views(stored: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> bool:
    """Whether writing to the stored tensors writes to the parameters."""
    memory = {value.untyped_storage().data_ptr() for value in parameters.values()}
    return all(value.untyped_storage().data_ptr() in memory for value in stored.values())


def output_layout(model: PreTrainedModel, source: Layout) -> Layout:
    """
    The files that hold the tensors of `model`, each where the source has it.

    Args:
        model (`PreTrainedModel`): Meta parameters; may have fewer experts than the source.
        source (`dict[str, dict[str, TensorInfo]]`): Layout of the source.

    Raises:
        InputError: If saving this model would give names that the source does not have.
    """
    stored = stored_tensors(model, model.state_dict())
    info = {name: TensorInfo(WORDS[value.dtype], tuple(value.shape)) for name, value in stored.items()}
    layout = {file: {name: info[name] for name in tensors if name in info} for file, tensors in source.items()}
    placed = {name for tensors in layout.values() for name in tensors}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lost = sorted(set(stored) - placed - tied)
    if lost:
        raise InputError(
            f"{len(lost)} tensors would get names that the source does not have, {lost[0]} first; this way of storing "
            "the model is not understood: prune it with --in-memory."
        )
    return {file: tensors for file, tensors in layout.items() if tensors}


def unused_tensors(model: PreTrainedModel, source: Layout) -> list[str]:
    """Tensors of the source that are no part of the model, such as the heads of another training objective."""
    stored = stored_tensors(model, model.state_dict())
    return [name for tensors in source.values() for name in tensors if name not in stored]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def materialize_(model: nn.Module, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gives meta parameters and buffers uninitialised memory; returns it by name, and what stood there."""
    made, before = {}, {}
    for name in names:
        place, leaf = tensor_place(model, name)
        before[name] = place[leaf]
        made[name] = torch.empty(place[leaf].shape, dtype=place[leaf].dtype)
        is_parameter = isinstance(place[leaf], nn.Parameter)
        place[leaf] = nn.Parameter(made[name], requires_grad=False) if is_parameter else made[name]
    return made, before


def release_(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Puts what stood there back, so that tied parameters are one again; those of experts that went are left out."""
    modules = dict(model.named_modules())
    for name, value in before.items():
        if name.rpartition(".")[0] in modules:
            place, leaf = tensor_place(model, name)
            place[leaf] = value
