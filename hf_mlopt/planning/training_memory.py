"""
How much memory an end-to-end distillation takes at its highest point: formulas over the moments of a training step,
the largest of which counts.

Each formula follows the code it describes: what is alive at once, times its size. What was measured is said where it
is used.
"""

# T tokens of a micro-batch   K experts per token   S slots = T * K   H hidden   I expert intermediate   V vocabulary
# L layers   N trained weights

from dataclasses import dataclass

from hf_mlopt.hub.shards import DTYPE_BYTES
from hf_mlopt.planning.memory import CALIBRATING, INTERPRETER, Peak
from hf_mlopt.planning.shape import LayerShape, ModelShape


TRAINER = 150_000_000  # peft, accelerate, the threads of a backward pass: beside what a sweep takes
_FLOAT32, _BFLOAT16, _INDEX = 4, 2, 8
_ADAMW = 8  # two float32 moments
_REROUTED = 0.25  # of the slots: experts that the teacher chose and the student did not, which come in addition
_NORMS = 6  # hidden vectors that the two norms of a layer keep: input, scaled and weighted
# On a CPU, freed blocks below this stay with the process: glibc keeps them for later ones of their size.
KEPT_BLOCK = 32 << 20
# Copies of a layer that FSDP2 has made whole: its weights, those of the next and the buffer they arrive in; its
# gradients and the buffer they leave in.
_GATHERED_WEIGHTS, _GATHERED_GRADIENTS = 3, 2


@dataclass(frozen=True)
class Training:
    """
    What of an end-to-end distillation decides its memory.

    Args:
        batch_size (`int`), length (`int`): Windows of a micro-batch on one process, and tokens in each.
        accumulation (`int`): Micro-batches per step.
        experts (`bool`), logits (`bool`): Whether outputs of experts, and logits, are compared with the teacher's.
        trained (`str`): `all` or `experts`.
        lora_rank (`int`, *optional*): Adapters of this rank on the experts are trained instead.
        bf16 (`bool`): Whether matrix products are computed in bfloat16.
        checkpointing (`bool`): Whether activations are computed a second time instead of being kept.
        teacher_on_disk (`bool`): What the teacher gives is read from disk, and there is none in memory.
        processes (`int`): GPUs that train together.
        sharded (`bool`): FSDP2: each holds a share of both models. Otherwise each holds all (DDP).
    """

    batch_size: int
    length: int
    accumulation: int = 1
    experts: bool = True
    logits: bool = False
    trained: str = "all"
    lora_rank: int | None = None
    bf16: bool = False
    checkpointing: bool = False
    teacher_on_disk: bool = False
    processes: int = 1
    sharded: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def needs_teacher(self) -> bool:
        return (self.experts or self.logits) and not self.teacher_on_disk

    @property
    def shares(self) -> int:
        """Parts that the weights are divided into."""
        return self.processes if self.sharded else 1


def weights_of(shape: ModelShape) -> int:
    """All parameters of a model."""
    inside = sum(info.numel for layer in shape.layers for info in layer.tensors.values())
    return inside + sum(info.numel for info in shape.rest.values())


def expert_weights(layer: LayerShape) -> int:
    """Weights in the experts' matrices of a layer."""
    return sum(matrix.numel for matrix in layer.experts)


def up_weights(layer: LayerShape) -> int:
    """Of those, the ones that read the layer's input: gate and up projections are one parameter."""
    return sum(matrix.numel for matrix in layer.experts if matrix.reads == "hidden")


def trained_weights(shape: ModelShape, training: Training) -> int:
    """N, the weights that the optimizer has moments of; the few of a frozen router are counted too."""
    if training.lora_rank is not None:
        return sum(_adapter_weights(shape, layer, training.lora_rank) for layer in shape.layers)
    if training.trained == "experts":
        return sum(expert_weights(layer) for layer in shape.layers)
    return weights_of(shape)


def student_bytes(shape: ModelShape, training: Training) -> int:
    """Of one weight of the student: float32, but frozen ones stay as they are stored where they are not sharded."""
    frozen = training.lora_rank is not None and not training.sharded
    return DTYPE_BYTES[shape.dtype] if frozen else _FLOAT32


def masked_weights(shape: ModelShape, training: Training) -> int:
    """Weights with a byte that says whether they are held at zero; of pruned adapters the base model says it."""
    if training.lora_rank is not None:
        return 0
    everything = training.trained == "all" and (shape.config.get("hf_mlopt") or {}).get("scope") == "all-linear"
    linears = sum(matrix.numel for layer in shape.layers for matrix in layer.linears) if everything else 0
    return sum(expert_weights(layer) for layer in shape.layers) + linears


