"""What a run computes, reads and writes: counts that follow from shapes, without a clock."""

from dataclasses import dataclass

from hf_mlopt.hub.shards import DTYPE_BYTES, Layout
from hf_mlopt.planning.layout import file_bytes
from hf_mlopt.planning.shape import LayerShape, Matrix, ModelShape
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.pruning.kept import num_kept
from hf_mlopt.pruning.scores import METHODS


@dataclass(frozen=True)
class Run:
    """
    How a run goes through the model.

    Args:
        config (`PruningConfig`): What is pruned, and how.
        samples (`int`), length (`int`): Calibration windows, and tokens in each after the cut to the context.
        streamed (`bool`): One layer at a time from disk to disk, or the whole model in memory.
        offloaded (`bool`): Whether the states of a streamed run live on disk.
        save_states_every (`int`): Layers between two states a streamed run can go on from.
    """

    config: PruningConfig
    samples: int
    length: int
    streamed: bool
    offloaded: bool = False
    save_states_every: int = 4

    @property
    def tokens(self) -> int:
        """Calibration tokens; 0 where no activations are read."""
        return self.samples * self.length if self.config.needs_calibration else 0

    @property
    def has_hessians(self) -> bool:
        return METHODS[self.config.method].hessian

    @property
    def has_outlier_pass(self) -> bool:
        """OWL runs the dense model once before anything is pruned."""
        return self.config.allocation == "owl"

    def in_scope(self, layer: LayerShape) -> bool:
        """Whether a layer is observed: it has weights that may go."""
        return bool(layer.num_experts or (self.config.scope == "all-linear" and layer.linears))


@dataclass(frozen=True)
class Costs:
    """
    Args:
        forward_flops (`int`): Calibration passes; a multiplication and an addition are two.
        solve_flops (`int`): Hessians of SparseGPT, their factors and the updates.
        scored_weights (`int`): Weights that are compared with one another.
        read_bytes (`int`), written_bytes (`int`): From and to disk, states included.
        state_bytes (`int`): The states of one layer.
        output_bytes (`int`): The weight files of the result.
        disk_bytes (`int`): Most that lies beside the output at one time, the result included.
        offloaded_bytes (`int`): Most that lies in the directory for offloaded states at one time.
    """

    forward_flops: int
    solve_flops: int
    scored_weights: int
    read_bytes: int
    written_bytes: int
    state_bytes: int
    output_bytes: int
    disk_bytes: int
    offloaded_bytes: int


def count_costs(shape: ModelShape, run: Run, source: Layout, output: Layout) -> Costs:
    """Counts everything a run does, from the layouts of its source and of its result."""
    states = run.tokens * shape.hidden * DTYPE_BYTES[shape.dtype]
    output_bytes = sum(file_bytes(output).values())
    read = sum(info.nbytes for tensors in source.values() for info in tensors.values())
    read -= sum(info.nbytes for tensors in source.values() for name, info in tensors.items() if name in shape.unused)
    state_read, state_written, lying = _states_on_disk(shape, run, states)
    if run.streamed:
        layer_bytes = sum(info.nbytes for layer in shape.layers for info in layer.tensors.values())
        embedding = sum(info.nbytes for info in shape.embedding.values())
        # The embedding is read once to start and once more to be copied; OWL reads both a second time.
        read += embedding * bool(run.tokens) + (layer_bytes + embedding) * run.has_outlier_pass
    return Costs(
        forward_flops=sum(_passes(shape, run, layer) * forward_flops(shape, layer, run) for layer in shape.layers),
        solve_flops=sum(_solve_flops(shape, run, layer) for layer in shape.layers) if run.has_hessians else 0,
        scored_weights=sum(
            _left(run, layer, matrix, matrix.numel) for layer in shape.layers for matrix in targets(layer, run.config)
        ),
        read_bytes=read + state_read,
        written_bytes=output_bytes + state_written,
        state_bytes=states,
        output_bytes=output_bytes,
        disk_bytes=output_bytes + (0 if run.offloaded else lying),
        offloaded_bytes=lying if run.offloaded else 0,
    )


def targets(layer: LayerShape, config: PruningConfig) -> list[Matrix]:
    """The matrices of a layer that lose weights."""
    if not config.prunes_weights:
        return []
    return [*layer.experts, *(layer.linears if config.scope == "all-linear" else ())]


def _left(run: Run, layer: LayerShape, matrix: Matrix, count: int) -> int:
    """What is left of a count over the experts of a matrix when whole experts have been removed."""
    if matrix.reads not in ("hidden", "intermediate"):
        return count
    return count * num_kept(layer.num_experts, run.config.drop_experts) // layer.num_experts


def _passes(shape: ModelShape, run: Run, layer: LayerShape) -> int:
    """Times a layer is run over all states: to observe it, and for its pruned output; nobody reads the last one's."""
    observed = run.in_scope(layer)
    last = layer.index + 1 == len(shape.layers)
    again = not last and not (observed and run.config.propagate == "dense")
    before = (observed + 1) * run.has_outlier_pass
    return observed + again + before


def forward_flops(shape: ModelShape, layer: LayerShape, run: Run) -> int:
    """Operations of one pass of a layer over all calibration tokens."""
    of_token = 2 * sum(matrix.numel for matrix in layer.linears)
    if layer.num_experts:
        experts = sum(matrix.numel for matrix in layer.experts) // layer.num_experts
        of_token += 2 * shape.top_k * experts + 2 * layer.num_experts * shape.hidden
    if layer.has_attention:
        of_token += _score_width(shape) * run.length  # causal: half of the square, twice for queries and values
    return of_token * run.tokens


def _score_width(shape: ModelShape) -> int:
    """Features of all heads that are multiplied for a pair of tokens: of queries and of values."""
    config = shape.config
    heads = config.get("num_attention_heads") or 1
    query = config.get("head_dim") or shape.hidden // heads
    if config.get("qk_nope_head_dim"):
        query = config["qk_nope_head_dim"] + config.get("qk_rope_head_dim", 0)
    return heads * (query + (config.get("v_head_dim") or query))


def _solve_flops(shape: ModelShape, run: Run, layer: LayerShape) -> int:
    flops, widths = 0, {}
    for matrix in targets(layer, run.config):
        tokens = run.tokens
        if matrix.reads in ("hidden", "intermediate"):
            widths[matrix.reads] = matrix.inputs
        else:
            flops += 2 * tokens * matrix.inputs**2
        # Cholesky, inverse, Cholesky: 1/3 + 2/3 + 1/3 D³; each error moves all columns after it.
        solve = matrix.experts * (4 * matrix.inputs**3 // 3 + matrix.outputs * matrix.inputs**2)
        flops += _left(run, layer, matrix, solve)
    slots = run.tokens * shape.top_k
    flops += sum(2 * slots * width**2 for width in widths.values())
    return flops + 2 * run.tokens * widths.get("hidden", 0) ** 2  # of all tokens of the layer, for the coverage guard


def _states_on_disk(shape: ModelShape, run: Run, states: int) -> tuple[int, int, int]:
    """Bytes of states that are read and written, and the most that lies there at one time."""
    layers = len(shape.layers)
    if not run.streamed or not states:
        return 0, 0, 0
    if run.offloaded:  # the input of every layer is written once and read at each pass
        passes = sum(_passes(shape, run, layer) for layer in shape.layers)
        writes = layers * (1 + run.has_outlier_pass)
        return states * passes, states * writes, states * min(2, layers)
    saves = (layers - 1) // run.save_states_every
    return 0, states * saves, states * min(2, saves)
