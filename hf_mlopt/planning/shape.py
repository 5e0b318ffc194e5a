"""
What a mixture of experts consists of, from the names and shapes of its stored tensors.

A plan has no modules to look at, as [`~hf_mlopt.moe.moe_layers`] has, so this understands the forms in which experts
are stored: a matrix for each expert under a numbered name, or all experts in one tensor of three dimensions.
"""

# E experts   H hidden   I expert intermediate   O output features   D input features

import re
from dataclasses import dataclass, field

from hf_mlopt.errors import InputError
from hf_mlopt.hub.shards import TensorInfo
from hf_mlopt.moe.names import EXPERT_COUNT_KEYS, TOP_K_KEYS
from hf_mlopt.planning.families import has_fused_experts
from hf_mlopt.planning.source import Source


_LAYER = re.compile(r"^(.*?\blayers)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(\w+)\.weight$")
_ROUTER = re.compile(r"\b(gate|router)\.")
_DOWN = ("down_proj", "output_linear", "w2", "wo", "fc2")
_UP = ("gate_up_proj", "gate_proj", "up_proj", "input_linear", "w1", "w3", "fc1")
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "half": "F16", "bfloat16": "BF16", "float": "F32"}


@dataclass(frozen=True)
class Matrix:
    """
    A stored tensor that multiplies activations.

    Args:
        name (`str`): Its name in the files.
        experts (`int`): Matrices stacked in it; 1 for a plain one.
        outputs (`int`), inputs (`int`): Features of each.
        reads (`str`): `"hidden"` or `"intermediate"` for those of an expert, otherwise its own name.
    """

    name: str
    experts: int
    outputs: int
    inputs: int
    reads: str

    @property
    def numel(self) -> int:
        return self.experts * self.outputs * self.inputs


@dataclass
class LayerShape:
    """
    One decoder layer.

    Args:
        index (`int`): Its number.
        tensors (`dict[str, TensorInfo]`): All that is stored of it.
        experts (`list[Matrix]`): Matrices of its routed experts.
        num_experts (`int`): How many it has; 0 for a dense layer.
        linears (`list[Matrix]`): Attention, shared experts, dense MLP.
        block (`str`): Prefix of the names in its mixture of experts.
    """

    index: int
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    experts: list[Matrix] = field(default_factory=list)
    num_experts: int = 0
    linears: list[Matrix] = field(default_factory=list)
    block: str = ""

    @property
    def has_attention(self) -> bool:
        return any(re.search(r"\b(q|qkv|q_b|o|out)_?proj\b|\battn\b", matrix.name) for matrix in self.linears)

    @property
    def intermediate(self) -> int:
        """Width inside an expert."""
        return next((matrix.inputs for matrix in self.experts if matrix.reads == "intermediate"), 0)


@dataclass(frozen=True)
class ModelShape:
    """
    A mixture of experts as its files describe it.

    Args:
        model_type (`str`): As in `config.json`.
        config (`dict`): The configuration of its decoder.
        dtype (`str`): Type it is loaded and written in, in the words of safetensors.
        hidden (`int`), num_experts (`int`), top_k (`int`): Sizes.
        layers (`list[LayerShape]`): Its decoder layers.
        rest (`dict[str, TensorInfo]`): Tensors outside them.
        unused (`set[str]`): Tensors in the files that are no part of the model.
    """

    model_type: str
    config: dict
    dtype: str
    hidden: int
    num_experts: int
    top_k: int
    layers: list[LayerShape]
    rest: dict[str, TensorInfo]
    unused: set[str]

    @property
    def embedding(self) -> dict[str, TensorInfo]:
        """What is read before the first layer: all outside the layers but the head."""
        return {name: info for name, info in self.rest.items() if not re.match(r"(lm_head|output|head)\.", name)}

    @property
    def context(self) -> int | None:
        """Tokens the model was made for."""
        return self.config.get("max_position_embeddings")


