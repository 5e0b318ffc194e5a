"""A tiny random model of every mixture-of-experts family, and one whose experts are a `ModuleList`."""

# T tokens   H hidden   E experts   K experts per token

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


_COMMON = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_SMALL_EXPERTS = {"intermediate_size": 64, "moe_intermediate_size": 32}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_DEEPSEEK = {
    **_SMALL_EXPERTS,
    **_LATENT_ATTENTION,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
}

# What differs from `_COMMON`, by model type.
FAMILIES = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "qwen2_moe": {**_SMALL_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "qwen3_moe": {**_SMALL_EXPERTS, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": 32, "num_experts": 8},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": _DEEPSEEK,
    "phimoe": {"intermediate_size": 64, "num_local_experts": 4},
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 4},
    "gpt_oss": {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        **_SMALL_EXPERTS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "head_dim": 8,
        "first_k_dense_replace": 0,
    },
    # Experts without a gate: down(relu(up x)^2). Attention stands in a layer of its own.
    "nemotron_h": {
        **_SMALL_EXPERTS,
        "n_routed_experts": 4,
        "head_dim": 8,
        "layers_block_type": ["attention", "moe", "moe"],
        "num_hidden_layers": 3,
        "moe_shared_expert_intermediate_size": 32,
    },
}
FUSED_FAMILIES = tuple(FAMILIES)
ALL_FAMILIES = (*FUSED_FAMILIES, "module_list")


def make_family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A tiny causal language model of one family in evaluation mode, with every parameter random."""
    model_type = "mixtral" if name == "module_list" else name
    config = AutoConfig.for_model(model_type, **{**_COMMON, **FAMILIES[model_type], **overrides})
    # As a checkpoint would be loaded: `model.to(dtype)` would also cast the rotary frequencies.
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if name == "module_list":
        for layer in model.model.layers:
            layer.mlp = ListBlock(config).to(dtype)
    randomize(model, seed)
    return model.eval()


def token_ids(samples: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids without padding, `[samples, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 260, (samples, length), generator=generator)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fills parameters, and the bias that picks the experts, so that nothing is zero and routing varies by token."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors.update((name, value) for name, value in model.named_buffers() if name.endswith("e_score_correction_bias"))
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            # Large enough that routing and activations vary from token to token.
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        else:
            tensor.copy_(0.1 * noise)


class ListExpert(nn.Module):
    """An expert as transformers 4 and remote code write it."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(hidden_TH)) * self.w3(hidden_TH))


class ListBlock(nn.Module):
    """Mixtral's block of transformers 4: a linear gate and a `ModuleList` of experts."""

    normalized = True

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(ListExpert(config) for _ in range(config.num_local_experts))

    def weights(self, logits_TE: torch.Tensor):
        weight_TK, index_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), self.top_k, dim=-1)
        if self.normalized:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return weight_TK, index_TK

    def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        weight_TK, index_TK = self.weights(self.gate(hidden_TH))
        output_TH = torch.zeros_like(hidden_TH)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index_TK == number)
            weighted = expert(hidden_TH[token]) * weight_TK[token, place, None].to(hidden_TH.dtype)
            output_TH.index_add_(0, token, weighted)
        return output_TH.reshape(hidden_BSH.shape)
