"""`hf-mlopt plan`: what `hf-mlopt prune` would do, take and refuse, before it starts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_mlopt.planning import conflicts as check
from hf_mlopt.planning.costs import Costs, Run, count_costs, targets
from hf_mlopt.planning.layout import file_bytes, packed_bytes, planned_layout, saved_by_transformers
from hf_mlopt.planning.machine import available_memory, gpu_memory
from hf_mlopt.planning.memory import Peak, in_memory_peak, must_stream, streamed_peak
from hf_mlopt.planning.shape import ModelShape, read_shape
from hf_mlopt.planning.source import Source, read_source
from hf_mlopt.pruning.kept import num_kept


@dataclass(frozen=True)
class Plan:
    """
    What a run will take. Printed, it is a table.

    Args:
        model (`dict`): Type, layers, experts, top-k, hidden size, dtype, parameters and bytes of the source.
        run (`dict`): What is done to it, and whether it is streamed and why.
        peak (`Peak`): Memory of this process at the highest point, bytes by part.
        device_peak (`Peak`, *optional*): Memory of the GPU, where there is one.
        available_memory (`int`): Bytes free here now.
        costs (`Costs`): Operations and bytes.
        files (`dict[str, int]`): Size of every weight file of the result.
        result (`dict`): Experts, parameters, zeros, bytes as plain files and packed.
        to_download (`int`): Bytes of the source that are not here yet.
        rates (`dict`, *optional*): What was measured of this machine.
        seconds (`dict[str, float]`, *optional*): Time by part, and `total`; only with rates.
        conflicts (`list[str]`): What the run would be refused for.
        notes (`list[str]`): What is allowed but may not be meant.
    """

    model: dict
    run: dict
    peak: Peak
    device_peak: Peak | None
    available_memory: int
    costs: Costs
    files: dict[str, int]
    result: dict
    to_download: int = 0
    rates: dict | None = None
    seconds: dict[str, float] | None = None
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        record = asdict(self)
        for name, peak in (("peak", self.peak), ("device_peak", self.device_peak)):
            if peak is not None:
                record[name]["total"] = peak.total
        return record

    def __str__(self) -> str:
        from hf_mlopt.planning.table import as_table

        return as_table(self)


def make_plan(recipe, *, measure: bool = False) -> Plan:
    """
    Plans a run from the configuration and the headers of a checkpoint.

    Args:
        recipe (`PruneRecipe`): What `hf-mlopt prune` would be given; `output` may be absent.
        measure (`bool`, *optional*, defaults to `False`): Whether to measure this machine for five seconds, which
            gives times. Only this imports torch.

    Raises:
        InputError: If the model is no mixture of experts, or stored in a way that is not understood. What can be
            understood but not be done is in `conflicts`.
    """
    source = read_source(recipe.model, recipe.revision)
    shape = read_shape(source)
    length = min(recipe.sequence_length, shape.context or recipe.sequence_length)
    available, gpu = available_memory(), gpu_memory(recipe.device)
    streamed, why = _streams(recipe, source, shape, length, available)
    offload = recipe.offload_states if streamed else None
    run = Run(recipe, recipe.samples, length, streamed, offload is not None, recipe.save_states_every)

    kept = num_kept(shape.num_experts, recipe.drop_experts) if recipe.drop_experts else None
    output = planned_layout(shape, source.layout, kept)
    output = output if streamed else saved_by_transformers(output)
    costs = count_costs(shape, run, source.layout, output)
    peak, device_peak = _peaks(shape, run, source, costs, gpu is not None)

    found = check.model_conflicts(source, shape, recipe, recipe.trust_remote_code)
    found += check.device_conflicts(recipe.device)
    needed = peak if streamed else in_memory_peak(shape, run, costs.state_bytes, mapped=False)
    found += check.memory_conflicts(needed, available, "memory", streamed, recipe.batch_size)
    if device_peak is not None:
        found += check.memory_conflicts(device_peak, gpu, "memory of the GPU", True, recipe.batch_size)
    found += check.disk_conflicts(
        source, costs, recipe.output, streamed=streamed, resume=recipe.resume, offload=offload
    )
    rates, seconds = None, None
    if measure:
        from hf_mlopt.planning.probe import measure as probe

        place = Path(recipe.output or ".").expanduser().resolve()
        rates = asdict(probe(shape, run, place.parent if recipe.output else place, recipe.device))
        seconds = _seconds(costs, rates, streamed)
    return Plan(
        model=_about_model(source, shape),
        run={
            "method": recipe.method,
            "pattern": recipe.label,
            "scope": recipe.scope,
            "streamed": streamed,
            "why": why,
            "samples": recipe.samples if run.tokens else 0,
            "sequence_length": length if run.tokens else 0,
            "device": rates["device"] if rates else ("cuda" if gpu is not None else "cpu"),
        },
        peak=peak,
        device_peak=device_peak,
        available_memory=available,
        costs=costs,
        files=file_bytes(output),
        result=_about_result(shape, run, output, kept),
        to_download=source.to_download,
        rates=rates,
        seconds=seconds,
        conflicts=found,
        notes=check.notes(shape, recipe, run.tokens, recipe.sequence_length if run.tokens else 0, length),
    )


def _streams(recipe, source: Source, shape: ModelShape, length: int, available: int) -> tuple[bool, str]:
    if recipe.stream is not None:
        return recipe.stream, "as asked"
    if recipe.resume:
        return True, "to go on with an earlier run"
    if recipe.offload_states:
        return True, "to keep the states on disk"
    tokens = recipe.samples * length if recipe.needs_calibration else 0
    if must_stream(source.nbytes, tokens * shape.hidden * 4, available):
        return True, "the model does not fit in memory"
    return False, "the model fits in memory"


def _peaks(shape: ModelShape, run: Run, source: Source, costs: Costs, on_gpu: bool) -> tuple[Peak, Peak | None]:
    """Memory of this process, and of the GPU that layers are computed on."""
    if on_gpu:
        device_peak = streamed_peak(shape, run, costs.state_bytes, accelerator=True)
        host = streamed_peak(shape, Run(**{**vars(run), "offloaded": True}), 0)
        kept = {key: value for key, value in host.parts.items() if key != "workspace"}
        if not run.streamed:
            kept |= {"weights": source.nbytes}
        return Peak(host.moment, kept), device_peak
    if run.streamed:
        return streamed_peak(shape, run, costs.state_bytes), None
    return in_memory_peak(shape, run, costs.state_bytes), None


def _seconds(costs: Costs, rates: dict, streamed: bool) -> dict[str, float]:
    """Time by part; a streamed run reads ahead and writes behind while it computes."""
    parts = {
        "read": costs.read_bytes / rates["read_bytes"],
        "calibrate": costs.forward_flops / rates["flops"],
        "solve": costs.solve_flops / rates["flops"],
        "score": costs.scored_weights / rates["scored"],
        "write": costs.written_bytes / rates["written_bytes"],
    }
    compute, disk = parts["calibrate"] + parts["solve"] + parts["score"], parts["read"] + parts["write"]
    return parts | {"total": max(compute, disk) if streamed else compute + disk}


def _about_model(source: Source, shape: ModelShape) -> dict:
    tensors = [info for layer in shape.layers for info in layer.tensors.values()] + list(shape.rest.values())
    return {
        "source": source.name,
        "revision": source.revision,
        "model_type": shape.model_type,
        "layers": len(shape.layers),
        "moe_layers": sum(bool(layer.num_experts) for layer in shape.layers),
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "hidden_size": shape.hidden,
        "dtype": shape.dtype,
        "parameters": sum(info.numel for info in tensors),
        "bytes": source.nbytes,
    }


def _about_result(shape: ModelShape, run: Run, output, kept: int | None) -> dict:
    names = {matrix.name for layer in shape.layers for matrix in targets(layer, run.config)}
    tensors = {name: info for file in output.values() for name, info in file.items()}
    config, zeros = run.config, 0
    pruned = sum(info.numel for name, info in tensors.items() if name in names)
    sparsity = 1 - config.n_of_m[0] / config.n_of_m[1] if config.n_of_m else config.sparsity or 0.0
    zeros = round(pruned * sparsity)
    parameters = sum(info.numel for info in tensors.values())
    return {
        "experts": kept or shape.num_experts,
        "parameters": parameters,
        "zeros": zeros,
        "sparsity": zeros / parameters,
        "bytes": sum(file_bytes(output).values()),
        "packed_bytes": packed_bytes(output, names, sparsity),
    }
