"""`hf-mlopt plan --distill`: what each way to distil a model would take, and whether it fits."""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_mlopt.errors import InputError
from hf_mlopt.hub.output import check_output
from hf_mlopt.planning.conflicts import device_conflicts
from hf_mlopt.planning.layerwise_memory import disk_beside_output
from hf_mlopt.planning.layout import file_bytes, planned_layout
from hf_mlopt.planning.machine import available_memory, free_disk, gpu_memories, own_memory
from hf_mlopt.planning.shape import ModelShape, read_shape
from hf_mlopt.planning.source import Source, read_source
from hf_mlopt.planning.training_memory import Training, checkpoint_bytes, trained_weights, weights_of
from hf_mlopt.planning.ways import Machine, Way, all_ways, asked_way, layerwise_of, refusal, training_of


_UNCERTAIN = 0.15  # a run is refused only if it does not fit by more than the plan may be wrong by


@dataclass(frozen=True)
class DistillationPlan:
    """
    What a distillation will take. Printed, it is a table.

    Args:
        model (`dict`): Type, layers, experts, dtype and parameters of the student.
        run (`dict`): Data, batch and what is trained.
        ways (`list[Way]`): Every way to do it with these GPUs.
        asked (`str`): Label of the way that the recipe asks for.
        disk_bytes (`dict[str, int]`): Most that lies on disk at one time: `output`, `beside` it, `states` in the
            directory for offloaded ones.
        conflicts (`list[str]`): What the run would be refused for.
        notes (`list[str]`): What is allowed but may not be meant.
    """

    model: dict
    run: dict
    ways: list[Way]
    asked: str
    disk_bytes: dict[str, int]
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def way(self) -> Way:
        """The one that is asked for."""
        return next(way for way in self.ways if way.label == self.asked)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        record = asdict(self)
        for way, entry in zip(self.ways, record["ways"], strict=True):
            entry |= {"label": way.label, "fits": way.fits, "total": way.peak.total}
        return record

    def __str__(self) -> str:
        from hf_mlopt.planning.distillation_table import as_table

        return as_table(self)


def plan_distillation(
    recipe, *, gpus: int | None = None, gpu_memory: int | None = None, sharded: bool = False
) -> DistillationPlan:
    """
    Plans a distillation from the configurations and the headers of its checkpoints.

    Args:
        recipe (`DistillRecipe`): What `hf-mlopt distill` would be given; a `teacher` that is the student itself stands
            for one of the same shape.
        gpus (`int`, *optional*): GPUs to train on; those of this machine, or one if their memory is given.
        gpu_memory (`int`, *optional*): Bytes of each; what is free in the smallest of this machine.
        sharded (`bool`, *optional*, defaults to `False`): Whether several GPUs are to share the models (FSDP2).

    Raises:
        InputError: If a model is no mixture of experts, or stored in a way that is not understood. What can be
            understood but not be done is in `conflicts`.
    """
    source = read_source(recipe.student, recipe.student_revision)
    shape = read_shape(source)
    teacher_source = source
    if recipe.teacher not in (None, recipe.student):
        teacher_source = read_source(recipe.teacher, recipe.teacher_revision)
    teacher = read_shape(teacher_source)
    found = _pair_conflicts(shape, teacher)
    machine = _machine(recipe.device, gpus, gpu_memory, sharded)
    if gpus is None and gpu_memory is None:
        found += device_conflicts(recipe.device)
    length = min(recipe.sequence_length, shape.context or recipe.sequence_length)
    if found:
        teacher = shape  # whose layers can be told one by one
    ways = all_ways(shape, teacher, recipe, length, machine)
    asked = asked_way(ways, recipe, machine)
    if missing := asked.missing():
        found.append(refusal(asked, missing, ways))
    disk = _disk(source, shape, teacher, recipe, length, machine)
    found += _disk_conflicts(recipe, disk, (source, teacher_source))
    return DistillationPlan(
        model=_about(source, shape),
        run={
            "mode": recipe.mode,
            "samples": recipe.samples,
            "eval_samples": recipe.eval_samples,
            "sequence_length": length,
            "batch_size": recipe.batch_size,
            "trained_parameters": _trained(shape, recipe),
            "gpus": machine.gpus,
        },
        ways=ways,
        asked=asked.label,
        disk_bytes=disk,
        conflicts=found,
        notes=_notes(recipe, shape, length, machine),
    )


