"""What docs/scaling.md is worked out from: shapes of models that are not here, rows of benchmarks/results/*.json."""

import json
from functools import cache
from pathlib import Path

from hf_mlopt.hub.shards import TensorInfo
from hf_mlopt.planning import read_shape
from hf_mlopt.planning.costs import Run, forward_flops
from hf_mlopt.planning.shape import ModelShape
from hf_mlopt.planning.source import Source
from hf_mlopt.pruning.config import PruningConfig


RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {  # layers, hidden, inside an expert, experts, top-k, heads of queries, of keys, words
    "8x7B": (32, 4096, 14336, 8, 2, 32, 8, 32_000),
    "8x22B": (56, 6144, 16384, 8, 2, 48, 8, 32_000),
    "400-GB MoE": (80, 4096, 1536, 128, 8, 64, 4, 151_936),
}
HALF = PruningConfig(sparsity=0.5)


def moe(
    layers: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    heads: int,
    kv_heads: int,
    words: int,
    *,
    head: int = 128,
    dtype: str = "BF16",
) -> tuple[Source, ModelShape]:
    """A checkpoint under Mixtral's names, a file a layer: what a plan knows of it."""
    config = {"model_type": "mixtral", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": words}
    config |= {"num_attention_heads": heads, "head_dim": head, "num_local_experts": experts}
    config |= {"num_experts_per_tok": top_k, "max_position_embeddings": 32_768}
    inside = {f"self_attn.{name}_proj": (count * head, hidden) for name, count in (("q", heads), ("k", kv_heads))}
    inside |= {"self_attn.v_proj": (kv_heads * head, hidden), "self_attn.o_proj": (hidden, heads * head)}
    inside |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    inside["block_sparse_moe.gate"] = (experts, hidden)
    for number in range(experts):
        block = f"block_sparse_moe.experts.{number}"
        inside |= {f"{block}.w1": (inner, hidden), f"{block}.w3": (inner, hidden), f"{block}.w2": (hidden, inner)}
    files = [{f"model.layers.{k}.{name}.weight": size for name, size in inside.items()} for k in range(layers)]
    outside = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden)}
    files.append({**outside, "model.norm.weight": (hidden,)})
    layout = {
        f"{number}.safetensors": {name: TensorInfo(dtype, size) for name, size in tensors.items()}
        for number, tensors in enumerate(files)
    }
    source = Source("moe", config, layout)
    return source, read_shape(source)


@cache
def model(name: str) -> tuple[Source, ModelShape]:
    """One of `SIZES`."""
    return moe(*SIZES[name])


def window_flops(shape: ModelShape, length: int = 2048) -> int:
    """Operations of one forward pass over a window, the head included."""
    layers = sum(forward_flops(shape, layer, Run(HALF, 1, length, True)) for layer in shape.layers)
    return layers + 2 * length * shape.config["vocab_size"] * shape.hidden


@cache
def rows(file: str) -> list[dict]:
    """The rows of a file of results."""
    return json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["rows"]


def one(file: str, **given) -> dict:
    """The first row that has these values."""
    return next(row for row in rows(file) if given.items() <= row.items())


def matrix_rate() -> float:
    """Operations a second of an H200 in a product of matrices."""
    return one("pruning_gpu", kind="matrix rate")["flops_per_second_median"]


def distillation_seconds() -> tuple[float, float]:
    """
    A step of distillation on that card, 4 layers of 8x7B's width and 8 windows of 1,024: at the matrix rate (teacher
    once, student three times), and measured.
    """
    shape = moe(4, *SIZES["8x7B"][1:])[1]
    measured = one("distillation_gpu", kind="pass", name="distillation")["seconds_median"]
    return 4 * 8 * window_flops(shape, 1024) / matrix_rate(), measured
