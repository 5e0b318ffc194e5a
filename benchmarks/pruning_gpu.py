"""
Seconds per decoder layer of each part of pruning on one GPU, for a model of Mixtral-8x7B's shape.

    python benchmarks/pruning_gpu.py    # planned for under 8 minutes on an H100; 50 GB of disk and of host memory

Recorded on an H200 with 8 layers in memory and 3 on disk (--in-memory-layers 8 --disk-layers 3), in 67 s.

memory      layers on the device: the sweep itself, timed between what it asks of its source and its layer calls
              observe    the forward pass over all calibration data, with the second moments of every expert
              select     scores, masks and zeros of all matrices of the layer
              propagate  the forward pass of the pruned layer, which gives the input of the next
              compute    the three together
            beside it `forward`, the same layer over the same data with nobody watching, and the rate of a large
            bfloat16 matrix product; the claim is that compute takes at most twice what the operations of two forward
            passes take at that rate
operations  what Python calls for one layer (`operations_called`), and launches of kernels. For 8 and 16 small experts
            the calls are the same. In full width, weights are scored in `pieces` that bound memory: their number
            follows the bytes
disk        layers from and to safetensors files: load (file to host to device; the next layer is read ahead into the
            system's cache during compute, only the first comes from the disk), write (device to host to the system's
            cache) and sync (from there to the disk; `hf-mlopt prune` does it during the next layer)

Weights and tokens are random. If fewer layers fit than are asked for, as many are taken, and the row says so. The last
layer of a sweep is run once, as nobody needs its output, and is not timed. Needs torch, transformers and what they
bring; no data, no network.
"""

import argparse
import operator
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import Results
from timed_sweep import WatchedLayers, now, timed_sweep
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from hf_mlopt.hub.shards import ShardReader, ShardWriter
from hf_mlopt.moe import decoder_layers, moe_layers
from hf_mlopt.pruning import PruningConfig
from hf_mlopt.pruning.apply import chunks
from hf_mlopt.pruning.pruner import peak_memory
from hf_mlopt.pruning.states import LayerCalls, States, embed
from hf_mlopt.pruning.sweep import InMemory, sweep
from hf_mlopt.pruning.targets import expert_targets
from hf_mlopt.streaming.layers import StreamedLayers
from hf_mlopt.streaming.skeleton import load_skeleton, output_layout


CONFIG = PruningConfig(sparsity=0.5)
# Sixteen such experts are scored in one piece, on a CPU too.
SMALL = {"hidden": 128, "intermediate": 128, "heads": 4, "kv_heads": 2}


def shape(arguments, layers: int) -> MixtralConfig:
    """The configuration of the model asked for, with this many layers."""
    return MixtralConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
        max_position_embeddings=max(4096, arguments.length),
        dtype="bfloat16",
    )


def make_model(config: MixtralConfig, device: torch.device) -> MixtralForCausalLM:
    """Random bfloat16 weights, on the device from the start."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_batches(arguments) -> tuple[torch.Tensor, ...]:
    """Random token ids, `[batch, length]` each."""
    torch.manual_seed(1)
    return torch.randint(arguments.vocabulary, (arguments.samples, arguments.length)).split(arguments.batch_size)


def forward_flops(config: MixtralConfig, samples: int, length: int) -> float:
    """Multiplications and additions of one layer's forward pass. Attention is causal, so half of it is counted."""
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    projections = hidden * (2 * hidden + 2 * config.num_key_value_heads * head)  # query, output; key, value
    attention = length * hidden  # two products over the length, of which half is masked
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    return 2.0 * samples * length * (projections + attention + hidden * config.num_local_experts + experts)


def layer_bytes(arguments) -> int:
    """Bytes of the weights of one decoder layer."""
    model = make_model(shape(arguments, 1), torch.device("meta"))
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


