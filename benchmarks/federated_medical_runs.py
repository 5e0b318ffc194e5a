"""The runs of `federated_medical.py` on images with masks: one training each, and what its models find."""

import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARED
from datasets import Dataset, concatenate_datasets

from hf_mlopt.federated import FederatedTrainer, FederatedTrainingArguments, SiteData
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.segmentation_data import disc_site, segmentation_dataset, sites_from_npz
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.selector_model import ImageBatches, MomentsSelectorModel, selector_reply
from hf_mlopt.federated.super_model import SuperModel
from hf_mlopt.workflows.segmentation_data import POOLED, AugmentedRows
from hf_mlopt.workflows.segmentation_metrics import mean_overlap
from hf_mlopt.workflows.segmentation_report import predictors, super_model_of


NUCLEI = SHARED / "vision" / "nuclei_sites_128.npz"
UNSEEN = "mixed"
# Number in the file to site, with its images to train on and to test on: those of the first measurements.
NUCLEI_SITES = {
    0: ("fluorescence_256", 200, 60),
    1: ("colour", 60, 47),
    2: ("fluorescence_360", 50, 40),
    3: ("fluorescence_520", 50, 40),
    4: ("grey_1024", 8, 8),
}
SITES = [name for name, *_ in NUCLEI_SITES.values()]
# Method: algorithm, its options, the model that it is judged by.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "FedSM": ("fedsm", {"selector": "learned", "selector_weighting": "uniform"}, "super, moments"),
    "centralised": ("fedavg", {}, "global"),
    "FedAvg": ("fedavg", {}, "global"),
    "local only": ("fedavg", {}, "personal"),
    "Ditto": ("ditto", {}, "personal"),
    "FedProx": ("fedprox", {}, "global"),
    "FedBN": ("fedbn", {}, "personal"),
    "SCAFFOLD": ("scaffold", {}, "global"),
    "FedAvg, SGD": ("fedavg", {}, "global"),
}
PLAIN_SGD = ("SCAFFOLD", "FedAvg, SGD")
PULL, THRESHOLD = 0.7, 0.9
THRESHOLDS = (0.0, 0.5, 0.9, 1.0)
AUGMENTATION = {"RandRotate90d": {"prob": 0.5}, "RandAxisFlipd": {"prob": 0.5}}
_SPLIT_SEED = 0  # not the seed of the run: all runs have the same sites
_BATCH = 32


@dataclass
class Part:
    """What a site trains on, as it is, and what its models are judged on."""

    train: Dataset
    held_out: Dataset


@dataclass
class Training:
    """
    A method with all that changes between runs.

    Args:
        method (`str`): Of `METHODS`.
        rate (`float`): Local learning rate.
        seed (`int`): Of first weights and of the order of rows.
        rounds (`int`): Of one local epoch.
        width (`int`): Channels of the U-Net's first level.
        options (`dict`): Of the algorithm, beside or in place of those of `METHODS`.
        arguments (`dict`): Further fields of `FederatedTrainingArguments`.
    """

    method: str
    rate: float
    seed: int
    rounds: int
    width: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def trainer(self, folder: str, trains: dict[str, Dataset]) -> FederatedTrainer:
        """Trained, in a folder that must stay as long as its models are asked."""
        algorithm, options, _ = METHODS[self.method]
        is_fedsm, is_sgd = algorithm == "fedsm", self.method in PLAIN_SGD
        args = FederatedTrainingArguments(
            folder,
            algorithm=algorithm,
            algorithm_args={**options, **self.options},
            num_rounds=self.rounds,
            learning_rate=self.rate,
            optim="adamw_torch",
            mlopt_optim="sgd" if is_sgd else None,
            max_grad_norm=0.0 if is_sgd else 1.0,  # clipping would falsify SCAFFOLD's controls
            optimizer_state="keep" if self.method == "centralised" else "reset",
            release_personal=is_fedsm,
            per_device_train_batch_size=16,
            evaluate_every=0,
            seed=self.seed,
            use_cpu=True,
            disable_tqdm=True,
            **self.arguments,
        )
        sites = {name: SiteData(AugmentedRows(rows, AUGMENTATION), None, plain=rows) for name, rows in trains.items()}
        trainer = FederatedTrainer(lambda: SegmentationModel("unet", width=self.width), args, sites)
        trainer.train()
        return trainer


