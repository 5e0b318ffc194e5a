"""Images with binary masks, per site, as `datasets`: from an npz file, from folders, or drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Array3D, Dataset, Features
from PIL import Image, UnidentifiedImageError

from hf_mlopt.errors import ConfigurationError, InputError


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def segmentation_dataset(images: np.ndarray, masks: np.ndarray, name: str, size: int | None = None) -> Dataset:
    """
    Args:
        images (`np.ndarray`): `[N, C, H, W]`, uint8.
        masks (`np.ndarray`): `[N, H, W]`, 0 or 1.
        name (`str`): Where they are from, for errors.
        size (`int`, *optional*): Height and width to resize to; a pixel of a mask is what most of it was.

    Returns:
        `Dataset`: `pixel_values` `[C, H, W]` in [0, 1] and `labels` `[1, H, W]`, float32 torch tensors.

    Raises:
        InputError: If there is no image, or the masks do not fit.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
        raise InputError(
            f"{name}: images are {images.dtype} {list(images.shape)}; uint8 [images, channels, H, W] needed"
        )
    if masks.shape != (len(images), *images.shape[2:]):
        raise InputError(
            f"{name}: masks have shape {list(masks.shape)}, the images {list(images.shape)}; sizes must agree"
        )
    values = np.unique(masks)
    if not np.isin(values, (0, 1)).all():
        raise InputError(f"{name}: masks hold {values[:5].tolist()}; 0 and 1 are the two classes there are")
    columns = {"pixel_values": images.astype(np.float32) / 255, "labels": masks[:, None].astype(np.float32)}
    if size is not None:
        columns = {column: _resized(array, size) for column, array in columns.items()}
        columns["labels"] = (columns["labels"] >= 0.5).astype(np.float32)
    features = Features({column: Array3D(array.shape[1:], "float32") for column, array in columns.items()})
    return Dataset.from_dict(columns, features=features).with_format("torch")


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    if type(size) is not int or size < 2:
        raise ConfigurationError("size", size, "must be an int of at least 2")
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return resized.clamp(0, 1).numpy()


def sites_from_npz(
    path: str | Path, names: Mapping[int, str] | None = None, size: int | None = None
) -> dict[str, Dataset]:
    """
    Reads one file of all sites.

    Args:
        path (`str` or `Path`): With `images` `[N, C, H, W]` uint8, `masks` `[N, H, W]` and `site` `[N]`.
        names (`Mapping[int, str]`, *optional*): Number in `site` to the name; sites without a name are left out. All
            sites, as `site-<number>`, where absent.
        size (`int`, *optional*): Height and width to resize to.

    Raises:
        InputError: If the file is none, lacks an array, or has no image of a site named.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "masks", "site")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(path)!r}: cannot be read as images, masks and site ({error})") from error
    names = names or {int(number): f"site-{number}" for number in np.unique(arrays["site"])}
    sites = {}
    for number, name in names.items():
        rows = arrays["site"] == number
        if not rows.any():
            raise InputError(
                f"{str(path)!r}: site {number} ({name!r}) has no image; there are {np.unique(arrays['site'])}"
            )
        name_of_rows = f"{path}, site {name!r}"
        sites[name] = segmentation_dataset(arrays["images"][rows], arrays["masks"][rows], name_of_rows, size)
    return sites


def sites_from_folders(path: str | Path, size: int | None = None) -> dict[str, Dataset]:
    """
    Reads `<path>/<site>/images/<name>.*` with `<path>/<site>/masks/<name>.*`, in which all but 0 is foreground.

    Args:
        path (`str` or `Path`): Holds a folder a site.
        size (`int`, *optional*): Height and width to resize to; all images of a site must have one size where absent.

    Raises:
        InputError: If an image has no mask, a mask another size than its image, or a file is no image; with the file.
    """
    folders = sorted(folder for folder in Path(path).glob("*") if (folder / "images").is_dir())
    if not folders:
        raise InputError(f"{str(path)!r}: holds no folder <site>/images")
    return {folder.name: site_from_folder(folder, size) for folder in folders}


def site_from_folder(folder: Path, size: int | None = None) -> Dataset:
    """Reads `<folder>/images` with `<folder>/masks` of one site; see [`sites_from_folders`]."""
    if size is not None and (type(size) is not int or size < 2):
        raise ConfigurationError("size", size, "must be an int of at least 2")
    if not (folder / "images").is_dir():
        raise InputError(f"{str(folder)!r}: holds no folder images")
    files = sorted(file for file in (folder / "images").iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"{str(folder / 'images')!r}: holds no image")
    masks_by_stem = {file.stem: file for file in (folder / "masks").glob("*") if file.suffix.lower() in IMAGE_SUFFIXES}
    images, masks = [], []
    for file in files:
        if file.stem not in masks_by_stem:
            raise InputError(f"{str(file)!r}: has no mask of that name in {str(folder / 'masks')!r}")
        image, mask = _read(file, "RGB"), _read(masks_by_stem[file.stem], "L")
        if mask.size != image.size:
            raise InputError(
                f"{str(masks_by_stem[file.stem])!r}: is {mask.size}, its image {image.size}; must be equal"
            )
        if size is not None:
            image, mask = image.resize((size, size), Image.BILINEAR), mask.resize((size, size), Image.NEAREST)
        images.append(np.asarray(image).transpose(2, 0, 1))
        masks.append(np.asarray(mask) > 0)
        if images[-1].shape != images[0].shape:
            raise InputError(f"{str(file)!r}: is {image.size}, others of its site are not; give a size to resize to")
    return segmentation_dataset(np.stack(images), np.stack(masks), str(folder))


def _read(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert(mode)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{str(file)!r}: is no image that can be read ({error})") from error


# Background and disc of each kind of site: sites differ in contrast and polarity, as microscopes do.
_DISC_LEVELS = ((60, 160), (110, 150), (200, 90), (20, 60), (150, 250))


def disc_site(site: int, num_images: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Noisy images of one to three discs, drawn.

    Args:
        site (`int`): 0 to 4, another contrast and polarity each.
        num_images (`int`): N.
        size (`int`, *optional*, defaults to 32): H and W.
        seed (`int`, *optional*, defaults to 0): Of the images; the same for all sites gives other discs at each.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: `[N, 3, size, size]` uint8 and masks `[N, size, size]` of 0 and 1.
    """
    if type(site) is not int or not 0 <= site < len(_DISC_LEVELS):
        raise ConfigurationError("site", site, f"must be an int from 0 to {len(_DISC_LEVELS) - 1}")
    generator = np.random.default_rng([seed, site])
    rows, columns = np.mgrid[:size, :size]
    masks = np.zeros((num_images, size, size), dtype=np.uint8)
    for mask in masks:
        for _ in range(generator.integers(1, 4)):
            y, x = generator.uniform(0.2 * size, 0.8 * size, size=2)
            mask |= (rows - y) ** 2 + (columns - x) ** 2 < generator.uniform(0.08 * size, 0.2 * size) ** 2
    ground, disc = _DISC_LEVELS[site]
    grey = np.where(masks, disc, ground)[:, None] + generator.normal(0, 12, size=(num_images, 3, size, size))
    return grey.clip(0, 255).astype(np.uint8), masks


def disc_sites(sites: Sequence[str], num_images: int, size: int = 32, seed: int = 0) -> dict[str, Dataset]:
    """[`disc_site`] for the names given, at most 5, as `datasets`."""
    return {name: segmentation_dataset(*disc_site(k, num_images, size, seed), name) for k, name in enumerate(sites)}