def read_shape(source: Source) -> ModelShape:
    """
    Understands the tensors of a checkpoint.

    Raises:
        InputError: If it has no experts, or stores them in a way that is not understood.
    """
    config = text_config(source.config)
    tensors = {name: info for file in source.layout.values() for name, info in file.items()}
    layers, rest, unused = _split(tensors, config, source)
    hidden = config.get("hidden_size") or config.get("d_model")
    if not hidden:
        raise InputError(f"model={source.name!r}: its config.json has no hidden_size; the plan needs it.")
    for layer in layers:
        _read_layer(layer, hidden, _value(config, EXPERT_COUNT_KEYS))
    counts = [layer.num_experts for layer in layers if layer.num_experts]
    if not counts:
        raise InputError(_no_experts(source, config))
    if has_fused_experts(source.config["model_type"]) is False and "auto_map" not in source.config:
        raise InputError(
            f"model={source.name!r}: the experts of model type {source.config['model_type']!r} are in a layout that "
            "is not understood; understood are transformers' fused experts (@use_experts_implementation) and a "
            "ModuleList of experts."
        )
    top_k = _value(config, TOP_K_KEYS)
    if top_k is None:
        raise InputError(
            f"model={source.name!r}: its config.json does not say how many experts a token is sent to; understood are "
            f"{', '.join(TOP_K_KEYS)}."
        )
    return ModelShape(
        source.config["model_type"],
        config,
        _loaded_dtype(source.config, config, tensors),
        hidden,
        max(counts),
        top_k,
        layers,
        rest,
        unused,
    )


