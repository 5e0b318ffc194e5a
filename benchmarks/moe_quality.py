"""The table and the plot of `train_moe.py`: what pruning costs, and what distillation wins back."""

import copy
import time

import torch
from common import Results

from hf_mlopt.evaluation import perplexity
from hf_mlopt.pruning import METHODS, MoEPruner, PruningConfig


PATTERNS = {
    "50%": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "60%": {"sparsity": 0.6},
    "40%": {"sparsity": 0.4},
    "70%": {"sparsity": 0.7},
    "4:8": {"pattern": "4:8"},
}
FIRST, BOTH = ("magnitude", "wanda", "moe-pruner"), ("50%", "2:4")
RATES, EPOCHS, BATCH = (3e-4, 1e-3, 1e-4), 2.0, 8  # of distillation; its rate is chosen on text of its own
LAYERWISE = "layer-wise"


def jobs() -> list[dict]:
    """The rows, the most wanted first."""

    def pruned(patterns, methods, scope="experts", seeds=(0,)) -> list[dict]:
        return [
            {"kind": "pruned", "scope": scope, "pattern": pattern, "method": method, "seed": seed}
            for seed in seeds
            for pattern in patterns
            for method in methods
            if METHODS[method].calibrated or seed == 0  # magnitude reads no calibration data
        ]

    distilled = [
        {"kind": "distilled", "scope": "experts", "pattern": pattern, "method": "moe-pruner", "seed": 0, "rate": rate}
        for rate in RATES
        for pattern in BOTH
    ]
    others = [method for method in METHODS if method not in FIRST]
    return [
        *pruned(BOTH, FIRST),
        *distilled,
        *pruned(BOTH, others),
        *pruned(["60%"], METHODS),
        *pruned(BOTH, METHODS, scope="all-linear"),
        *pruned(BOTH, METHODS, seeds=(1, 2)),
        *pruned(["40%", "70%", "4:8"], METHODS),
    ]


