"""Tiny random models of the families that a pipeline cuts, and batches for them."""

import torch
from families import randomize
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification


_DECODER = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_AUX = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
_QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4}
_GPT2 = {
    **{"vocab_size": 61, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "tie_word_embeddings": False},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1},
}
_VIT = {
    **{"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_labels": 5},
    **{"num_hidden_layers": 4, "num_attention_heads": 4},
}

# Name to model type and configuration.
DECODERS = {
    "llama": ("llama", _DECODER),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 4}),
    "qwen2": ("qwen2", {**_DECODER, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 4}),
    "gpt2": ("gpt2", _GPT2),
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_DECODER, **_QWEN3_MOE, "mlp_only_layers": [1]}),
}
TIED = {
    "llama": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {**_GPT2, "tie_word_embeddings": True}),
}
# The last layer of the second routes nothing: alone in its block it has no router.
WITH_AUX = {
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 4, **_AUX}),
    "qwen3_moe": ("qwen3_moe", {**_DECODER, **_QWEN3_MOE, **_AUX, "mlp_only_layers": [0, 3]}),
}
IMAGES = {
    "vit": ("vit", _VIT),
    "resnet": (
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 1], "layer_type": "basic", "num_labels": 5},
    ),
}


def make_model(model_type: str, configuration: dict, **overrides):
    """A model of four layers in training mode, its parameters random."""
    config = AutoConfig.for_model(model_type, **{**configuration, **overrides})
    auto = AutoModelForImageClassification if model_type in IMAGES else AutoModelForCausalLM
    model = auto.from_config(config)
    if model_type != "resnet":
        randomize(model, seed=0)
    return model.train()


def token_batch(left: bool = False, num_items: int | None = None) -> dict:
    """Three rows of nine tokens, two of them padded, with a label left out besides."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in ((0, 2), (2, 5)):
        mask[row, slice(None, padding) if left else slice(-padding, None)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": num_items}
    if left:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def image_batch(size: int) -> dict:
    """Four images of `size` pixels a side."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, 1, 4])}
