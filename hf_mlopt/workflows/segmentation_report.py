"""What a federated segmentation has come to: Dice of every model at every site, overlays, and the super model."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Ditto, FedBN, FedSM, Message
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.selector_model import planes, selector_like
from hf_mlopt.federated.super_model import SuperModel
from hf_mlopt.workflows.segmentation_metrics import mean_overlap
from hf_mlopt.workflows.segmentation_overlays import save_sheet


if TYPE_CHECKING:
    from datasets import Dataset

    from hf_mlopt.federated import FederatedTrainer
    from hf_mlopt.workflows.segmentation_data import SegmentationData

logger = logging.getLogger(__name__)

SUPER_MODEL, OVERLAYS = "super_model", "overlays"
_SHOWN = 4  # images of a site in its overlay
_BATCH = 32
Predict = Callable[[torch.Tensor], torch.Tensor]


class OverlayCallback(TrainerCallback):
    """
    Draws overlays every few rounds of a run whose sites are on this machine.

    Args:
        every (`int`): Rounds; 0 is never.
        data (`SegmentationData`): Of the sites.
        output (`Path`): Of the run.
    """

    def __init__(self, every: int, data: "SegmentationData", output: Path):
        self.every, self.data, self.output = every, data, output
        self.trainer: FederatedTrainer | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.every and logs and "train_loss" in logs and (logs["round"] + 1) % self.every == 0:
            folder = self.output / OVERLAYS / f"round-{logs['round'] + 1:04d}"
            for site in self.data.parts:
                _draw(folder / f"{site}.png", _held_out(self.data, site), predictors(self.trainer, site))


def report(trainer: "FederatedTrainer", data: "SegmentationData", output: Path) -> dict[str, Any]:
    """
    Judges the models on what each site holds out, draws the overlays, and writes the super model into
    `output/super_model` where sites release their personal models.

    Returns:
        `dict`: JSON-able. `sites`: site to `images`, the mean Dice of `global`, `personal` and `super`, and
        `answered_by` (model to images that the super model gave it); `mean` over sites of each; `selector_accuracy`;
        `unseen`, as a site.
    """
    super_model = super_model_of(trainer)
    accuracy = []
    found: dict[str, Any] = {"sites": {}}
    for site in data.parts:
        rows = _held_out(data, site)
        predict = predictors(trainer, site)
        found["sites"][site] = _judge(rows, predict, super_model)
        _draw(output / OVERLAYS / f"{site}.png", rows, {**predict, **_of(super_model)})
        if super_model is not None and rows is not None:
            chosen = _in_batches(lambda images: super_model.predict(images).probabilities.argmax(1), _images(rows))
            accuracy += (chosen == super_model.sites.index(site)).tolist()
    names = ("global", "personal", "super")
    values = {name: [one[name] for one in found["sites"].values() if name in one] for name in names}
    found["mean"] = {name: sum(some) / len(some) for name, some in values.items() if some}
    if accuracy:
        found["selector_accuracy"] = sum(accuracy) / len(accuracy)
    if data.evaluation is not None:
        name, message = data.recipe.unseen_site, next(iter(trainer.algorithm.evaluation().values()))
        predict = {"global": _network(trainer, message)}
        found["unseen"] = {"site": name, **_judge(data.evaluation, predict, super_model)}
        _draw(output / OVERLAYS / f"{name}.png", data.evaluation, {**predict, **_of(super_model)})
    save_super_model(super_model, output, found)
    return found


def save_super_model(super_model: SuperModel | None, output: Path, results: Mapping[str, Any]) -> None:
    """Writes `output/super_model` with its card, where there is one."""
    if super_model is not None:
        shutil.rmtree(output / SUPER_MODEL, ignore_errors=True)  # of a run that was resumed
        super_model.save_pretrained(output / SUPER_MODEL, results)


def predictors(trainer: "FederatedTrainer", site: str) -> dict[str, Predict]:
    """The models that a site has after a round: `global`, and `personal` where the algorithm makes one."""
    algorithm = trainer.algorithm.tuned
    messages = trainer.algorithm.evaluation()
    message = messages.get(site) or next(iter(messages.values()))  # a part of the pooled site has the common model
    if site not in messages:
        return {"global": _network(trainer, message)}
    kept = None
    if isinstance(algorithm, Ditto | FedBN):
        kept = trainer.client.store.load(site, trainer.training, algorithm.last_rounds.get(site, -1))
    if isinstance(algorithm, FedBN) and kept is not None:
        return {"global": _network(trainer, message, kept)}
    found = {"global": _network(trainer, message)}
    if isinstance(algorithm, FedSM):
        groups = {"weights": "personal", "buffers": "personal_buffers"}
        kept = Message({to: message.groups[of] for to, of in groups.items() if of in message.groups})
    if kept is not None:
        found["personal"] = _network(trainer, message, kept)
    return found


def super_model_of(trainer: "FederatedTrainer") -> SuperModel | None:
    """The super model of the sites that release their personal models, if there is one."""
    algorithm = trainer.algorithm.tuned
    if not isinstance(algorithm, FedSM) or algorithm.selector.name == "none":
        return None
    if not trainer.released:
        logger.warning(
            "no site releases its personal model, so only the global one is saved; sites that agree to hand theirs to "
            "all users of a super model set release_personal: true"
        )
        return None
    network = SegmentationModel(**trainer.model.options)
    learned = algorithm.groups.get("selector")
    try:
        selector = None if learned is None else selector_like(learned)
        return SuperModel.from_training(algorithm, network, selector, trainer.released)
    except InputError as error:  # too few sites have sent their statistics
        logger.warning("there is no super model: %s", error)
        return None


def _network(trainer: "FederatedTrainer", *messages: Message) -> Predict:
    model, device = trainer.model, trainer.args.device

    @torch.no_grad()
    def predict(images: torch.Tensor) -> torch.Tensor:
        trainer.client.shared.load(*messages)
        was_training = model.training
        logits = model.eval()(images.to(device))["logits"]
        model.train(was_training)
        return (logits > 0).cpu()

    return predict


def _of(super_model: SuperModel | None) -> dict[str, Predict]:
    return {} if super_model is None else {"super": lambda images: super_model.predict(images).logits > 0}


def _held_out(data: "SegmentationData", site: str) -> "Dataset | None":
    return data.site(site).evaluation


def _images(rows: "Dataset") -> torch.Tensor:
    return rows[:]["pixel_values"]


def _judge(rows: "Dataset | None", predict: Mapping[str, Predict], super_model: SuperModel | None) -> dict[str, Any]:
    if rows is None:
        return {"images": 0}
    true = rows[:]["labels"].numpy()
    cases = np.asarray(rows["case"]) if "case" in rows.column_names else None
    found: dict[str, Any] = {"images": len(rows) if cases is None else len(np.unique(cases))}
    for name, one in {**predict, **_of(super_model)}.items():
        found[name] = mean_overlap(_in_batches(one, _images(rows)), true, cases)["dice"]
    if super_model is not None:
        batches = _images(rows).split(_BATCH)
        found["answered_by"] = dict(Counter(name for batch in batches for name in super_model.predict(batch).models))
    return found


def _in_batches(predict: Predict, images: torch.Tensor) -> np.ndarray:
    return torch.cat([predict(batch) for batch in images.split(_BATCH)]).numpy()


def _draw(path: Path, rows: "Dataset | None", predict: Mapping[str, Predict]) -> None:
    if rows is None:
        return
    # Spread over the rows, since the first ones may be the empty end of a volume.
    some = rows[np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows)), dtype=int)]
    masks = {"": some["labels"], **{name: one(some["pixel_values"]) for name, one in predict.items()}}
    true, *predicted = (planes(mask)[:, 0].numpy() for mask in masks.values())
    save_sheet(path, planes(some["pixel_values"]).numpy(), true, dict(zip(predict, predicted, strict=True)))
