"""The super model: routing by batch, saved and read again, also in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.fedsm import FedSM
from hf_mlopt.federated.algorithms.image_features import feature_statistics, image_features
from hf_mlopt.federated.algorithms.message import Message
from hf_mlopt.federated.segmentation_data import disc_sites
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.selector_model import selector_model
from hf_mlopt.federated.super_model import SuperModel


SITES = ["a", "b", "c"]


def split(model):
    """Weights and buffers, as a training has them."""
    buffers = {name for name, _ in model.named_buffers()}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {n: t for n, t in state.items() if n not in buffers}, {n: t for n, t in state.items() if n in buffers}


def trained(selector, threshold=0.6):
    """A FedSM training of one round whose sites answer with models of their own making."""
    torch.manual_seed(0)
    weights, buffers = split(SegmentationModel("segformer", width=2))
    algorithm = FedSM(selector=selector, threshold=threshold, pull=1.0, buffers="local")
    init = {"weights": weights, "buffers": buffers}
    if selector == "learned":
        init["selector"] = dict(split(selector_model(3, 3))[0])
    algorithm.setup(SITES, Message(init), seed=0)
    replies = {}
    for k, site in enumerate(SITES):
        template = algorithm.template(site)
        groups = {name: dict(group) for name, group in template.groups.items() if name != "selector_statistics"}
        groups["personal"] = {n: t + 0.02 * (k + 1) for n, t in groups["personal"].items()}
        if "selector" in groups:
            groups["selector"] = {n: t * 40 for n, t in groups["selector"].items()}  # sure of itself
        if "selector_statistics" in template.groups:
            images = torch.stack(list(disc_sites(SITES, 12)[site]["pixel_values"]))
            groups["selector_statistics"] = feature_statistics(image_features(images))
        replies[site] = Message(groups, {**template.scalars, "num_samples": 12})
    algorithm.aggregate(0, replies)
    return algorithm


def super_model(selector="moments", released=SITES, **options):
    network = SegmentationModel("segformer", width=2)
    own = selector_model(3, 3) if selector == "learned" else None
    return SuperModel.from_training(trained(selector, **options), network, own, released)


@pytest.fixture(scope="module")
def images():
    sets = disc_sites(SITES, 4, seed=1).values()
    noise = torch.rand(3, 3, 32, 32, generator=torch.manual_seed(1))  # of no site
    return torch.cat([*(torch.stack(list(some["pixel_values"])) for some in sets), noise])


@pytest.mark.parametrize("selector", ["moments", "learned"])
def test_a_batch_is_answered_as_its_images_are(selector, images):
    model = super_model(selector)
    whole = model.predict(images)
    assert whole.logits.shape == (15, 1, 32, 32) and whole.probabilities.shape == (15, 3)
    if selector == "moments":
        assert whole.models[:12] == [site for site in SITES for _ in range(4)]
    for i, image in enumerate(images):
        single = model.predict(image[None])
        assert single.models == [whole.models[i]]
        torch.testing.assert_close(single.logits[0], whole.logits[i], rtol=1e-4, atol=1e-5)


def test_each_image_is_answered_by_the_model_named(images):
    algorithm, model = trained("moments"), super_model()
    prediction = model.predict(images)
    for i, name in enumerate(prediction.models):
        network = SegmentationModel("segformer", width=2).eval()
        kinds = ("weights", "buffers") if name == "global" else (f"personal/{name}", f"personal_buffers/{name}")
        network.load_state_dict({n: t for kind in kinds for n, t in algorithm.groups[kind].items()})
        with torch.no_grad():
            expected = network(images[i : i + 1])["logits"][0]
        torch.testing.assert_close(prediction.logits[i], expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_not_released_is_not_in_it(images, tmp_path):
    model = super_model(released=["b"])
    assert set(model.predict(images).models[:12]) == {"global", "b"}
    model.save_pretrained(tmp_path / "super")
    assert json.loads((tmp_path / "super/config.json").read_text())["released"] == ["b"]
    assert set(SuperModel.from_pretrained(tmp_path / "super").models) == {"global", "b"}


def test_threshold_1_is_the_global_model(images):
    assert set(super_model(threshold=1.0).predict(images).models) == {"global"}


READ = """
import sys, torch
from pathlib import Path
from hf_mlopt.federated.super_model import SuperModel
folder = Path(sys.argv[1])
images = torch.load(folder / "images.pt", weights_only=True)
for selector in sys.argv[2:]:
    prediction = SuperModel.from_pretrained(folder / selector).predict(images)
    torch.save([prediction.logits, prediction.probabilities], folder / f"{selector}.pt")
    print(",".join(prediction.models))
"""


def test_what_was_saved_predicts_the_same_in_another_process(images, tmp_path):
    models = {selector: super_model(selector) for selector in ("moments", "learned")}
    for selector, model in models.items():
        model.save_pretrained(tmp_path / selector)
        files = sorted(file.name for file in (tmp_path / selector).iterdir())
        assert files == ["README.md", "config.json", "model.safetensors"]
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", READ, tmp_path, *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    for line, (selector, model) in zip(done.stdout.splitlines(), models.items(), strict=True):
        expected = model.predict(images)
        assert line.split(",") == expected.models
        logits, probabilities = torch.load(tmp_path / f"{selector}.pt", weights_only=True)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(probabilities, expected.probabilities, rtol=1e-5, atol=1e-7)


def test_what_is_no_super_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no super model"):
        SuperModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"released=\['x'\]: the sites are"):
        super_model(released=["x"])
    with pytest.raises(InputError, match="selector='none'"):
        SuperModel.from_training(trained("none"), SegmentationModel("segformer", width=2))
    with pytest.raises(InputError, match="give the SelectorModel"):
        SuperModel.from_training(trained("learned"), SegmentationModel("segformer", width=2))
    with pytest.raises(InputError, match="'global' has other weights than the network"):
        SuperModel.from_training(trained("moments"), torch.nn.Linear(1, 1))
