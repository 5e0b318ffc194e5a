"""`hf-mlopt train`: a language model or an image classifier trained with an optimizer of this package."""

import json
import logging
import math
import time
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mlopt import ranks
from hf_mlopt.configuration import save_yaml
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.hub import Checkpoint, environment, resolve_checkpoint
from hf_mlopt.hub.provenance import shown_name
from hf_mlopt.workflows.places import check_output_dir, check_text_files, require_writable
from hf_mlopt.workflows.train_data import load_image_data, load_text_data
from hf_mlopt.workflows.train_model import build_model, load_config, warn_of_filled_zeros
from hf_mlopt.workflows.train_recipe import TrainRecipe


if TYPE_CHECKING:
    from hf_mlopt.training import MLOptTrainer

logger = logging.getLogger(__name__)

_TRAINER_STATE = "trainer_state.json"


def check(recipe: TrainRecipe) -> None:
    """
    Refuses a recipe that cannot be carried out, as far as that shows before data and weights are read.

    Raises:
        InputError: If a file is missing, the output cannot be written or, in a new run, holds something, there is no
            checkpoint to go on from, or the model cannot be made as `model_config` says.
    """
    _check_places(recipe)
    load_config(recipe, _checkpoint(recipe))


def _checkpoint(recipe: TrainRecipe) -> Checkpoint | None:
    return resolve_checkpoint(recipe.model) if recipe.model else None


def _check_places(recipe: TrainRecipe) -> str | None:
    """The training checkpoint to go on from, None in a new run, if the files of a recipe are where they should be."""
    resumed = _resumed(recipe)
    check_output_dir(recipe.output_dir, resumed is not None)
    require_writable(recipe.output_dir, plot_path(recipe).parent)
    check_text_files({name: getattr(recipe, name) for name in ("dataset", "eval_dataset")})
    return resumed


def _resumed(recipe: TrainRecipe) -> str | None:
    wanted = recipe.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is not True:
        if not (Path(wanted) / _TRAINER_STATE).is_file():
            raise ConfigurationError("resume_from_checkpoint", wanted, f"holds no {_TRAINER_STATE}")
        return wanted
    # What a killed process left half-written lacks this file, which is written last.
    whole = [path.parent for path in Path(recipe.output_dir).glob(f"checkpoint-*/{_TRAINER_STATE}")]
    if not whole:
        raise ConfigurationError("resume_from_checkpoint", True, f"there is no checkpoint in {recipe.output_dir}")
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def plot_path(recipe) -> Path:
    """The PNG that `plot` of a recipe, of this verb or a related one, means."""
    return Path(recipe.output_dir) / "curves.png" if recipe.plot in (True, False) else Path(recipe.plot)


def train(recipe: TrainRecipe) -> tuple[dict, Path]:
    """
    Carries out a recipe, in this process and in those that a launcher has started beside it.

    Writes the model with its tokenizer, `recipe.yaml`, `train_results.json` and the plot into `output_dir`.

    Returns:
        `tuple[dict, Path]`: What `train_results.json` holds, and the directory.

    Raises:
        InputError: For anything that cannot be done, before training begins.
    """
    # These take seconds, which a parser, and the parent of several processes, need not wait for.
    from transformers import default_data_collator, enable_full_determinism, set_seed

    from hf_mlopt.pipeline import PipelineTrainer
    from hf_mlopt.training import MLOptTrainer

    resumed = ranks.on_first(lambda: _check_places(recipe))
    checkpoint = _checkpoint(recipe)
    config = load_config(recipe, checkpoint)
    is_text = recipe.task == "causal-lm"
    with recipe.main_process_first(desc="reading the data"):
        data = load_text_data(recipe, checkpoint) if is_text else load_image_data(recipe)
    enable_full_determinism(recipe.seed) if recipe.full_determinism else set_seed(recipe.seed)
    trainer_class = MLOptTrainer if recipe.pipeline is None else PipelineTrainer
    trainer = trainer_class(
        build_model(recipe, checkpoint, config, data),
        recipe,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=default_data_collator,
        processing_class=data.tokenizer,
        **({} if is_text else {"compute_metrics": accuracy, "preprocess_logits_for_metrics": choices}),
    )
    _announce(recipe, trainer)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - started
    elsewhere = _at_every_point(trainer)
    results = _results(recipe, trainer, data, trainer.evaluate(), seconds)
    if elsewhere:
        results["eval_loss_elsewhere"] = elsewhere
    output = Path(recipe.output_dir).resolve()
    timeline = trainer.timeline() if recipe.pipeline else None
    if ranks.rank() == 0:
        _write(recipe, results, output)
        if timeline and recipe.plot is not False:
            from hf_mlopt.pipeline.timeline import plot_timeline

            title = f"{results['model']}, {results['pipeline']['mode']}"
            plot_timeline(timeline, plot_path(recipe).with_name("timeline.png"), title)
    trainer.save_model()  # pushes the whole directory where it is to be pushed
    if recipe.pipeline:
        trainer.close()
    ranks.wait_for_all()
    return results, output


