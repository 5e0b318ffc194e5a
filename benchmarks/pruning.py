"""
Costs and quality of pruning on the reference model.

    python benchmarks/pruning.py            # about 25 minutes on 2 cores
    python benchmarks/pruning.py --short    # under 4 minutes

Costs, with 64 x 256 calibration tokens, as ratios taken in pairs: observation against the plain forward pass (at most
1.10), the whole sweep against plain calibration passes (at most 2.6), row selection against a full sort.
Quality: every method x {40, 50, 60, 70 %, 2:4, 4:8} x three calibration seeds x both scopes, calibrated on
wikipedia.txt, perplexity on wikitext2-test.txt. The reference model is small and has no outlier features: the
table says what is there and does not decide which method is best.
"""

import argparse
import copy
import re
import statistics
import tempfile
from pathlib import Path

import torch
from common import SHARED, Results, paired_ratio
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_mlopt.data import CalibrationConfig, load_calibration, load_text, tokenize_corpus
from hf_mlopt.demo.plot import STYLES
from hf_mlopt.evaluation import perplexity
from hf_mlopt.moe import moe_layers, observe
from hf_mlopt.pruning import METHODS, MoEPruner, PruningConfig
from hf_mlopt.pruning.moments import ExpertMoments
from hf_mlopt.pruning.patterns import smallest_per_row


# Costs on 64 x 256 tokens; quality on as many, in windows of the length the reference model was trained on.
COST_SHAPE, QUALITY_SHAPE = (64, 256), (128, 128)
WINDOW = QUALITY_SHAPE[1]
PATTERNS = (
    {"sparsity": 0.4},
    {"sparsity": 0.5},
    {"sparsity": 0.6},
    {"sparsity": 0.7},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
)
SEEDS = (0, 1, 2)
SCOPES = ("experts", "all-linear")
REFERENCE = SHARED / "models" / "mixtral-8x-wiki"


def write_articles(path: Path) -> Path:
    """The text of wikipedia.txt without its tags."""
    text = (SHARED / "text" / "wikipedia.txt").read_text(encoding="utf-8")
    path.write_text(re.sub(r"</?doc[^>]*>", "", text), encoding="utf-8")
    return path