def check_distillation_memory(recipe, student: Path, teacher: Path | None, *, gpu_memory: int | None = None) -> None:
    """
    Refuses a run that cannot fit where it was started, before any weights are loaded: in one process, or in those of
    `accelerate launch`, with FSDP2 or without.

    Args:
        recipe (`DistillRecipe`): What is to be done.
        student (`Path`), teacher (`Path`, *optional*): Directories of the checkpoints; no teacher where what it gives
            is on disk.
        gpu_memory (`int`, *optional*): Free bytes of this process's GPU; None if it trains on the CPU.

    Raises:
        InputError: If the plan, less what it may be wrong by, exceeds the memory of the GPU, or without one the
            available memory of the machine; it names both, and a way that fits.
    """
    try:
        shapes = [read_shape(read_source(str(directory))) for directory in (student, teacher or student)]
    except InputError:
        return  # stored in a way that only loading understands: nothing is known of its size
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    sharded = _is_set("ACCELERATE_USE_FSDP")
    added = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16", _is_set("FSDP_ACTIVATION_CHECKPOINTING")
    memory = available_memory() + own_memory()  # what it has taken already is in the plan
    if gpu_memory is not None:
        machine = Machine(processes, gpu_memory, memory if here == processes else None, sharded, *added)
    elif sharded and processes > 1:
        return  # shares on CPUs are for trying things out
    else:
        machine = Machine(0, None, memory // here)
    length = min(recipe.sequence_length, shapes[0].context or recipe.sequence_length)
    ways = all_ways(*shapes, recipe, length, machine)
    asked = asked_way(ways, recipe, machine)
    if missing := asked.missing(_UNCERTAIN):
        raise InputError(refusal(asked, missing, ways))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def _machine(device: str, gpus: int | None, gpu_memory: int | None, sharded: bool) -> Machine:
    """What was given, or else what this machine has; of another machine only the GPUs are known."""
    memory = available_memory() if gpu_memory is None else None
    here = gpu_memories(device) if gpus is None or gpu_memory is None else []
    if gpus is None:
        gpus = max(1, len(here)) if gpu_memory is not None else len(here)
    if gpus and gpu_memory is None:
        if not here:
            raise InputError(f"gpus={gpus}: nvidia-smi shows none on this machine; say what one has, --gpu-memory 80")
        gpu_memory = min(here)
    return Machine(gpus, gpu_memory, memory, sharded)


def _pair_conflicts(shape: ModelShape, teacher: ModelShape) -> list[str]:
    """In what a teacher differs from its student, as `distill` refuses it."""
    sizes = [
        {
            "a vocabulary of": model.config.get("vocab_size"),
            "decoder layers": len(model.layers),
            "hidden size": model.hidden,
            "experts": max(layer.num_experts for layer in model.layers),
            "layers with experts": sum(bool(layer.num_experts) for layer in model.layers),
            "experts per token": model.top_k,
        }
        for model in (shape, teacher)
    ]
    differing = [f"{name} {ours} and {sizes[1][name]}" for name, ours in sizes[0].items() if ours != sizes[1][name]]
    return [f"teacher: does not fit the student, which have {'; '.join(differing)}"] if differing else []


def _disk(source: Source, shape: ModelShape, teacher: ModelShape, recipe, length: int, machine: Machine) -> dict:
    output = sum(file_bytes(planned_layout(shape, source.layout)).values())
    if recipe.mode == "layerwise":
        run = layerwise_of(recipe, length)
        beside, states = disk_beside_output(teacher, run)
        return {"output": output, "beside": beside, "states": states}
    checkpoint = checkpoint_bytes(shape, training_of(recipe, length, recipe.lora_rank))
    # A training checkpoint is removed when the next one is there; the last one, when the output is.
    beside = max(2 * checkpoint - output, checkpoint) if _steps(recipe, machine) > recipe.save_steps else checkpoint
    return {"output": output, "beside": beside, "states": 0}


def _steps(recipe, machine: Machine) -> int:
    batches = math.ceil(recipe.samples / (recipe.batch_size * max(1, machine.gpus)))
    return math.ceil(math.ceil(batches / recipe.gradient_accumulation_steps) * recipe.epochs)


def _disk_conflicts(recipe, disk: dict[str, int], sources: tuple[Source, Source]) -> list[str]:
    found = []
    place = Path(recipe.output or ".").expanduser().resolve()
    if recipe.output is not None:
        try:
            check_output(recipe.output)
        except InputError as error:
            found.append(str(error))
        place = place.parent
    wanted = [("output", place, 0 if recipe.resume else disk["output"] + disk["beside"])]
    if recipe.offload_states:
        wanted.append(("offload_states", Path(recipe.offload_states).expanduser().resolve(), disk["states"]))
    downloads = {source.name: source for source in sources if source.to_download}
    wanted += [("model", source.download_to, source.to_download) for source in downloads.values()]
    for name, where, needed in wanted:
        free = free_disk(where)
        if needed > free:
            found.append(
                f"{name}: needs {needed / 1e9:.2f} GB, but the disk of {where} has {free / 1e9:.2f} GB free; free "
                "some space or name a directory on another disk"
            )
    return found


def _notes(recipe, shape: ModelShape, length: int, machine: Machine) -> list[str]:
    found = []
    if length < recipe.sequence_length:
        found.append(f"sequence_length={recipe.sequence_length} is cut to the model's context of {length} tokens")
    if recipe.mode == "layerwise" and machine.gpus > 1:
        found.append(f"layer-wise distillation runs in one process: {machine.gpus - 1} of the GPUs would be idle")
    return found


def _trained(shape: ModelShape, recipe) -> int:
    rank = recipe.lora_rank if recipe.mode == "end-to-end" else None
    only = "experts" if recipe.mode == "layerwise" else recipe.trained
    return trained_weights(shape, Training(1, 1, trained=only, lora_rank=rank))


def _about(source: Source, shape: ModelShape) -> dict:
    return {
        "source": source.name,
        "revision": source.revision,
        "model_type": shape.model_type,
        "layers": len(shape.layers),
        "moe_layers": sum(bool(layer.num_experts) for layer in shape.layers),
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "dtype": shape.dtype,
        "parameters": weights_of(shape),
    }
