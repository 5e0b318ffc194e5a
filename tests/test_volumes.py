"""NIfTI volumes of sites: read whatever their axes, as slices or whole, and judged by case."""

import gc
import json

import nibabel
import numpy as np
import pytest
import torch
from command_line import hf_mlopt
from monai.inferers import sliding_window_inference

from hf_mlopt.configuration import load_config
from hf_mlopt.errors import InputError
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.super_model import SuperModel
from hf_mlopt.federated.volume_data import site_from_volumes
from hf_mlopt.workflows.federate_recipe import FederateRecipe
from hf_mlopt.workflows.segmentation_data import SegmentationData
from hf_mlopt.workflows.segmentation_metrics import mean_overlap


gc.collect()
gc.freeze()  # every Trainer ends with a full collection

SHAPE = (20, 16, 12)  # right, anterior, superior


def ball(seed, low=-100.0, high=200.0):
    """A noisy volume in Hounsfield units, and the mask of the ball in it."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij")
    centre = [generator.uniform(0.35, 0.65) * side for side in SHAPE]
    mask = sum(((axis - c) / 4) ** 2 for axis, c in zip(axes, centre, strict=True)) < 1
    volume = np.where(mask, high, low) + generator.normal(0, 10, SHAPE)
    return volume.astype(np.float32), mask.astype(np.uint8)


def write_case(folder, name, volume, mask, axes="RAS", affine=None):
    affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
    for kind, array in (("images", volume), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(array, affine)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
        )
        nibabel.save(image.as_reoriented(turn), folder / kind / f"{name}.nii.gz")


def write_sites(path, count=4):
    """Sites of other contrast and another order of axes."""
    for number, (site, levels, axes) in enumerate(
        (("a", (-100, 200), "RAS"), ("b", (150, -50), "LPS"), ("c", (0, 60), "PIR"))
    ):
        for case in range(count):
            write_case(path / site, f"case_{case}", *ball(10 * number + case, *levels), axes)
    return path


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return write_sites(tmp_path_factory.mktemp("ct"))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
def test_axial_slices_whatever_the_order_of_axes(tmp_path, axes):
    volume, mask = ball(3)
    write_case(tmp_path, "x", volume, mask, axes)
    rows = site_from_volumes(tmp_path, 16, (-200, 300))[:]
    assert rows["pixel_values"].shape == rows["labels"].shape == (12, 1, 16, 16)
    expected = (np.clip((volume + 200) / 500, 0, 1)).transpose(2, 0, 1)
    found = rows["pixel_values"][:, 0].numpy()
    assert found.mean() == pytest.approx(expected.mean(), abs=2e-3)
    for k in range(12):  # 20 rows become 16, so means are compared
        assert found[k].mean() == pytest.approx(expected[k].mean(), abs=0.01)
        assert rows["labels"][k].sum() / 256 == pytest.approx(mask[:, :, k].mean(), abs=0.015)
    assert found.min() >= 0 and found.max() <= 1 and set(rows["labels"].unique().tolist()) == {0.0, 1.0}


def test_a_slice_of_the_right_size_is_the_file_itself(tmp_path):
    volume, mask = ball(4)
    write_case(tmp_path, "x", volume[:16], mask[:16], "LPS")
    rows = site_from_volumes(tmp_path, 16, (-200, 300))[:]
    expected = np.clip((volume[:16] + 200) / 500, 0, 1).transpose(2, 0, 1)
    np.testing.assert_allclose(rows["pixel_values"][:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(rows["labels"][:, 0], mask[:16].transpose(2, 0, 1))


def test_whole_volumes_and_the_percentiles_of_each(tmp_path):
    for case in range(2):
        volume, mask = ball(case)
        write_case(tmp_path, str(case), volume * (1 + 9 * case), mask)
    rows = site_from_volumes(tmp_path, 12, None, True)
    assert rows[:]["pixel_values"].shape == (2, 1, 12, 12, 12) and rows["case"][:].tolist() == [0, 1]
    for row in rows:  # the second is ten times as bright, and looks the same
        inside = row["pixel_values"][row["labels"] > 0].mean()
        outside = row["pixel_values"][row["labels"] == 0].mean()
        assert inside > 0.75 and outside < 0.25


def test_dice_is_that_of_a_volume():
    true, predicted = np.zeros((4, 1, 2, 2)), np.zeros((4, 1, 2, 2))
    true[0, 0, 0], predicted[0, 0, 0, 0], predicted[1, 0, 0, 0] = 1, 1, 1  # case 0: 1 of 2 found, 1 too much
    found = mean_overlap(predicted, true, np.array([0, 0, 1, 1]))
    assert found == {"dice": pytest.approx((0.5 + 1) / 2), "iou": pytest.approx((1 / 3 + 1) / 2)}
    by_slice = mean_overlap(predicted, true)
    assert by_slice["dice"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)


SMALL = (
    *("--task", "segmentation", "--image-size", "16", "--site-eval-share", "0.4", "--num-rounds", "2"),
    *("--per-device-train-batch-size", "8", "--learning-rate", "3e-3", "--optim", "adamw_torch", "--disable-tqdm"),
    *("--use-cpu", "--intensity-window", "-200", "300", "--release-personal", "--algorithm", "fedsm"),
    *("--algorithm-args", '{"selector": "moments"}', "--overlay-every", "0"),
)
SLICES = ("--volumes", "slices", "--model-type", "unet", "--model-config", '{"width": 2}')
WHOLE = ("--volumes", "whole", "--model-type", "unet3d", "--model-config", '{"width": 2, "patch": 8}')
CROPS = ("--augmentation", '{"RandSpatialCropd": {"roi_size": [8, 8, 8], "random_size": false}}')


def federate(output, source, *more):
    recipe = output.parent / "recipe.yaml"
    recipe.write_text("{}")
    return hf_mlopt("federate", recipe, *SMALL, "--dataset", source, "--output-dir", output, *more)


@pytest.mark.parametrize("how", [SLICES, (*WHOLE, *CROPS)], ids=["slices", "whole"])
def test_a_federation_of_volumes(sites, tmp_path, how):
    output = tmp_path / "output"
    outcome = federate(output, sites, *how)
    assert outcome.status == 0, outcome.err
    found = json.loads((output / "federated_results.json").read_text())
    data = SegmentationData(load_config(FederateRecipe, output / "recipe.yaml", {"output_dir": "x"}))
    super_model = SuperModel.from_pretrained(output / "super_model")
    network = SegmentationModel.from_pretrained(output).eval()
    for site, row in found["segmentation"]["sites"].items():
        rows = data.site(site).evaluation[:]
        held_out, cases = (
            set(rows["case"].tolist()),
            set(data.site(site).train[:]["case"].tolist()) if how is SLICES else set(),
        )
        assert len(held_out) == row["images"] == 2 and not held_out & cases  # no volume is on both sides
        with torch.no_grad():
            masks = network(rows["pixel_values"])["logits"] > 0
        expected = mean_overlap(masks.numpy(), rows["labels"].numpy(), rows["case"].numpy())["dice"]
        assert row["global"] == pytest.approx(expected, abs=1e-6)
        assert row["global"] == pytest.approx(found["rounds"][-1]["evaluation"]["sites"][site]["eval_dice"], abs=1e-6)
        prediction = super_model.predict(rows["pixel_values"])
        assert prediction.logits.shape == rows["labels"].shape and len(prediction.models) == len(rows["case"])
        assert (output / "overlays" / f"{site}.png").is_file()


def test_a_window_slides_over_what_is_larger_than_a_patch():
    torch.manual_seed(0)
    model = SegmentationModel("unet3d", num_channels=1, width=2, patch=8)
    volume = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        expected = sliding_window_inference(volume, (8, 8, 8), 4, model.network.eval(), mode="gaussian")
        torch.testing.assert_close(model.eval()(volume)["logits"], expected)
        small = volume[..., :8, :8, :8]
        torch.testing.assert_close(model(small)["logits"], model.network(small))
        torch.testing.assert_close(model.train()(volume)["logits"], model.network(volume))


@pytest.mark.parametrize(
    "damage, match",
    [
        ("no mask", r"x.nii.gz'.*has no mask of that name"),
        ("shape", r"masks/x.nii.gz'.*is \[20, 16, 11\], its image \[20, 16, 12\]"),
        ("place", r"masks/x.nii.gz'.*lies elsewhere in space"),
        ("classes", r"masks/x.nii.gz'.*holds \[0.0, 2.0\]; 0 and 1 are the two classes"),
        ("no file", "holds no .nii or .nii.gz"),
        ("no volume", r"images/x.nii.gz'.*is no volume that can be read"),
    ],
)
def test_a_bad_volume_is_named(tmp_path, damage, match):
    volume, mask = ball(0)
    write_case(tmp_path, "x", volume, mask)
    masks = tmp_path / "masks" / "x.nii.gz"
    if damage == "no mask":
        masks.unlink()
    elif damage == "shape":
        nibabel.save(nibabel.Nifti1Image(mask[..., :11], np.diag([2.0, 2.0, 3.0, 1.0])), masks)
    elif damage == "place":
        nibabel.save(nibabel.Nifti1Image(mask, np.diag([2.0, 2.0, 2.0, 1.0])), masks)
    elif damage == "classes":
        nibabel.save(nibabel.Nifti1Image(2 * mask, np.diag([2.0, 2.0, 3.0, 1.0])), masks)
    elif damage == "no volume":
        (tmp_path / "images" / "x.nii.gz").write_text("no volume")
    else:
        (tmp_path / "images" / "x.nii.gz").unlink()
    with pytest.raises(InputError, match=match):
        site_from_volumes(tmp_path, 16)


@pytest.mark.parametrize(
    "more, message",
    [
        ((*SLICES, "--intensity-window", "300", "-200"), "intensity_window=[300.0, -200.0]: must be [low, high]"),
        (("--volumes", "slices", "--model-type", "unet3d"), "model_type='unet3d': unet3d and volumes: whole belong"),
        (("--volumes", "whole", "--model-type", "unet"), "model_type='unet'"),
        (("--model-type", "unet"), "intensity_window=[-200.0, 300.0]: is for volumes"),
        ((*SLICES, "--image-size", "null"), "image_size=None: is needed with volumes"),
    ],
)
def test_bad_input_is_named(sites, tmp_path, more, message):
    outcome = federate(tmp_path / "output", sites, *more)
    assert outcome.status == 2 and message in outcome.err
