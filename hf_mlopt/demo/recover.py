"""Distils the demo's pruned model, and judges it beside the dense and the pruned one."""

from dataclasses import replace
from pathlib import Path

from hf_mlopt.configuration import load_config, save_yaml
from hf_mlopt.demo.model import CONTEXT
from hf_mlopt.demo.task import write_task
from hf_mlopt.hub.results_into_card import collect_results
from hf_mlopt.workflows.distill import DistillRecipe, distill_checkpoint
from hf_mlopt.workflows.evaluate import EvaluationConfig, evaluate_models


DENSE, PRUNED, DISTILLED = "mixtral-demo", "mixtral-demo-50", "mixtral-demo-50-distilled"  # what cards call them
TASK = "continuations.jsonl"


def distil(folder: Path, target: Path, samples: int, epochs: float, seed: int) -> dict:
    """
    Distils `folder/mixtral-demo-50` layer by layer.

    Args:
        folder (`Path`), target (`Path`): Where the checkpoints are, and where they will be.
        samples (`int`), epochs (`float`): Windows of the embedded text to train on, and how often.
        seed (`int`): Seed of the windows and of their order.

    Returns:
        `dict`: What `distillation_report.json` holds.
    """
    recipe = DistillRecipe(
        student=str(folder / PRUNED),
        teacher=str(folder / DENSE),
        output=str(folder / DISTILLED),
        dataset="embedded",
        samples=samples,
        sequence_length=CONTEXT,
        epochs=epochs,
        learning_rate=1e-3,
        seed=seed,
        device="cpu",
    )
    report, output = distill_checkpoint(recipe)
    written = load_config(DistillRecipe, output / "recipe.yaml")
    save_yaml(replace(written, student=str(target / PRUNED), teacher=str(target / DENSE)), output / "recipe.yaml")
    return report.to_dict()


def judge(folder: Path, windows: int, questions: int, seed: int) -> list[dict]:
    """
    Evaluates the three models on perplexity and a task made of held-out text, which is left in `folder`; the results
    go into the card of the distilled one.

    Args:
        folder (`Path`): Where the checkpoints are.
        windows (`int`), questions (`int`): Of the held-out text, and of the task.
        seed (`int`): Seed of the task.

    Returns:
        `list[dict]`: `model`, `perplexity`, `accuracy` and its standard error `stderr`, a row a model.
    """
    write_task(folder / TASK, questions, seed)
    evaluation = evaluate_models(
        EvaluationConfig(
            models=[str(folder / name) for name in (DENSE, PRUNED, DISTILLED)],
            tasks=str(folder / TASK),
            perplexity="embedded",
            window=CONTEXT,
            max_windows=windows,
            device="cpu",
        )
    )
    for name, text in collect_results(folder / DISTILLED, evaluation).items():
        (folder / DISTILLED / name).parent.mkdir(exist_ok=True)
        (folder / DISTILLED / name).write_text(text, encoding="utf-8")
    rows = []
    for model in evaluation["models"]:
        accuracy = next(row for row in model["results"] if row["metric"] == "acc")
        rows.append(
            {
                "model": model["model"],
                "perplexity": model["perplexity"]["perplexity"],
                "accuracy": accuracy["value"],
                "stderr": accuracy["stderr"],
                "questions": accuracy["samples"],
            }
        )
    return rows
