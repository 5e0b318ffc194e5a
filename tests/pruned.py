"""Prunes tiny models and compares what comes out."""

import torch

from hf_mlopt.moe import moe_layers
from hf_mlopt.pruning import MoEPruner, PruningConfig
from tests.families import token_ids


PATTERNS = ({"sparsity": 0.5}, {"pattern": "2:4"})


def prune(model, ids=None, **settings):
    settings = {"min_tokens": 0, **({} if "pattern" in settings else {"sparsity": 0.5}), **settings}
    return MoEPruner(PruningConfig(**settings)).prune(model, token_ids() if ids is None else ids, progress=False)


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def expert_matrices(model):
    for layer in moe_layers(model):
        for projection in layer.projections:
            for expert in range(layer.num_experts):
                yield f"{layer.name}.{projection}[{expert}]", layer.weight(expert, projection)


def assert_pattern(name, matrix, sparsity=None, pattern=None):
    zeros = matrix == 0
    if pattern is None:
        assert (zeros.sum(dim=-1) == int(sparsity * matrix.shape[-1])).all(), name
    else:
        kept, group = map(int, pattern.split(":"))
        assert (zeros.unflatten(-1, (-1, group)).sum(dim=-1) == group - kept).all(), name


def same(left, right):
    left, right = snapshot(left), snapshot(right)
    return all(torch.equal(left[key], right[key]) for key in left)


@torch.no_grad()
def routed_by(model, ids, index):
    """Tokens per expert of decoder layer `index` in the whole model."""
    layer = next(layer for layer in moe_layers(model) if layer.index == index)
    found = []
    handle = layer.experts.register_forward_pre_hook(lambda _module, args: found.append(args))
    model(ids, use_cache=False)
    handle.remove()
    hidden_TH, topk_index_TK, topk_weight_TK = found[0]
    return layer, hidden_TH, topk_index_TK, topk_weight_TK
