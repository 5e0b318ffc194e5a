"""
Makes the tables of docs/scaling.md: what every method would take at sizes that were not run here.

    python benchmarks/scaling_tables.py    # some seconds

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is not touched. Formulas are those of the
package where it has them, rates those of benchmarks/results/*.json.
"""

import re
from pathlib import Path

from scaling_checks import all_checks
from scaling_shapes import HALF, SIZES, distillation_seconds, matrix_rate, model, one, window_flops

from hf_mlopt.communication.pays import bf16_bytes, bytes_sent, decide
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.pipeline.event_model import memory, time_per_batch
from hf_mlopt.planning import planned_layout
from hf_mlopt.planning.costs import Run, count_costs
from hf_mlopt.planning.layerwise_memory import Layerwise, layerwise_host, layerwise_peak
from hf_mlopt.planning.layout import packed_bytes
from hf_mlopt.planning.memory import streamed_peak
from hf_mlopt.planning.training_memory import Training, end_to_end_peak, trained_weights, weights_of
from hf_mlopt.pruning.config import PruningConfig
from hf_mlopt.vertical.budget import automatic_budget
from hf_mlopt.vertical.messages import HEADER_BYTES


PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
RANKS, SITES, PARTIES = (8, 64, 256, 1024), (10, 100, 1000, 10_000), (2, 4, 8, 16, 32, 64)
LINKS = {"1 Gbit/s": 0.125e9, "10 Gbit/s": 1.25e9, "400 Gbit/s": 50e9}  # bytes a second
BLOCK, BUCKET = 2048, 6_553_600  # gradients that share levels; in a bucket of DDP, 25 MiB
ROWS, COLUMNS, BATCH = 100_000, 330, 1024  # vertical
ROUND_TRIP, WIDE_LINK = 0.05, 12.5e6  # seconds; bytes a second


