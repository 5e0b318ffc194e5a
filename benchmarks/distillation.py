"""
What distillation wins back, on the reference model, and what it costs.

    python benchmarks/distillation.py            # about 80 minutes on 2 cores
    python benchmarks/distillation.py --short    # under 4 minutes

quality  perplexity dense, pruned and distilled at 50 %, 60 % and 2:4, trained on at most 184,000 tokens of
         wikipedia.txt (5 % of what the model was trained on), measured on wikitext2-test.txt: layer-wise and
         end-to-end expert-wise distillation beside fine-tuning with a mask (lmbda = 0), distillation of logits, and
         the dense model trained on for as many tokens. Each method's learning rate is the best of three on one seed
         at 50 %, by perplexity on a later part of that text; then three seeds. Two runs at a time, so that seconds
         are those of a busy machine.
curve    perplexity against tokens, at 50 %
step     an end-to-end step against a cross-entropy step of the same student and a forward pass of the teacher
depth    peak memory of layer-wise distillation of a deeper model of the same width
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from common import Results, paired_ratio
from datasets import Dataset
from distillation_plot import draw
from pruning import REFERENCE, load_reference, write_articles
from pruning_scale import write_checkpoint, write_tokens
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging

from hf_mlopt.data import CalibrationConfig, load_calibration
from hf_mlopt.distillation import DistillationArguments, ExpertDistillationTrainer
from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.distillation.layerwise import distill_layerwise
from hf_mlopt.evaluation import perplexity
from hf_mlopt.moe import moe_layers
from hf_mlopt.pruning import MoEPruner, PruningConfig


HERE = Path(__file__).resolve().parent
WINDOW, TOKENS, BATCH = 128, 184_000, 8
SEEDS = (0, 1, 2)
PATTERNS = {"50%": {"sparsity": 0.5}, "60%": {"sparsity": 0.6}, "2:4": {"pattern": "2:4"}}
PARTS = {"quality": ("quality", "tuning"), "curve": ("curve",), "step": ("step",), "depth": ("depth",)}
# Method -> what it gives the trainer, and the learning rates it is tuned over.
LAYERWISE, EXPERTS, DENSE = "layer-wise", "end-to-end, experts only", "dense, trained on"
METHODS = {
    LAYERWISE: ({}, (1e-3, 2e-3, 4e-3)),
    "end-to-end": ({}, (3e-5, 1e-4, 3e-4)),
    EXPERTS: ({}, (3e-4, 1e-3, 3e-3)),
    "masked fine-tuning": ({"lmbda": 0.0}, (3e-5, 1e-4, 3e-4)),
    "logits": ({"lmbda": 0.0, "logit_weight": 10.0}, (1e-4, 3e-4, 1e-3)),
    DENSE: ({"lmbda": 0.0, "allow_dense": True}, (1e-5, 3e-5, 1e-4)),
}
SHARES = (0.25, 0.5, 1.0)  # of the tokens, for the curve


class Setting:
    """The reference model, its held-out text, and pruned copies and training windows by seed."""

    def __init__(self, windows: int):
        self.dense, _, self.calibration, held_out = load_reference()
        self.tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
        self.held_out, self.for_tuning = held_out[: WINDOW * windows], held_out[-WINDOW * 100 :]
        self.dense_perplexity = self.judge(self.dense)
        self._pruned = {}

    def judge(self, model) -> float:
        return perplexity(model, self.held_out, WINDOW, 16).perplexity

    def pruned(self, pattern: str, seed: int):
        """A model pruned by MoE-Pruner, and its perplexity."""
        if (pattern, seed) not in self._pruned:
            model = copy.deepcopy(self.dense)
            MoEPruner(PruningConfig(**PATTERNS[pattern])).prune(model, self.calibration[seed], progress=False)
            self._pruned[pattern, seed] = model, self.judge(model)
        return self._pruned[pattern, seed]


def train(setting: Setting, method: str, rate: float, student, windows: torch.Tensor, seed: int, judged=None):
    """
    Trains a copy of the student on every window once.

    Args:
        judged (`dict`, *optional*): Is told the perplexity after some steps: tokens -> perplexity.

    Returns:
        `tuple`: The trained model, and the seconds it took.
    """
    model, settings = copy.deepcopy(student), METHODS[method][0]
    started = time.perf_counter()
    if method == LAYERWISE:
        config = LayerwiseConfig(epochs=1.0, learning_rate=rate, batch_size=BATCH, seed=seed)
        distill_layerwise(model, copy.deepcopy(setting.dense), windows, config, progress=False)
        return model, time.perf_counter() - started
    if method == EXPERTS:
        model.requires_grad_(False)
        for layer in moe_layers(model):
            layer.experts.requires_grad_(True)
    trainer = end_to_end(setting, model, windows, seed, learning_rate=rate, **settings)
    if judged is not None:
        trainer.add_callback(_Judge(setting, judged))
    trainer.train()
    return model, time.perf_counter() - started


def end_to_end(setting: Setting, model, windows: torch.Tensor, seed: int, **settings) -> ExpertDistillationTrainer:
    arguments = DistillationArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        adam_epsilon=1e-12,  # gradients of means over thousands of features are small
        seed=seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **settings,
    )
    rows = windows.tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = ExpertDistillationTrainer(model, copy.deepcopy(setting.dense), arguments, train_dataset=data)
    trainer.log = lambda *args, **kwargs: None
    return trainer


class _Judge(TrainerCallback):
    """Measures perplexity on the way; the learning rate still falls to zero at the end only."""

    def __init__(self, setting: Setting, judged: dict):
        self.setting, self.judged = setting, judged

    def on_step_end(self, args, state, control, model=None, **kwargs):
        at = [max(1, round(share * state.max_steps)) for share in SHARES[:-1]]
        if state.global_step in at:
            self.judged[state.global_step * BATCH * WINDOW] = self.setting.judge(model)


def measure_quality(results: Results, arguments: tuple[int, int], patterns, seeds, grid: bool) -> dict[str, float]:
    """Tunes every method at 50 % on the first seed, then runs it on all; returns the learning rates."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_begin, initargs=arguments) as pool:
        jobs = [
            ("tuning", method, rate, "50%", seeds[0])
            for method, (_, values) in METHODS.items()
            for rate in (values if grid else values[1:2])
        ]
        found = add_rows(pool, results, jobs)
        rates = {
            method: min((row for row in found if row["method"] == method), key=lambda row: row["perplexity"])
            for method in METHODS
        }
        rates = {method: row["learning_rate"] for method, row in rates.items()}
        results.note(learning_rates=rates)
        jobs = [
            ("quality", method, rates[method], pattern, seed)
            for pattern in patterns
            for seed in seeds
            for method in METHODS
            if method != DENSE or pattern == patterns[0]  # the dense model does not depend on the pattern
        ]
        add_rows(pool, results, jobs)
    return rates