def load_reference():
    """The reference model, calibration windows for costs and, per seed, for quality, and the evaluation tokens."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain = write_articles(Path(folder) / "wikipedia.txt")
        cost = load_calibration(CalibrationConfig(str(plain), *COST_SHAPE), tokenizer).token_ids
        calibration = {
            seed: load_calibration(CalibrationConfig(str(plain), *QUALITY_SHAPE, seed), tokenizer).token_ids
            for seed in SEEDS
        }
    documents, _ = load_text(str(SHARED / "text" / "wikitext2-test.txt"))
    return model, cost, calibration, tokenize_corpus(documents, tokenizer)


def measure_costs(model, token_ids, results: Results, pairs: int) -> None:
    """Observation, sweep and selection, each against its plain counterpart."""
    batches = token_ids.split(8)

    @torch.no_grad()
    def plain():
        for batch in batches:
            model(batch)

    @torch.no_grad()
    def observed():
        moments = {
            layer.index: ExpertMoments(
                layer.num_experts,
                {source: layer.input_size(source) for source in ("hidden", "intermediate")},
                gate_power=1.0,
            )
            for layer in moe_layers(model)
        }
        with observe(model, lambda layer, routed: moments[layer.index].update(layer, routed)):
            plain()

    # Time does not depend on how many zeros the weights hold already, so one copy serves all repetitions.
    pruned = copy.deepcopy(model)

    def sweep():
        MoEPruner(PruningConfig(sparsity=0.5)).prune(pruned, token_ids, progress=False)

    scores = torch.rand(4096, 4096)
    comparisons = {
        "observation / plain forward": (observed, plain, 1.10),
        "sweep moe-pruner 50% / plain calibration pass": (sweep, plain, 2.6),
        "row selection / full sort, 4096 x 4096": (
            lambda: smallest_per_row(scores, 2048),
            lambda: torch.sort(scores, dim=-1),
            None,
        ),
    }
    for name, (function, baseline, claim) in comparisons.items():
        results.add(kind="cost", name=name, claim_at_most=claim, **paired_ratio(function, baseline, pairs))


def measure_quality(model, calibration, held_out, results: Results, patterns, seeds, scopes) -> None:
    """Perplexity of every variant; the dense model first."""
    dense = perplexity(model, held_out, WINDOW)
    results.note(
        dense_perplexity=dense.perplexity, evaluation_tokens=dense.tokens, window=WINDOW, calibration=QUALITY_SHAPE
    )
    for scope in scopes:
        for pattern in patterns:
            for method, spec in METHODS.items():
                for seed in seeds if spec.calibrated else seeds[:1]:  # magnitude reads no calibration data
                    config = PruningConfig(method=method, scope=scope, **pattern)
                    pruned = copy.deepcopy(model)
                    report = MoEPruner(config).prune(pruned, calibration[seed], progress=False)
                    results.add(
                        kind="quality",
                        scope=scope,
                        pattern=config.label,
                        method=method,
                        seed=seed,
                        perplexity=perplexity(pruned, held_out, WINDOW).perplexity,
                        sparsity=report.sparsity,
                        sparsity_of_model=report.totals["sparsity_of_model"],
                        seconds=report.seconds,
                    )


def plot(results: Results) -> None:
    """Perplexity against sparsity, a panel a scope, a line a method; error bars span the seeds."""
    quality = [row for row in results.record["rows"] if row["kind"] == "quality"]
    scopes = list(dict.fromkeys(row["scope"] for row in quality))
    figure = Figure(figsize=(5.5 * len(scopes), 4.5), layout="constrained")
    for axes, scope in zip(figure.subplots(1, len(scopes), squeeze=False)[0], scopes, strict=True):
        labels = list(dict.fromkeys(row["pattern"] for row in quality if row["scope"] == scope))
        for offset, method in enumerate(METHODS):
            middle, below, above = [], [], []
            for label in labels:
                key = (scope, label, method)
                cell = [row["perplexity"] for row in quality if (row["scope"], row["pattern"], row["method"]) == key]
                middle.append(statistics.median(cell))
                below.append(middle[-1] - min(cell))
                above.append(max(cell) - middle[-1])
            colour, marker = STYLES[method]
            place = [index + 0.1 * (offset - 2.5) for index in range(len(labels))]
            axes.errorbar(
                place, middle, (below, above), color=colour, marker=marker, linestyle="", label=method, capsize=2
            )
        axes.axhline(results.record["dense_perplexity"], color="black", linestyle="--", linewidth=1, label="dense")
        axes.set_xticks(range(len(labels)), labels)
        axes.set(title=f"scope {scope}", ylabel="perplexity, WikiText-2 test", yscale="log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(results.path.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="One seed, experts only, 50 %% and 2:4.")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"the reference model and texts are not at {SHARED}: nothing to measure")
    logging.disable_progress_bar()
    model, cost, calibration, held_out = load_reference()
    if arguments.short:
        results = Results("pruning_short", "python benchmarks/pruning.py --short")
        patterns, seeds, scopes, windows, pairs = PATTERNS[1:5:3], SEEDS[:1], SCOPES[:1], 200, 7
        results.note(not_run="40, 60, 70 %, 4:8; seeds 1 and 2; scope all-linear")
    else:
        results = Results("pruning", "python benchmarks/pruning.py")
        patterns, seeds, scopes, windows, pairs = PATTERNS, SEEDS, SCOPES, 800, 15
    measure_costs(model, cost, results, pairs)
    measure_quality(model, calibration, held_out[: windows * WINDOW], results, patterns, seeds, scopes)
    plot(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
