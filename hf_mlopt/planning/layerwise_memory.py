"""How much memory a layer-wise distillation takes at its highest point, told as in `training_memory`."""

# N windows   T tokens of a step   S slots = T * K   H hidden   I expert intermediate

from dataclasses import dataclass

from hf_mlopt.hub.shards import DTYPE_BYTES
from hf_mlopt.planning.memory import CALIBRATING, INTERPRETER, Peak
from hf_mlopt.planning.shape import LayerShape, ModelShape
from hf_mlopt.planning.training_memory import KEPT_BLOCK, expert_weights, up_weights


_FLOAT32, _INT32, _INT64 = 4, 4, 8
_ADAMW = 8
_VECTORS = 8  # hidden vectors per slot that a forward pass has at once beside wider activations


@dataclass(frozen=True)
class Layerwise:
    """
    What of a layer-wise distillation decides its memory.

    Args:
        windows (`int`), length (`int`): Windows to train and to evaluate on, and tokens in each.
        batch_size (`int`): Windows per step.
        streamed (`bool`): Layers come from disk and go to disk; otherwise both models are in memory.
        offloaded (`bool`): Whether what is known of the windows is on disk.
        save_states_every (`int`): Layers between two states that a run can go on from.
    """

    windows: int
    length: int
    batch_size: int
    streamed: bool = True
    offloaded: bool = False
    save_states_every: int = 4

    @property
    def tokens(self) -> int:
        """T, of a step."""
        return min(self.batch_size, self.windows) * self.length


def layerwise_peak(shape: ModelShape, teacher: ModelShape, run: Layerwise, *, accelerator: bool = True) -> Peak:
    """
    The highest point on the device where a layer is trained, without what the host holds in any case.

    Args:
        shape (`ModelShape`), teacher (`ModelShape`): Student and teacher.
        run (`Layerwise`): How the layers are trained.
        accelerator (`bool`, *optional*, defaults to `True`): Whether that device is a GPU.
    """
    moments = [
        moment
        for layer, original in zip(shape.layers, teacher.layers, strict=True)
        if layer.num_experts
        for moment in _moments(shape, teacher, layer, original, run, accelerator)
    ]
    return max(moments, key=lambda peak: peak.total)


def layerwise_host(shape: ModelShape, teacher: ModelShape, run: Layerwise) -> dict[str, int]:
    """What the memory of the machine holds in any case, by part, wherever layers are trained."""
    width = DTYPE_BYTES[teacher.dtype]
    parts = {"interpreter": INTERPRETER + CALIBRATING}
    if not run.offloaded:
        parts |= {"states": state_bytes(teacher, run), "inputs of experts": _input_bytes(teacher, run)}
    if not run.streamed:
        parts["models"] = _model_bytes(shape) + _model_bytes(teacher)
    embedding = sum(info.numel for info in teacher.embedding.values()) * width
    layer = max(_layer_bytes(layer, width) for layer in teacher.layers)
    parts["a layer on its way"] = max(embedding, layer) if run.streamed else 0
    return parts


def state_bytes(teacher: ModelShape, run: Layerwise) -> int:
    """The input of one layer for all windows."""
    return run.windows * run.length * teacher.hidden * DTYPE_BYTES[teacher.dtype]


def disk_beside_output(teacher: ModelShape, run: Layerwise) -> tuple[int, int]:
    """Bytes beside the output, of states to go on from, and in the directory for offloaded states."""
    if not run.streamed:
        return 0, 0
    if run.offloaded:
        return 0, min(2, len(teacher.layers)) * state_bytes(teacher, run) + _input_bytes(teacher, run)
    saves = (len(teacher.layers) - 1) // run.save_states_every
    return min(2, saves) * state_bytes(teacher, run), 0


