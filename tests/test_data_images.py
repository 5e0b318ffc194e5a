import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_mlopt.data import image_dataset, load_images
from hf_mlopt.errors import ConfigurationError, InputError


def pixels(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def archive(tmp_path):
    """Writes arrays as images.npz and returns its name."""

    def write(**arrays) -> str:
        np.savez(tmp_path / "images.npz", **arrays)
        return str(tmp_path / "images.npz")

    return write


@pytest.fixture
def folder(tmp_path):
    """Writes images, by name below a folder, and returns its name."""

    def write(images: dict) -> str:
        for name, image in images.items():
            path = tmp_path / "animals" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
        return str(tmp_path / "animals")

    return write


# Digits


def test_digits_are_split_by_class():
    from sklearn.datasets import load_digits

    digits, train, test = load_digits(), load_images("digits"), load_images("digits", "test")
    assert train.images.shape == (1400, 1, 8, 8) and test.images.shape == (397, 1, 8, 8)
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int64
    assert train.num_classes == 10 and train.label_names == list("0123456789")
    assert (train.images.min(), train.images.max()) == (0, 1)
    # Together they are all images, each with its label.
    rows = {
        (image.tobytes(), label)
        for data in (train, test)
        for image, label in zip(data.images, data.labels, strict=True)
    }
    assert rows == {((i / 16).astype("f4").tobytes(), y) for i, y in zip(digits.images, digits.target, strict=True)}
    expected = np.bincount(digits.target) * 397 / 1797
    assert (np.abs(np.bincount(test.labels) - expected) < 1).all()


def test_the_seed_decides_the_held_out_images():
    first, again, other = (load_images("digits", "test", seed) for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images) and first.provenance == again.provenance
    assert not np.array_equal(first.images, other.images)
    assert first.provenance["fingerprint"] != other.provenance["fingerprint"]


def test_the_record_is_json_and_says_what_was_used(archive):
    source = archive(images=pixels(10, 4, 4), labels=np.arange(10) % 2)
    data = load_images(source, "test", seed=3)
    numbers = b"".join(np.float32(x).tobytes() for x in data.images.ravel())
    numbers += b"".join(int(label).to_bytes(8, "little") for label in data.labels)
    record = {"source": "images.npz", "split": "test", "seed": 3, "images": 2}
    record["fingerprint"] = hashlib.sha256(numbers).hexdigest()
    assert json.loads(json.dumps(data.provenance)) == record
    assert load_images(source, None).provenance["seed"] is None
    assert load_images(source, None, seed=1).provenance == load_images(source, None).provenance


# Splits


def test_a_fifth_of_each_class_is_held_out_and_the_order_is_kept(archive):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    source = archive(images=np.arange(100, dtype=np.uint8)[:, None, None].repeat(2, 1), labels=labels)
    numbers = {}
    for split in ("train", "test", None):
        data = load_images(source, split)
        numbers[split] = np.rint(data.images[:, 0, 0, 0] * 255).astype(int).tolist()
        assert np.array_equal(labels[numbers[split]], data.labels)
        assert numbers[split] == sorted(numbers[split])
    assert np.bincount(labels[numbers["test"]]).tolist() == [10, 6, 4]
    assert sorted(numbers["train"] + numbers["test"]) == numbers[None] == list(range(100))


def test_every_class_stays_in_training(archive):
    source = archive(images=pixels(9, 4, 4), labels=[0, 1, 2, 3, 4, 5, 6, 7, 7])
    assert set(load_images(source).labels) == set(range(8))
    assert load_images(source, "test").labels.tolist() == [7]
    source = archive(images=pixels(4, 4, 4), labels=[0, 1, 2, 3])
    with pytest.raises(InputError, match="4 images are too few to hold some out; use split=None"):
        load_images(source, "test")
    assert len(load_images(source, None).images) == 4


def test_a_bad_split_or_seed_is_refused():
    with pytest.raises(ConfigurationError, match="split='validation'"):
        load_images("digits", "validation")
    with pytest.raises(ConfigurationError, match="seed=-1"):
        load_images("digits", seed=-1)


# Arrays


@pytest.mark.parametrize(
    "shape, order",
    [((6, 4, 5), None), ((6, 3, 4, 5), None), ((6, 4, 5, 3), (0, 3, 1, 2)), ((6, 4, 5, 1), (0, 3, 1, 2))],
)
def test_arrays_get_their_channels_first(archive, shape, order):
    images = pixels(*shape)
    data = load_images(archive(images=images, labels=[0, 1] * 3), None)
    expected = images[:, None] if images.ndim == 3 else images.transpose(order) if order else images
    assert data.images.shape == expected.shape and data.images.flags.c_contiguous
    assert np.array_equal(data.images, expected.astype(np.float32) / 255)


def test_floats_are_taken_as_they_are_if_they_are_in_range(archive):
    images = np.random.default_rng(0).random((6, 4, 4))
    assert np.array_equal(
        load_images(archive(images=images, labels=[0, 1] * 3), None).images[:, 0], images.astype("f4")
    )
    for bad in (images * 2, images - 0.5, np.where(images > 0.5, np.nan, images), (images * 255).astype(np.int32)):
        with pytest.raises(InputError, match=r"outside \[0, 1\]; give uint8"):
            load_images(archive(images=bad, labels=[0, 1] * 3), None)


def test_names_come_from_the_file_or_are_the_numbers(archive):
    arrays = {"images": pixels(6, 4, 4), "labels": np.array([0, 2] * 3, dtype=np.uint8)}
    assert load_images(archive(**arrays)).label_names == ["0", "1", "2"]
    data = load_images(archive(**arrays, classes=["cat", "dog", "fish", "bird"]))
    assert data.label_names == ["cat", "dog", "fish", "bird"] and data.num_classes == 4
    with pytest.raises(InputError, match="labels from 0 to 2; give 0 to 1"):
        load_images(archive(**arrays, classes=["cat", "dog"]))
    with pytest.raises(InputError, match="labels from -1 to 1"):
        load_images(archive(images=pixels(2, 4, 4), labels=[-1, 1]))


def test_a_set_of_several_is_chosen_by_name(archive):
    first, second = pixels(6, 4, 4), pixels(4, 4, 4, seed=1)
    source = archive(one_x=first, one_y=[0, 1] * 3, two_x=second, two_y=[1, 0, 1, 0])
    data = load_images(f"{source}:two", None)
    assert np.array_equal(data.images[:, 0], second.astype(np.float32) / 255)
    assert data.labels.tolist() == [1, 0, 1, 0] and data.provenance["source"] == "images.npz:two"
    with pytest.raises(InputError, match="no arrays images and labels.*choose a set, as images.npz:one"):
        load_images(source)
    with pytest.raises(InputError, match="no arrays three_x and three_y, only one_x, one_y, two_x, two_y"):
        load_images(f"{source}:three")


def packed(images: list[np.ndarray]) -> dict:
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return {
        "data": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
    }


def test_image_files_end_to_end(archive):
    images = pixels(6, 4, 5, 3)
    arrays = packed(list(images))
    data = load_images(archive(**arrays, labels=[0, 1] * 3, classes=["cat", "dog"]), None)
    assert np.array_equal(data.images, images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert data.label_names == ["cat", "dog"]
    with pytest.raises(InputError, match="6 images but 4 labels"):
        load_images(archive(**arrays, labels=[0, 1] * 2))
    with pytest.raises(InputError, match="image 0 cannot be read as an image"):
        load_images(archive(data=arrays["data"][4:], offsets=arrays["offsets"], labels=[0, 1] * 3), None)


# Folders


def test_a_folder_has_a_folder_for_each_class(folder, tmp_path, monkeypatch):
    images = {f"{name}/{index}.png": pixels(4, 5, 3, seed=index) for index in range(5) for name in ("dog", "cat")}
    source = folder(images)
    (tmp_path / "animals/dog/notes.txt").write_text("no image")
    data = load_images(source, None)
    assert data.label_names == ["cat", "dog"] and data.labels.tolist() == [0] * 5 + [1] * 5
    expected = np.stack([images[f"{name}/{i}.png"] for name in ("cat", "dog") for i in range(5)])
    assert np.array_equal(data.images, expected.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert load_images(source, "test").labels.tolist() == [0, 1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert np.array_equal(load_images("~/animals", None).images, data.images)


def test_images_are_grey_only_if_all_are(folder):
    grey = {"a/0.png": pixels(4, 4), "b/0.png": Image.fromarray(pixels(4, 4, seed=1)).convert("1")}
    assert load_images(folder(grey), None).images.shape == (2, 1, 4, 4)
    data = load_images(folder({"b/1.png": pixels(4, 4, 4)}), None)  # RGBA
    assert data.images.shape == (3, 3, 4, 4)
    assert np.array_equal(data.images[0], np.stack([grey["a/0.png"]] * 3).astype(np.float32) / 255)


@pytest.mark.parametrize(
    "images, message",
    [
        ({"a/0.png": pixels(4, 4), "b/0.png": pixels(4, 6)}, r"differ in size, 4 x 4 and 6 x 4 \(b/0.png\)"),
        ({"a/0.png": pixels(4, 4), "b/0.png": np.full((4, 4), 60_000, np.uint16)}, "b/0.png has mode I;16"),
        ({"a/0.png": pixels(4, 4), "a/1.png": pixels(4, 4)}, "1 class in 2 images; two or more"),
        ({"train/a/0.png": pixels(4, 4), "train/b/0.png": pixels(4, 4)}, "no images in folders.*train, give that one"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, images, message):
    with pytest.raises(InputError, match=message):
        load_images(folder(images), None)


def test_a_broken_image_is_named(folder, tmp_path):
    source = folder({"a/0.png": pixels(64, 64), "b/0.png": pixels(64, 64)})
    content = (tmp_path / "animals/b/0.png").read_bytes()
    for broken in (content[:200], b"no image"):
        (tmp_path / "animals/b/0.png").write_bytes(broken)
        with pytest.raises(InputError, match="b/0.png cannot be read as an image"):
            load_images(source, None)


# Bad files


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": pixels(4, 4, 4), "targets": [0, 1] * 2}, "no arrays images and labels, only images, targets"),
        ({"images": pixels(4, 4, 4), "labels": [0, 1]}, "4 images but 2 labels"),
        ({"images": pixels(4, 4, 4), "labels": [1] * 4}, "1 class in 4 images"),
        ({"images": pixels(4, 4, 4), "labels": [0.5, 1.0] * 2}, "labels are float64"),
        ({"images": pixels(4, 4, 4), "labels": [[0, 1]] * 4}, r"labels are int64 of shape \(4, 2\)"),
        ({"images": pixels(4, 16), "labels": [0, 1] * 2}, r"images of shape \(16,\)"),
        ({"images": pixels(4, 4, 4, 2), "labels": [0, 1] * 2}, r"images of shape \(4, 4, 2\)"),
        ({"images": np.array([pixels(2, 2), pixels(3, 3)], dtype=object), "labels": [0, 1]}, "of different sizes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(archive, arrays, message):
    with pytest.raises(InputError, match=message):
        load_images(archive(**arrays), None)


def test_sources_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere.npz: no such file or folder; give 'digits'"):
        load_images(str(tmp_path / "nowhere.npz"))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(InputError, match="text.txt: not images"):
        load_images(str(tmp_path / "text.txt"))
    for content in (b"", b"text", b"PK\x03\x04text"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as .npz: broken"):
            load_images(str(tmp_path / "broken.npz"))


# As a data set


def test_items_are_what_image_models_take():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    data = load_images("digits", "test")
    dataset = image_dataset(data)
    assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == 397
    item = dataset[5]
    assert torch.equal(item["pixel_values"], torch.from_numpy(data.images[5])) and item["labels"] == data.labels[5]
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["pixel_values"].shape == (4, 1, 8, 8) and batch["labels"].dtype == torch.long
    config = MobileNetV2Config(num_channels=1, num_labels=data.num_classes, depth_multiplier=0.35)
    assert MobileNetV2ForImageClassification(config)(**batch).loss.isfinite()


def test_shared_images_load(shared_data):
    cifar = load_images(str(shared_data / "vision/cifar10_sub_test_jpeg.npz"), "test")
    assert cifar.images.shape == (1000, 3, 32, 32) and np.bincount(cifar.labels).tolist() == [100] * 10
    assert cifar.label_names[:2] == ["airplane", "automobile"] and 0.4 < cifar.images.mean() < 0.55
    semeion = load_images(f"{shared_data}/vision/digits3_16x16.npz:semeion", None)
    assert semeion.images.shape == (1593, 1, 16, 16) and semeion.num_classes == 10
