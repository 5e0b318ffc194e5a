"""The formulas of docs/scaling.md at the size of the largest runs of benchmarks/results/*.json, beside those runs."""

from collections.abc import Iterator

from scaling_shapes import RESULTS, SIZES, distillation_seconds, matrix_rate, moe, one, rows

from hf_mlopt.communication.pays import bytes_sent
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.planning.costs import Run
from hf_mlopt.planning.layerwise_memory import Layerwise, layerwise_host, layerwise_peak
from hf_mlopt.planning.memory import streamed_peak
from hf_mlopt.pruning.config import PruningConfig


Check = tuple[str, str, float, float, str]  # method, what, formula, measured, row and file


def all_checks() -> Iterator[Check]:
    """In the order of the page."""
    yield from _moe_pruner()
    yield from _optimizers()
    yield from _communication()
    yield from _pipeline()
    yield from _federated()
    yield from _vertical()


def _moe_pruner() -> Iterator[Check]:
    found = one("pruning_scale", kind="depth", layers=32)
    shape = moe(32, 1024, 3584, 8, 2, 8, 2, 2048, dtype="F32")[1]
    run = Run(PruningConfig(sparsity=0.5, batch_size=4), 32, 64, True)
    planned = streamed_peak(shape, run, found["states_bytes"]).total
    where = "depth, 32 layers, 11.6 GB; `pruning_scale`"
    yield "MoE-Pruner", "memory on a CPU, GB", planned / 1e9, found["peak_bytes"] / 1e9, where
    found = one("pruning_gpu", kind="sweep", where="disk")
    shape = moe(found["layers"], *SIZES["8x7B"][1:])[1]
    run = Run(PruningConfig(sparsity=0.5), 128, 2048, True)
    planned = streamed_peak(shape, run, found["states_bytes"], accelerator=True).total
    where = "sweep from disk, layers of 8x7B; `pruning_gpu`"
    yield "MoE-Pruner", "memory on an H200, GB", planned / 1e9, found["peak_bytes"] / 1e9, where
    seconds = one("pruning_gpu", kind="ratio")["flops"] / matrix_rate()
    found = one("pruning_gpu", kind="part", where="memory", part="compute")["seconds_median"]
    yield "MoE-Pruner", "a layer on an H200, s", seconds, found, "part compute, in memory; `pruning_gpu`"
    where = "pass distillation, 6.1 B weights; `distillation_gpu`"
    yield "expert-wise distillation", "a step on an H200, s", *distillation_seconds(), where
    found = one("distillation", kind="depth", layers=32)
    shape, run = moe(32, 512, 1792, 8, 2, 4, 1, 2048, dtype="F32")[1], Layerwise(24, 64, 8)
    parts = {**layerwise_host(shape, shape, run), **layerwise_peak(shape, shape, run, accelerator=False).parts}
    planned = sum(size for part, size in parts.items() if part != "a layer on its way")
    where = "depth, 32 layers, 2.9 GB; `distillation`"
    yield "expert-wise distillation", "layer-wise memory, GB", planned / 1e9, found["peak_bytes"] / 1e9, where


def _optimizers() -> Iterator[Check]:
    for file, device in (("optimizers", "one thread"), ("optimizers_gpu", "an H200")):
        found = one(file, kind="step", name="RSGDm", size="100M", threads=1, baseline="SGDm, foreach")
        triad = one(file, kind="bandwidth", threads=1, elements=found["parameters"])["triad"]
        measured = found["ratio_median"] * found["baseline_seconds"]
        where = f"step, RSGDm, 100M; `{file}`"
        yield "RSGDm", f"a step on {device}, ms", 28e3 * found["parameters"] / triad, 1e3 * measured, where
    found = one("optimizers", kind="traffic", variant="domo")
    yield "DOMO", "a round, bytes", 4 * found["parameters"], found["bytes_per_round"], "traffic, domo; `optimizers`"


