"""Models of binary segmentation by name, and their loss."""

import math
from functools import partial
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError


EPS = 1e-6  # on both sides of the fraction, so that an empty prediction of an empty mask has Dice 1


def dice_bce_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    1 less the soft Dice of sigmoid(logits), mean over cases, plus the binary cross entropy, mean over pixels (nats).

    Args:
        logits (`torch.Tensor`): `[B, 1, ...]`.
        masks (`torch.Tensor`): 0 or 1, of the same shape.
    """
    if logits.shape != masks.shape:
        raise InputError(f"masks: shape {list(masks.shape)}; the logits have {list(logits.shape)}")
    masks = masks.to(logits.dtype)
    predicted, true = torch.sigmoid(logits).flatten(1), masks.flatten(1)
    dice = (2 * (predicted * true).sum(1) + EPS) / (predicted.sum(1) + true.sum(1) + EPS)
    return 1 - dice.mean() + nn.functional.binary_cross_entropy_with_logits(logits, masks)


class SegmentationModel(nn.Module, PyTorchModelHubMixin, library_name="hf_mlopt", tags=["image-segmentation"]):
    """
    A network for binary masks with the interface a Trainer expects, and `save_pretrained`, `from_pretrained` and
    `push_to_hub`.

    Args:
        name (`str`): `unet` or `unet3d` (MONAI, extra `medical`), or `segformer`, of random weights.
        num_channels (`int`, *optional*, defaults to 3): Of the images.
        width (`int`, *optional*, defaults to 8): Channels of the U-Net's first level; for `segformer` twice as many.
        patch (`int`, *optional*): In evaluation an image larger than this is answered by a window of so many pixels
            on a side that slides over it; for networks trained on crops.
    """

    def __init__(self, name: str, num_channels: int = 3, width: int = 8, patch: int | None = None):
        super().__init__()
        if name not in _NETWORKS:
            raise ConfigurationError("model", name, f"must be one of {', '.join(_NETWORKS)}")
        sizes = {"num_channels": num_channels, "width": width, **({} if patch is None else {"patch": patch})}
        for field, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ConfigurationError(field, value, "must be an int of at least 1")
        self.options: dict[str, Any] = {"name": name, **sizes}
        self.patch, self.network = patch, _NETWORKS[name](num_channels, width)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, case: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        `logits` `[B, 1, H, W]` of images `[B, C, H, W]` in [0, 1], or of volumes with one axis more, and `loss` where
        there are `labels`. What `case` an image is of is for metrics.
        """
        if self.patch is not None and not self.training and max(pixel_values.shape[2:]) > self.patch:
            from monai.inferers import sliding_window_inference

            window = (self.patch,) * (pixel_values.ndim - 2)
            logits = sliding_window_inference(pixel_values, window, 4, self.network, mode="gaussian")
        else:
            logits = self.network(pixel_values)
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        if logits.shape[2:] != pixel_values.shape[2:]:  # SegFormer predicts at a fraction of the resolution
            logits = nn.functional.interpolate(logits, pixel_values.shape[2:], mode="bilinear", align_corners=False)
        if labels is None:
            return {"logits": logits}
        return {"loss": dice_bce_loss(logits, labels), "logits": logits}


class _UNet(nn.Module):
    """
    Three levels of MONAI's blocks of nnU-Net. Its DynUNet is made of the same, but has every block twice in its
    `state_dict`, which safetensors and `functional_call` refuse.
    """

    def __init__(self, spatial_dims: int, num_channels: int, width: int):
        super().__init__()
        try:
            from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetUpBlock
        except ImportError as error:
            raise InputError("the U-Nets are MONAI's; install the extra hf-mlopt[medical]") from error
        norm = ("GROUP", {"num_groups": math.gcd(width, 4)})  # no buffers, and no statistics of a batch
        sizes = [num_channels, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            UnetBasicBlock(spatial_dims, sizes[level], sizes[level + 1], 3, min(2, level + 1), norm)
            for level in range(3)
        )
        self.up = nn.ModuleList(
            UnetUpBlock(spatial_dims, sizes[level + 1], sizes[level], 3, 1, 2, norm) for level in (2, 1)
        )
        self.out = UnetOutBlock(spatial_dims, width, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sizes, passed = list(images.shape[2:]), []
        if any(size % 4 for size in sizes):
            raise InputError(
                f"images of {sizes} pixels: the U-Net halves them twice; take multiples of 4 (image_size)"
            )
        for block in self.down:
            images = block(images)
            passed.insert(0, images)
        for block, skip in zip(self.up, passed[1:], strict=True):
            images = block(images, skip)
        return self.out(images)


def _segformer(num_channels: int, width: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_channels=num_channels,
        num_labels=1,
        hidden_sizes=[2 * width, 4 * width, 8 * width, 16 * width],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 4],
        decoder_hidden_size=8 * width,
        patch_sizes=[7, 3, 3, 3],
        strides=[2, 2, 2, 2],
    )
    return SegformerForSemanticSegmentation(config)


_NETWORKS = {"unet": partial(_UNet, 2), "unet3d": partial(_UNet, 3), "segformer": _segformer}