def add_rows(pool: ProcessPoolExecutor, results: Results, jobs: list[tuple]) -> list[dict]:
    rows = []
    for future in as_completed([pool.submit(_run, *job) for job in jobs]):
        rows.append(future.result())
        results.add(**rows[-1])
    return rows


def _begin(evaluated: int, number: int) -> None:
    """What a process of the pool loads once."""
    global _setting, _windows
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    _setting = Setting(evaluated)
    _windows = {seed: training_windows(_setting, seed, number) for seed in SEEDS}


def _run(kind: str, method: str, rate: float, pattern: str, seed: int) -> dict:
    """One row."""
    windows = _windows[seed]
    student, pruned = (_setting.dense, None) if method == DENSE else _setting.pruned(pattern, seed)
    model, seconds = train(_setting, method, rate, student, windows, seed)
    if kind == "tuning":  # on other windows than the results
        tuned = perplexity(model, _setting.for_tuning, WINDOW, 16).perplexity
        row = {"kind": kind, "method": method, "pattern": pattern, "seed": seed, "learning_rate": rate}
        return {**row, "perplexity": tuned, "seconds": seconds}
    value, dense = _setting.judge(model), _setting.dense_perplexity
    return {
        "kind": kind,
        "method": method,
        "pattern": "" if method == DENSE else pattern,
        "seed": seed,
        "learning_rate": rate,
        "tokens": windows.numel(),
        "seconds": seconds,
        "dense": dense,
        "pruned": pruned,
        "perplexity": value,
        "gap_closed": None if pruned is None else (pruned - value) / (pruned - dense),
    }


def measure_curve(setting: Setting, results: Results, windows: torch.Tensor, rates: dict[str, float]) -> None:
    """
    Perplexity against tokens, first seed, 50 %: on the way for methods that train the whole model, in runs of their
    own for the layer-wise one, which is done with a layer before it begins the next.
    """
    student, pruned = setting.pruned("50%", SEEDS[0])
    for method, rate in rates.items():
        if method == DENSE:
            continue
        judged = {0: pruned}
        if method == LAYERWISE:
            for share in SHARES:
                part = windows[: round(share * len(windows))]
                judged[part.numel()] = setting.judge(train(setting, method, rate, student, part, SEEDS[0])[0])
        else:
            model, _ = train(setting, method, rate, student, windows, SEEDS[0], judged)
            judged[windows.numel()] = setting.judge(model)
        for tokens, value in sorted(judged.items()):
            closed = (pruned - value) / (pruned - setting.dense_perplexity)
            results.add(kind="curve", method=method, tokens=tokens, perplexity=value, gap_closed=closed)


