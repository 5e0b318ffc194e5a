"""
How much memory a run takes at its highest point: formulas over the moments of a sweep, the largest of which counts.

Each formula follows the code it describes: what is alive at once, times its size. The constants were measured.
"""

# T tokens of a batch   S slots = T * K   H hidden   I expert intermediate   E experts   D input features

from dataclasses import dataclass

from hf_mlopt.hub.shards import DTYPE_BYTES
from hf_mlopt.planning.costs import Run, targets
from hf_mlopt.planning.shape import LayerShape, Matrix, ModelShape, is_float
from hf_mlopt.pruning.scores import METHODS


INTERPRETER = 405_000_000  # Python, torch, transformers, a model without weights
CALIBRATING = 120_000_000  # datasets, a tokenizer, the text, and the kernels of a forward pass
IN_MEMORY_FACTOR = 1.6  # saving with transformers, in units of the weights
_STREAMING_MARGIN = 0.8  # of the available memory that a model in memory may take
_CPU_CHUNK = 1 << 20  # weights scored at once
_ACCELERATOR_CHUNK = 1 << 26
_ACCELERATOR_WORK = 2  # times the activations of a batch: measured 1.9 on an H200 in bfloat16, in memory and streamed
_SCORING = 24  # bytes a weight that is being scored takes: score, its copies in selection, masks
_OUTER_CHUNK = 1 << 28  # floats of one step in which Hessians are summed
_SOLVING = 4  # a Hessian while it is inverted: damped, its factor, the inverse, the factor of that
_FLOAT32, _FLOAT64 = 4, 8


@dataclass(frozen=True)
class Peak:
    """
    Memory at the highest point of a run.

    Args:
        moment (`str`): What the run does then.
        parts (`dict[str, int]`): What takes how many bytes.
    """

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes that the system counts as the process's."""
        return sum(self.parts.values())


def must_stream(weight_bytes: int, state_bytes: int, available: int) -> bool:
    """Whether a model is too large to be pruned in memory."""
    return IN_MEMORY_FACTOR * weight_bytes + state_bytes > _STREAMING_MARGIN * available


def streamed_peak(shape: ModelShape, run: Run, states: int, *, accelerator: bool = False) -> Peak:
    """
    The highest point of a streamed run, on the device where layers are computed.

    Args:
        shape (`ModelShape`), run (`Run`): The model, and what is done to it.
        states (`int`): Bytes of the states of one layer.
        accelerator (`bool`, *optional*, defaults to `False`): Whether that device is a GPU, whose memory holds no
            interpreter.
    """
    width = DTYPE_BYTES[shape.dtype]
    always = {} if accelerator else {"interpreter": _interpreter(run)}
    held = {**always, "states": 0 if run.offloaded else states}
    moments = []
    if run.tokens and not accelerator:
        embedding = _loaded(shape.embedding, width)
        moments.append(Peak("embedding the calibration data", {**held, "embedding": embedding}))
    for layer in shape.layers:
        moments += _layer_moments(shape, run, layer, held, states, accelerator)
    if not accelerator:
        largest = max((_loaded({name: info}, width) for name, info in shape.rest.items()), default=0)
        moments.append(Peak("copying what is outside the layers", {**always, "embedding": largest}))
    return max(moments, key=lambda peak: peak.total)


def in_memory_peak(shape: ModelShape, run: Run, states: int, *, mapped: bool = True) -> Peak:
    """
    The highest point of a run with the whole model in memory: while it is loaded, swept or saved.

    Args:
        shape (`ModelShape`), run (`Run`), states (`int`): As in [`streamed_peak`].
        mapped (`bool`, *optional*, defaults to `True`): Whether pages of the source's files count, which loading maps
            into memory. The system counts them as the process's, but takes them back when it needs them.
    """
    width = DTYPE_BYTES[shape.dtype]
    inside = [layer.tensors for layer in shape.layers]
    weights = sum(_loaded(tensors, width) for tensors in [shape.rest, *inside])
    held = {"interpreter": _interpreter(run), "weights": weights}
    # Experts that the files hold one by one are put together from the pages of all files; of others, the pages of a
    # file go when its tensors have been taken. To be saved, they are split out of the stacks again, gate from up.
    one_by_one = [matrix for layer in shape.layers for matrix in layer.experts if matrix.experts == 1]
    of_layers = [sum(info.nbytes for info in tensors.values()) for tensors in inside]
    pages = (sum(of_layers) if one_by_one else max(of_layers)) if mapped else 0
    split = sum(matrix.numel * width for matrix in one_by_one if matrix.reads == "hidden")
    moments = [Peak("loading", {**held, "mapped files": pages}), Peak("saving", {**held, "saving": split})]
    for layer in shape.layers:
        for moment in _layer_moments(shape, run, layer, {**held, "states": states}, states, accelerator=False):
            moments.append(Peak(moment.moment, moment.parts | {"layer": 0}))
    return max(moments, key=lambda peak: peak.total)


