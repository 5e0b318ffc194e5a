"""
Removes whole experts: which of them, by the statistics of the calibration pass, and the model that is left.

That model is built by the model's own class from its own configuration with another number of experts, so whatever
depends on the number is right and plain transformers reloads it; then the tensors that stay are moved into it, one
decoder layer at a time.
"""

# E experts   R experts retained   G groups of consecutive experts

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.moe import MoELayer
from hf_mlopt.moe.layers import text_config
from hf_mlopt.moe.names import EXPERT_COUNT_KEYS
from hf_mlopt.pruning.kept import refuse_drop


def expert_scores(sums: dict[str, torch.Tensor], score: str) -> torch.Tensor:
    """
    How much each expert of a layer matters.

    Args:
        sums (`dict[str, torch.Tensor]`): Of [`ExpertMoments`]; `reap` needs `output_norm`.
        score (`str`): `reap`, the mean over an expert's tokens of router weight times norm of its output
            ([REAP](https://huggingface.co/papers/2510.13999); 0 for an expert without tokens), or `frequency`,
            the tokens sent to it.

    Returns:
        `torch.Tensor`: float64, `[experts]`.
    """
    tokens_E = sums["tokens"].double()
    return tokens_E if score == "frequency" else sums["output_norm"] / tokens_E.clamp(min=1)