def measure_step(setting: Setting, results: Results, windows: torch.Tensor, pairs: int) -> None:
    """One optimizer step of either kind, in turn."""
    student, _ = setting.pruned("50%", SEEDS[0])
    batch = {"input_ids": windows[:BATCH], "labels": windows[:BATCH]}
    steppers = []
    for settings in ({}, {"lmbda": 0.0}):
        trainer = end_to_end(setting, copy.deepcopy(student), windows[: 4 * BATCH], 0, learning_rate=0.0, **settings)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        steppers.append(trainer)
    teacher = copy.deepcopy(setting.dense)

    def step(trainer):
        (inputs,), items = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))
        trainer.training_step(trainer.model, inputs, items)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    @torch.no_grad()
    def baseline():
        teacher(batch["input_ids"], use_cache=False, logits_to_keep=1)
        with torch.enable_grad():
            step(steppers[1])

    ratio = paired_ratio(lambda: step(steppers[0]), baseline, pairs)
    name = "end-to-end step / cross-entropy step and a forward pass of the teacher"
    results.add(kind="step", name=name, tokens=BATCH * WINDOW, claim_at_most=1.25, **ratio)


def measure_depth(results: Results, depths: tuple[int, ...]) -> None:
    """Peak memory of `hf-mlopt distill --mode layerwise`, each in a process of its own."""
    sizes = {"hidden": 512, "intermediate": 1792, "experts": 8, "vocabulary": 2048}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = write_tokens(folder / "tokens.jsonl", 24, 64, sizes["vocabulary"])
        for layers in depths:
            dense, pruned, output = (folder / f"{name}-{layers}" for name in ("dense", "pruned", "distilled"))
            layer = write_checkpoint(dense, layers, **sizes)
            write_tokenizer(dense, sizes["vocabulary"])
            run("prune", dense, "--output", pruned, "--sparsity", 0.5, "--method", "magnitude", "--stream")
            words = ["--dataset", tokens, "--samples", 16, "--eval-samples", 8, "--sequence-length", 64]
            run("distill", pruned, "--teacher", dense, "--output", output, *words, "--epochs", 1, "--stream")
            report = json.loads((output / "distillation_report.json").read_text())
            results.add(
                kind="depth",
                layers=layers,
                layer_bytes=layer,
                model_bytes=sum(file.stat().st_size for file in dense.glob("*.safetensors")),
                peak_bytes=report["peak_memory_bytes"],
                seconds=report["seconds"],
            )


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of that many words, as `distill` needs one; the texts are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="0").save_pretrained(folder)


def run(*words) -> None:
    command = [sys.executable, "-m", "hf_mlopt", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Fewer tokens, one seed, no tuning: checks that it runs.")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=list(PARTS), help="Only these parts (default: all)."
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name = "distillation_short" if args.short else "distillation"
    results = Results(name, f"python benchmarks/distillation.py{' --short' if args.short else ''}")
    results.keep_others({kind for part in args.only for kind in PARTS[part]})
    evaluated = 50 if args.short else 200
    setting = Setting(evaluated)
    results.note(dense_perplexity=setting.dense_perplexity, window=WINDOW, batch=BATCH)
    number = (TOKENS if not args.short else 8_000) // WINDOW
    windows = training_windows(setting, SEEDS[0], number)
    rates = results.record.get("learning_rates")
    if "quality" in args.only:
        patterns, seeds = (("50%",), SEEDS[:1]) if args.short else (tuple(PATTERNS), SEEDS)
        rates = measure_quality(results, (evaluated, number), patterns, seeds, grid=not args.short)
    if "curve" in args.only:
        measure_curve(setting, results, windows, rates)
    if "step" in args.only:
        measure_step(setting, results, windows, pairs=3 if args.short else 15)
    if "depth" in args.only:
        measure_depth(results, (2, 4) if args.short else (8, 32))
    results.note(not_run=[part for part in PARTS if part not in args.only])
    draw(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


def training_windows(setting: Setting, seed: int, number: int) -> torch.Tensor:
    """Windows of wikipedia.txt, other ones than those that the seed calibrates on."""
    with tempfile.TemporaryDirectory() as folder:
        text = write_articles(Path(folder) / "wikipedia.txt")
        config = CalibrationConfig(str(text), number, WINDOW, seed=100 + seed)
        return load_calibration(config, setting.tokenizer).token_ids


if __name__ == "__main__":
    main()
