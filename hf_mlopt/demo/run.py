"""Trains, prunes with every method, distils, evaluates; leaves a table, a plot and checkpoints with their cards."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from hf_mlopt.data import CalibrationConfig, embedded_corpus, load_calibration, tokenize_corpus
from hf_mlopt.demo.model import CONTEXT, build_model, train, train_tokenizer
from hf_mlopt.demo.output import demo_output
from hf_mlopt.demo.plot import plot
from hf_mlopt.demo.recover import DENSE, DISTILLED, PRUNED, TASK, distil, judge
from hf_mlopt.evaluation import perplexity
from hf_mlopt.hub import environment, resolve_checkpoint
from hf_mlopt.pruning import METHODS, MoEPruner, PruningConfig
from hf_mlopt.workflows.loading import load_model
from hf_mlopt.workflows.prune import PruneRecipe, calibration_record, write_pruned


_RESULTS = "results.json"
_WRITTEN = {DENSE, PRUNED, DISTILLED, TASK, "perplexity.png", _RESULTS}
_EMBEDDED = {"calibration": "embedded", "samples": 64, "sequence_length": CONTEXT}


@dataclass(frozen=True)
class Budget:
    """
    How much the demo does: optimizer steps, sparsities per method, windows of held-out text, windows to distil on and
    how often, questions of the task.
    """

    steps: int = 350
    sparsities: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)
    methods: tuple[str, ...] = tuple(METHODS)
    windows: int = 100
    distilled_on: int = 512
    epochs: float = 2.0
    questions: int = 200


SHORT = Budget(
    steps=4,
    sparsities=(0.5,),
    methods=("magnitude", "wanda", "moe-pruner"),
    windows=4,
    distilled_on=16,
    questions=8,
)


def run_demo(output: str, seed: int = 0, budget: Budget = Budget()) -> dict:
    """
    Runs the demo and writes `output`: `mixtral-demo/`, `mixtral-demo-50/`, `mixtral-demo-50-distilled/`, the task
    `continuations.jsonl`, `perplexity.png` and `results.json`.

    Returns:
        `dict`: What `results.json` holds: `dense` perplexity, `rows` (one a variant), `distillation` (its report),
        `recovery` (a row a model: dense, pruned, distilled), `seconds`, `environment`.

    Raises:
        InputError: If `output` holds anything but an earlier demo, which is replaced.
    """
    started = time.perf_counter()
    target = Path(output).expanduser().resolve()
    with demo_output(target, _WRITTEN, 100_000_000) as folder:
        tokenizer = train_tokenizer()
        model = build_model(tokenizer, seed)
        print(f"training a Mixtral of {model.num_parameters() / 1e6:.1f} M parameters, {budget.steps} steps")
        train(model, tokenizer, budget.steps, seed, str(folder / "scratch"))
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        model.save_pretrained(folder / DENSE)
        tokenizer.save_pretrained(folder / DENSE)

        checkpoint = resolve_checkpoint(folder / DENSE)
        calibration = load_calibration(CalibrationConfig(**_EMBEDDED, seed=seed), tokenizer, CONTEXT)
        held_out = tokenize_corpus(embedded_corpus("test"), tokenizer)[: CONTEXT * budget.windows]
        dense = perplexity(load_model(checkpoint), held_out, CONTEXT).perplexity
        rows = []
        for config in tqdm(_variants(budget), desc="pruning and evaluating", unit="variant"):
            pruned, report, row = _prune_and_judge(checkpoint, config, calibration, held_out)
            rows.append(row)
            if config.method == "moe-pruner" and config.sparsity == 0.5:
                _write_checkpoint(pruned, tokenizer, checkpoint, target, folder, calibration, report, seed, dense, row)
        plot(
            rows,
            dense,
            folder / "perplexity.png",
            f"A Mixtral of {model.num_parameters() / 1e6:.1f} M parameters, trained by the demo, seed {seed}",
        )
        distillation = distil(folder, target, budget.distilled_on, budget.epochs, seed)
        result = {
            "dense": dense,
            "rows": rows,
            "distillation": distillation,
            "recovery": judge(folder, budget.windows, budget.questions, seed),
            "seed": seed,
            "seconds": time.perf_counter() - started,
            "environment": environment(),
        }
        (folder / _RESULTS).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _variants(budget: Budget) -> list[PruningConfig]:
    patterns = [{"sparsity": sparsity} for sparsity in budget.sparsities] + [{"pattern": "2:4"}]
    return [PruningConfig(method=method, **pattern) for method in budget.methods for pattern in patterns]


def _prune_and_judge(checkpoint, config, calibration, held_out):
    """One variant: the pruned model, its report, and its row of the table."""
    model = load_model(checkpoint)
    report = MoEPruner(config).prune(model, calibration.token_ids, progress=False)
    result = perplexity(model, held_out, CONTEXT)
    row = {
        "method": config.method,
        "label": config.label,
        "sparsity": config.sparsity,
        "perplexity": result.perplexity,
        "achieved_sparsity": report.sparsity,
        "seconds": report.seconds,
        "tokens": result.tokens,
    }
    return model, report, row


def _write_checkpoint(model, tokenizer, checkpoint, target, folder, calibration, report, seed, dense, row) -> None:
    report.calibration = calibration_record(calibration)
    recipe = PruneRecipe(**_EMBEDDED, seed=seed, sparsity=0.5, model=str(target / DENSE))
    recipe.output = str(folder / PRUNED)
    evaluation = {
        "dataset": "pydoc_data.topics (embedded)",
        "split": "test",
        "window": CONTEXT,
        "tokens": row["tokens"],
        "dense": dense,
        "pruned": row["perplexity"],
    }
    write_pruned(model, tokenizer, report, recipe, checkpoint, [evaluation])


def table(result: dict) -> str:
    """The 50 % and 2:4 rows beside the dense model, as text."""
    shown = [row for label in ("50%", "2:4") for row in result["rows"] if row["label"] == label]
    lines = [f"{'method':<16} {'pattern':>8} {'zeros':>8} {'perplexity':>11} {'change':>8} {'seconds':>8}"]
    lines.append(f"{'dense':<16} {'':>8} {'0.0 %':>8} {result['dense']:>11.2f} {'':>8} {'':>8}")
    for row in shown:
        change = 100 * (row["perplexity"] / result["dense"] - 1)
        lines.append(
            f"{row['method']:<16} {row['label']:>8} {100 * row['achieved_sparsity']:>6.1f} % "
            f"{row['perplexity']:>11.2f} {change:>+6.1f} % {row['seconds']:>8.2f}"
        )
    return "\n".join(lines)


def recovery_table(result: dict) -> str:
    """Dense, pruned and distilled side by side, as text."""
    rows, report = result["recovery"], result["distillation"]
    lines = [f"{'model':<28} {'perplexity':>11} {'accuracy':>16}"]
    for row in rows:
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} %"
        lines.append(f"{row['model']:<28} {row['perplexity']:>11.2f} {accuracy:>16}")
    lines.append(
        f"distilled layer by layer on {report['tokens']:,} tokens in {report['seconds']:.0f} s; accuracy on "
        f"{rows[0]['questions']} questions about held-out text, 4 choices each"
    )
    return "\n".join(lines)
