"""Mixtral-8x7B as a plan sees it: its configuration and the headers of its 46.7 B weights, which are not there."""

import json
from pathlib import Path

from hf_mlopt.hub.shards import TensorInfo, header_bytes
from hf_mlopt.planning.source import Source


CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


def source() -> Source:
    """What is known of it, in memory."""
    tensors = {
        "model.embed_tokens.weight": (32000, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (32000, 4096),
    }
    for layer in range(32):
        prefix = f"model.layers.{layer}"
        for name, width in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (width, 4096)
        for expert in range(8):
            block = f"{prefix}.block_sparse_moe.experts.{expert}"
            tensors |= {f"{block}.w1.weight": (14336, 4096), f"{block}.w2.weight": (4096, 14336)}
            tensors[f"{block}.w3.weight"] = (14336, 4096)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (8, 4096)
        tensors |= {f"{prefix}.{norm}_layernorm.weight": (4096,) for norm in ("input", "post_attention")}
    return Source("mixtral", CONFIG, {"model.safetensors": {n: TensorInfo("BF16", s) for n, s in tensors.items()}})


def write(directory: Path) -> Path:
    """A checkpoint whose weight file is a hole after its header: it takes no room on disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    layout = source().layout["model.safetensors"]
    header = header_bytes(layout, {"format": "pt"})
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.nbytes for info in layout.values()))
    return directory
