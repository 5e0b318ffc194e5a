"""`hf-mlopt federate`: one model trained at several sites."""

import json
import logging
import time
from dataclasses import dataclass, make_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mlopt.configuration import save_yaml
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.federated import FederatedClient, SiteStore
from hf_mlopt.federated.checkpoint import checkpoints
from hf_mlopt.hub import Checkpoint, environment, resolve_checkpoint
from hf_mlopt.hub.card_segmentation import segmentation_card
from hf_mlopt.hub.provenance import shown_name
from hf_mlopt.workflows.federate_data import FederatedData
from hf_mlopt.workflows.federate_recipe import FederateRecipe
from hf_mlopt.workflows.places import check_output_dir, check_text_files, require_writable
from hf_mlopt.workflows.segmentation_data import SegmentationData
from hf_mlopt.workflows.segmentation_metrics import overlap, predicted_masks
from hf_mlopt.workflows.train import accuracy, choices, plot_path
from hf_mlopt.workflows.train_data import TrainData
from hf_mlopt.workflows.train_model import build_model, load_config, warn_of_filled_zeros


if TYPE_CHECKING:
    import torch

    from hf_mlopt.federated import FederatedTrainer
    from hf_mlopt.federated.engines import Engine

logger = logging.getLogger(__name__)

_MODELS = ("global", "personal", "super")


@dataclass
class Federation:
    """
    What a recipe says, as the parts that server and sites are made of. Each is read or made when it is needed, so
    that a server reads no site's data.

    Args:
        recipe (`FederateRecipe`): What to do.
    """

    recipe: FederateRecipe

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The model to go on from."""
        return resolve_checkpoint(self.recipe.model) if self.recipe.model else None

    @cached_property
    def data(self) -> FederatedData | SegmentationData:
        """Of all sites."""
        if self.recipe.task == "segmentation":
            return SegmentationData(self.recipe)
        return FederatedData(self.recipe, self.checkpoint)

    def model(self) -> "torch.nn.Module":
        """The model, with adapters where the recipe has them; random weights are those of the global seed."""
        model = self.base_model()
        return model if self.recipe.lora is None else _with_adapters(self.recipe, model)

    def base_model(self) -> "torch.nn.Module":
        """The model without adapters."""
        recipe, data = self.recipe, self.data
        if recipe.task == "segmentation":
            # A server that has no images is told their channels.
            return _segmentation_model(recipe, (recipe.model_config or {}).get("num_channels") or data.shape[0])
        config = load_config(recipe, self.checkpoint)
        of_data = TrainData(None, None, {}, data.tokenizer, data.shape, data.label_names)
        return build_model(recipe, self.checkpoint, config, of_data)

    def trainer_kwargs(self) -> dict[str, Any]:
        """What the sites' Trainers take beside model, arguments and data."""
        from transformers import DataCollatorWithPadding, default_data_collator

        pads = self.recipe.task == "text-classification"
        collator = DataCollatorWithPadding(self.data.tokenizer) if pads else default_data_collator
        judged = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": choices}
        if self.recipe.task == "segmentation":
            judged = {"compute_metrics": overlap, "preprocess_logits_for_metrics": predicted_masks}
        return {
            "data_collator": collator,
            "processing_class": self.data.tokenizer,
            **({} if self.recipe.task == "causal-lm" else judged),
        }

    def client(self, folder: Path) -> FederatedClient:
        """What stands at a site, which keeps its state in `folder`."""
        store = SiteStore(folder)
        return FederatedClient(self.recipe, self.model, self.data.site, store, trainer_kwargs=self.trainer_kwargs())


def _segmentation_model(recipe: FederateRecipe, num_channels: int) -> "torch.nn.Module":
    from hf_mlopt.federated.segmentation_models import SegmentationModel

    options = {"num_channels": num_channels, **(recipe.model_config or {})}
    try:
        return SegmentationModel(recipe.model_type, **options)
    except ConfigurationError as error:
        raise ConfigurationError(f"model_config.{error.field}", error.value, str(error).partition(": ")[2]) from None
    except TypeError as error:
        raise ConfigurationError("model_config", recipe.model_config, " ".join(str(error).split())) from error