def _interpreter(run: Run) -> int:
    return INTERPRETER + CALIBRATING * bool(run.tokens)


def _layer_moments(shape: ModelShape, run: Run, layer: LayerShape, held: dict, states: int, accelerator: bool):
    width = DTYPE_BYTES[shape.dtype]
    held = {**held, "layer": _loaded(layer.tensors, width)}
    named = f"layer {layer.index}"
    moments = [Peak(f"loading {named}", held)]
    statistics = _statistics(shape, run, layer)
    if run.tokens:
        if run.config.propagate == "dense":
            held = {**held, "states": held["states"] + states}
        work = max(_forward(shape, run, layer), _observation(shape, run, layer))
        work *= _ACCELERATOR_WORK if accelerator else 1
        moments.append(Peak(f"observing {named}", {**held, "statistics": statistics, "workspace": work}))
    scoring = _scoring(run, layer, accelerator)
    moments.append(Peak(f"pruning {named}", {**held, "statistics": statistics, "workspace": scoring}))
    return moments


def _loaded(tensors: dict, width: int) -> int:
    return sum(info.numel * width if is_float(info.dtype) else info.nbytes for info in tensors.values())


def _tokens_of_batch(run: Run) -> int:
    return min(run.config.batch_size, run.samples) * run.length


def _forward(shape: ModelShape, run: Run, layer: LayerShape) -> int:
    """Activations alive at the highest point of one batch through one layer."""
    width, tokens = DTYPE_BYTES[shape.dtype], _tokens_of_batch(run)
    beside = 3 * tokens * shape.hidden * width  # the layer's input, the sum after attention, its norm
    widest = max((matrix.outputs for matrix in layer.linears), default=0)
    dense = 4 * tokens * widest * width  # gate, up, activation and their product; or queries, keys, values and output
    if not layer.num_experts:
        return beside + dense
    slots, inner = tokens * shape.top_k, layer.intermediate
    up = sum(matrix.outputs * matrix.experts for matrix in layer.experts if matrix.reads == "hidden")
    up //= layer.num_experts
    norms = bool(run.config.drop_experts) and run.config.drop_score == "reap"
    gathered = slots * shape.hidden * width * (1 + norms)  # each slot's copy of its token
    gating = gathered + slots * (up + 2 * inner) * width
    # Down projection, weighted by the router in its own type, which is often float32, and put back in order.
    down = gathered + slots * inner * width + slots * shape.hidden * (width + 2 * _FLOAT32)
    return beside + max(dense, gating, down)


def _observation(shape: ModelShape, run: Run, layer: LayerShape) -> int:
    """What the observer of one batch needs, after the experts have run."""
    if not run.in_scope(layer):
        return 0
    width, tokens = DTYPE_BYTES[shape.dtype], _tokens_of_batch(run)
    beside = 4 * tokens * shape.hidden * width
    slots, inner = tokens * shape.top_k, layer.intermediate
    if run.has_hessians:
        widest = max(matrix.inputs for matrix in targets(layer, run.config)) if targets(layer, run.config) else 0
        step = min(_OUTER_CHUNK, layer.num_experts * widest * (widest + min(slots, 2048)))
        return beside + slots * (inner + shape.hidden) * width + step * _FLOAT32
    return beside + slots * inner * (width + _FLOAT32) + tokens * shape.hidden * _FLOAT32


def _statistics(shape: ModelShape, run: Run, layer: LayerShape) -> int:
    """Sums over the calibration data."""
    if not run.in_scope(layer) or not run.tokens:
        return 0
    widths = [(layer.num_experts + 1, shape.hidden), (layer.num_experts, layer.intermediate)]
    if run.config.scope == "all-linear":
        widths += [(1, matrix.inputs) for matrix in layer.linears]
    if run.has_hessians:
        return sum(count * width**2 * _FLOAT32 for count, width in widths)
    return sum(count * width * _FLOAT64 for count, width in widths)


def _scoring(run: Run, layer: LayerShape, accelerator: bool) -> int:
    """Scores, masks and, for SparseGPT, factors of the weights that are taken at once."""
    chunk, most = _ACCELERATOR_CHUNK if accelerator else _CPU_CHUNK, 0
    outputs: dict[str, list[Matrix]] = {}
    for matrix in targets(layer, run.config):
        outputs.setdefault(matrix.reads, []).append(matrix)
    for together in outputs.values():  # experts that the files hold one by one are one tensor when they are pruned
        numel, width = sum(matrix.numel for matrix in together), together[0].inputs
        experts = layer.num_experts if together[0].reads in ("hidden", "intermediate") else 1
        if run.has_hessians:
            at_once = min(experts, max(1, _ACCELERATOR_CHUNK // max(numel // experts, width**2)))
            most = max(most, at_once * (_SOLVING * width**2 + numel // experts) * _FLOAT32)
        else:
            row_local = METHODS[run.config.method].row_local
            one = max(matrix.outputs * width for matrix in together)
            most = max(most, _SCORING * min(numel, chunk if row_local else max(chunk, one)))
    return most