def end_to_end_peak(shape: ModelShape, teacher: int, training: Training, *, accelerator: bool = True) -> Peak:
    """
    The highest point of one process, on the device where it trains.

    Args:
        shape (`ModelShape`): The student.
        teacher (`int`): Bytes of the teacher in the type it is loaded in.
        training (`Training`): How it is trained.
        accelerator (`bool`, *optional*, defaults to `True`): Whether that device is a GPU, whose memory holds no
            interpreter.
    """
    weights, trained = weights_of(shape), trained_weights(shape, training)
    held = {} if accelerator else {"interpreter": INTERPRETER + CALIBRATING + TRAINER}
    held |= {
        "student": _share(student_bytes(shape, training) * weights, training),
        "teacher": _share(teacher, training) if training.needs_teacher else 0,
        "AdamW": _share(_ADAMW * trained, training),
        "masks": _share(masked_weights(shape, training), training),
        "gathered layers": _gathered(shape, training),
    }
    if training.processes > 1 and not training.sharded:
        held["buckets of DDP"] = _FLOAT32 * trained  # gradients are copied there to be exchanged
    gradients, targets = _share(_FLOAT32 * trained, training), _targets(shape, teacher / weights, training)
    kept, last = _activations(shape, training)
    beginning = {**held, "targets": training.accumulation * targets, "activations": kept}
    logits, single = _logits(shape, training), _single_gradients(shape, training)
    moments = [
        Peak("computing the loss", {**beginning, "logits": logits}),
        Peak("at the beginning of a backward pass", {**beginning, "workspace": last + single}),
        Peak(
            "at the end of a backward pass",
            {
                **held,
                "targets": training.accumulation * targets,
                "gradients": gradients,
                "workspace": single + last * training.checkpointing,
                "freed activations": 0 if accelerator else _freed_activations(shape, training.tokens, kept),
            },
        ),
    ]
    if training.accumulation > 1:  # the gradients of the micro-batches before are there already
        beginning |= {"targets": (training.accumulation - 1) * targets, "gradients": gradients}
        moments.append(Peak("computing the loss of a further micro-batch", {**beginning, "logits": logits}))
        moments.append(Peak("at the beginning of a further backward pass", {**beginning, "workspace": last + single}))
    if not training.sharded:
        moments.append(Peak("writing the result", {**held, "result": _result(shape, training)}))
    return max(moments, key=lambda peak: peak.total)


def _freed_activations(shape: ModelShape, tokens: int, kept: int) -> int:
    """What a process on the CPU still has of activations that are freed, where they are small blocks."""
    widest = max((matrix.inputs for layer in shape.layers for matrix in layer.experts), default=0)
    return kept if tokens * shape.top_k * widest * _FLOAT32 < KEPT_BLOCK else 0


def host_bytes(shape: ModelShape, teacher: int, training: Training) -> int:
    """
    Memory of the machine that all processes on it take together when they train on its GPUs. Under FSDP2 with
    `cpu_ram_efficient_loading` the first process alone loads, and collects the result.
    """
    processes = training.processes * (INTERPRETER + CALIBRATING + TRAINER)
    loaded = student_bytes(shape, training) * weights_of(shape) + (teacher if training.needs_teacher else 0)
    if not training.sharded:
        return processes + training.processes * loaded
    merging = _FLOAT32 if training.lora_rank is not None else 0  # adapters are merged into a second copy
    result = (_FLOAT32 + merging + DTYPE_BYTES[shape.dtype]) * weights_of(shape)
    return processes + max(loaded, result)


def checkpoint_bytes(shape: ModelShape, training: Training) -> int:
    """A training checkpoint on disk: float32 weights, or the adapters alone, and the moments of the optimizer."""
    trained = trained_weights(shape, training)
    return _FLOAT32 * (trained if training.lora_rank is not None else weights_of(shape)) + _ADAMW * trained


