"""The files a run will write, to the byte."""

import re

from hf_mlopt.hub.shards import DTYPE_BYTES, Layout, TensorInfo, header_bytes
from hf_mlopt.planning.families import kept_in_float32
from hf_mlopt.planning.shape import LayerShape, ModelShape, is_float


_METADATA = {"format": "pt"}
_MASK_BITS = 1  # of a packed tensor, for each weight
# Saving with transformers: one file up to this size.
_TRANSFORMERS_SHARD = 5_000_000_000


def planned_layout(shape: ModelShape, source: Layout, num_kept: int | None = None) -> Layout:
    """
    The safetensors files of the result, each tensor where the source has it.

    Args:
        shape (`ModelShape`): What the source is.
        source (`dict[str, dict[str, TensorInfo]]`): Its files.
        num_kept (`int`, *optional*): Experts that stay in each layer; all by default.

    Returns:
        `dict[str, dict[str, TensorInfo]]`: File name to tensors, in their order; files that would be empty are left
            out.
    """
    in_float32 = kept_in_float32(shape.model_type, shape.dtype)
    layer_of = {name: layer for layer in shape.layers for name in layer.tensors}
    layout = {}
    for file, tensors in source.items():
        kept = {}
        for name, info in tensors.items():
            size = _kept_shape(name, info, layer_of.get(name), num_kept)
            if name not in shape.unused and size is not None:
                kept[name] = TensorInfo(_loaded_as(name, info.dtype, shape.dtype, in_float32), size)
        if kept:
            layout[file] = kept
    return layout


def saved_by_transformers(layout: Layout) -> Layout:
    """
    The same tensors as `save_pretrained` puts them: one file, the widest types first, then by name. What would take
    several files is left as it is; their headers differ from those by bytes.
    """
    tensors = {name: info for file in layout.values() for name, info in file.items()}
    if sum(info.nbytes for info in tensors.values()) > _TRANSFORMERS_SHARD:
        return layout
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[0]))
    return {"model.safetensors": dict(ordered)}


def file_bytes(layout: Layout) -> dict[str, int]:
    """Size of every file of a layout, its header included."""
    return {
        file: len(header_bytes(tensors, _METADATA)) + sum(info.nbytes for info in tensors.values())
        for file, tensors in layout.items()
    }


def packed_bytes(layout: Layout, pruned: set[str], sparsity: float) -> int:
    """
    About what [`hf-mlopt pack`] makes of the result: a bit for each weight of a pruned tensor, and those that are not
    zero.

    Args:
        layout (`dict[str, dict[str, TensorInfo]]`): From [`planned_layout`].
        pruned (`set[str]`): Names of the tensors that lose weights.
        sparsity (`float`): Fraction of their weights that is zero.
    """
    total = 0
    for tensors in layout.values():
        for name, info in tensors.items():
            packed = info.numel * _MASK_BITS // 8 + round(info.nbytes * (1 - sparsity))
            total += min(packed, info.nbytes) if name in pruned else info.nbytes
    return total


def _loaded_as(name: str, stored: str, dtype: str, in_float32: re.Pattern | None) -> str:
    if not is_float(stored):
        return stored
    return "F32" if in_float32 is not None and in_float32.search(name) else dtype


def _kept_shape(name: str, info: TensorInfo, layer: LayerShape | None, num_kept: int | None) -> tuple[int, ...] | None:
    """The shape of a tensor when `num_kept` experts stay; None if it goes."""
    if num_kept is None or layer is None or not layer.num_experts or not name.startswith(f"{layer.block}."):
        return info.shape
    inside = name.removeprefix(f"{layer.block}.")
    if found := re.match(r"experts\.(\d+)\.", inside):
        return info.shape if int(found[1]) < num_kept else None  # those that stay are numbered anew
    # Router and stacked experts have one dimension that counts experts, the first one if several are as large.
    counts = re.match(r"(experts|gate|router|input_linear|output_linear)\b", inside) or "e_score_correction" in inside
    if not counts or layer.num_experts not in info.shape:
        return info.shape
    at = info.shape.index(layer.num_experts)
    return (*info.shape[:at], num_kept, *info.shape[at + 1 :])