def spread(values: list[float], name: str) -> dict[str, float]:
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def measure_matrix_rate(arguments, results: Results, device: torch.device) -> float:
    """Operations a second of a large product in bfloat16: median of ten blocks of twenty."""
    size = arguments.matrix
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(11):
        begun = now(device)
        for _ in range(20):
            left @ right
        rates.append(20 * 2 * size**3 / (now(device) - begun))
    results.add(kind="matrix rate", size=size, **spread(rates[1:], "flops_per_second"))  # the first block warms up
    return statistics.median(rates[1:])


def add_parts(results: Results, where: str, seconds: dict, names: tuple[str, ...]) -> None:
    for name in names:
        results.add(
            kind="part", where=where, part=name, layers_timed=len(seconds[name]), **spread(seconds[name], "seconds")
        )


def facts(arguments, layers: int, asked: int, reports: list, device: torch.device) -> dict:
    """What was swept, and whether it is a fair case: tokens of the least and the most used expert."""
    tokens = [count for report in reports for count in report.tokens_per_expert]
    weights = [tensor for report in reports for tensor in report.tensors]
    fewer = {"fewer_because": "no more fit beside what a sweep needs"} if layers < asked else {}
    return {
        "layers": layers,
        "layers_asked": asked,
        **fewer,
        "layer_bytes": layer_bytes(arguments),
        "states_bytes": 2 * arguments.samples * arguments.length * arguments.hidden,
        "peak_bytes": peak_memory(device),
        "fewest_tokens": min(tokens),
        "most_tokens": max(tokens),
        "layers_with_uncovered_experts": sum(bool(report.uncovered) for report in reports),
        "sparsity": statistics.mean(tensor["sparsity"] for tensor in weights),
    }


