"""The ways to distil a model on a machine: what each takes, whether it fits, and what to do where it does not."""

from dataclasses import dataclass, replace

from hf_mlopt.hub.shards import DTYPE_BYTES
from hf_mlopt.planning.layerwise_memory import Layerwise, layerwise_host, layerwise_peak
from hf_mlopt.planning.memory import Peak
from hf_mlopt.planning.shape import ModelShape
from hf_mlopt.planning.training_memory import Training, end_to_end_peak, host_bytes, weights_of


_FSDP2 = "--config_file accelerate/fsdp2.yaml (hf-mlopt recipes copy accelerate/fsdp2 --output .)"


_LORA_RANK = 16  # where the recipe names none


@dataclass(frozen=True)
class Way:
    """
    One way to distil a model on one machine.

    Args:
        name (`str`): Mode, and what is trained.
        place (`str`): `CPU`, `one GPU`, `DDP on 8` or `FSDP2 on 8`.
        gpu (`Peak`, *optional*): Memory of each GPU; None on the CPU.
        host_bytes (`int`): Memory of the machine, of all processes on it.
        host (`Peak`, *optional*): What that is made of, where it is known.
        gpu_available (`int`, *optional*), host_available (`int`, *optional*): What there is, where it is known.
    """

    name: str
    place: str
    gpu: Peak | None
    host_bytes: int
    host: Peak | None
    gpu_available: int | None
    host_available: int | None

    @property
    def label(self) -> str:
        return f"{self.name}, {self.place}"

    @property
    def peak(self) -> Peak:
        """Where the models are: of a GPU, or of the process."""
        return self.gpu or self.host

    @property
    def fits(self) -> bool | None:
        """Whether there is room; None if nothing is known of the machine."""
        if (self.gpu_available if self.gpu is not None else self.host_available) is None:
            return None
        return not self.missing()

    def missing(self, margin: float = 0.0) -> str:
        """What does not fit even if the plan is too high by a share of `margin`, in words; empty if all does."""
        rooms = [(self.host_bytes, self.host_available, "of memory")]
        if self.gpu is not None:
            rooms.insert(0, (self.gpu.total, self.gpu_available, "per GPU"))
        for needed, available, where in rooms:
            if available is not None and needed * (1 - margin) > available:
                return f"{needed / 1e9:.1f} GB {where}, but {available / 1e9:.1f} GB are available"
        return ""


@dataclass(frozen=True)
class Machine:
    """
    GPUs to train on and what they have.

    Args:
        gpus (`int`): How many; 0 for the CPU.
        gpu_memory (`int`, *optional*): Bytes of each.
        memory (`int`, *optional*): Bytes of the machine, where it is this one.
        sharded (`bool`): Whether FSDP2 is meant where there are several.
        bf16 (`bool`), checkpointing (`bool`): What the configuration of `accelerate launch` adds to the recipe where
            there are several: products in bfloat16 and, under FSDP2, activations that are computed a second time. By
            default as in `recipes/accelerate`.
    """

    gpus: int
    gpu_memory: int | None
    memory: int | None
    sharded: bool = False
    bf16: bool = True
    checkpointing: bool = True


def all_ways(shape: ModelShape, teacher: ModelShape, recipe, length: int, machine: Machine) -> list[Way]:
    """
    Every way to distil on a machine: layer by layer, whole, and with adapters; on the CPU, one GPU, and several.

    Args:
        shape (`ModelShape`), teacher (`ModelShape`): Student and teacher, alike but for their type.
        recipe (`DistillRecipe`): What is to be done; its mode does not matter.
        length (`int`): Tokens of a window, cut to the model's context.
        machine (`Machine`): What there is.
    """
    run = layerwise_of(recipe, length)
    ways = [_layerwise(shape, teacher, run, machine, on_gpu=False)]
    if machine.gpus:
        ways.append(_layerwise(shape, teacher, run, machine, on_gpu=True))
    for rank in (None, recipe.lora_rank or _LORA_RANK):
        base = training_of(recipe, length, rank)
        if not machine.gpus:
            ways.append(_end_to_end(shape, teacher, base, machine, "CPU"))
            continue
        ways.append(_end_to_end(shape, teacher, base, machine, "one GPU"))
        if machine.gpus > 1:
            several = replace(base, processes=machine.gpus, bf16=base.bf16 or machine.bf16)
            ways.append(_end_to_end(shape, teacher, several, machine, f"DDP on {machine.gpus}"))
            shared = replace(several, sharded=True, checkpointing=base.checkpointing or machine.checkpointing)
            ways.append(_end_to_end(shape, teacher, shared, machine, f"FSDP2 on {machine.gpus}"))
    return ways


