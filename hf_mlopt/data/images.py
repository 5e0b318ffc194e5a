"""Labelled images by name: the bundled digits, an .npz file or a folder, with a record of where they came from."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_mlopt.errors import ConfigurationError, InputError


if TYPE_CHECKING:
    import numpy as np
    import torch

HELD_OUT = 0.2  # share of each class in the test split
_DIGITS_HELD_OUT = 397  # of 1,797: leaves 1,400
_GREY = ("1", "L")
_EIGHT_BIT = (*_GREY, "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # modes of PIL


@dataclass
class ImageData:
    """
    Images of one split.

    Args:
        images (`np.ndarray`): `[images, channels, height, width]`, float32 in [0, 1]; no mean is subtracted.
        labels (`np.ndarray`): `[images]`, int64 from 0.
        num_classes (`int`): Of the whole source, whether or not the split has images of all.
        label_names (`list[str]`): `[num_classes]`; the numbers as text where the source has no names.
        provenance (`dict`): JSON-able record: `source`, `split`, `seed` (`None` without a split), `images`, and
            `fingerprint`, the sha256 of the images as little-endian float32 and the labels as int64.
    """

    images: "np.ndarray"
    labels: "np.ndarray"
    num_classes: int
    label_names: list[str]
    provenance: dict


@dataclass
class _Source:
    """All labels of a source, and how to read the images of some rows as `[rows, channels, height, width]`."""

    labels: "np.ndarray"
    names: list[str] | None
    read: Callable[["np.ndarray"], "np.ndarray"]
    held_out: int | None = None


def load_images(source: str, split: Literal["train", "test"] | None = "train", seed: int = 0) -> ImageData:
    """
    Loads the images of a source into memory, in its order.

    Args:
        source (`str`): One of

            - `digits`: 8 x 8 grey digits that come with scikit-learn, 1,400 to train on and 397 held out;
            - an .npz file with arrays `images` and `labels`, or JPEG or PNG files end to end as `data`, `offsets` and
              `labels`, either with the names as `classes` if there are any;
            - `file.npz:name`: the arrays `name_x` and `name_y` of such a file;
            - a folder with a folder of images for each class, which it names.

            Arrays of images are uint8, or float in [0, 1], `[images, height, width]` or with 1 or 3 channels before or
            after height and width. Images in files are grey if all of the split are, else RGB.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, or `"test"` for the fifth of each class that is
            held out; `None` for all images of a source that has its test images elsewhere.
        seed (`int`, *optional*, defaults to 0): Decides which images are held out.

    Raises:
        ConfigurationError: If the split or seed is not a valid one.
        InputError: If the source cannot be read, its arrays do not fit together, images differ in size, or there are
            fewer than two classes.
    """
    import numpy as np

    if split not in ("train", "test", None):
        raise ConfigurationError("split", split, "must be 'train', 'test' or None")
    if seed < 0:
        raise ConfigurationError("seed", seed, "must be at least 0")
    opened = _open(source)
    labels, names = _checked_labels(source, opened.labels, opened.names)
    rows = np.arange(len(labels))
    if split is not None:
        count = opened.held_out or round(HELD_OUT * len(labels))
        held_out = _held_out(labels, count, seed)
        rows = np.flatnonzero(held_out if split == "test" else ~held_out)
        if len(rows) == 0:
            raise InputError(f"{source}: {len(labels)} images are too few to hold some out; use split=None")
    try:
        images = np.ascontiguousarray(opened.read(rows), dtype=np.float32)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    labels = labels[rows]
    digest = hashlib.sha256(images.astype("<f4", copy=False))
    digest.update(labels.astype("<i8", copy=False))
    provenance = {
        "source": source if source == "digits" else Path(source).name,
        "split": split,
        "seed": None if split is None else seed,
        "images": len(images),
        "fingerprint": digest.hexdigest(),
    }
    return ImageData(images, labels, len(names), names, provenance)


def image_dataset(data: ImageData) -> "torch.utils.data.Dataset":
    """
    Images as items for an image model of transformers.

    Args:
        data ([`ImageData`]): The images.

    Returns:
        [`torch.utils.data.StackDataset`]: Items `{"pixel_values": [channels, height, width], "labels": []}`.
    """
    import torch
    from torch.utils.data import StackDataset

    return StackDataset(pixel_values=torch.from_numpy(data.images), labels=torch.from_numpy(data.labels))


def _open(source: str) -> _Source:
    if source == "digits":
        return _digits()
    file, _, name = source.rpartition(":") if ".npz:" in source else (source, None, None)
    path = Path(file).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _open_archive(path, name)
    known = "'digits', an .npz file, or a folder with a folder of images for each class"
    raise InputError(f"{source}: {'not images' if path.exists() else 'no such file or folder'}; give {known}")


def _digits() -> _Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _Source(digits.target, None, lambda rows: digits.images[rows, None] / 16, _DIGITS_HELD_OUT)


def _open_archive(path: Path, name: str | None) -> _Source:
    """One of the three layouts of an .npz file."""
    import numpy as np

    try:
        with np.load(path) as file:
            keys = (f"{name}_x", f"{name}_y") if name else ("images", "labels")
            packed = not name and {"data", "offsets", "labels"} <= set(file.files)
            if packed:
                keys = ("data", "labels", "offsets")
            if not set(keys) <= set(file.files):
                named = [key.removesuffix("_x") for key in file.files if key.endswith("_x")]
                hint = f"; choose a set, as {path.name}:{named[0]}" if named else ""
                raise InputError(f"{path}: no arrays {' and '.join(keys)}, only {', '.join(file.files)}{hint}")
            data, labels, *offsets = (np.atleast_1d(file[key]) for key in keys)
            names = file["classes"].astype(str).tolist() if "classes" in file.files else None
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        # NumPy's own advice, to unpickle the file, is not given on: that would run what is in it.
        reason = "arrays of Python objects (images of different sizes?)" if "Object arrays" in str(error) else "broken"
        raise InputError(f"{path}: cannot be read as .npz: {reason}; save plain arrays of numbers") from error
    count = len(offsets[0]) - 1 if packed else len(data)
    if count != len(labels):
        raise InputError(f"{path}: {count} images but {len(labels)} labels")
    if not packed:
        return _Source(labels, names, lambda rows: _channels_first(data[rows]))
    start, stop = offsets[0][:-1], offsets[0][1:]
    return _Source(
        labels, names, lambda rows: _decode((f"image {row}", data[start[row] : stop[row]].tobytes()) for row in rows)
    )


def _open_folder(path: Path) -> _Source:
    """A folder for each class, as the builder `imagefolder` of datasets takes it, read here without a cache."""
    import numpy as np
    from PIL import Image

    suffixes = Image.registered_extensions()
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in suffixes)
    if not files:
        raise InputError(
            f"{path}: no images in folders named by class, as {path.name}/cat/1.png; if these lie in a folder train, "
            "give that one"
        )
    names, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    relative = [f"{file.parent.name}/{file.name}" for file in files]
    return _Source(labels, names.tolist(), lambda rows: _decode((relative[row], files[row]) for row in rows))


def _checked_labels(source: str, labels: "np.ndarray", names: list[str] | None) -> tuple["np.ndarray", list[str]]:
    import numpy as np

    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{source}: labels are {labels.dtype} of shape {labels.shape}; give one integer an image")
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"{source}: {len(present)} class in {len(labels)} images; two or more are needed")
    if names is None:
        names = [str(label) for label in range(int(present[-1]) + 1)]
    if present[0] < 0 or present[-1] >= len(names):
        raise InputError(f"{source}: labels from {present[0]} to {present[-1]}; give 0 to {len(names) - 1}")
    return labels.astype(np.int64), names


def _held_out(labels: "np.ndarray", count: int, seed: int) -> "np.ndarray":
    """
    Which images the test split has: `count` of them, each class by its size, rounded by largest remainder. One image
    of each class stays in training, even if the test split gets smaller by that.
    """
    import numpy as np

    rng, mask = np.random.default_rng(seed), np.zeros(len(labels), dtype=bool)
    present, sizes = np.unique(labels, return_counts=True)
    exact = count * sizes / len(labels)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: count - quotas.sum()]] += 1
    for label, quota in zip(present, np.minimum(quotas, sizes - 1), strict=True):
        mask[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return mask


def _channels_first(images: "np.ndarray") -> "np.ndarray":
    """Array of images of any accepted layout as `[images, channels, height, width]` in [0, 1]."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {images.shape[1:]}; give height x width, or that with 1 or 3 channels")
    if images.dtype == "uint8":
        return images.astype("float32") / 255
    if images.dtype.kind != "f" or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images are {images.dtype} outside [0, 1]; give uint8, or float divided by its largest value"
        )
    return images


def _decode(files: Iterable[tuple[str, bytes | Path]]) -> "np.ndarray":
    """Image files, each with a name for messages, as `[images, channels, height, width]` in [0, 1]."""
    import numpy as np
    from PIL import Image

    images = []
    for name, file in files:
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                image.load()
        except (OSError, SyntaxError) as error:  # a broken PNG is a SyntaxError
            raise ValueError(f"{name} cannot be read as an image") from error
        if image.mode not in _EIGHT_BIT:
            raise ValueError(f"{name} has mode {image.mode}; convert it to 8 bits a channel")
        if images and image.size != images[0].size:
            sizes = " and ".join("{} x {}".format(*size) for size in (images[0].size, image.size))
            raise ValueError(f"images differ in size, {sizes} ({name}); resize them first")
        images.append(image)
    mode = "L" if all(image.mode in _GREY for image in images) else "RGB"
    return _channels_first(np.stack([np.asarray(image.convert(mode)) for image in images]))