def _with_adapters(recipe: FederateRecipe, model: "torch.nn.Module") -> "torch.nn.Module":
    from peft import LoraConfig, TaskType, get_peft_model

    kinds = {"causal-lm": TaskType.CAUSAL_LM, "text-classification": TaskType.SEQ_CLS}
    kind = {"task_type": kinds[recipe.task]} if recipe.task in kinds else {}
    try:
        return get_peft_model(model, LoraConfig(**{**kind, **recipe.lora}))
    except (TypeError, ValueError) as error:
        raise ConfigurationError("lora", recipe.lora, " ".join(str(error).split())[:300]) from error


def check(recipe: FederateRecipe) -> None:
    """
    Refuses a recipe that cannot be carried out, as far as that shows before data and weights are read.

    Raises:
        InputError: If a file is missing, the output cannot be written or, in a new run, holds something, there is no
            checkpoint to go on from, or the model cannot be made as `model_config` says.
    """
    check_output_dir(recipe.output_dir, bool(recipe.resume_from_checkpoint), may_hold=("sites",))
    if recipe.resume_from_checkpoint is True and not checkpoints(Path(recipe.output_dir)):
        raise ConfigurationError("resume_from_checkpoint", True, f"there is no checkpoint in {recipe.output_dir}")
    require_writable(recipe.output_dir, plot_path(recipe).parent)
    sources = {"dataset": recipe.dataset, "eval_dataset": recipe.eval_dataset}
    if recipe.engine == "in-process":
        sources |= {f"site_datasets.{site}": source for site, source in (recipe.site_datasets or {}).items()}
    check_text_files(sources)
    if recipe.task == "segmentation":
        _segmentation_model(recipe, 3)
    else:
        load_config(recipe, resolve_checkpoint(recipe.model) if recipe.model else None)


def federate(recipe: FederateRecipe, engine: "Engine | None" = None) -> tuple[dict, Path]:
    """
    Carries out a recipe as the server.

    Writes the model with its tokenizer, `recipe.yaml`, `federated_results.json` and the plot into `output_dir`; of
    adapters to random weights also these, as `base`.

    Args:
        recipe (`FederateRecipe`): What to do.
        engine (`Engine`, *optional*): What reaches the sites; by default they train on this machine.

    Returns:
        `tuple[dict, Path]`: What `federated_results.json` holds, and the directory.

    Raises:
        InputError: For anything that cannot be done, before the first round.
    """
    from transformers import set_seed

    from hf_mlopt.federated import FederatedTrainer
    from hf_mlopt.workflows.segmentation_report import (
        OverlayCallback,
        report,
        save_super_model,
        super_model_of,
    )

    check(recipe)
    federation, output = Federation(recipe), Path(recipe.output_dir).resolve()
    data = federation.data
    # Where sites are elsewhere their images are as well.
    is_drawn = recipe.task == "segmentation" and engine is None
    callbacks = [OverlayCallback(recipe.overlay_every, data, output)] if is_drawn else []
    trainer = FederatedTrainer(
        federation.model,
        recipe,
        {name: partial(data.site, name) for name in data.names} if engine is None else None,
        engine=engine,
        eval_dataset=data.evaluation if recipe.evaluate_every else None,
        callbacks=callbacks,
        **federation.trainer_kwargs(),
    )
    for callback in callbacks:
        callback.trainer = trainer
    warn_of_filled_zeros(trainer.model, recipe)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=recipe.resume_from_checkpoint)
    results = _results(recipe, trainer, data, time.perf_counter() - started)
    trainer.save_model(str(output))
    if recipe.lora is not None and recipe.model is None:  # adapters are nothing without weights that are nowhere else
        set_seed(recipe.seed)
        federation.base_model().save_pretrained(output / "base")
    if is_drawn:
        results["segmentation"] = report(trainer, data, output)
    elif recipe.task == "segmentation":
        save_super_model(super_model_of(trainer), output, {})
    if recipe.task == "segmentation":
        trainer.load_server_model()
        (output / "README.md").write_text(segmentation_card(output.name, results), encoding="utf-8")
        trainer.model.save_pretrained(output)
    _write(recipe, results, output)
    return results, output