def layers_in_memory(arguments, device: torch.device) -> int:
    """How many layers the device has room for, beside states, embeddings and what a batch takes."""
    asked = arguments.in_memory_layers
    if device.type != "cuda":
        return asked
    slots = 2 * arguments.batch_size * arguments.length
    states = 2 * arguments.samples * arguments.length * arguments.hidden
    embeddings = 2 * 2 * arguments.vocabulary * arguments.hidden
    batch = slots * (10 * arguments.intermediate + 12 * arguments.hidden)  # gate and up, their product, its square
    free = torch.cuda.mem_get_info(device)[0] - states - embeddings - 1.25 * batch - 4e9  # pieces that are scored
    return max(2, min(asked, int(free // layer_bytes(arguments))))


def measure_memory(arguments, results: Results, device: torch.device, rate: float) -> None:
    """The parts of the sweep with all layers on the device, and the claim."""
    config = shape(arguments, layers_in_memory(arguments, device))
    model = make_model(config, device)
    moe = moe_layers(model)
    source = InMemory(*decoder_layers(model, moe), moe, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, reports = timed_sweep(source, model, make_batches(arguments), CONFIG, device)
    asked = arguments.in_memory_layers
    results.add(kind="sweep", where="memory", **facts(arguments, len(source), asked, reports, device))
    add_parts(results, "memory", seconds, ("forward", "observe", "select", "propagate", "compute"))
    flops = forward_flops(config, arguments.samples, arguments.length)
    for name, passes, claim in (("compute", 2, {"claim_at_most": 2}), ("forward", 1, {})):
        ratios = [value * rate / (passes * flops) for value in seconds[name]]
        what = f"{name} / operations of {passes} forward pass{'es' * (passes > 1)} at the matrix rate"
        results.add(kind="ratio", name=what, flops=passes * flops, **claim, **spread(ratios, "ratio"))


def measure_operations(arguments, results: Results, device: torch.device) -> None:
    """Counts the operations and launches of the compute part of one layer."""
    model = make_model(shape(arguments, 2), device)
    moe, calls = moe_layers(model), LayerCalls()
    source = InMemory(*decoder_layers(model, moe), moe, device)
    states = States(embed(model, source.layers, list(make_batches(arguments)), device, calls))
    on_gpu = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu)

    def tell(event: str, index: int) -> None:
        if (event, index) == ("loaded", 0):
            profiler.start()
        if (event, index) == ("finished", 0):
            now(device)
            profiler.stop()

    # The guard for experts that saw few tokens is off: it runs those one after the other.
    reports = sweep(WatchedLayers(source, tell), states, calls, replace(CONFIG, min_tokens=0), iter)
    called = launched = 0
    for event in profiler.events():
        parent = event.cpu_parent.name if event.cpu_parent is not None else ""
        called += event.name.startswith("aten::") and not parent.startswith("aten::")
        launched += "LaunchKernel" in event.name
    time_of = operator.attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")  # microseconds
    rows = [row for row in profiler.key_averages() if row.key.startswith("aten::")]
    results.add(
        kind="operations",
        experts=arguments.experts,
        hidden=arguments.hidden,
        batches=len(states),
        pieces=sum(len(list(chunks(target.weight_EOD, False, True))) for target in expert_targets(moe[0])),
        operations_called=called,
        kernels_launched=launched if on_gpu else None,
        fewest_tokens=min(reports[0].tokens_per_expert),
        seconds_of_slowest={row.key: time_of(row) / 1e6 for row in sorted(rows, key=time_of, reverse=True)[:8]},
    )


def measure_disk(arguments, results: Results, device: torch.device) -> None:
    """The parts of the sweep with all layers in files."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        after.mkdir()
        room = 0.95 * shutil.disk_usage(folder).free - 8 * arguments.vocabulary * arguments.hidden
        fitting = int(room // (2 * layer_bytes(arguments)))
        config = shape(arguments, max(2, min(arguments.disk_layers, fitting)))
        make_model(config, device).to("cpu").save_pretrained(before, max_shard_size="5GB")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        files = sorted(before.glob("*.safetensors"))
        forget(files)
        with ShardReader(files) as reader:
            model = load_skeleton(MixtralForCausalLM, config, reader, "random")
            moe = moe_layers(model)
            with ShardWriter(after, output_layout(model, reader.layout)) as writer:
                source = StreamedLayers(model, decoder_layers(model, moe)[0], moe, reader, writer, device)
                seconds, reports = timed_sweep(source, model, make_batches(arguments), CONFIG, device, writer.sync)
    results.add(
        kind="sweep",
        where="disk",
        first_load_seconds=seconds["load"][0],
        **facts(arguments, config.num_hidden_layers, arguments.disk_layers, reports, device),
    )
    add_parts(results, "disk", seconds, ("load", "compute", "write", "sync"))


def forget(files: list[Path]) -> None:
    """Writes files to the disk and asks the system to drop them from its cache."""
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse(words: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 4096, "intermediate": 14336, "experts": 8, "heads": 32, "kv-heads": 8, "vocabulary": 32000}
    sizes |= {"samples": 128, "length": 2048, "batch-size": 8, "in-memory-layers": 32, "disk-layers": 8}
    for name, default in (sizes | {"matrix": 8192}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="On the disk to be measured; default: a temp folder.")
    parts = ["memory", "operations", "disk"]
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    arguments = parser.parse_args(words)
    if min(arguments.in_memory_layers, arguments.disk_layers) < 2:
        parser.error("--in-memory-layers and --disk-layers must be at least 2: the last layer is not timed.")
    return arguments


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    logging.disable_progress_bar()
    device = torch.device(arguments.device)
    begun = time.perf_counter()
    results = Results("pruning_gpu", "python benchmarks/pruning_gpu.py")
    asked = {key: value for key, value in vars(arguments).items() if key != "folder"}
    results.note(sparsity=CONFIG.sparsity, **asked)
    rate = measure_matrix_rate(arguments, results, device)
    if "memory" in arguments.only:
        measure_memory(arguments, results, device, rate)
    if "operations" in arguments.only:
        for experts in (8, 16):
            small = argparse.Namespace(**{**vars(arguments), **SMALL, "experts": experts})
            measure_operations(small, results, device)
        measure_operations(arguments, results, device)
    if "disk" in arguments.only:
        measure_disk(arguments, results, device)
    results.note(seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
