"""`hf-mlopt federate --task segmentation`: from a recipe to tables, overlays and a super model that is read again."""

import gc
import json

import numpy as np
import pytest
import torch
from command_line import hf_mlopt, python, succeed
from network import no_network  # noqa: F401
from PIL import Image
from test_workflow_federate_flower import no_process_is_left  # noqa: F401

from hf_mlopt.configuration import load_config
from hf_mlopt.federated.segmentation_data import disc_sites
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.super_model import SuperModel
from hf_mlopt.resources import resource_dir
from hf_mlopt.workflows.federate_recipe import FederateRecipe
from hf_mlopt.workflows.segmentation_data import AugmentedRows, SegmentationData
from hf_mlopt.workflows.segmentation_overlays import FOUND, MISSED, TOO_MUCH, overlay, save_sheet


gc.collect()
gc.freeze()  # every Trainer ends with a full collection

SMALL = (
    *("--task", "segmentation", "--model-type", "unet", "--model-config", '{"width": 2}', "--dataset", "discs:10"),
    *("--image-size", "16", "--num-sites", "3", "--site-eval-share", "0.3", "--per-device-train-batch-size", "4"),
    *("--learning-rate", "3e-3", "--optim", "adamw_torch", "--disable-tqdm", "--use-cpu"),
)
FEDSM = ("--algorithm", "fedsm", "--algorithm-args", '{"selector": "moments"}')