class Text:
    """
    Windows of the held-out packages: to evaluate on, to calibrate on, to distil on, and to choose a learning rate by.
    The last three share their packages and no window.
    """

    def __init__(self, tokens: dict[str, torch.Tensor], arguments):
        self.length, length = arguments.length, arguments.length
        self.evaluation = tokens["evaluation"].long()[: arguments.windows * length]
        windows = tokens["calibration"].long()
        windows = windows[: len(windows) // length * length].view(-1, length)
        for_rates = max(1, min(arguments.windows // 4, len(windows) // 8))
        self.for_rates, rest = windows[:for_rates], windows[for_rates:]
        self.samples, self.windows, self.rest = arguments.samples, arguments.windows, rest

    def calibration(self, seed: int) -> torch.Tensor:
        return self._chosen(self.samples, seed)

    def distilled_on(self, seed: int) -> torch.Tensor:
        return self._chosen(self.windows, seed)

    def _chosen(self, number: int, seed: int) -> torch.Tensor:
        return self.rest[torch.randperm(len(self.rest), generator=torch.Generator().manual_seed(seed))[:number]]


def measure_quality(model, tokens: dict[str, torch.Tensor], results: Results, arguments) -> None:
    """Adds the rows that are not there yet, until the time is over."""
    begun, text = time.perf_counter(), Text(tokens, arguments)
    if "dense_perplexity" not in results.record:
        dense = judge(model, text.evaluation, text)
        results.note(dense_perplexity=dense.perplexity, dense_stderr=dense.stderr, evaluation_tokens=dense.tokens)
    done = results.record["rows"]
    waiting = [job for job in jobs() if not any(job.items() <= row.items() for row in done)]
    for number, job in enumerate(waiting):
        alike = [row["row_seconds"] for row in done if row["kind"] == job["kind"]]
        late = time.perf_counter() - begun + max(alike, default=0) > 60 * arguments.minutes
        if late or number == arguments.rows:
            print(f"{len(waiting) - number} rows are left: give the same command again")
            return
        started = time.perf_counter()
        found = (distil if job["kind"] == "distilled" else prune)(model, text, job, results.record)
        results.add(**job, **found, row_seconds=time.perf_counter() - started)
    print("nothing is left")


def judge(model, token_ids: torch.Tensor, text: Text):
    return perplexity(model, token_ids, text.length, 8)


def pruned_copy(model, text: Text, job: dict):
    config = PruningConfig(method=job["method"], scope=job["scope"], **PATTERNS[job["pattern"]])
    pruned = copy.deepcopy(model)
    return pruned, MoEPruner(config).prune(pruned, text.calibration(job["seed"]), progress=False)


def prune(model, text: Text, job: dict, record: dict) -> dict:
    pruned, report = pruned_copy(model, text, job)
    found = judge(pruned, text.evaluation, text)
    return {
        "perplexity": found.perplexity,
        "stderr": found.stderr,
        "sparsity": report.sparsity,
        "sparsity_of_model": report.totals["sparsity_of_model"],
        "layers_with_uncovered_experts": sum(bool(layer.uncovered) for layer in report.layers),
        "seconds": report.seconds,
        "peak_bytes": report.peak_memory_bytes,
    }


def distil(model, text: Text, job: dict, record: dict) -> dict:
    from hf_mlopt.distillation.config import LayerwiseConfig
    from hf_mlopt.distillation.layerwise import distill_layerwise

    student, _ = pruned_copy(model, text, job)
    before, dense = judge(student, text.evaluation, text).perplexity, record["dense_perplexity"]
    config = LayerwiseConfig(epochs=EPOCHS, learning_rate=job["rate"], batch_size=BATCH)
    report = distill_layerwise(student, model, text.distilled_on(job["seed"]), config, progress=False)
    found = judge(student, text.evaluation, text)
    return {
        "method_of_distillation": LAYERWISE,
        "tuning_perplexity": judge(student, text.for_rates.flatten(), text).perplexity,
        "pruned": before,
        "perplexity": found.perplexity,
        "stderr": found.stderr,
        "gap_closed": (before - found.perplexity) / (before - dense),
        "tokens": report.tokens,
        "steps_per_layer": report.steps,
        "mask_violations": report.mask_violations,
        "layers_left_as_they_were": sum(not layer.kept for layer in report.layers),
        "seconds": report.seconds,
        "seconds_per_layer": report.seconds / len(report.layers),
        "peak_bytes": report.peak_memory_bytes,
    }


def chosen_rates(rows: list[dict]) -> list[dict]:
    """Of the distilled rows, those whose learning rate did best on the text that it is chosen by."""
    best = {}
    for row in rows:
        if row["kind"] == "distilled":
            other = best.setdefault(row["pattern"], row)
            best[row["pattern"]] = min(other, row, key=lambda row: row["tuning_perplexity"])
    return list(best.values())


def plot(record: dict, arguments) -> None:
    """The training, and perplexity by pattern, a mark a seed, a panel a scope."""
    from matplotlib.figure import Figure

    from hf_mlopt.demo.plot import STYLES

    rows = [row for row in record["rows"] if row["kind"] == "pruned"]
    scopes = list(dict.fromkeys(row["scope"] for row in rows))
    figure = Figure(figsize=(5 * (1 + len(scopes)), 4.5), layout="constrained")
    first, *panels = figure.subplots(1, 1 + len(scopes), squeeze=False)[0]
    points = [(row["tokens"] / 1e6, row["ce"]) for row in record["training"]["curve"]]
    first.plot(*zip(*points, strict=True), color="black")
    first.set(
        title=f"training, {record['parameters'] / 1e6:.0f} M parameters",
        xlabel="million tokens",
        ylabel="cross-entropy (nats per token)",
    )
    for axes, scope in zip(panels, scopes, strict=True):
        here = [row for row in rows if row["scope"] == scope]
        patterns = [pattern for pattern in PATTERNS if any(row["pattern"] == pattern for row in here)]
        for offset, (method, (colour, marker)) in enumerate(STYLES.items()):
            found = [row for row in here if row["method"] == method]
            if found:
                x = [patterns.index(row["pattern"]) + 0.1 * (offset - 3) for row in found]
                y = [row["perplexity"] for row in found]
                axes.plot(x, y, linestyle="", color=colour, marker=marker, label=method)
        distilled = [row for row in chosen_rates(record["rows"]) if row["scope"] == scope]
        if distilled:
            x = [patterns.index(row["pattern"]) + 0.3 for row in distilled]
            y = [row["perplexity"] for row in distilled]
            axes.plot(x, y, linestyle="", color="black", marker="*", label=f"moe-pruner, then {LAYERWISE}")
        axes.axhline(record["dense_perplexity"], color="black", linestyle="--", linewidth=1, label="dense")
        axes.set_xticks(range(len(patterns)), patterns)
        axes.set(title=f"scope {scope}", ylabel="perplexity, packages that were held out", yscale="log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.legend(frameon=False, fontsize=8)
    for axes in (first, *panels):
        axes.spines[["top", "right"]].set_visible(False)
    for folder in filter(None, (arguments.folder, arguments.out)):
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "train_moe.png", dpi=130)
        print(f"written to {folder / 'train_moe.png'}")