def _communication() -> Iterator[Check]:
    found = one("communication", kind="crossover", ranks=4, codec="bingrad-b")
    coded = found["coded"]
    exempt = one("communication", kind="link", ranks=4)["parameters"] - coded
    for name in ("orq-9", "bingrad-b"):
        formula = bytes_sent(codec(name), codec(name), coded, 4, False) + 2 * 3 / 4 * 4 * exempt
        link = one("communication", kind="link", ranks=4, codec=name, bandwidth=1e8)
        where = f"link, 4 ranks, {name}, 100 Mbit/s; `communication`"
        yield "ORQ, BinGrad", "a step, MB on the wire", formula / 1e6, link["bytes_on_wire_per_step"] / 1e6, where
    seconds = formula / 12.5e6 + coded / found["codec_rate"] + found["backward_seconds"]
    yield "ORQ, BinGrad", "that step, s", seconds, link["step_seconds_median"], "the same row"
    where = "crossover, 4 ranks, bingrad-b; `communication`"
    yield "ORQ, BinGrad", "pays below, Mbit/s", found["predicted"] / 1e6, found["measured"] / 1e6, where
    plain, averaged, fp32, bf16 = (
        one("communication", kind="quality", task="LM", mode=mode)["bytes_per_step"]
        for mode in ("bingrad-b / step-ahead", "bingrad-b / step-ahead, averaged", "fp32", "bf16")
    )
    coded = (fp32 - bf16) / 3  # gradients of which bf16 saves two bytes, one and a half times among four ranks
    where = "quality, bingrad-b, averaged, 4 ranks; `communication`"
    yield "SAEF", "averages every 20, bytes a step", 2 * 3 / 4 * 2 * coded / 20, averaged - plain, where


def _pipeline() -> Iterator[Check]:
    fast = one("pipeline", kind="speed", label="dsp, recompute=no")
    far = max((row for row in rows("pipeline") if row["kind"] == "speed"), key=lambda row: row["of_model"])
    for row in (fast, far):
        where = f"speed, {row['label']}, 4 stages; `pipeline`"
        yield "DSP", "a batch, forwards", row["model_of_F"], row["of_F"], where
    held = one("pipeline", kind="memory", mode="dsp", recompute="no", stage=0)
    where = "memory, dsp, graphs kept, stage 0 of 4; `pipeline`"
    yield "DSP", "held, MB", held["model_held_bytes"] / 1e6, held["held_bytes"] / 1e6, where


def _federated() -> Iterator[Check]:
    found = one("federated", kind="quality", task="CIFAR-10 subset, label-sorted", method="FedAvg")
    theta = 4 * (274_394 + 1_568) + 8 * 21  # weights, statistics and counts of the ResNet of 20 layers
    where = "quality, CIFAR-10, FedAvg, 10 sites, 30 rounds; `federated`"
    yield "FedAvg", "bytes of all rounds, MB", 2 * 10 * 30 * theta / 1e6, found["megabytes"], where
    scale = sorted((row for row in rows("federated") if row["kind"] == "scale"), key=lambda row: row["sites"])
    growth = scale[-1]["peak_gigabytes"] / scale[0]["peak_gigabytes"]
    where = f"scale, {scale[0]['sites']} and {scale[-1]['sites']} sites; `federated`"
    yield "FedAvg", "memory, over that of the fewest sites", 1, growth, where


def _vertical() -> Iterator[Check]:
    files = [name for name in ("vertical", "vertical_short") if (RESULTS / f"{name}.json").is_file()]
    file = next(name for name in files if {"wire", "sparse"} <= {row["kind"] for row in rows(name)})
    found = max((row for row in rows(file) if row["kind"] == "wire"), key=lambda row: (row["parties"], row["tls"]))
    batches = -(-found["rows"] // 1024)
    formula = 8 * found["rows"] / batches * (found["parties"] - 1)
    where = f"wire, {found['parties']} parties, {found['rows']:,} rows; `{file}`"
    yield "AFSGD-VP", "an update, bytes", formula, found["payload_bytes_per_update"], where
    found = next((row for row in rows(file) if row["kind"] == "processes"), None)
    if found is not None:
        q = found["parties"]
        where = f"processes, {found['data']}, {q} parties, one at a third; `{file}`"
        yield "AFSAGA-VP", "speed over in step", (q - 1 + 1 / 3) / (q / 3), found["speed_up"], where
    found = one(file, kind="sparse")
    formula = 12 * found["nonzeros"] + 12 * found["rows"] + 8 * found["columns"]
    where = f"sparse, {found['rows']:,} × {found['columns']:,}; `{file}`"
    yield "AFSAGA-VP", "memory of a block, MB", formula / 1e6, found["megabytes"], where