def words(output, *more, rounds=2):
    recipe = output.parent / f"{output.name}.yaml"
    recipe.write_text("{}")
    return "federate", recipe, *SMALL, "--num-rounds", str(rounds), "--output-dir", output, *more


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that releases personal models, with a picture a round; output and what was printed."""
    output = tmp_path_factory.mktemp("fedsm") / "output"
    outcome = succeed(*words(output, *FEDSM, "--release-personal", "--overlay-every", "1"))
    return output, outcome


def results(output):
    return json.loads((output / "federated_results.json").read_text())


def test_the_table_has_the_dice_of_every_model(run):
    output, outcome = run
    header, *rows = [line.split() for line in outcome.out.splitlines()[:4]]
    assert [row[0] for row in rows] == ["site_0", "site_1", "site_2"]
    for name in ("global", "personal", "super"):
        column = header.index(f"dice_{name}")
        for row in rows:
            assert float(row[column]) == pytest.approx(
                results(output)["segmentation"]["sites"][row[0]][name], rel=1e-3
            )
    assert outcome.out.rstrip().endswith("federated_results.json, curves.png, overlays, super_model")


def test_dice_of_the_report_is_that_of_the_saved_models(run):
    """Read again, each predicts what was judged; the sites themselves have found the same."""
    output, _ = run
    found, last = results(output)["segmentation"], results(output)["rounds"][-1]["evaluation"]["sites"]
    data = SegmentationData(load_config(FederateRecipe, output / "recipe.yaml", {"output_dir": "x"}))
    common = SegmentationModel.from_pretrained(output).eval()
    super_model = SuperModel.from_pretrained(output / "super_model")
    for site, row in found["sites"].items():
        rows = data.site(site).evaluation[:]
        true, images = rows["labels"].bool(), rows["pixel_values"]
        with torch.no_grad():
            masks = common(images)["logits"] > 0
        assert row["images"] == 3 and row["global"] == pytest.approx(dice(masks, true), abs=1e-6)
        assert row["super"] == pytest.approx(dice(super_model.predict(images).logits > 0, true), abs=1e-6)
        assert row["global"] == pytest.approx(last[site]["eval_dice"], abs=1e-6)
        assert row["personal"] == pytest.approx(last[site]["eval_personal_dice"], abs=1e-6)
        assert row["answered_by"] == {site: 3} and row["super"] == row["personal"]
    assert found["selector_accuracy"] == 1.0
    mean = sum(row["super"] for row in found["sites"].values()) / 3
    assert found["mean"]["super"] == pytest.approx(mean, rel=1e-12)


def dice(masks, true):
    return float(np.mean([_dice(m, t) for m, t in zip(masks.numpy(), true.numpy(), strict=True)]))


def _dice(mask, true):
    return 2 * (mask & true).sum() / (mask.sum() + true.sum()) if mask.any() or true.any() else 1.0


READ = """
import sys, torch
from hf_mlopt.federated.super_model import SuperModel
prediction = SuperModel.from_pretrained(sys.argv[1]).predict(torch.load(sys.argv[2], weights_only=True))
torch.save([prediction.logits, prediction.probabilities], sys.argv[3])
print(",".join(prediction.models))
"""


def test_the_super_model_predicts_the_same_in_another_process(run, tmp_path):
    output, _ = run
    images = torch.cat([rows[:4]["pixel_values"] for rows in disc_sites(["a", "b", "c"], 4, 16, seed=5).values()])
    torch.save(images, tmp_path / "images.pt")
    printed = python(READ, output / "super_model", tmp_path / "images.pt", tmp_path / "logits.pt")
    here = SuperModel.from_pretrained(output / "super_model").predict(images)
    assert printed.strip().split(",") == here.models and set(here.models) == {"site_0", "site_1", "site_2"}
    logits, probabilities = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, here.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probabilities, here.probabilities, rtol=1e-5, atol=1e-7)


def test_the_cards_state_what_was_measured(run):
    output, _ = run
    found = results(output)["segmentation"]
    for folder, row in ((output, "site_1 | 3 |"), (output / "super_model", "site_1 | 3 |")):
        card = (folder / "README.md").read_text()
        assert f"| {row} {found['sites']['site_1']['global']:.3f} | " in card and "hf_mlopt" in card
    card = (output / "super_model" / "README.md").read_text()
    assert "3 personal models (site_0, site_1, site_2)" in card and "100.0 % of these images" in card
    assert f"| mean over sites |  | {found['mean']['global']:.3f} |" in card


def test_without_release_only_the_global_model_is_saved(tmp_path):
    outcome = succeed(*words(tmp_path / "output", *FEDSM, rounds=1))
    assert "no site releases its personal model, so only the global one is saved" in outcome.err
    assert not (tmp_path / "output" / "super_model").exists() and "super_model" not in outcome.out
    row = results(tmp_path / "output")["segmentation"]["sites"]["site_0"]
    assert set(row) == {"images", "global", "personal"}
    assert (tmp_path / "output" / "model.safetensors").is_file()


# Overlays


def test_colours_of_an_overlay():
    true = np.array([[1, 1, 0, 0]])
    predicted = np.array([[1, 0, 1, 0]])
    image = np.array([[[0.2, 0.4, 0.6, 0.8]]] * 3)
    found = overlay(image, true, predicted)
    for column, (colour, grey) in enumerate(zip((FOUND, MISSED, TOO_MUCH), (51, 102, 153), strict=False)):
        expected = [round(0.4 * grey + 0.6 * part) for part in colour]
        np.testing.assert_allclose(found[0, column], expected, atol=1)
    assert found[0, 3].tolist() == [204] * 3


def test_a_sheet_has_a_row_an_image_and_a_column_a_model(tmp_path):
    images, true = np.full((2, 1, 2, 4), 0.5), np.zeros((2, 2, 4))
    true[0, :, :2] = 1
    save_sheet(tmp_path / "x" / "sheet.png", images, true, {"none": np.zeros((2, 2, 4)), "all": np.ones((2, 2, 4))})
    sheet = np.asarray(Image.open(tmp_path / "x" / "sheet.png"))
    width, height, gap, head = 128, 64, 4, 18
    assert sheet.shape[1] == gap + 3 * (width + gap) and sheet.shape[0] == head + 2 * (height + gap) + 18

    def cell(row, column):
        y, x = head + row * (height + gap), gap + column * (width + gap)
        return sheet[y : y + height, x : x + width]

    grey = 128
    mix = {name: [round(0.4 * 127.5 + 0.6 * part) for part in c] for name, c in
           (("found", FOUND), ("missed", MISSED), ("too much", TOO_MUCH))}  # fmt: skip
    for row, column, left, right in (
        *((0, 0, [grey] * 3, [grey] * 3), (0, 1, mix["missed"], [grey] * 3), (1, 1, [grey] * 3, [grey] * 3)),
        *((0, 2, mix["found"], mix["too much"]), (1, 2, mix["too much"], mix["too much"])),
    ):
        part = cell(row, column).astype(int)
        assert (abs(part[:, :64] - left) <= 1).all() and (abs(part[:, 64:] - right) <= 1).all(), (row, column)


def test_overlays_of_every_site_during_and_after(run):
    """The colours of the final ones are those of predictions of the saved models."""
    output, _ = run
    sites = ["site_0.png", "site_1.png", "site_2.png"]
    folder = output / "overlays"
    assert sorted(path.name for path in folder.iterdir()) == ["round-0001", "round-0002", *sites]
    for number in (1, 2):
        assert sorted(path.name for path in (folder / f"round-000{number}").iterdir()) == sites
    data = SegmentationData(load_config(FederateRecipe, output / "recipe.yaml", {"output_dir": "x"}))
    rows = data.site("site_1").evaluation[:]
    with torch.no_grad():
        masks = SegmentationModel.from_pretrained(output).eval()(rows["pixel_values"])["logits"][:, 0] > 0
    routed = SuperModel.from_pretrained(output / "super_model").predict(rows["pixel_values"]).logits[:, 0] > 0
    sheet = np.asarray(Image.open(folder / "site_1.png"))
    assert sheet.shape == (18 + 3 * 132 + 18, 4 + 4 * 132, 3)  # image, global, personal, super
    for column, some in ((1, masks), (2, routed), (3, routed)):
        for row in range(3):
            cell = sheet[18 + row * 132 :, 4 + column * 132 :][4:128:8, 4:128:8]
            expected = overlay(rows["pixel_values"][row].numpy(), rows["labels"][row, 0].numpy(), some[row].numpy())
            np.testing.assert_array_equal(cell, expected)


# Data


def test_an_unseen_site_is_the_servers_and_all_can_be_pooled(tmp_path):
    output = tmp_path / "output"
    succeed(*words(output, "--unseen-site", "site_2", "--pool-sites", rounds=1))
    found = results(output)
    assert found["sites"] == ["all"] and found["rounds"][0]["sites"]["all"]["num_samples"] == 14
    assert set(found["segmentation"]["sites"]) == {"site_0", "site_1"}
    unseen = found["segmentation"]["unseen"]
    assert (unseen["site"], unseen["images"]) == ("site_2", 10)
    assert unseen["global"] == pytest.approx(found["server"]["server_dice"], abs=1e-6)
    assert (output / "overlays" / "site_2.png").is_file()


def write_site(folder, name, count=6, size=16):
    rows = disc_sites([name], count, size)[name][:]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = (rows["pixel_values"][i].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray((rows["labels"][i, 0] * 255).byte().numpy()).save(folder / "masks" / f"{i}.png")
    return folder


def test_folders_with_masks_of_sites(tmp_path):
    for site in ("north", "south"):
        write_site(tmp_path / "data" / site, site)
    first = words(tmp_path / "1", "--dataset", tmp_path / "data", rounds=1)
    sources = json.dumps({site: str(tmp_path / "data" / site) for site in ("north", "south")})
    second = [word for word in words(tmp_path / "2", "--site-datasets", sources, rounds=1)]
    at = second.index("--dataset")
    del second[at : at + 2]
    digests = []
    for command, output in ((first, "1"), (second, "2")):
        succeed(*command)
        found = results(tmp_path / output)
        assert found["sites"] == ["north", "south"] and str(tmp_path) not in json.dumps(found["data"])
        digests.append(found["rounds"][0]["digest"])
    assert digests[0] == digests[1]


def test_augmented_rows_follow_torchs_seed():
    plain = disc_sites(["a"], 4, 16)["a"]
    rows = AugmentedRows(
        plain, {"RandRotate90d": {"prob": 1.0}, "RandGaussianNoised": {"prob": 1, "keys": ["pixel_values"]}}
    )
    torch.manual_seed(3)
    first, other = [rows[i] for i in range(4)], rows[0]
    torch.manual_seed(3)
    again = [rows[i] for i in range(4)]
    for one, two in zip(first, again, strict=True):
        assert all(type(one[name]) is torch.Tensor and torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(first[0]["pixel_values"], other["pixel_values"])
    for one, row in zip(first, plain, strict=True):
        assert one["labels"].sum() == row["labels"].sum()  # a turn keeps the area, and noise is not in the mask
        turns = [torch.rot90(row["labels"], k, (1, 2)) for k in (1, 2, 3)]
        (turn,) = [k for k, turned in enumerate(turns, 1) if torch.equal(turned, one["labels"])]
        noise = one["pixel_values"] - torch.rot90(row["pixel_values"], turn, (1, 2))
        assert 0 < noise.std() < 0.2


def test_a_run_with_augmentation_is_repeatable_and_goes_on_exactly(tmp_path):
    more = ("--augmentation", '{"RandAxisFlipd": {"prob": 0.5}}', *FEDSM, "--overlay-every", "0")
    succeed(*words(tmp_path / "whole", *more, rounds=2))
    succeed(*words(tmp_path / "parts", *more, rounds=1))
    resumed = words(tmp_path / "parts", *more, "--resume-from-checkpoint", "true", rounds=2)
    succeed(*resumed)
    whole, parts = (results(tmp_path / name) for name in ("whole", "parts"))
    assert [row["digest"] for row in whole["rounds"]] == [row["digest"] for row in parts["rounds"]]
    assert whole["segmentation"] == parts["segmentation"]


def test_auto_fedrl_leaves_its_trace_and_a_picture(tmp_path):
    search = {"learning_rate": [1e-3, 1e-2], "local_epochs": [1, 2]}
    succeed(*words(tmp_path / "output", *FEDSM, "--auto-fedrl", json.dumps(search)))
    found = results(tmp_path / "output")
    assert [(row["round"], row["site"]) for row in found["trace"]] == [
        (r, f"site_{k}") for r in range(2) for k in range(3)
    ]
    assert {"global", "personal"} <= set(found["segmentation"]["mean"])  # what is tuned is still FedSM
    assert found["auto_fedrl"] == search and all(row["learning_rate"] for row in found["trace"])
    assert Image.open(tmp_path / "output" / "auto_fedrl.png").size[0] == 1200


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, further",
    [("--release-personal", "super_model/model.safetensors"), ("--secure-sum", "sites/site_2/*/round-1.safetensors")],
)
def test_flower_gives_the_same_bits(more, further, tmp_path, no_process_is_left):  # noqa: F811
    """Global and personal models, or their mean under masks, selector, and the super model."""
    fedsm = ("--algorithm", "fedsm", "--algorithm-args", '{"selector": "learned"}')
    for name, engine in (("here", "in-process"), ("there", "flower")):
        succeed(*words(tmp_path / name, *fedsm, more, "--engine", engine))
    for file in ("checkpoint-2/server.safetensors", further):
        here, there = (next((tmp_path / name).glob(file)) for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()


def test_a_site_whose_masks_are_all_empty_is_warned_of(tmp_path):
    write_site(tmp_path / "data" / "north", "north")
    south = write_site(tmp_path / "data" / "south", "south")
    for file in (south / "masks").iterdir():
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(file)
    outcome = succeed(*words(tmp_path / "output", "--dataset", tmp_path / "data", rounds=1))
    assert "all masks that site 'south' trains on are empty" in outcome.err and "'north'" not in outcome.err


# Bad input


@pytest.mark.parametrize(
    "more, message",
    [
        (("--model-type", "vgg"), "model_type='vgg': is no segmentation architecture"),
        (("--model-config", '{"width": 0}'), "model_config.width=0"),
        (("--model-config", '{"depth": 3}'), "model_config="),
        (("--dataset", "discs:x"), "dataset='discs:x': must be discs, or discs:NUMBER"),
        (("--dataset", "nothing"), "dataset='nothing': no such .npz file or folder of sites"),
        (("--num-sites", "9"), "num_sites=9: of discs there are 1 to 5 sites"),
        (("--unseen-site", "site_7"), "unseen_site='site_7': the sites are site_0, site_1, site_2"),
        (("--partition", "dirichlet"), "partition='dirichlet': does not belong to --task segmentation"),
        (("--augmentation", '{"RandomFlip": {}}'), "augmentation.RandomFlip={}: is no dictionary transform"),
        (("--augmentation", '{"RandFlipd": {"probability": 1}}'), "augmentation.RandFlipd"),
        (("--site-names", '{"0": "north"}'), "site_names"),
        ((*FEDSM, "--pool-sites"), "pool_sites=True"),
        ((*FEDSM, "--num-sites", "1"), "selector='moments': with one site there is nothing to select"),
        (("--algorithm", "fedsm", "--algorithm-args", '{"pull": 2}'), "algorithm_args.pull=2: must be in [0, 1]"),
        (("--algorithm", "fedsm", "--algorithm-args", '{"threshold": 2}'), "algorithm_args.threshold=2"),
        (("--auto-fedrl", '{"learning_rate": [1, 0.1]}'), "auto_fedrl.learning_rate=[1, 0.1]"),
        (("--auto-fedrl", '{"local_epochs": [1, 2]}', "--site-eval-share", "0"), "has no rows to evaluate on"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path, more, message):
    outcome = hf_mlopt(*words(tmp_path / "output", *more, rounds=1))
    assert outcome.status == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not list((tmp_path / "output").glob("checkpoint-*"))


@pytest.mark.parametrize("damage", ["no mask", "another size", "more classes", "no images"])
def test_a_bad_folder_is_named(tmp_path, damage):
    write_site(tmp_path / "data" / "north", "north")
    south = write_site(tmp_path / "data" / "south", "south")
    if damage == "no mask":
        (south / "masks" / "3.png").unlink()
    elif damage == "another size":
        Image.fromarray(np.zeros((8, 16), np.uint8)).save(south / "masks" / "3.png")
    elif damage == "more classes":
        arrays = {"images": np.zeros((2, 3, 16, 16), np.uint8), "site": np.array([0, 1])}
        masks = np.stack([np.zeros((16, 16), np.uint8), np.full((16, 16), 2, np.uint8)])
        np.savez(tmp_path / "data.npz", masks=masks, **arrays)
    else:
        for file in (south / "images").iterdir():
            file.unlink()
    source, named = (tmp_path / "data", "south/")
    if damage == "more classes":
        source, named = tmp_path / "data.npz", "site 'site-1': masks hold [2]; 0 and 1 are the two classes"
    outcome = hf_mlopt(*words(tmp_path / "output", "--dataset", source, rounds=1))
    assert outcome.status == 2 and named in outcome.err.replace("south'", "south/")


def test_fields_of_segmentation_belong_to_it(tmp_path):
    outcome = hf_mlopt(
        *("federate", "/dev/null", "--model-type", "resnet", "--pool-sites", "--output-dir", tmp_path / "x")
    )
    assert outcome.status == 2 and "pool_sites=True: does not belong to --task image-classification" in outcome.err


RECIPES = ("fedsm_discs", "fedsm_nuclei", "segformer_discs", "ct_volumes", "auto_fedrl_cifar")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_begins_with_what_it_is_for(name):
    path = resource_dir("recipes") / "federated" / f"{name}.yaml"
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and second == f"# hf-mlopt federate {name}.yaml --output-dir DIR"
    recipe = load_config(FederateRecipe, path, {"output_dir": "x"})
    assert (recipe.auto_fedrl is not None) == (name in ("segformer_discs", "auto_fedrl_cifar"))
    if "without a network" in first:
        assert recipe.dataset.startswith("discs") and recipe.release_personal


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedsm_discs", "segformer_discs"])
def test_a_recipe_that_needs_no_network_runs(name, tmp_path, no_network):  # noqa: F811
    path = resource_dir("recipes") / "federated" / f"{name}.yaml"
    more = ("--num-rounds", "2", "--dataset", "discs:8", "--overlay-every", "0", "--disable-tqdm")
    succeed("federate", path, "--output-dir", tmp_path / "output", *more)
    assert (tmp_path / "output" / "super_model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_recipe_of_nuclei_runs(shared_data, tmp_path):
    path = resource_dir("recipes") / "federated" / "fedsm_nuclei.yaml"
    more = ("--num-rounds", "1", "--overlay-every", "0", "--disable-tqdm", "--release-personal")
    source = ("--dataset", shared_data / "vision" / "nuclei_sites_128.npz")
    succeed("federate", path, "--output-dir", tmp_path / "output", *source, *more)
    found = results(tmp_path / "output")["segmentation"]
    assert len(found["sites"]) == 5 and found["unseen"]["site"] == "mixed" and found["unseen"]["images"] == 27
    assert found["selector_accuracy"] > 0.5  # of five