def nuclei(
    method: str,
    rate: float,
    seed: int,
    rounds: int,
    width: int = 8,
    held_out: str = "test",
    without: str = "",
    pull: float = PULL,
) -> dict:
    """
    One training on the nuclei, and the Dice of its models.

    Args:
        held_out (`str`): What they are judged on: `test`, or `validation`, a fifth of what is trained on otherwise.
        without (`str`): Site that takes no part; it is then another unseen one.
        pull (`float`): λ of FedSM.

    Returns:
        `dict`: That of [`measured`].
    """
    parts, others = nuclei_parts(held_out == "validation")
    unseen = {UNSEEN: others, **({without: parts.pop(without).held_out} if without else {})}
    options = {"pull": pull} if method == "FedSM" else {}
    return measured(Training(method, rate, seed, rounds, width, options), parts, unseen)


def shared(method: str, rate: float, seed: int, rounds: int) -> dict:
    """FedSM or FedAvg where three sites have one distribution: drawn discs of all five kinds, dealt at random."""
    kinds = [segmentation_dataset(*disc_site(kind, 36, 32, seed), f"kind {kind}") for kind in range(5)]
    rows = concatenate_datasets(kinds).shuffle(seed=seed)
    test = rows.select(range(120, 180))
    parts = {f"site_{k}": Part(rows.select(range(40 * k, 40 * k + 40)), test) for k in range(3)}
    return measured(Training(method, rate, seed, rounds), parts, {})


def traffic(method: str, selector: str) -> dict:
    """Bytes a site and round, in the first round and in a later one, of three rounds of one step."""
    torch.set_num_threads(1)
    options = {"selector": selector} if method == "FedSM" else {}
    parts, _ = nuclei_parts(False)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(method, 2e-3, 0, 3, options=options, arguments={"local_steps": 1})
        history = training.trainer(folder, {site: part.train for site, part in parts.items()}).history
    return {
        f"{when}_{way}": history[row][f"bytes_{way}"] / len(parts)
        for when, row in (("first", 0), ("later", -1))
        for way in ("down", "up")
    }