def table(header: str, lines: list[list]) -> str:
    names = [name.strip() for name in header.split("|")]
    cells = [names, ["---", *["---:"] * (len(names) - 1)], *([shown(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def shown(value: str | float) -> str:
    """A number with three digits, thousands parted; text as it is."""
    if isinstance(value, str):
        return value
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if abs(value) >= 100 else f"{float(digits):g}"


def models() -> str:
    lines = []
    for name in SIZES:
        shape = model(name)[1]
        weights = weights_of(shape)
        experts = sum(matrix.numel for layer in shape.layers for matrix in layer.experts)
        active = weights - experts * (1 - shape.top_k / shape.num_experts)
        layer = sum(info.nbytes for info in shape.layers[0].tensors.values())
        built = f"{len(shape.layers)}, with {shape.num_experts} experts, top-{shape.top_k}"
        lines.append([name, built, weights / 1e9, active / 1e9, 2 * weights / 1e9, layer / 1e9])
        lines[-1].append(window_flops(shape) / 1e12)
    return table("model | layers | N, 10⁹ | active, 10⁹ | bf16, GB | a layer, GB | a window, TFLOP", lines)


def pruning() -> str:
    beyond = one("pruning_gpu", kind="ratio")["ratio_median"]
    layer = one("pruning_gpu", kind="sweep", where="disk")["layer_bytes"]
    load, write = (one("pruning_gpu", part=part, where="disk")["seconds_median"] for part in ("load", "write"))
    lines = []
    for name in SIZES:
        source, shape = model(name)
        run, output = Run(HALF, 128, 2048, True), planned_layout(shape, source.layout)
        costs = count_costs(shape, run, source.layout, output)
        small = Run(PruningConfig(sparsity=0.5, batch_size=1), 128, 2048, True, offloaded=True)
        peaks = [streamed_peak(shape, one_run, costs.state_bytes).total / 1e9 for one_run in (run, small)]
        on_gpu = streamed_peak(shape, run, costs.state_bytes, accelerator=True).total / 1e9
        computing = beyond * costs.forward_flops / matrix_rate()
        disk = (costs.read_bytes * load + costs.written_bytes * write) / layer
        pruned = {matrix.name for one_layer in shape.layers for matrix in one_layer.experts}
        packed = packed_bytes(output, pruned, 0.5) / 1e9
        moved = [costs.read_bytes / 1e9, costs.written_bytes / 1e9, costs.forward_flops / 1e15]
        lines.append([name, *peaks, on_gpu, *moved, computing, disk, packed])
    header = (
        "model | CPU, GB | batch 1, states on disk | GPU, GB | read, GB | written, GB | PFLOP | computing, s | disk, s"
    )
    return table(f"{header} | packed, GB", lines)


def distillation() -> str:
    at_rate, measured = distillation_seconds()
    lines = []
    for name in SIZES:
        shape, run = model(name)[1], Layerwise(1016, 2048, 8)
        weights = weights_of(shape)
        host = sum(layerwise_host(shape, shape, run).values())
        lines.append([name, layerwise_peak(shape, shape, run).total / 1e9, host / 1e9])
        for n in RANKS:
            shared = {"batch_size": 1, "length": 2048, "bf16": True, "checkpointing": True, "sharded": True}
            ways = [Training(**shared, processes=n, lora_rank=rank) for rank in (None, 16)]
            lines[-1].append(" / ".join(f"{end_to_end_peak(shape, 2 * weights, way).total / 1e9:.0f}" for way in ways))
        computing = 5 * window_flops(shape) / matrix_rate() * measured / at_rate
        lines[-1] += [computing, 8 * weights / 1e9, 8 * weights / LINKS["400 Gbit/s"]]
    header = "model | one GPU, GB | its host, GB | FSDP2: 8 GPUs | 64 | 256 | 1,024 | a step, s | received, GB"
    return table(f"{header} | at 400 Gbit/s, s", lines)


def optimizers() -> str:
    kinds = {"SGDm": (12, 20), "RSGD": (12, 20), "RSGDm": (16, 28), "AdamW": (16, 28), "RSGD-AdamW": (20, 36)}
    lines = []
    for name, (held, moved) in {**kinds, "DOMO": (20, 20)}.items():
        lines.append([name, held, moved, *(held * weights_of(model(size)[1]) / 1e9 for size in SIZES)])
    sizes = " | ".join(f"{name}, GB" for name in SIZES)
    return table(f"optimizer | held, bytes a weight | moved in a step, bytes a weight | {sizes}", lines)


def domo() -> str:
    lines = []
    for n in RANKS:
        whole = 2 * (n - 1) / n * 4 * 1e9
        lines.append(
            [f"{n:,}", whole / 1e9, *(whole / link / 100 for link in LINKS.values()), bf16_bytes(1e9, n) / 1e9]
        )
    return table(f"ranks | a round, GB | {', s | '.join(LINKS)}, s | DDP in bf16, GB a step", lines)


def codecs() -> str:
    binary, lines = codec("bingrad-b"), []
    for n in RANKS:
        sent = [bytes_sent(used, used, 10**9, n, False) / 1e9 for used in (codec("orq-9"), binary)]
        sent.append(bytes_sent(binary, binary, BUCKET, n, False) / BUCKET)
        message = binary.wire_bytes(-(-BUCKET // (BLOCK * n)) * BLOCK)
        crossover = decide(binary, 10**9, n, bandwidth=1.0, codec_rate=codec_rate(binary.name, n)).crossover
        averages = bf16_bytes(1, n) / 20
        lines.append([f"{n:,}", bf16_bytes(1, n), *sent, averages, f"{2 * (n - 1):,}", message, crossover / 1e9])
    header = "ranks | bf16 | orq-9 | bingrad-b | the same in 25-MiB buckets | averages of SAEF, p = 20"
    return table(f"{header} | messages a bucket | bytes of one | bingrad-b pays below, GB/s", lines)


def codec_rate(name: str, n: int) -> float:
    """Gradients a second of an H200 through all that a rank codes, with error feedback, as `pays.measure` counts."""
    found = one("communication_gpu", kind="codec", codec=name)
    encode, decode = 1 / found["encode_per_second"], 1 / found["decode_per_second"]
    return 1 / (encode * (1 + 1 / n) + 3 * decode)


def sharded() -> str:
    per = codec("bingrad-b").wire_bytes(1 << 20) / (1 << 20)
    lines = []
    for name in SIZES:
        weights = weights_of(model(name)[1]) / 1e9
        lines.append([name, *(count * weights for count in (4, 2, per)), (4 + per) / 6, 4 * weights])
    header = "model | weights, GB a step | gradients in bf16 | in bingrad-b | all, over that of bf16"
    return table(f"{header} | error feedback, GB a rank", lines)


def pipeline() -> str:
    weights, boundary = 4 * weights_of(model("8x7B")[1]), 4 * 2048 * 4096
    kinds = [("gpipe", 8, False), ("1f1b", 8, False), ("1f1b", 32, False), ("lag1", 0, True), ("dsp", 0, True)]
    lines = []
    for mode, micro, repeats in [*kinds, ("dsp", 0, False)]:
        how = f"{micro} batches an update" if micro else "repeated forwards" if repeats else "graphs kept"
        lines.append([f"`{mode}`, {how}"])
        given = {"micro_batches": micro or 8}
        for stages in (8, 16, 32):
            again = [1.0] * (stages - 1) + [0.0] if repeats else None
            times = [1.0] * stages, [2.0] * stages
            lines[-1].append(time_per_batch(mode, *times, recompute=again, num_batches=256, **given))
        for stages in (8, 16, 32):
            size = {"weights": weights / stages, "boundary_in": boundary, "boundary_out": boundary, "graph": 0}
            lines[-1].append(memory(mode, 1, stages=stages, recompute=repeats, **size, **given) / 1e9)
    return table("mode | 8 stages, F | 16 | 32 | 8x7B in 8 stages, GB | 16 | 32", lines)


def federated() -> str:
    adapters = 4 * trained_weights(model("8x7B")[1], Training(1, 1, lora_rank=16))
    kinds = {"ResNet, 78 thousand weights": 316_336, "U-Net, 1.6 million": 6_499_376, "GPT-2, 10 million": 4e7}
    lines = []
    for name, theta in {**kinds, "LoRA of rank 16 on 8x7B": adapters}.items():
        whole = [2 * sites * theta for sites in SITES]
        lines.append([name, theta / 1e6, *(count / 1e9 for count in whole), whole[-1] / LINKS["10 Gbit/s"]])
    sites = " | ".join(f"{count:,}" for count in SITES[1:])
    return table(f"what travels | θ, MB | {SITES[0]} sites, GB a round | {sites} | the last at 10 Gbit/s, s", lines)


def vertical() -> str:
    lines, batches = [], -(-ROWS // BATCH)
    for q in PARTIES:
        answers = 8 * ROWS * (q - 1)  # of one party in an epoch of all, and what one asks for
        update = (q - 1) * (8 * BATCH + 2 * HEADER_BYTES)
        seconds = [max(batches * ROUND_TRIP / flying, answers / WIDE_LINK) for flying in (1, 8)]
        budget = automatic_budget(ROWS, COLUMNS - COLUMNS // q)
        traffic = [update / 1e3, q * answers / 1e6, 2 * answers / 1e6]
        lines.append([str(q), f"{q * (q - 1) // 2:,}", *traffic, *seconds, budget])
    header = "parties | connections | an update, kB | an epoch of all, MB | with shared sums, MB"
    return table(f"{header} | an epoch, s | with 8 in flight, s | epochs allowed", lines)


def checks() -> str:
    lines = [
        [*words, formula, measured, formula / measured, where] for *words, formula, measured, where in all_checks()
    ]
    return table("method | what | formula | measured | formula / measured | row; file", lines)


BLOCKS = (models, pruning, distillation, optimizers, domo, codecs, sharded, pipeline, federated, vertical, checks)


def render(text: str) -> str:
    """The page with its tables made anew."""
    for block in BLOCKS:
        place = re.compile(rf"(<!-- {block.__name__} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{PAGE.name}: has no place for the table {block.__name__!r}")
        made = block()
        text = place.sub(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
