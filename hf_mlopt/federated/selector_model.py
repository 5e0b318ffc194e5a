"""Modules that tell from an image which site it resembles, and the local training of the one that is trained."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms.adam import adam_step
from hf_mlopt.federated.algorithms.image_features import (
    Discriminant,
    feature_statistics,
    image_features,
    num_channels_of,
)
from hf_mlopt.federated.algorithms.message import Group, Message, Scalar


MAX_PARAMETERS = 100_000  # the moments make every round carry three times as many numbers


def planes(images: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]`: images as they are, and of volumes `[B, C, H, W, D]` the middle plane."""
    return images if images.ndim == 4 else images[..., images.shape[-1] // 2]


class SelectorModel(nn.Module):
    """
    Three convolutions of stride 2, then mean and standard deviation of each channel over the image and a linear head.
    No normalization: brightness and contrast, which it would take away, are what often tells sites apart.

    Args:
        num_channels (`int`): Of the images.
        num_sites (`int`): K, at least 2.
        width (`int`, *optional*, defaults to 8): Channels after the first convolution; 8 makes about 4,000 parameters.
    """

    def __init__(self, num_channels: int, num_sites: int, width: int = 8):
        super().__init__()
        self.options = {"num_channels": num_channels, "num_sites": num_sites, "width": width}
        widths = [num_channels, width, 2 * width, 2 * width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.head = nn.Linear(4 * width, num_sites)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, K]` logits of `[B, C, H, W]` images."""
        hidden = planes(images)
        for convolution in self.convolutions:
            hidden = torch.relu(convolution(hidden))
        variance = hidden.var(dim=(2, 3), correction=0)
        pooled = torch.cat([hidden.mean(dim=(2, 3)), (variance + 1e-6).sqrt()], dim=1)
        return self.head(pooled)


def selector_model(num_channels: int, num_sites: int, width: int = 8) -> SelectorModel:
    """
    A [`SelectorModel`] within `MAX_PARAMETERS`, with the weights of torch's default initialization.

    Raises:
        ConfigurationError: For fewer than two sites, or too many parameters.
    """
    for field, value, least in (("num_channels", num_channels, 1), ("num_sites", num_sites, 2), ("width", width, 1)):
        if type(value) is not int or value < least:
            raise ConfigurationError(field, value, f"must be an int of at least {least}")
    with torch.device("meta"):
        size = sum(weight.numel() for weight in SelectorModel(num_channels, num_sites, width).parameters())
    if size > MAX_PARAMETERS:
        raise ConfigurationError("width", width, f"{size} parameters; at most {MAX_PARAMETERS}, give a smaller width")
    return SelectorModel(num_channels, num_sites, width)


class MomentsSelectorModel(nn.Module):
    """
    [`Discriminant`] of the sites' statistics as a module with the interface of [`SelectorModel`].

    Args:
        statistics (`Sequence[Group]`): [`feature_statistics`] of every site, in the order of labels.
    """

    def __init__(self, statistics: Sequence[Group]):
        super().__init__()
        for name in ("count", "sum", "products"):
            self.register_buffer(name, torch.stack([some[name] for some in statistics]))

    @classmethod
    def from_state_dict(cls, state: Group) -> "MomentsSelectorModel":
        """The module whose `state_dict` this is."""
        return cls([{name: tensor[k] for name, tensor in state.items()} for k in range(len(state["count"]))])

    @property
    def discriminant(self) -> Discriminant:
        """Of the statistics the module holds."""
        state = self.state_dict()
        return Discriminant([{name: state[name][k] for name in state} for k in range(len(self.count))])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, K]` logits of `[B, C, H, W]` images, uint8 or in [0, 1]."""
        return -0.5 * self.discriminant.distances(image_features(planes(images)))

    def out_of_federation_score(self, images: torch.Tensor) -> torch.Tensor:
        """`[B]`; see [`Discriminant.out_of_federation_score`]."""
        return self.discriminant.out_of_federation_score(image_features(planes(images)))


class ImageBatches:
    """
    The images of some rows, batch after batch, as often as they are asked for.

    Args:
        rows (`datasets.Dataset` or `torch.utils.data.Dataset`): With `pixel_values` `[C, H, W]`.
        device (`torch.device`, *optional*): Where they are wanted.
        size (`int`, *optional*, defaults to 64): Images in a batch; no matter for what comes out.
    """

    def __init__(self, rows: Any, device: torch.device | str = "cpu", size: int = 64):
        self.rows, self.device, self.size = rows, device, size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.rows), self.size):
            stop = min(start + self.size, len(self.rows))
            images = [torch.as_tensor(self.rows[i]["pixel_values"]) for i in range(start, stop)]
            yield torch.stack(images).to(self.device)


def selector_weights(model: nn.Module, num_sites: int, seed: int) -> dict[str, torch.Tensor]:
    """
    What a learned selector begins with.

    Args:
        model (`nn.Module`): The model that is trained; it says how many channels the images have.
        num_sites (`int`): K.
        seed (`int`): Of the weights; torch's generator stays as it is.

    Raises:
        ConfigurationError: If the model does not take images, or for one site.
    """
    if num_sites < 2:
        remedy = "with one site there is nothing to select; take none"
        raise ConfigurationError("algorithm_args.selector", "learned", remedy)
    num_channels = num_channels_of(model)
    if num_channels is None:
        kind = type(model).__name__
        raise ConfigurationError("algorithm_args.selector", "learned", f"{kind} is no model of images; take none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        selector = selector_model(num_channels, num_sites)
    return {name: weight.detach() for name, weight in selector.named_parameters()}


def selector_like(weights: Group) -> SelectorModel:
    """
    The [`SelectorModel`] that weights are of; its own are of no use.

    Raises:
        InputError: If they are those of another module.
    """
    try:
        width, num_channels = weights["convolutions.0.weight"].shape[:2]
        model = SelectorModel(num_channels, len(weights["head.bias"]), width)
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = f"weights of another module than this version's; install the server's ({error})"
        raise InputError(f"selector: {reason}") from error
    return model


def selector_reply(message: Message, batches: Iterable[torch.Tensor]) -> tuple[dict[str, Group], dict[str, Scalar]]:
    """
    A site's part of whatever selector the server's message is about.

    Args:
        message (`Message`): What the server sent.
        batches (`Iterable[torch.Tensor]`): The site's images, `[B, C, H, W]` in [0, 1].

    Returns:
        `tuple`: Groups and scalars of the reply.
    """
    if "selector" in message.groups:
        return train_selector(selector_like(message.groups["selector"]), batches, message)
    if not message.scalars.get("needs_statistics"):
        return {}, {}
    parts = [feature_statistics(image_features(planes(images))) for images in batches]
    total = {name: sum(part[name] for part in parts).cpu() for name in parts[0]}
    return {"selector_statistics": total}, {}


def train_selector(
    model: nn.Module, batches: Iterable[torch.Tensor], message: Message
) -> tuple[dict[str, Group], dict[str, Scalar]]:
    """
    A site's part of [`~hf_mlopt.federated.algorithms.selectors.LearnedSelector`]: full-batch steps of cross entropy
    with the site's label. Depends on the message and the images only; an optimizer of earlier rounds is of no use.

    Args:
        model (`nn.Module`): Gives logits `[B, K]`; its own weights are not read and not changed.
        batches (`Iterable[torch.Tensor]`): The site's images in batches, on the model's device; gone through once a
            step, so no iterator that ends.
        message (`Message`): What the server sent.

    Returns:
        `tuple`: The groups `selector`, `selector_m`, `selector_v` and the scalar `selector_step` of the reply.

    Raises:
        InputError: If moments are missing, or there is no image.
    """
    step, label = message.scalars["selector_step"], message.scalars["label"]
    weights = message.groups["selector"]
    missing = {"selector_m", "selector_v"} - set(message.groups)
    if step > 0 and missing:
        raise InputError(f"message: no {sorted(missing)} at selector_step={step}; the optimizer cannot be built")
    m, v = (
        message.groups[name] if step > 0 else {key: torch.zeros_like(w, dtype=_wide(w)) for key, w in weights.items()}
        for name in ("selector_m", "selector_v")
    )
    for _ in range(message.scalars["selector_steps"]):
        step += 1
        grads = _mean_gradient(model, batches, label, weights)
        weights, m, v = adam_step(weights, grads, m, v, step, message.scalars["selector_lr"])
    return {"selector": weights, "selector_m": m, "selector_v": v}, {"selector_step": step}


def _mean_gradient(model: nn.Module, batches: Iterable[torch.Tensor], label: int, weights: Group) -> Group:
    """Of the mean over all images, on the CPU."""
    totals, num_images = {}, 0
    for images in batches:
        leaves = {name: w.to(images.device, copy=True).requires_grad_() for name, w in weights.items()}
        logits = torch.func.functional_call(model, leaves, (images,))
        labels = torch.full((len(images),), label, device=images.device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            totals[name] = totals[name] + grad.cpu() if name in totals else grad.cpu()
        num_images += len(images)
    if num_images == 0:
        raise InputError("selector: the site has no images to train on")
    return {name: total / num_images for name, total in totals.items()}


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