def _moments(
    shape: ModelShape, teacher: ModelShape, layer: LayerShape, original: LayerShape, run: Layerwise, accelerator
):
    width = DTYPE_BYTES[shape.dtype]
    experts = expert_weights(layer)
    masters = 0 if width == _FLOAT32 else _FLOAT32 * experts
    in_float32 = shape.dtype == "F16"  # trained as they are turned to float32, so that there is no second copy
    held = {
        "teacher's layer": _layer_bytes(original, DTYPE_BYTES[teacher.dtype]),
        "student's layer": _layer_bytes(layer, width) - in_float32 * width * experts,
        "layer as it was": width * experts,
        "float32 weights": masters,
        "AdamW": _ADAMW * experts,
        "masks": experts,
    }
    own = _FLOAT32 if in_float32 else width  # of a gradient as the backward pass gives it
    gradients = own * experts
    # While AdamW is given float32 gradients of bfloat16 weights, one parameter has both.
    at_step = _FLOAT32 * experts + (own * min(up_weights(layer), experts - up_weights(layer)) if own < _FLOAT32 else 0)
    # The gradient of the larger parameter as it is computed, before it is copied to the layout of the weights.
    single = own * up_weights(layer)
    activations, rest, vectors = _activations(shape, teacher, layer, run, own)
    freed = {} if accelerator else _freed(activations, rest, vectors)
    name = f"in layer {layer.index}"
    yield Peak(f"in a backward pass {name}", {**held, "activations": activations, **freed.get("middle", {})})
    last = {"gradients": gradients, "activations": rest, "workspace": single, **freed.get("end", {})}
    yield Peak(f"at the end of a backward pass {name}", {**held, **last})
    yield Peak(f"at a step of AdamW {name}", {**held, "gradients": at_step})


def _activations(shape: ModelShape, teacher: ModelShape, layer: LayerShape, run: Layerwise, width: int):
    """
    Bytes of activations and their gradients where they are most, in the gate of the experts or at the loss; of what is
    left at the last product; and of one hidden vector for every slot.
    """
    slots, hidden, inner = run.tokens * shape.top_k, shape.hidden, layer.intermediate
    up = sum(matrix.outputs * matrix.experts for matrix in layer.experts if matrix.reads == "hidden")
    up //= layer.num_experts
    targets = DTYPE_BYTES[teacher.dtype]
    inputs = run.tokens * (hidden * targets + shape.top_k * (_INT64 + _INT32))
    # The gathered input, gate and up, the activation and its product; outputs of both, their float32 copies, the
    # difference and its square.
    copies = _FLOAT32 * (2 + (width < _FLOAT32) + (targets < _FLOAT32))
    loss = (hidden + up + 2 * inner) * width + hidden * (width + targets + copies)
    # The gathered input, gate and up, the activation; gradients of the product, of its two factors, of gate and up.
    gate = (hidden + 2 * up + 4 * inner) * width
    return inputs + slots * max(loss, gate), inputs + slots * (hidden + 2 * up) * width, slots * hidden * width


def _freed(activations: int, rest: int, vectors: int) -> dict[str, dict[str, int]]:
    """On a CPU, what of freed activations stays with the process: all of them, or only the narrow ones."""
    if activations - rest < KEPT_BLOCK:
        return {"end": {"freed activations": activations - rest}}
    kept = _VECTORS * vectors if vectors < KEPT_BLOCK else 0
    return {"middle": {"freed activations": kept}, "end": {"freed activations": kept}}


def _input_bytes(teacher: ModelShape, run: Layerwise) -> int:
    """What the experts of a layer are given for all windows: a vector, and the experts' numbers."""
    return state_bytes(teacher, run) + run.windows * run.length * teacher.top_k * _INT32


def _layer_bytes(layer: LayerShape, width: int) -> int:
    return sum(info.numel for info in layer.tensors.values()) * width


def _model_bytes(shape: ModelShape) -> int:
    inside = sum(_layer_bytes(layer, DTYPE_BYTES[shape.dtype]) for layer in shape.layers)
    return inside + sum(info.numel for info in shape.rest.values()) * DTYPE_BYTES[shape.dtype]
