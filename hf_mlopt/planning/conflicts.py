"""Everything that a run would be refused for, found before it starts; all of it, not only the first."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub.output import check_output, unfinished_directory
from hf_mlopt.planning.costs import Costs
from hf_mlopt.planning.families import has_fused_experts
from hf_mlopt.planning.machine import free_disk, gpu_memory
from hf_mlopt.planning.memory import Peak
from hf_mlopt.planning.shape import Matrix, ModelShape, is_float
from hf_mlopt.planning.source import Source
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.grid import sparsity_grid
from hf_mlopt.pruning.kept import num_kept, refuse_drop


def model_conflicts(source: Source, shape: ModelShape, config: PruningConfig, trust_remote_code: bool) -> list[str]:
    """What does not fit between a model and what is to be done to it, a line each."""
    found = []
    if source.config.get("quantization_config") is not None:
        found.append("the checkpoint is quantized (quantization_config); prune the unquantized weights.")
    model_type = source.config["model_type"]
    if has_fused_experts(model_type) is None and "auto_map" in source.config and not trust_remote_code:
        why = f"model type {model_type!r} needs code of the checkpoint; read it first"
        found.append(str(ConfigurationError("trust_remote_code", False, why)))
    found += _dtype_conflicts(shape, config)
    found += _width_conflicts(shape, config)
    found += _allocation_conflicts(shape, config)
    found += _drop_conflicts(shape, config)
    return found


def scope_matrices(shape: ModelShape, config: PruningConfig) -> Iterator[Matrix]:
    """Experts, and with `all-linear` all other matrices, as prune checks them even if none loses weights."""
    for layer in shape.layers:
        yield from layer.experts
        if config.scope == "all-linear":
            yield from layer.linears


def _dtype_conflicts(shape: ModelShape, config: PruningConfig) -> Iterator[str]:
    types = {name: info.dtype for layer in shape.layers for name, info in layer.tensors.items()}
    seen = set()
    for matrix in scope_matrices(shape, config):
        dtype = types[matrix.name]
        if not is_float(dtype) and dtype not in seen:
            seen.add(dtype)
            yield f"{matrix.name} is stored as {dtype}; prune the unquantized weights."


def _width_conflicts(shape: ModelShape, config: PruningConfig) -> Iterator[str]:
    """A tensor is named for each width that does not fit."""
    seen = set()
    for matrix in scope_matrices(shape, config):
        width = matrix.inputs
        if width in seen:
            continue
        seen.add(width)
        if config.n_of_m is not None and width % config.n_of_m[1]:
            why = f"{config.n_of_m[1]} does not divide the input width {width} of {matrix.name}"
            yield str(ConfigurationError("pattern", config.pattern, why))
        if config.sparsity and num_kept(width, config.sparsity) == width:
            why = f"removes nothing from rows of {width} inputs in {matrix.name}"
            yield str(ConfigurationError("sparsity", config.sparsity, why))


def _allocation_conflicts(shape: ModelShape, config: PruningConfig) -> Iterator[str]:
    if config.allocation != "load":
        return
    for widths in {frozenset(m.inputs for m in layer.experts) for layer in shape.layers if layer.experts}:
        try:
            sparsity_grid(config.sparsity, widths)
        except ConfigurationError as error:
            yield str(error)


def _drop_conflicts(shape: ModelShape, config: PruningConfig) -> Iterator[str]:
    if not config.drop_experts:
        if shape.top_k > shape.num_experts:
            yield f"num_experts_per_tok={shape.top_k}: the model has {shape.num_experts} experts"
        return
    counts = sorted({layer.num_experts for layer in shape.layers if layer.num_experts})
    if len(counts) > 1:
        why = f"the layers have {' or '.join(map(str, counts))} experts; they must have equally many"
        yield str(ConfigurationError("drop_experts", config.drop_experts, why))
        return
    groups, of_token = shape.config.get("n_group"), shape.config.get("topk_group")
    try:
        refuse_drop(config.drop_experts, counts[0], shape.top_k, groups, of_token)
    except ConfigurationError as error:
        yield str(error)


def device_conflicts(device: str) -> list[str]:
    """A device that there is not."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        return [str(ConfigurationError("device", device, "must be auto, cpu, cuda or cuda:N"))]
    if device.startswith("cuda") and gpu_memory(device) is None:
        return [str(ConfigurationError("device", device, "nvidia-smi shows no such GPU on this machine"))]
    return []