def text_config(config: dict) -> dict:
    """The configuration of the decoder, also inside that of a multimodal model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else config


def _value(config: dict, keys: tuple[str, ...]) -> int | None:
    inner = config.get("ffn_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in keys:
            if isinstance(holder.get(key), int):
                return holder[key]
    return None


def _loaded_dtype(config: dict, decoder: dict, tensors: dict[str, TensorInfo]) -> str:
    """The type `from_pretrained(dtype="auto")` gives a model."""
    for holder in (config, decoder):
        named = holder.get("dtype") or holder.get("torch_dtype")
        if named in _DTYPES:
            return _DTYPES[named]
    return next((info.dtype for info in tensors.values() if is_float(info.dtype)), "F32")


def is_float(dtype: str) -> bool:
    """Whether weights of this type are cast when a model is loaded."""
    return dtype in ("F64", "F32", "F16", "BF16")


def _split(tensors: dict[str, TensorInfo], config: dict, source: Source):
    """The decoder layers, what is outside them, and what belongs to no layer of the model."""
    stacks: dict[str, dict[int, LayerShape]] = {}
    for name, info in tensors.items():
        if found := _LAYER.match(name):
            prefix, number = found[1], int(found[2])
            stacks.setdefault(prefix, {}).setdefault(number, LayerShape(number)).tensors[name] = info
    count = _value(config, EXPERT_COUNT_KEYS)
    with_experts = [
        prefix for prefix, stack in stacks.items() if any(_mentions_experts(layer, count) for layer in stack.values())
    ]
    if not with_experts:
        raise InputError(_no_experts(source, config))
    if len(with_experts) > 1:
        raise InputError(f"{' and '.join(with_experts)}: experts in different stacks; that is not understood.")
    stack = stacks[with_experts[0]]
    depth = config.get("num_hidden_layers") or config.get("n_layer") or max(stack) + 1
    layers = [stack[number] for number in sorted(stack) if number < depth]
    if [layer.index for layer in layers] != list(range(depth)):
        absent = next(number for number in range(depth) if number not in stack)
        raise InputError(
            f"model={source.name!r}: its files hold nothing of layer {absent} of {depth}; download it again"
        )
    inside = {name for layer in stack.values() for name in layer.tensors}
    # Heads that predict further tokens, and frequencies that older checkpoints hold, are no part of the model.
    unused = {name for number, layer in stack.items() if number >= depth for name in layer.tensors}
    unused |= {name for name in tensors if name.endswith("rotary_emb.inv_freq") or re.search(r"(^|\.)mtp\b", name)}
    for layer in layers:
        layer.tensors = {name: info for name, info in layer.tensors.items() if name not in unused}
    rest = {name: info for name, info in tensors.items() if name not in inside and name not in unused}
    return layers, rest, unused


def _mentions_experts(layer: LayerShape, count: int | None) -> bool:
    return any(_EXPERT.match(name) or _is_stacked(info, count) for name, info in layer.tensors.items())


def _is_stacked(info: TensorInfo, count: int | None) -> bool:
    return len(info.shape) == 3 and min(info.shape) > 1 and info.shape[0] == count


def _no_experts(source: Source, config: dict) -> str:
    count, model_type = _value(config, EXPERT_COUNT_KEYS) or 0, source.config["model_type"]
    if source.config.get("quantization_config") is not None:
        return f"model={source.name!r}: is quantized (quantization_config); prune the unquantized weights."
    if count > 1:
        return (
            f"model={source.name!r}: model type {model_type!r} has {count} experts in a layout that is not "
            "understood; understood are a matrix for each expert (experts.0.w1.weight) and three-dimensional tensors."
        )
    return (
        f"model={source.name!r}: model type {model_type!r} is a dense model, with no experts in it; give a mixture "
        "of experts."
    )


def _read_layer(layer: LayerShape, hidden: int, count: int | None) -> None:
    """Tells apart experts, router and ordinary matrices of a layer."""
    stacked = {}
    for name, info in layer.tensors.items():
        found = _EXPERT.match(name)
        if found and len(info.shape) == 2:
            layer.experts.append(Matrix(name, 1, *info.shape, _reads(found[3], info.shape, hidden, name)))
            layer.num_experts = max(layer.num_experts, int(found[2]) + 1)
            layer.block = found[1].rpartition(".")[0]
        elif _is_stacked(info, count):
            stacked[name] = info
    if stacked:
        _read_stacked(layer, stacked, hidden)
    matrices = {matrix.name for matrix in layer.experts}
    for name, info in layer.tensors.items():
        plain = name.endswith(".weight") and len(info.shape) == 2 and info.shape[0] > 1
        if plain and name not in matrices and not (layer.num_experts and _ROUTER.search(name)):
            layer.linears.append(Matrix(name, 1, *info.shape, name))


def _read_stacked(layer: LayerShape, stacked: dict[str, TensorInfo], hidden: int) -> None:
    leaves = {name: name.removesuffix(".weight").rpartition(".")[2] for name in stacked}
    for name, leaf in leaves.items():
        if leaf not in _DOWN + _UP:
            raise InputError(f"{name} {list(stacked[name].shape)}: experts in a layout that is not understood.")
    transposed = _is_transposed([(leaves[name] in _DOWN, info.shape) for name, info in stacked.items()], hidden)
    for name, info in stacked.items():
        num_experts, outputs, inputs = info.shape
        if transposed:
            outputs, inputs = inputs, outputs
        down = leaves[name] in _DOWN
        if (outputs if down else inputs) != hidden:
            raise InputError(f"{name} {list(info.shape)}: does not fit the hidden size {hidden} of config.json.")
        reads = "intermediate" if down else "hidden"
        layer.experts.append(Matrix(name, num_experts, outputs, inputs, reads))
        layer.num_experts = num_experts
        layer.block = name.partition(".experts.")[0] if ".experts." in name else name.rpartition(f".{leaves[name]}")[0]


def _is_transposed(shapes: list[tuple[bool, tuple[int, ...]]], hidden: int) -> bool:
    """Whether the input dimension comes before the output dimension; square matrices do not tell, so all are asked."""
    for down, (_, first, second) in shapes:
        if (first == hidden) != (second == hidden):
            return (first == hidden) != down
    return False


def _reads(leaf: str, shape: tuple[int, ...], hidden: int, name: str) -> str:
    """Down projections write the hidden size; where expert and hidden width agree, only the name tells."""
    if (shape[0] == hidden) != (shape[1] == hidden):
        return "intermediate" if shape[0] == hidden else "hidden"
    if shape[0] != hidden or leaf not in _DOWN + _UP:
        raise InputError(f"{name} {list(shape)}: cannot tell what it reads; hidden size is {hidden}.")
    return "intermediate" if leaf in _DOWN else "hidden"
