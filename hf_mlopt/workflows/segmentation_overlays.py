"""Pictures of predictions against truth, a sheet a site."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Colour-blind safe (Okabe and Ito).
FOUND, MISSED, TOO_MUCH = (0, 158, 115), (0, 114, 178), (213, 94, 0)
LEGEND = {"found": FOUND, "missed": MISSED, "too much": TOO_MUCH}
_OPACITY = 0.6
_GAP, _HEAD, _FOOT = 4, 18, 18  # pixels
_LEAST_SIDE = 128  # smaller images are enlarged by a whole factor, so that pixels stay pixels


def overlay(image: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """
    An image in grey under the colours of `LEGEND`.

    Args:
        image (`np.ndarray`): `[C, H, W]` in [0, 1].
        true (`np.ndarray`): `[H, W]`, truth value or 0 and 1.
        predicted (`np.ndarray`): As `true`.

    Returns:
        `np.ndarray`: `[H, W, 3]`, uint8.
    """
    grey = np.repeat(255 * image.mean(axis=0)[..., None], 3, axis=-1)
    true, predicted = true.astype(bool), predicted.astype(bool)
    for where, colour in ((true & predicted, FOUND), (true & ~predicted, MISSED), (predicted & ~true, TOO_MUCH)):
        grey[where] = (1 - _OPACITY) * grey[where] + _OPACITY * np.array(colour)
    return grey.round().astype(np.uint8)


def save_sheet(path: Path, images: np.ndarray, true: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    """
    Writes a PNG with a row an image: the image, and the overlay of each model.

    Args:
        path (`Path`): File; its folder is made.
        images (`np.ndarray`): `[N, C, H, W]` in [0, 1].
        true (`np.ndarray`): `[N, H, W]`, 0 or 1.
        predicted (`Mapping[str, np.ndarray]`): Name of a model to `[N, H, W]`, 0 or 1.
    """
    height, width = images.shape[2:]
    factor = max(1, -(-_LEAST_SIDE // max(height, width)))
    columns = [("image", [_plain(image) for image in images])]
    for name, masks in predicted.items():
        columns.append((name, [overlay(*row) for row in zip(images, true, masks, strict=True)]))
    side = (width * factor, height * factor)
    size = (_GAP + len(columns) * (side[0] + _GAP), _HEAD + len(images) * (side[1] + _GAP) + _FOOT)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (name, cells) in enumerate(columns):
        x = _GAP + number * (side[0] + _GAP)
        draw.text((x, 2), name, fill="black", font=font)
        for row, cell in enumerate(cells):
            enlarged = Image.fromarray(cell).resize(side, Image.NEAREST)
            sheet.paste(enlarged, (x, _HEAD + row * (side[1] + _GAP)))
    x = _GAP
    for name, colour in LEGEND.items():
        draw.rectangle((x, size[1] - 14, x + 10, size[1] - 4), fill=colour)
        draw.text((x + 14, size[1] - 17), name, fill="black", font=font)
        x += 24 + int(draw.textlength(name, font=font))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _plain(image: np.ndarray) -> np.ndarray:
    """`[H, W, 3]`; in grey unless the image has three channels."""
    channels = image if len(image) == 3 else np.repeat(image.mean(axis=0)[None], 3, axis=0)
    return (255 * channels).round().astype(np.uint8).transpose(1, 2, 0)