def kept_experts(score_E: torch.Tensor, num_kept: int, num_groups: int = 1) -> list[int]:
    """
    The experts with the highest scores, ascending; among equal scores the lower index is removed first.

    Args:
        score_E (`torch.Tensor`): `[experts]`, finite.
        num_kept (`int`): Experts that stay.
        num_groups (`int`): Groups of consecutive experts, all of which keep the same number.
    """
    score_GE = score_E.cpu().reshape(num_groups, -1)
    best_GR = score_GE.argsort(dim=-1, stable=True)[:, score_GE.shape[1] - num_kept // num_groups :]
    first_G1 = torch.arange(num_groups)[:, None] * score_GE.shape[1]
    return sorted((best_GR + first_G1).flatten().tolist())


def routing_groups(model: nn.Module) -> int:
    """Groups of consecutive experts that the routers pick from first (DeepSeek); 1 for all other models."""
    return getattr(text_config(model), "n_group", None) or 1


def refuse_removal(model: nn.Module, layers: list[MoELayer], drop: float) -> int:
    """
    Checks that a fraction of the experts can be removed and the rest reloaded by plain transformers.

    Args:
        model (`PreTrainedModel`): May be without weights (meta device).
        layers (`list[MoELayer]`): Its mixture-of-experts layers.
        drop (`float`): Fraction of the experts of every layer, in [0, 1).

    Returns:
        `int`: Experts that stay in each layer.

    Raises:
        InputError: If not; the message names the field or the tensor.
    """
    counts = sorted({layer.num_experts for layer in layers})
    if len(counts) > 1:
        raise ConfigurationError(
            "drop_experts",
            drop,
            f"the layers have {' or '.join(map(str, counts))} experts; they must have equally many",
        )
    config = text_config(model)
    if not isinstance(model, PreTrainedModel) or next(iter(_counts(config).values()), None) != counts[0]:
        raise ConfigurationError(
            "drop_experts",
            drop,
            f"the configuration of {type(model).__name__} does not say that there are {counts[0]} experts; understood "
            f"are {', '.join(EXPERT_COUNT_KEYS)}",
        )
    for layer in layers:
        for name, value in _tensors(layer.block):
            if not value.is_floating_point():
                raise InputError(
                    f"{layer.name.rpartition('.')[0]}.{name} holds {value.dtype}, perhaps the numbers of experts: "
                    "experts cannot be removed from this model."
                )
    return refuse_drop(
        drop, counts[0], _top_k(layers[0]), getattr(config, "n_group", None), getattr(config, "topk_group", None)
    )


def _top_k(layer: MoELayer) -> int:
    for holder in (layer, layer.router, layer.block):
        if isinstance(getattr(holder, "top_k", None), int):
            return holder.top_k
    raise InputError(f"{layer.name}: how many experts a token is sent to was not found; experts cannot be removed.")


def _counts(config) -> dict[str, int]:
    found = {key: getattr(config, key, None) for key in EXPERT_COUNT_KEYS}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def shrunk_config(config: PreTrainedConfig, num_kept: int) -> PreTrainedConfig:
    """A copy of a configuration with another number of experts, under every name it has for it."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    count = next(iter(_counts(text).values()))
    for holder in (text, smaller):  # a multimodal configuration may repeat what its text model has
        for key in EXPERT_COUNT_KEYS:
            if getattr(holder, key, None) == count:
                setattr(holder, key, num_kept)
    return smaller


def smaller_model(model: PreTrainedModel, num_kept: int) -> PreTrainedModel:
    """
    A model of the same class with fewer experts and without weights: all on the meta device, in evaluation mode.

    Args:
        model (`PreTrainedModel`): May be without weights as well.
        num_kept (`int`): Experts of every layer, from [`refuse_removal`].

    Raises:
        InputError: If its tensors are not those of `model` with experts left out; the message names one.
    """
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    with torch.device("meta"):
        small = type(model)._from_config(shrunk_config(model.config, num_kept), dtype=dtype)
    if hasattr(model, "_weight_conversions"):
        small._weight_conversions = model._weight_conversions  # it is saved under the names it was loaded from
    dtypes = {name: value.dtype for name, value in _tensors(model)}
    for origin, name, _ in _moves(model, small, range(num_kept)):
        place, leaf = tensor_place(small, name)
        if place[leaf].dtype != dtypes[origin]:  # loading keeps some in float32, whatever the model's dtype is
            place[leaf] = _on_meta(place[leaf].to(dtypes[origin]))
    return small.eval()


@torch.no_grad()
def keep_experts_(layer: nn.Module, twin: nn.Module, keep: Sequence[int]) -> None:
    """
    Leaves a decoder layer with some of its experts. Its modules stay, and so do hooks on them.

    A tensor that has another shape in `twin` is cut along the one dimension that differs; of a list of experts those
    that stay are kept. At most one tensor exists twice at a time.

    Args:
        layer (`nn.Module`): With all experts; changed in place.
        twin (`nn.Module`): The same layer of [`smaller_model`].
        keep (`Sequence[int]`): Experts that stay, ascending.

    Raises:
        InputError: If a tensor differs in another way; nothing has changed then.
    """
    for name, _, dim in _moves(layer, twin, keep):
        if dim is not None:
            place, leaf = tensor_place(layer, name)
            value = place[leaf]
            kept = value.index_select(dim, torch.tensor(keep, device=value.device))
            place[leaf] = nn.Parameter(kept, value.requires_grad) if isinstance(value, nn.Parameter) else kept
            del value
    for name in _expert_lists(layer, twin, keep):
        experts = layer.get_submodule(name)
        kept = [experts[expert] for expert in keep]
        experts._modules.clear()
        experts.extend(kept)
    adopt_config_(layer, twin)


def adopt_config_(module: nn.Module, twin: nn.Module) -> None:
    """Gives all parts of a model or layer the configuration of a smaller one, and its numbers where they keep some."""
    twins = dict(twin.named_modules())
    for name, part in module.named_modules():
        for key, value in vars(twins[name]).items() if name in twins else ():
            if isinstance(value, PreTrainedConfig) or type(value) is int:
                vars(part)[key] = value


def _expert_lists(source: nn.Module, target: nn.Module, keep: Sequence[int]) -> list[str]:
    """Names of the lists of experts that are shorter in `target`."""
    modules = dict(source.named_modules())
    return [
        name
        for name, module in target.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == len(keep) < len(modules.get(name, ()))
    ]


def _moves(source: nn.Module, target: nn.Module, keep: Sequence[int]) -> list[tuple[str, str, int | None]]:
    """Name in `source`, name in `target` and the dimension to cut, of every tensor of `target`."""
    shapes = {name: value.shape for name, value in _tensors(source)}
    lists = _expert_lists(source, target, keep)
    moves = []
    for name, value in _tensors(target):
        origin = name
        for prefix in lists:
            if name.startswith(f"{prefix}."):
                number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
                origin = f"{prefix}.{keep[int(number)]}.{rest}"
        moves.append((origin, name, _differing(origin, shapes.get(origin), value.shape, keep)))
    moved = {origin for origin, _, _ in moves}
    for name in shapes:
        if name not in moved and not any(name.startswith(f"{prefix}.") for prefix in lists):
            raise InputError(f"{name}: a model with fewer experts has no such tensor; experts cannot be removed.")
    return moves


def _differing(name: str, before, after, keep: Sequence[int]) -> int | None:
    """The one dimension that has as many entries as there are experts to keep, instead of all; None if all agree."""
    if before == after:
        return None
    same_rank = before is not None and len(before) == len(after)
    differing = [dim for dim in range(len(after)) if before[dim] != after[dim]] if same_rank else []
    if len(differing) != 1 or after[differing[0]] != len(keep) or before[differing[0]] <= max(keep):
        raise InputError(
            f"{name}: with {len(keep)} experts it would have the shape {tuple(after)} instead of "
            f"{tuple(before) if before is not None else 'none'}; this is not understood, experts cannot be removed."
        )
    return differing[0]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, also those that are not saved, under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensor_place(module: nn.Module, name: str) -> tuple[dict, str]:
    """The dictionary that holds a tensor, and its key there."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    return (owner._parameters if leaf in owner._parameters else owner._buffers), leaf


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