def memory_conflicts(peak: Peak, available: int, what: str, streamed: bool, batch_size: int) -> list[str]:
    """A peak above what is free; `what` names the memory."""
    if peak.total <= available:
        return []
    parts = peak.parts
    remedy = "stream it (--stream)"
    if streamed:
        others = max(parts, key=parts.get)
        remedy = {
            "states": "keep the states on disk (--offload-states DIR) or give fewer samples",
            "workspace": f"lower batch_size (now {batch_size})",
        }.get(others, f"the {others} alone takes {parts[others] / 1e9:.2f} GB; use a larger machine")
    return [f"{what}: needs {peak.total / 1e9:.2f} GB, but {available / 1e9:.2f} GB are available; {remedy}"]


def disk_conflicts(
    source: Source, costs: Costs, output: str | None, *, streamed: bool, resume: bool, offload: str | None
) -> list[str]:
    """An output that cannot be written, and disks with too little room."""
    found = []
    place = Path(output or ".").expanduser().resolve()
    if output is not None:
        try:
            check_output(output)
        except InputError as error:
            found.append(str(error))
        unfinished = unfinished_directory(place)
        begun = (unfinished / "manifest.json").is_file() and (unfinished / "checkpoint").is_dir()
        if streamed and begun and not resume:
            found.append(f"output: an unfinished run stands in {unfinished}; go on with it by --resume, or remove it")
        place = place.parent
    wanted = {"output": (place, 0 if resume else max(costs.disk_bytes, source.nbytes))}
    if offload is not None:
        states = Path(offload).expanduser().resolve()
        wanted["offload_states"] = (states, costs.offloaded_bytes)
        existing = next(path for path in (states, *states.parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            found.append(str(ConfigurationError("offload_states", offload, f"cannot write in {existing}")))
    if source.to_download:
        wanted["model"] = (source.download_to, source.to_download)
    for names in _by_disk(wanted):
        needed, free = sum(wanted[name][1] for name in names), free_disk(wanted[names[0]][0])
        if needed > free:
            what = " and ".join(names)
            found.append(
                f"{what}: needs {needed / 1e9:.2f} GB, but the disk of {wanted[names[0]][0]} has {free / 1e9:.2f} GB "
                "free; free some space or name a directory on another disk"
            )
    return found


def _by_disk(wanted: dict[str, tuple[Path, int]]) -> list[list[str]]:
    """The fields whose paths share a disk."""
    disks: dict[int, list[str]] = {}
    for name, (path, _) in wanted.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        disks.setdefault(os.stat(existing).st_dev, []).append(name)
    return list(disks.values())


def notes(shape: ModelShape, config: PruningConfig, tokens: int, asked_length: int, length: int) -> list[str]:
    """What is allowed but may not be what was meant."""
    found = []
    if length < asked_length:
        found.append(f"sequence_length={asked_length} is cut to the model's context of {length} tokens")
    if shape.unused:
        found.append(f"{len(shape.unused)} tensors of the checkpoint are no part of the model and are left out")
    if config.sparsity == 0:
        found.append("sparsity=0 removes nothing")
    share = tokens * shape.top_k // shape.num_experts
    if tokens and share < config.min_tokens:
        found.append(
            f"{share} calibration tokens an expert on average, below min_tokens={config.min_tokens}: more samples "
            f"would be better than on_uncovered={config.on_uncovered!r}"
        )
    if has_fused_experts(shape.model_type) is None:
        found.append(
            f"model type {shape.model_type!r} is not in the installed transformers; its layout was not checked"
        )
    stored = {layer.tensors[matrix.name].dtype for layer in shape.layers for matrix in layer.experts}
    if stored != {shape.dtype}:
        found.append(f"experts are stored as {', '.join(sorted(stored))}, but loaded and written as {shape.dtype}")
    return found
