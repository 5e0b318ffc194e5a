"""Segmentation: the data of sites with their errors, the loss, and models that learn discs."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.segmentation_data import disc_site, disc_sites, sites_from_folders, sites_from_npz
from hf_mlopt.federated.segmentation_models import SegmentationModel, dice_bce_loss
from hf_mlopt.workflows.segmentation_metrics import mean_overlap, predicted_masks


def test_the_loss_equals_its_formula():
    logits = torch.randn(3, 1, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    masks = (torch.rand(3, 1, 4, 5, generator=torch.manual_seed(1)) > 0.5).double()
    dice, bce = 0.0, 0.0
    for x, y in zip(logits.reshape(3, -1).tolist(), masks.reshape(3, -1).tolist(), strict=True):
        p = [1 / (1 + np.exp(-value)) for value in x]
        dice += (2 * sum(a * b for a, b in zip(p, y, strict=True)) + 1e-6) / (sum(p) + sum(y) + 1e-6) / 3
        bce -= sum(b * np.log(a) + (1 - b) * np.log(1 - a) for a, b in zip(p, y, strict=True)) / 60
    assert float(dice_bce_loss(logits, masks)) == pytest.approx(1 - dice + bce, rel=1e-12)
    with pytest.raises(InputError, match="^masks: shape"):
        dice_bce_loss(logits, masks[:, :, :2])


def learns(name, **options):
    torch.manual_seed(0)
    model = SegmentationModel(name, **options)
    data = disc_sites(["a"], 12)["a"]
    images, masks = torch.stack(list(data["pixel_values"])), torch.stack(list(data["labels"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(images, masks)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        found = predicted_masks(model.eval()(images)["logits"], masks)
    return mean_overlap(found.numpy(), masks.numpy())["dice"]


def test_segformer_learns_discs():
    assert learns("segformer", width=4) > 0.6


def test_the_unet_learns_discs_and_has_no_buffers():
    pytest.importorskip("monai", reason="MONAI, of the extra `medical`, is not installed")
    assert not list(SegmentationModel("unet").named_buffers())
    assert learns("unet") > 0.6


def test_an_unknown_network_is_named():
    with pytest.raises(ConfigurationError, match="^model='vgg'"):
        SegmentationModel("vgg")
    with pytest.raises(ConfigurationError, match="^width=0"):
        SegmentationModel("segformer", width=0)


def test_discs_are_as_described():
    images, masks = disc_site(2, 6, size=24, seed=3)
    assert images.shape == (6, 3, 24, 24) and images.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    assert np.array_equal(images, disc_site(2, 6, size=24, seed=3)[0])
    assert not np.array_equal(masks, disc_site(1, 6, size=24, seed=3)[1])
    foreground, background = images.mean(1)[masks == 1].mean(), images.mean(1)[masks == 0].mean()
    assert foreground == pytest.approx(90, abs=3) and background == pytest.approx(200, abs=3)  # dark on bright
    with pytest.raises(ConfigurationError, match="^site=5"):
        disc_site(5, 1)


def write_npz(path, **changes):
    images, masks = disc_site(0, 6)
    arrays = {"images": images, "masks": masks, "site": np.array([0, 0, 1, 1, 1, 2]), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_sites_of_an_npz_file(tmp_path):
    path = write_npz(tmp_path / "sites.npz")
    sites = sites_from_npz(path)
    assert {name: len(site) for name, site in sites.items()} == {"site-0": 2, "site-1": 3, "site-2": 1}
    chosen = sites_from_npz(path, {1: "colour"})["colour"]
    images, masks = disc_site(0, 6)
    row = chosen[0]
    torch.testing.assert_close(row["pixel_values"], torch.from_numpy(images[2]).float() / 255)
    torch.testing.assert_close(row["labels"], torch.from_numpy(masks[2][None]).float())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"masks": None}, "cannot be read as images, masks and site"),
        ({"masks": np.zeros((6, 16, 32))}, "site 'site-0': masks have shape"),
        ({"masks": np.full((6, 32, 32), 2)}, "masks hold \\[2\\]"),
        ({"images": np.zeros((6, 3, 32, 32))}, "images are float64"),
    ],
)
def test_a_bad_npz_file_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"sites.npz.*{message}"):
        sites_from_npz(write_npz(tmp_path / "sites.npz", **changes))


def test_a_site_that_is_not_in_the_file_is_named(tmp_path):
    with pytest.raises(InputError, match="site 7 \\('x'\\) has no image"):
        sites_from_npz(write_npz(tmp_path / "sites.npz"), {7: "x"})


def write_folders(path):
    for k, site in enumerate(("north", "south")):
        images, masks = disc_site(k, 3)
        for kind in ("images", "masks"):
            (path / site / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(images[i].transpose(1, 2, 0)).save(path / site / f"images/{i}.png")
            Image.fromarray(masks[i] * 255).save(path / site / f"masks/{i}.png")
    return path


def test_sites_of_folders(tmp_path):
    sites = sites_from_folders(write_folders(tmp_path))
    assert list(sites) == ["north", "south"]
    images, masks = disc_site(1, 3)
    row = sites["south"][2]
    torch.testing.assert_close(row["pixel_values"], torch.from_numpy(images[2]).float() / 255)
    torch.testing.assert_close(row["labels"], torch.from_numpy(masks[2][None]).float())
    small = sites_from_folders(tmp_path, size=16)["north"][0]
    assert small["pixel_values"].shape == (3, 16, 16) and set(small["labels"].unique().tolist()) <= {0.0, 1.0}


def test_bad_folders_name_the_file(tmp_path):
    with pytest.raises(InputError, match="holds no folder <site>/images"):
        sites_from_folders(tmp_path)
    write_folders(tmp_path)
    Image.new("L", (8, 9)).save(tmp_path / "north/masks/1.png")
    with pytest.raises(InputError, match=r"north/masks/1.png': is \(8, 9\), its image \(32, 32\)"):
        sites_from_folders(tmp_path)
    (tmp_path / "north/masks/1.png").unlink()
    with pytest.raises(InputError, match="north/images/1.png': has no mask"):
        sites_from_folders(tmp_path)
    (tmp_path / "north/masks/1.png").write_text("no image")
    with pytest.raises(InputError, match="north/masks/1.png': is no image"):
        sites_from_folders(tmp_path)
    for kind in ("images", "masks"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"north/{kind}/1.png")
    with pytest.raises(InputError, match=r"north/images/1.png': is \(16, 16\), others of its site are not"):
        sites_from_folders(tmp_path)
    with pytest.raises(ConfigurationError, match="^size=1"):
        sites_from_folders(tmp_path, size=1)


def test_the_u_net_is_that_of_monai():
    """Layer for layer; only the names differ."""
    from monai.networks.nets import DynUNet

    for name, dims in (("unet", 2), ("unet3d", 3)):
        theirs = DynUNet(dims, 2, 1, [3] * 3, [1, 2, 2], [2, 2], [6, 12, 24], norm_name=("GROUP", {"num_groups": 2}))
        ours = SegmentationModel(name, num_channels=2, width=6)
        with torch.no_grad():
            for mine, weight in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.copy_(weight)
        images = torch.rand(2, 2, *[16] * dims)
        assert torch.equal(ours(images)["logits"], theirs.eval()(images))


def test_sizes_that_cannot_be_halved_twice_are_refused():
    with pytest.raises(InputError, match=r"\[16, 18\] pixels: .* multiples of 4"):
        SegmentationModel("unet")(torch.rand(1, 3, 16, 18))