def _announce(recipe: TrainRecipe, trainer: "MLOptTrainer") -> None:
    import torch

    model = trainer.model
    processes = "1 process" if recipe.world_size == 1 else f"{recipe.world_size} processes"
    logger.info(
        f"{model.config.model_type}, {model.num_parameters():,} parameters, {len(trainer.train_dataset):,} rows to "
        f"train on and {len(trainer.eval_dataset):,} to evaluate on, {_optimizer(recipe)['name']}, {processes} on "
        f"{recipe.device.type}"
    )
    warn_of_filled_zeros(model, recipe)
    has_statistics = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if has_statistics and _optimizer(recipe)["name"].startswith("rsgd"):
        logger.warning(
            "the statistics of batch normalisation are those of the training point, and RSGD is evaluated at another: "
            """take a model without them, or --mlopt-optim-args '{"eval_point": "w"}'"""
        )


def _at_every_point(trainer: "MLOptTrainer") -> dict[str, float]:
    """The loss at w, y and x where the optimizer has these; it stays at the point that it was given."""
    from hf_mlopt.training.local_steps import unwrapped

    optimizer = unwrapped(trainer.optimizer)
    # The best model replaces what the optimizer has come to, and would be moved along with it.
    if "residual" not in optimizer.param_groups[0] or trainer.args.load_best_model_at_end:
        return {}
    wanted, losses = optimizer.param_groups[0]["eval_point"], {}
    others = [point for point in ("w", "y", "x") if point != wanted]
    for point in [*others, wanted]:
        optimizer.train()
        for group in optimizer.param_groups:
            group["eval_point"] = point
        if point != wanted:
            losses[point] = trainer.evaluate(metric_key_prefix=f"eval_{point}")[f"eval_{point}_loss"]
    return losses


def choices(logits, labels):
    """What `compute_metrics` gets in place of logits: the class with the largest."""
    return logits.argmax(-1)


def accuracy(prediction) -> dict[str, float]:
    """Share of the rows whose class is right."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def _optimizer(recipe: TrainRecipe) -> dict:
    if recipe.mlopt_optim:
        return {"name": recipe.mlopt_optim, "args": recipe.mlopt_optim_args or {}}
    return {"name": recipe.optim.value, "args": recipe.optim_args or {}}


def _results(recipe: TrainRecipe, trainer: "MLOptTrainer", data, metrics: dict, seconds: float) -> dict:
    metric = "eval_perplexity" if recipe.task == "causal-lm" else "eval_accuracy"
    found = {name: finite(value) for name, value in _with_perplexity(metrics, recipe.task).items()}
    if found[metric] is None or found["eval_loss"] is None:
        logger.warning("what the held-out data give is not a finite number: lower learning_rate")
    return {
        "task": recipe.task,
        "model": shown_name(recipe.model) if recipe.model else recipe.model_type,
        "parameters": trainer.model.num_parameters(),
        "eval_loss": found["eval_loss"],
        metric: found[metric],
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "seconds": seconds,
        "optimizer": _optimizer(recipe),
        "learning_rate": recipe.learning_rate,
        "seed": recipe.seed,
        "world_size": recipe.world_size,
        "local_steps": recipe.local_steps,
        **({"pipeline": trainer.assembly.to_dict()} if recipe.pipeline else {}),
        "device": recipe.device.type,
        "data": data.record,
        "environment": environment(),
        "log": [
            {name: finite(value) for name, value in _with_perplexity(row, recipe.task).items()}
            for row in trainer.state.log_history
            if "loss" in row or "eval_loss" in row
        ],
    }


def _with_perplexity(row: dict, task: str) -> dict:
    if task != "causal-lm" or "eval_loss" not in row:
        return row
    loss = row["eval_loss"]
    return row | {"eval_perplexity": math.exp(loss) if loss < 700 else math.inf}


def finite(value):
    """JSON has no numbers for the others."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(recipe: TrainRecipe, results: dict, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "train_results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    given = recipe.given | ({"num_processes": recipe.world_size} if recipe.world_size > 1 else {})
    written = make_dataclass("Written", [(name, Any) for name in given])(**given)
    save_yaml(written, output / "recipe.yaml")
    if recipe.plot is not False:
        from hf_mlopt.workflows.train_plot import plot_training

        path = plot_path(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_training(results, path, f"{results['model']}, {results['optimizer']['name']}")