def site_rows(results: dict) -> list[dict[str, Any]]:
    """
    A row a site of what a run has come to, for its final table.

    Args:
        results (`dict`): What `federated_results.json` holds.

    Returns:
        `list[dict]`: `site`, `rows`, `rounds` (that counted), `train_loss` (of its last round), the metrics of the
        final model on its own rows, and `megabytes` (sent by it, all in all).
    """
    rounds, found = results["rounds"], results["rounds"][-1].get("evaluation", {}).get("sites", {})
    if "segmentation" in results:
        of_sites = results["segmentation"]["sites"]
        found = {site: {f"dice_{m}": one[m] for m in _MODELS if m in one} for site, one in of_sites.items()}
    names = sorted({site for row in rounds for site in row["sites"]} | set(found))
    table = []
    for name in names:
        took_part = [row for row in rounds if name in row["sites"] and name not in row["absent"]]
        last = took_part[-1]["sites"][name] if took_part else {}
        table.append(
            {
                "site": name,
                "rows": last.get("num_samples"),
                "rounds": len(took_part),
                "train_loss": last.get("train_loss"),
                **{metric: value for metric, value in found.get(name, {}).items() if metric != "num_evaluated"},
                "megabytes": sum(row["sites"].get(name, {}).get("bytes_up", 0) for row in rounds) / 1e6,
            }
        )
    return table


def _results(recipe: FederateRecipe, trainer: "FederatedTrainer", data: FederatedData, seconds: float) -> dict:
    last = trainer.history[-1]
    model = trainer.model
    return {
        "task": recipe.task,
        "model": shown_name(recipe.model) if recipe.model else recipe.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "exchanged_parameters": sum(p.numel() for p in trainer.client.shared.weights.values()),
        "algorithm": {"name": recipe.algorithm, "args": recipe.algorithm_args or {}},
        "optimizer": {"name": recipe.mlopt_optim or recipe.optim.value, "args": recipe.mlopt_optim_args or {}},
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "engine": recipe.engine,
        "sites": sorted(last["sites"]),
        "local_steps": recipe.local_steps,
        "local_epochs": None if recipe.local_steps else recipe.local_epochs,
        "evaluation": {name: value for name, value in last.get("evaluation", {}).items() if name != "sites"},
        "server": last.get("server"),
        "seconds": seconds,
        "bytes_down": sum(row["bytes_down"] + row.get("bytes_evaluation", 0) for row in trainer.history),
        "bytes_up": sum(row["bytes_up"] for row in trainer.history),
        "device": recipe.device.type,
        "data": data.record,
        "environment": environment(),
        **(
            {"auto_fedrl": recipe.auto_fedrl, "trace": trainer.algorithm.trace}
            if recipe.auto_fedrl is not None
            else {}
        ),
        "rounds": trainer.history,
    }


def _write(recipe: FederateRecipe, results: dict, output: Path) -> None:
    (output / "federated_results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written = make_dataclass("Written", [(name, Any) for name in recipe.given])(**recipe.given)
    save_yaml(written, output / "recipe.yaml")
    if recipe.plot is not False:
        from hf_mlopt.workflows.federate_plot import plot_rounds, plot_trace

        path = plot_path(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_rounds(results, path)
        if "trace" in results:
            plot_trace(results["trace"], path.with_name("auto_fedrl.png"))
