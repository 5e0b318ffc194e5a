"""Volumes with binary masks of a site, read by MONAI from NIfTI files: as slices or whole."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Array3D, Array4D, Dataset, Features, Value

from hf_mlopt.errors import ConfigurationError, InputError


VOLUME_SUFFIXES = (".nii", ".nii.gz")


def site_from_volumes(
    folder: str | Path, size: int, window: tuple[float, float] | None = None, whole: bool = False
) -> Dataset:
    """
    Reads `<folder>/images/<case>.nii.gz` with `<folder>/masks/<case>.nii.gz`.

    Axes are brought into the order right, anterior, superior, so that slices are axial whatever the file's order.

    Args:
        folder (`str` or `Path`): Of one site.
        size (`int`): Height and width of a slice, or all three sides of a volume, to resize to.
        window (`tuple[float, float]`, *optional*): Intensities that become 0 and 1, such as (-160, 240) Hounsfield
            units for soft tissue; by default the percentiles .5 and 99.5 of each volume.
        whole (`bool`, *optional*, defaults to `False`): A row is a volume rather than a slice.

    Returns:
        `Dataset`: `pixel_values` `[1, H, W]` or `[1, H, W, D]` in [0, 1], `labels` alike, and `case`, the number of
        the volume in order of name.

    Raises:
        InputError: If a package, a file or a mask is missing, or an image and its mask do not fit; with the file.
    """
    if type(size) is not int or size < 2:
        raise ConfigurationError("size", size, "must be an int of at least 2")
    images, masks, cases = [], [], []
    for case, (image, mask) in enumerate(_volumes(Path(folder), window)):
        if whole:
            parts = [torch.nn.functional.interpolate(v[None], (size,) * 3, mode="trilinear") for v in (image, mask)]
        else:
            slices = [v.permute(3, 0, 1, 2) for v in (image, mask)]
            parts = [torch.nn.functional.interpolate(v, (size, size), mode="bilinear", antialias=True) for v in slices]
        images.append(parts[0].clamp(0, 1).numpy())
        masks.append((parts[1] >= 0.5).float().numpy())
        cases += [case] * len(parts[0])
    columns = {"pixel_values": np.concatenate(images), "labels": np.concatenate(masks)}
    array = Array4D if whole else Array3D
    features = {name: array(values.shape[1:], "float32") for name, values in columns.items()}
    rows = Dataset.from_dict({**columns, "case": cases}, features=Features({**features, "case": Value("int64")}))
    return rows.with_format("torch")


def sites_from_volumes(path: str | Path, *how) -> dict[str, Dataset]:
    """[`site_from_volumes`] for every `<path>/<site>`."""
    folders = sorted(folder for folder in Path(path).glob("*") if (folder / "images").is_dir())
    if not folders:
        raise InputError(f"{str(path)!r}: holds no folder <site>/images")
    return {folder.name: site_from_volumes(folder, *how) for folder in folders}


def _volumes(folder: Path, window: tuple[float, float] | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Image in [0, 1] and mask of every case, `[1, H, W, D]`, float32."""
    from monai import transforms

    scale = transforms.ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)
    if window is not None:
        scale = transforms.ScaleIntensityRange(*window, 0, 1, clip=True)
    for file, mask_file in _pairs(folder):
        image, mask = _read(file), _read(mask_file)
        if image.shape != mask.shape:
            raise InputError(
                f"{str(mask_file)!r}: is {list(mask.shape[1:])}, its image {list(image.shape[1:])}; must be equal"
            )
        if not torch.allclose(image.affine, mask.affine, atol=1e-3):
            raise InputError(f"{str(mask_file)!r}: lies elsewhere in space than its image (another affine)")
        if not torch.isin(mask.unique(), torch.tensor([0.0, 1.0])).all():
            values = mask.unique()[:5].tolist()
            raise InputError(f"{str(mask_file)!r}: holds {values}; 0 and 1 are the two classes there are")
        yield scale(image).as_subclass(torch.Tensor).float(), mask.as_subclass(torch.Tensor).float()


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    names = [{_case(file): file for file in _files(folder / kind)} for kind in ("images", "masks")]
    if not names[0]:
        raise InputError(f"{str(folder / 'images')!r}: holds no {' or '.join(VOLUME_SUFFIXES)}")
    for case, file in names[0].items():
        if case not in names[1]:
            raise InputError(f"{str(file)!r}: has no mask of that name in {str(folder / 'masks')!r}")
    return [(file, names[1][case]) for case, file in names[0].items()]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.name.endswith(VOLUME_SUFFIXES))


def _case(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _read(file: Path):
    """A volume in RAS+ as MONAI's tensor, which knows its affine; `[1, H, W, D]`."""
    from monai.transforms import LoadImage, Orientation
    from monai.utils import OptionalImportError

    try:
        volume = LoadImage(image_only=True, ensure_channel_first=True, reader="NibabelReader")(file)
    except OptionalImportError as error:
        raise InputError("volumes: NIfTI files need nibabel; install the extra hf-mlopt[medical]") from error
    except Exception as error:  # readers raise whatever their format's library does
        raise InputError(f"{str(file)!r}: is no volume that can be read ({error})") from error
    if volume.ndim != 4:
        raise InputError(f"{str(file)!r}: has shape {list(volume.shape[1:])}; three axes are needed")
    return Orientation("RAS", labels=None)(volume)