def asked_way(ways: list[Way], recipe, machine: Machine) -> Way:
    """The one of them that a recipe and the number of GPUs amount to."""
    name = "layerwise" if recipe.mode == "layerwise" else _name(recipe.lora_rank)
    place = "CPU" if not machine.gpus else "one GPU"
    if recipe.mode == "end-to-end" and machine.gpus > 1:
        place = f"{'FSDP2' if machine.sharded else 'DDP'} on {machine.gpus}"
    return next(way for way in ways if way.label == f"{name}, {place}")


def _name(rank: int | None) -> str:
    return "end-to-end" if rank is None else f"end-to-end with LoRA of rank {rank}"


def _layerwise(shape: ModelShape, teacher: ModelShape, run: Layerwise, machine: Machine, on_gpu: bool) -> Way:
    peak = layerwise_peak(shape, teacher, run, accelerator=on_gpu)
    host = layerwise_host(shape, teacher, run)
    if on_gpu:
        available = machine.gpu_memory
        whole = Peak("throughout", host)
        return Way("layerwise", "one GPU", peak, whole.total, whole, available, machine.memory)
    parts = {**host, "a layer on its way": 0, **peak.parts}
    whole = Peak(peak.moment, {name: size for name, size in parts.items() if size})
    return Way("layerwise", "CPU", None, whole.total, whole, None, machine.memory)


def _end_to_end(shape: ModelShape, teacher: ModelShape, training: Training, machine: Machine, place: str) -> Way:
    teacher_bytes = weights_of(teacher) * DTYPE_BYTES[teacher.dtype]
    peak = end_to_end_peak(shape, teacher_bytes, training, accelerator=place != "CPU")
    name = _name(training.lora_rank)
    if place == "CPU":
        return Way(name, place, None, peak.total, peak, None, machine.memory)
    host = host_bytes(shape, teacher_bytes, training)
    return Way(name, place, peak, host, None, machine.gpu_memory, machine.memory)


def layerwise_of(recipe, length: int) -> Layerwise:
    """How a recipe trains layer by layer."""
    return Layerwise(
        recipe.samples + recipe.eval_samples,
        length,
        recipe.batch_size,
        recipe.stream,
        recipe.offload_states is not None,
        recipe.save_states_every,
    )


def training_of(recipe, length: int, rank: int | None) -> Training:
    """How a recipe trains end-to-end in one process, with adapters of a rank or without."""
    return Training(
        batch_size=recipe.batch_size,
        length=length,
        accumulation=recipe.gradient_accumulation_steps,
        experts=recipe.lmbda != 0,
        logits=recipe.logit_weight > 0,
        trained=recipe.trained,
        lora_rank=rank,
        bf16=recipe.bf16,
        checkpointing=recipe.activation_checkpointing,
        teacher_on_disk=recipe.teacher_targets is not None,
    )


def refusal(asked: Way, missing: str, ways: list[Way]) -> str:
    """What does not fit, and the ways that do."""
    whole = " (each GPU holds all of both models)" if asked.place.startswith("DDP") else ""
    others = [way for way in ways if way.fits and way.gpu is not None] or [way for way in ways if way.fits]
    remedies = [f"{_how(way)} ({way.peak.total / 1e9:.1f} GB)" for way in others]
    if asked.host is not None and asked.host.parts.get("states"):
        remedies.append("--offload-states DIR, which keeps what is known of the windows on disk")
    remedy = (
        f"What fits: {'; or '.join(remedies)}"
        if others
        else "; or ".join([*remedies, "lower batch_size or sequence_length, or use larger or more GPUs"])
    )
    return f"memory: {asked.label}, needs {missing}{whole}. {remedy}"


def _how(way: Way) -> str:
    """How a way is asked for."""
    words = "--mode layerwise" if way.name == "layerwise" else "--mode end-to-end"
    if "LoRA" in way.name:
        words += f" --lora-rank {way.name.rpartition(' ')[2]}"
    if way.place.startswith("FSDP2"):
        return f"{words} under accelerate launch {_FSDP2}"
    return f"{words} on {way.place}" if not way.place.startswith("DDP") else f"{words} under accelerate launch"
