"""The super model of FedSM: all models of a federated training, and the selector that says which one answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms.fedsm import FedSM
from hf_mlopt.federated.algorithms.message import Group
from hf_mlopt.federated.algorithms.routing import GLOBAL, route
from hf_mlopt.federated.segmentation_models import SegmentationModel
from hf_mlopt.federated.selector_model import MomentsSelectorModel, SelectorModel
from hf_mlopt.hub.card_segmentation import super_model_card
from hf_mlopt.hub.output import staged_output
from hf_mlopt.hub.provenance import environment


@dataclass(frozen=True)
class Prediction:
    """
    What a super model says of a batch.

    Args:
        logits (`torch.Tensor`): `[B, 1, H, W]`.
        models (`list[str]`): `[B]`, name of the site whose personal model answered, or `global`.
        probabilities (`torch.Tensor`): `[B, K]`, the selector's.
    """

    logits: torch.Tensor
    models: list[str]
    probabilities: torch.Tensor


class SuperModel:
    """
    One network with the weights of the global and of the personal models, and a selector. It asks for no site.

    Args:
        network (`SegmentationModel`): The architecture; its own weights are not used.
        sites (`Sequence[str]`): Names in the order of labels.
        models (`Mapping[str, Group]`): `global`, and by name of the site the personal models that may be used: a
            sample of a site without one goes to the global model.
        selector (`SelectorModel` or `MomentsSelectorModel`): With its weights or statistics.
        threshold (`float`): γ of [`route`].
    """

    def __init__(
        self,
        network: SegmentationModel,
        sites: Sequence[str],
        models: Mapping[str, Group],
        selector: SelectorModel | MomentsSelectorModel,
        threshold: float,
    ):
        self.network, self.sites, self.threshold = network.eval(), list(sites), threshold
        unknown = sorted(set(models) - {"global", *self.sites})
        if "global" not in models or unknown or "global" in self.sites:
            raise InputError(f"models: {sorted(models)}; 'global' is needed, and else only the sites {self.sites}")
        names = sorted(network.state_dict())
        for model, weights in models.items():
            if sorted(weights) != names:
                raise InputError(f"models: {model!r} has other weights than the network; give it as it was trained")
        self.models = {model: dict(weights) for model, weights in models.items()}
        self.selector = selector.eval()

    @classmethod
    def from_training(
        cls,
        algorithm: FedSM,
        network: SegmentationModel,
        selector: SelectorModel | None = None,
        released: Sequence[str] = (),
    ) -> "SuperModel":
        """
        Of a finished training.

        Args:
            algorithm (`FedSM`): With a selector.
            network (`SegmentationModel`): The architecture trained.
            selector (`SelectorModel`, *optional*): That of the training, where it was learned.
            released (`Sequence[str]`): Sites that agreed to hand their personal model to all users. Its weights tell
                of their data.
        """
        if unknown := sorted(set(released) - set(algorithm.sites)):
            raise InputError(f"released={unknown}: the sites are {algorithm.sites}")
        if algorithm.selector.name == "none":
            raise InputError("selector='none': a super model needs a selector; train with learned or moments")
        groups, frozen = algorithm.groups, network.state_dict()
        models = {"global": {**frozen, **groups["weights"], **groups.get("buffers", {})}}
        for site in released:
            own = {**groups[f"personal/{site}"], **groups.get(f"personal_buffers/{site}", {})}
            models[site] = {**frozen, **own}
        if algorithm.selector.name == "moments":
            selector = MomentsSelectorModel(algorithm.selector.statistics(groups, algorithm.sites))
        elif selector is None:
            raise InputError("selector: give the SelectorModel that was trained")
        else:
            selector.load_state_dict(groups["selector"])
        return cls(network, algorithm.sites, models, selector, algorithm.threshold)

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> Prediction:
        """
        Args:
            images (`torch.Tensor`): `[B, C, H, W]` in [0, 1].
        """
        probabilities = torch.softmax(self.selector(images), dim=1)
        chosen = [self._name(index) for index in route(probabilities, self.threshold).tolist()]
        logits = images.new_empty(len(images), 1, *images.shape[2:])
        for model in sorted(set(chosen)):
            rows = torch.tensor([name == model for name in chosen])
            answer = torch.func.functional_call(self.network, self.models[model], (images[rows],))
            logits[rows] = answer["logits"]
        return Prediction(logits, chosen, probabilities)

    def save_pretrained(self, directory: str | Path, results: Mapping[str, Any] | None = None) -> None:
        """
        Writes `config.json`, `model.safetensors` and a card into a new directory, whole or not at all.

        Args:
            directory (`str` or `Path`): To be made.
            results (`Mapping`, *optional*): What the card shows: `sites`, `mean`, `unseen` and `selector_accuracy` of
                a run's `federated_results.json`.
        """
        options = getattr(self.selector, "options", None)
        config = {
            "model_type": "fedsm_super_model",
            "network": self.network.options,
            "selector": {"kind": "moments" if options is None else "learned", **(options or {})},
            "sites": self.sites,
            "released": sorted(set(self.models) - {"global"}),
            "threshold": self.threshold,
            "hf_mlopt": {"method": "fedsm", "paper": "2203.10144", **environment()},
        }
        parts = {f"models/{name}": weights for name, weights in self.models.items()}
        parts["selector"] = self.selector.state_dict()
        tensors = {f"{part}/{name}": t.clone() for part, weights in parts.items() for name, t in weights.items()}
        with staged_output(directory) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            card = super_model_card(Path(directory).resolve().parent.name, config, results or {})
            (folder / "README.md").write_text(card, encoding="utf-8")
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "SuperModel":
        """
        Reads what [`SuperModel.save_pretrained`] wrote.

        Raises:
            InputError: If a file is missing, or is none of this kind.
        """
        directory = Path(directory)
        try:
            config = json.loads((directory / "config.json").read_text())
            tensors = load_file(directory / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{str(directory)!r}: holds no super model ({error})") from error
        if config.get("model_type") != "fedsm_super_model":
            raise InputError(f"{str(directory)!r}: model_type is {config.get('model_type')!r}, not a super model")
        models = {name: _part(tensors, f"models/{name}/") for name in ["global", *config["released"]]}
        weights, options = _part(tensors, "selector/"), dict(config["selector"])
        if options.pop("kind") == "moments":
            selector = MomentsSelectorModel.from_state_dict(weights)
        else:
            selector = SelectorModel(**options)
            selector.load_state_dict(weights)
        return cls(SegmentationModel(**config["network"]), config["sites"], models, selector, config["threshold"])

    def _name(self, index: int) -> str:
        site = "global" if index == GLOBAL else self.sites[index]
        return site if site in self.models else "global"


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
