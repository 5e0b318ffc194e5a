"""What the hyper-parameters of `federated_medical.py` are tuned for: classes of CIFAR at eight sites, and nuclei."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from common import SHARED
from federated_medical_runs import AUGMENTATION, nuclei_parts
from federated_quality import rows
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator

from hf_mlopt.data import ImageData, dirichlet_shares, image_dataset, load_images
from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments, SiteData
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.workflows.segmentation_data import AugmentedRows
from hf_mlopt.workflows.segmentation_metrics import overlap, predicted_masks


NUM_SITES = 8
_PUBLISHED = ("gaussian", "categorical", "cholesky", "mlp")
_TEST_IMAGES, _TRAIN_IMAGES = 1000, 6000


@dataclass(frozen=True)
class Task:
    """
    Args:
        rates (`tuple`): A grid over the local rate, of four.
        start (`float`): The rate in the middle of the policies' range, which they begin at.
        space (`dict`): What policies draw from. Local steps stay fixed, so that equal rounds are equal work.
        policies (`tuple`): Those compared.
        metric (`str`): What sites evaluate besides the loss.
        make (`Callable`): Called with settings, and callbacks; gives the trainer.
        judge (`Callable`): The metric of the server's model, which a trainer has loaded, on test images.
        arguments (`dict`): Fields of `FederatedTrainingArguments`.
    """

    rates: tuple[float, ...]
    start: float
    space: dict[str, Any]
    policies: tuple[str, ...]
    metric: str
    make: Callable[[FederatedTrainingArguments, list], FederatedTrainer]
    judge: Callable[[FederatedTrainer], float]
    arguments: dict[str, Any]

    def trainer(self, folder: str, settings: dict, seed: int, rounds: int, callbacks: list) -> FederatedTrainer:
        """Not yet trained; `settings` win over the task's own `arguments`."""
        common = {"num_rounds": rounds, "per_device_train_batch_size": 16, "seed": seed, "use_cpu": True}
        arguments = {**common, "disable_tqdm": True, **self.arguments, **settings}
        return self.make(FederatedTrainingArguments(folder, **arguments), callbacks)


def _space(low: float, high: float) -> dict[str, Any]:
    return {
        "learning_rate": [low, high],
        "local_epochs": None,
        "server_lr": [0.5, 1.5],
        "aggregation_weights": [0.1, 1.0],
    }


def _cifar_trainer(args: FederatedTrainingArguments, callbacks: list) -> FederatedTrainer:
    return FederatedTrainer(
        _resnet,
        args,
        _dealt(),
        data_collator=default_data_collator,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=callbacks,
    )


def _cifar_accuracy(trainer: FederatedTrainer) -> float:
    return trainer.client.evaluate_on(_test_rows())["eval_accuracy"]


def _resnet() -> ResNetForImageClassification:
    """A ResNet of 8 layers that sees 16 of 32 pixels: a round of eight sites takes seconds."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=10, **sizes))
    model.resnet.embedder.pooler = type(model.resnet.embedder.pooler)(kernel_size=1, stride=1)
    return model


@cache
def _images(part: str) -> ImageData:
    return load_images(str(SHARED / "vision" / f"cifar10_sub_{part}_jpeg.npz"), None)


@cache
def _test_rows() -> Any:
    data = _images("test")
    order = np.random.default_rng(0).permutation(len(data.labels))[:_TEST_IMAGES]
    return image_dataset(rows(data, order))


@cache
def _dealt() -> dict[str, SiteData]:
    data = _images("train")
    data = rows(data, np.random.default_rng(0).permutation(len(data.labels))[:_TRAIN_IMAGES])
    sites = {}
    for number, share in enumerate(dirichlet_shares(data.labels, NUM_SITES, 0.5, 0)):
        order = np.random.default_rng(number).permutation(share)
        count = max(1, len(order) // 10)
        held_out, train = (image_dataset(rows(data, some)) for some in (order[:count], order[count:]))
        sites[f"site_{number}"] = SiteData(train, held_out)
    return sites


def _nuclei_trainer(args: FederatedTrainingArguments, callbacks: list) -> FederatedTrainer:
    parts, _ = nuclei_parts(is_validation=True)
    return FederatedTrainer(
        lambda: SegmentationModel("unet", width=8),
        args,
        {
            site: SiteData(AugmentedRows(part.train, AUGMENTATION), part.held_out, plain=part.train)
            for site, part in parts.items()
        },
        compute_metrics=overlap,
        preprocess_logits_for_metrics=predicted_masks,
        callbacks=callbacks,
    )


def _nuclei_dice(trainer: FederatedTrainer) -> float:
    """Mean over the sites."""
    parts, _ = nuclei_parts(is_validation=False)
    return float(np.mean([trainer.client.evaluate_on(part.held_out)["eval_dice"] for part in parts.values()]))


TASKS = {
    # The middle of the range is a rate that is far too low.
    "cifar": Task(
        rates=(2e-3, 1e-2, 5e-2, 2e-1),
        start=2e-3,
        space=_space(2e-5, 2e-1),
        policies=(*_PUBLISHED, "gaussian, hyper-rate 0.05", "no learning"),
        metric="accuracy",
        make=_cifar_trainer,
        judge=_cifar_accuracy,
        arguments={
            "local_steps": 10,
            "mlopt_optim": "sgd",
            "mlopt_optim_args": {"momentum": 0.9},
            "weight_decay": 5e-4,
            "per_device_eval_batch_size": 250,
        },
    ),
    # The middle of the range is one of the grid, as somebody would choose it who knows the task.
    "nuclei": Task(
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        start=2e-3,
        space=_space(4e-4, 1e-2),
        policies=_PUBLISHED,
        metric="dice",
        make=_nuclei_trainer,
        judge=_nuclei_dice,
        arguments={"optim": "adamw_torch", "per_device_eval_batch_size": 32},
    ),
}