def _share(count: int, training: Training) -> int:
    return -(-count // training.shares)


def _adapter_weights(shape: ModelShape, layer: LayerShape, rank: int) -> int:
    if not layer.num_experts:
        return 0
    up = up_weights(layer) // (layer.num_experts * shape.hidden)
    return rank * layer.num_experts * (shape.hidden + up + layer.intermediate + shape.hidden)


def _targets(shape: ModelShape, teacher_width: float, training: Training) -> int:
    """What the teacher makes of one micro-batch: `[T, K, H]` and the experts' numbers of every layer, logits."""
    cast = training.bf16 and training.sharded
    width = _BFLOAT16 if cast else round(teacher_width)
    layers = sum(bool(layer.num_experts) for layer in shape.layers)
    slots = training.tokens * shape.top_k
    outputs = layers * slots * (shape.hidden * width + _INDEX) if training.experts else 0
    return outputs + (training.tokens * _vocabulary(shape) * _dense_bytes(shape, training) if training.logits else 0)


def _activations(shape: ModelShape, training: Training) -> tuple[int, int]:
    """What a forward pass keeps for the backward pass, and what the backward pass of one layer takes beside it."""
    of_layers = [_layer_activations(shape, layer, training) for layer in shape.layers]
    workspace = max(_layer_workspace(shape, layer, training) for layer in shape.layers)
    if not training.checkpointing:
        return sum(of_layers), workspace
    return len(of_layers) * training.tokens * shape.hidden * _FLOAT32, workspace + max(of_layers)


def _layer_activations(shape: ModelShape, layer: LayerShape, training: Training) -> int:
    tokens, slots, hidden = training.tokens, _slots(shape, training), shape.hidden
    size = _NORMS * tokens * hidden * _FLOAT32
    size += 2 * tokens * sum(matrix.outputs for matrix in layer.linears) * _dense_bytes(shape, training)
    if layer.num_experts:
        # The gathered input, gate and up, the activation and its product, and the output that the router weighs.
        width = 2 * hidden + _up_width(layer) + 2 * layer.intermediate
        size += slots * width * _expert_bytes(shape, training)
        size += tokens * shape.top_k * hidden * _FLOAT32 if training.experts else 0  # differences, to be squared
        if training.lora_rank is not None:  # W + B A and where W is zero
            size += expert_weights(layer) * (_expert_bytes(shape, training) + 1)
    return size


def _layer_workspace(shape: ModelShape, layer: LayerShape, training: Training) -> int:
    """Gradients of activations where they are most, in the gate: of the product, its two factors, gate and up."""
    if not layer.num_experts:
        return 2 * training.tokens * sum(matrix.outputs for matrix in layer.linears) * _dense_bytes(shape, training)
    slots = _slots(shape, training)
    return slots * (_up_width(layer) + 3 * layer.intermediate) * _expert_bytes(shape, training)


def _expert_bytes(shape: ModelShape, training: Training) -> int:
    """
    Of an activation inside the experts. Autocast leaves grouped products in the type of their weights; FSDP2 casts the
    weights.
    """
    return _BFLOAT16 if training.bf16 and training.sharded else student_bytes(shape, training)


def _dense_bytes(shape: ModelShape, training: Training) -> int:
    """Of an activation outside the experts."""
    return _BFLOAT16 if training.bf16 else student_bytes(shape, training)


def _up_width(layer: LayerShape) -> int:
    return sum(matrix.outputs * matrix.experts for matrix in layer.experts if matrix.reads == "hidden") // (
        layer.num_experts
    )


def _slots(shape: ModelShape, training: Training) -> int:
    return round(training.tokens * shape.top_k * (1 + _REROUTED * training.experts))


def _single_gradients(shape: ModelShape, training: Training) -> int:
    """The gradient of the largest parameter before it is kept, and its copy with zeros where they are held."""
    if training.sharded:
        return 0  # of gathered layers, and masked in place
    return 2 * student_bytes(shape, training) * max(up_weights(layer) for layer in shape.layers)


def _logits(shape: ModelShape, training: Training) -> int:
    """Logarithms of probabilities and two gradients; of a divergence, also those of both models and copies."""
    copies = 3 + 5 * training.logits
    return copies * training.tokens * _vocabulary(shape) * _FLOAT32


def _vocabulary(shape: ModelShape) -> int:
    return shape.config.get("vocab_size") or 0


def _gathered(shape: ModelShape, training: Training) -> int:
    if not training.sharded:
        return 0
    layer = max(sum(info.numel for info in layer.tensors.values()) for layer in shape.layers)
    copies = _GATHERED_WEIGHTS + (0 if training.lora_rank is not None else _GATHERED_GRADIENTS)
    head = _vocabulary(shape) * shape.hidden  # stays whole from the forward to the backward pass
    return (copies * layer + head) * (_BFLOAT16 if training.bf16 else _FLOAT32)


def _result(shape: ModelShape, training: Training) -> int:
    """Weights in the type they are stored in, and gate and up projections that are split for files by expert."""
    width = DTYPE_BYTES[shape.dtype]
    split = sum(
        matrix.numel
        for layer in shape.layers
        for matrix in layer.experts
        if matrix.experts == 1 and matrix.reads == "hidden"
    )
    return (weights_of(shape) if width != student_bytes(shape, training) else 0) * width + split * width