def measured(training: Training, parts: dict[str, Part], unseen: dict[str, Dataset]) -> dict:
    """
    Trains, and judges the models.

    Returns:
        `dict`: `dice` (model to site to the mean over cases, and `mean` over sites), `unseen` (unseen site to model to
        Dice), `headline` (the mean of the model that the method is judged by), `megabytes` (down and up, all sites
        and rounds), `seconds` (of training) and of FedSM `selector_accuracy`, `thresholds` and `answered_by`.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trains = {site: part.train for site, part in parts.items()}
        if training.method == "local only":
            folders = {site: str(Path(folder) / site) for site in parts}
            trainers = {site: training.trainer(folders[site], {site: trains[site]}) for site in parts}
        else:
            if training.method == "centralised":
                trains = {POOLED: concatenate_datasets(list(trains.values()))}
            trainers = dict.fromkeys(parts, training.trainer(folder, trains))
        seconds = time.perf_counter() - started
        found = _judged(training.method, trainers, parts, unseen)
        some = next(iter(trainers.values()))
        if training.method == "FedSM":
            _add_super(found, some, parts, unseen)
    for of_sites in found["dice"].values():
        of_sites["mean"] = float(np.mean(list(of_sites.values())))
    is_federated = training.method not in ("local only", "centralised")
    return {
        "headline": found["dice"][METHODS[training.method][2]]["mean"],
        **found,
        "megabytes": sum(row["bytes_down"] + row["bytes_up"] for row in some.history) / 1e6 if is_federated else 0.0,
        "seconds": seconds,
    }


def _judged(method: str, trainers: dict[str, FederatedTrainer], parts: dict[str, Part], unseen: dict) -> dict:
    """Dice of the common model and of those that sites have for themselves."""
    # FedBN has no model for a site without norms of its own.
    is_own = method in ("local only", "FedBN")
    dice: dict[str, dict[str, float]] = {}
    for site, part in parts.items():
        for model, predict in predictors(trainers[site], site).items():
            dice.setdefault("personal" if is_own else model, {})[site] = _dice(predict, part.held_out)
    common = {}
    if not is_own:
        trainer = next(iter(trainers.values()))
        common = {name: {"global": _dice(predictors(trainer, name)["global"], rows)} for name, rows in unseen.items()}
    return {"dice": dice, "unseen": common}


def _add_super(found: dict, trainer: FederatedTrainer, parts: dict[str, Part], unseen: dict[str, Dataset]) -> None:
    """
    Both selectors over the same models. What sites train on has no influence on the `moments` selector and the
    selector none on the models, so one training serves both.
    """
    learned = super_model_of(trainer)
    found |= {"selector_accuracy": {}, "thresholds": {}, "answered_by": {}}
    statistics = [
        selector_reply(Message({}, {"needs_statistics": True}), ImageBatches(parts[site].train))[0]
        for site in learned.sites
    ]
    selectors = {
        "learned": learned.selector,
        "moments": MomentsSelectorModel([groups["selector_statistics"] for groups in statistics]),
    }
    for name, selector in selectors.items():
        model = SuperModel(learned.network, learned.sites, learned.models, selector, THRESHOLD)
        answers = {site: _answers(model, part.held_out) for site, part in parts.items()}
        found["dice"][f"super, {name}"] = {site: dice for site, (dice, *_) in answers.items()}
        found["answered_by"][name] = {site: by for site, (_, by, _) in answers.items()}
        right = [chosen == learned.sites.index(site) for site, (*_, chosen) in answers.items()]
        found["selector_accuracy"][name] = float(np.concatenate(right).mean())
        for site, rows in unseen.items():
            dice, by, _ = _answers(model, rows)
            found["unseen"][site][f"super, {name}"] = dice
            found["answered_by"][name][site] = by
        found["thresholds"][name] = {str(gamma): _at(model, gamma, parts, unseen) for gamma in THRESHOLDS}


def _at(model: SuperModel, threshold: float, parts: dict[str, Part], unseen: dict[str, Dataset]) -> dict:
    model.threshold = threshold
    of_sites = [_answers(model, part.held_out)[0] for part in parts.values()]
    return {"mean": float(np.mean(of_sites)), **{site: _answers(model, rows)[0] for site, rows in unseen.items()}}


def _answers(model: SuperModel, rows: Dataset) -> tuple[float, dict[str, int], np.ndarray]:
    """Mean Dice, images by the model that answered, and the site that the selector holds most probable."""
    answers = [model.predict(batch) for batch in rows[:]["pixel_values"].split(_BATCH)]
    masks = torch.cat([answer.logits > 0 for answer in answers]).numpy()
    by = Counter(name for answer in answers for name in answer.models)
    chosen = torch.cat([answer.probabilities.argmax(1) for answer in answers]).numpy()
    return mean_overlap(masks, rows[:]["labels"].numpy())["dice"], dict(by), chosen


def _dice(predict, rows: Dataset) -> float:
    masks = torch.cat([predict(batch) for batch in rows[:]["pixel_values"].split(_BATCH)]).numpy()
    return mean_overlap(masks, rows[:]["labels"].numpy())["dice"]


@cache
def _nuclei_rows() -> dict[str, Dataset]:
    names = {number: name for number, (name, *_) in NUCLEI_SITES.items()}
    return sites_from_npz(NUCLEI, {**names, 5: UNSEEN}, size=64)


def nuclei_parts(is_validation: bool) -> tuple[dict[str, Part], Dataset]:
    """The sites, and the images of none; what is tested on never comes among what is tuned by."""
    rows, parts = _nuclei_rows(), {}
    for name, num_train, num_test in NUCLEI_SITES.values():
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows[name]))
        test, train = order[:num_test], order[num_test : num_test + num_train]
        if is_validation:
            num_held_out = max(2, num_train // 5)
            test, train = train[:num_held_out], train[num_held_out:]
        parts[name] = Part(rows[name].select(np.sort(train)), rows[name].select(np.sort(test)))
    return parts, rows[UNSEEN]
