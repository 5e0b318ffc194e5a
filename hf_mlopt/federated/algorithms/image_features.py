"""Cheap features of images, their sums at a site, and the discriminant that tells sites apart by them."""

import math
from collections.abc import Sequence

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.algorithms.server import require


# B images   C channels   F features   K sites
NUM_BINS = 16


def num_image_features(num_channels: int) -> int:
    """F of [`image_features`]: 23 for 3 channels."""
    return 2 * num_channels + NUM_BINS + 1


def num_channels_of(model: torch.nn.Module) -> int | None:
    """Channels of the images that a model takes, if it says so."""
    options, config = getattr(model, "options", {}), getattr(model, "config", None)
    return options.get("num_channels", getattr(config, "num_channels", None))


def image_features(images: torch.Tensor) -> torch.Tensor:
    """
    Means and standard deviations of the channels, a grey histogram of 16 bins (shares of pixels), and the mean
    difference between vertical neighbours in grey (absolute; the signed one would only see the first and last row).

    Args:
        images (`torch.Tensor`): `[B, C, H, W]`, H at least 2; floating point in [0, 1], or uint8.

    Returns:
        `torch.Tensor`: `[B, 2 C + 17]`, float64.

    Raises:
        InputError: If the images are not as described.
    """
    if images.ndim != 4 or images.shape[2] < 2:
        raise InputError(f"images: shape {list(images.shape)}; [images, channels, height, width] is needed")
    pixels = images.double() / (255 if images.dtype == torch.uint8 else 1)
    if not ((pixels >= 0) & (pixels <= 1)).all():
        raise InputError(f"images: from {float(pixels.min()):.4g} to {float(pixels.max()):.4g}; give uint8, or [0, 1]")
    grey = pixels.mean(dim=1)
    bins = (grey * NUM_BINS).long().clamp(max=NUM_BINS - 1).flatten(1)
    histogram = torch.nn.functional.one_hot(bins, NUM_BINS).double().mean(dim=1)
    difference = (grey[:, 1:] - grey[:, :-1]).abs().mean(dim=(1, 2))
    means, stds = pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3), correction=0)
    return torch.cat([means, stds, histogram, difference[:, None]], dim=1)


def feature_statistics(features_BF: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    What a site sends once: n, Σ f, and of Σ f fᵀ the lower triangle. Sums of two sets of images may be added.

    Returns:
        `dict[str, torch.Tensor]`: `count` (0-d), `sum` `[F]`, `products` `[F (F+1) / 2]`; float64.
    """
    features = features_BF.double()
    rows, columns = torch.tril_indices(features.shape[1], features.shape[1])
    products = features.T @ features
    return {
        "count": torch.tensor(float(len(features)), dtype=torch.float64),
        "sum": features.sum(dim=0),
        "products": products[rows, columns],
    }


def empty_statistics(num_features: int) -> dict[str, torch.Tensor]:
    """The statistics of no image."""
    return feature_statistics(torch.zeros(0, num_features, dtype=torch.float64))


class Discriminant:
    """
    Linear discriminant analysis on the statistics of sites, each site as likely as any other.

    The covariance common to all is shrunk to `.9 S + .1 mean(diag S) I`, S being the pooled scatter within sites over
    the number of images. Sites without statistics have the probability 0.

    Args:
        statistics (`Sequence[Group]`): [`feature_statistics`] of every site, in the order of labels.
        shrinkage (`float`, *optional*, defaults to 0.1): Share of the identity, in (0, 1].

    Raises:
        InputError: If fewer than two sites have statistics.
    """

    def __init__(self, statistics: Sequence[Group], shrinkage: float = 0.1):
        require("shrinkage", shrinkage, 0 < shrinkage <= 1, "must be above 0 and at most 1")
        counts = torch.stack([some["count"] for some in statistics])
        self.known_K = counts > 0
        if self.known_K.sum() < 2:
            raise InputError(f"selector: {int(self.known_K.sum())} sites have sent statistics; two are needed")
        self.means_KF = torch.stack([some["sum"] for some in statistics]) / counts.clamp(min=1)[:, None]
        scatter = sum(
            _unpacked(some["products"], len(mean)) - some["count"] * mean[:, None] * mean
            for some, mean in zip(statistics, self.means_KF, strict=True)
        )
        scatter = scatter / counts.sum()
        spread = scatter.diagonal().mean().clamp(min=1e-12)  # sites of one image each have none
        identity = torch.eye(len(scatter), dtype=torch.float64, device=scatter.device)
        self.precision_FF = torch.linalg.inv((1 - shrinkage) * scatter + shrinkage * spread * identity)

    def distances(self, features_BF: torch.Tensor) -> torch.Tensor:
        """`torch.Tensor`: `[B, K]`, squared Mahalanobis distances to the sites' means; infinite to an unknown site."""
        offsets = features_BF.double()[:, None] - self.means_KF
        distances = torch.einsum("bkf,fg,bkg->bk", offsets, self.precision_FF, offsets)
        return distances.masked_fill(~self.known_K, math.inf)

    def probabilities(self, features_BF: torch.Tensor) -> torch.Tensor:
        """`torch.Tensor`: `[B, K]`, softmax of minus half the squared distances."""
        return torch.softmax(-0.5 * self.distances(features_BF), dim=1)

    def out_of_federation_score(self, features_BF: torch.Tensor) -> torch.Tensor:
        """
        How far images are from every site of the federation.

        Returns:
            `torch.Tensor`: `[B]`, least squared distance over F: near 1 in the mean over the federation's images, less
            at sites that vary less than others, and more for images unlike all of them.
        """
        return self.distances(features_BF).min(dim=1).values / features_BF.shape[1]


def _unpacked(products: torch.Tensor, num_features: int) -> torch.Tensor:
    rows, columns = torch.tril_indices(num_features, num_features)
    full = products.new_empty(num_features, num_features)
    full[rows, columns] = products
    full[columns, rows] = products
    return full
