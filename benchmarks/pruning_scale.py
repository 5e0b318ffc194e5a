"""
Memory, time and quality of pruning models that are large for the machine, and the same work done by peers.

    python benchmarks/pruning_scale.py            # about 45 minutes on 2 cores, 26 GB of disk
    python benchmarks/pruning_scale.py --short    # under 4 minutes

depth    peak memory of the streamed sweep at 8 and 32 layers of one width, against the plan's prediction
wall     streamed against in memory, in pairs, on a model that fits both ways
peers    llm-compressor and the method of locuslab/wanda on the same checkpoint and tokens (see benchmarks/peers/)
quality  expert removal, alone and with 50 %, and allocation, on the reference model

Checkpoints of `depth`, `wall` and `peers` are Mixtral-shaped with random float32 weights: costs do not depend on them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import SHARED, Results

from hf_mlopt.hub.shards import COPY_BYTES, ShardWriter, TensorInfo, index_json


HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
PEER_PYTHON = PEERS / ".venv-llmcompressor" / "bin" / "python"
SIZES = {"hidden": 1024, "intermediate": 3584, "experts": 8, "vocabulary": 2048}
SAMPLES, LENGTH, BATCH = 32, 64, 4
PARTS = {"depth": ("depth",), "wall": ("wall",), "peers": ("peer", "peer ratio"), "quality": ("quality",)}


def write_checkpoint(folder: Path, layers: int, hidden: int, intermediate: int, experts: int, vocabulary: int) -> int:
    """Writes a random Mixtral layer by layer, with the Hub's names; returns the bytes of one decoder layer."""
    from transformers import MixtralConfig

    shapes = {"self_attn.q_proj.weight": (hidden, hidden), "self_attn.o_proj.weight": (hidden, hidden)}
    shapes |= {f"self_attn.{name}_proj.weight": (hidden // 4, hidden) for name in "kv"}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes["block_sparse_moe.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        matrices = {"w1": (intermediate, hidden), "w2": (hidden, intermediate), "w3": (intermediate, hidden)}
        shapes |= {f"block_sparse_moe.experts.{expert}.{name}.weight": size for name, size in matrices.items()}
    outside = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    files = [{f"model.layers.{index}.{name}": size for name, size in shapes.items()} for index in range(layers)]
    files.append({**outside, "model.norm.weight": (hidden,)})
    layout = {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": {
            name: TensorInfo("F32", size) for name, size in tensors.items()
        }
        for number, tensors in enumerate(files, start=1)
    }
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with ShardWriter(folder, layout) as writer:
        for tensors in layout.values():
            for name, info in tensors.items():
                values = generator.standard_normal(info.shape, dtype=np.float32)
                values = 1 + 0.1 * values if len(info.shape) == 1 else values * info.shape[-1] ** -0.5
                writer.write(name, values.astype(np.float32))
    (folder / "model.safetensors.index.json").write_text(index_json(layout))
    MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=experts,
        max_position_embeddings=4096,
        architectures=["MixtralForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    return sum(info.nbytes for info in next(iter(layout.values())).values())


def write_tokens(path: Path, samples: int, length: int, vocabulary: int) -> Path:
    """Random token ids as a file that `--calibration` takes."""
    ids = np.random.default_rng(1).integers(3, vocabulary, (samples, length))
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    return path


def run_json(*command, environment: dict | None = None) -> dict:
    """The last line that a process prints, which is JSON."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **(environment or {})}, cwd=PEERS
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(words)}\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def prune(model: Path, tokens: Path, *options, method: str = "moe-pruner") -> dict:
    """What one run of our pruner took; its output is removed."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        output = Path(folder) / "out"
        words = [model, "--output", output, "--sparsity", 0.5, "--method", method]
        row = run_json(sys.executable, HERE / "measured_prune.py", *words, *calibrated_on(tokens), *options)
        return {**row, "output_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors"))}


def calibrated_on(tokens: Path) -> list:
    samples = sum(1 for _ in tokens.open())
    return ["--calibration", tokens, "--samples", samples, "--sequence-length", LENGTH, "--batch-size", BATCH]


def measure_depth(folder: Path, results: Results, depths: tuple[int, ...]) -> None:
    """Peak memory of a streamed run by depth, what it is made of, and what the plan said."""
    tokens = write_tokens(folder / "tokens.jsonl", SAMPLES, LENGTH, SIZES["vocabulary"])
    states = SAMPLES * LENGTH * SIZES["hidden"] * 4
    write_checkpoint(folder / "nothing", 2, hidden=64, intermediate=64, experts=8, vocabulary=SIZES["vocabulary"])
    nothing = prune(folder / "nothing", tokens, "--stream")["peak_bytes"]  # the libraries and the calibration text
    for layers in depths:
        model = folder / f"layers-{layers}"
        layer = write_checkpoint(model, layers, **SIZES)
        plan = folder / "plan.json"
        words = ["plan", model, "--sparsity", 0.5, "--stream", *calibrated_on(tokens), "--json", plan]
        subprocess.run([sys.executable, "-m", "hf_mlopt", *map(str, words)], check=True, capture_output=True)
        planned = json.loads(plan.read_text())
        row = prune(model, tokens, "--stream")
        own, buffer = row["peak_bytes"] - nothing, COPY_BYTES
        results.add(
            kind="depth",
            layers=layers,
            model_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
            layer_bytes=layer,
            states_bytes=states,
            peak_of_a_tiny_model=nothing,
            shard_buffer_bytes=buffer,
            claim_at_most=1.3,
            own_peak_over_layer_states_and_buffer=own / (layer + states + buffer),
            planned_peak_bytes=planned["peak"]["total"],
            planned_output_bytes=planned["costs"]["output_bytes"],
            planned_over_measured=planned["peak"]["total"] / row["peak_bytes"],
            **row,
        )


def measure_wall(folder: Path, results: Results, layers: int, pairs: int) -> None:
    """Wall time of whole runs, streamed over in memory."""
    tokens, model = folder / "tokens.jsonl", folder / f"layers-{layers}"
    ratios, streamed, in_memory = [], [], []
    for _ in range(pairs):
        in_memory.append(prune(model, tokens, "--in-memory"))
        streamed.append(prune(model, tokens, "--stream"))
        ratios.append(streamed[-1]["seconds"] / in_memory[-1]["seconds"])
    results.add(
        kind="wall",
        name="streamed / in memory",
        claim_at_most=1.25,
        layers=layers,
        pairs=pairs,
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        seconds_in_memory=statistics.median(row["seconds"] for row in in_memory),
        peak_in_memory=max(row["peak_bytes"] for row in in_memory),
        peak_streamed=max(row["peak_bytes"] for row in streamed),
    )


def measure_peers(folder: Path, results: Results, rounds: int) -> None:
    """Ours and the peers in turn: whole runs, and for the peers their loading, pruning and saving."""
    if not PEER_PYTHON.exists():
        results.note(
            peers_not_run=f"no environment at {PEER_PYTHON.parent.parent.relative_to(HERE.parent)}: make peers"
        )
        return
    subprocess.run([sys.executable, PEERS / "shape.py", folder / "peers"], check=True, capture_output=True)
    model, tokens = folder / "peers" / "model", folder / "peers" / "tokens.safetensors"
    from safetensors.numpy import load_file

    ids = load_file(tokens)["input_ids"]
    lines = folder / "peers" / "tokens.jsonl"
    lines.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    calibration = ["--calibration", lines, "--samples", len(ids), "--sequence-length", ids.shape[1]]
    ours, theirs, two = [sys.executable, HERE / "measured_prune.py", model], [PEER_PYTHON], {"OMP_NUM_THREADS": "2"}
    for number in range(rounds):
        forward = run_json(sys.executable, PEERS / "run_forward.py", model, tokens)
        results.add(kind="peer", tool="plain forward", round=number, seconds=forward["median"])
        for method in ("wanda", "sparsegpt") if number == 0 else ("wanda",):  # SparseGPT takes minutes: once
            for mode in ("--in-memory", "--stream"):
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    words = ["--output", Path(out) / "out", "--sparsity", 0.5, "--method", method, mode, *calibration]
                    row = run_json(*ours, *words, environment=two)
                results.add(kind="peer", tool=f"hf_mlopt {mode[2:]}", method=method, round=number, **row)
            for routed in ((), ("--routed",)):
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    words = [PEERS / "run_llmcompressor.py", model, tokens, Path(out) / "out", "--method", method]
                    row = run_json(*theirs, *words, *routed, "--repack")
                add_peer(results, row, f"llm-compressor, {row['calibrated_on']}", method, number)
        row = run_json(sys.executable, PEERS / "run_wanda_method.py", model, tokens)
        add_peer(results, row, "method of locuslab/wanda, unfused", "wanda", number)
    summarize_peers(results)


def add_peer(results: Results, row: dict, tool: str, method: str, number: int) -> None:
    """One run of a peer, or its own message where it could not."""
    phases = {name: phase["seconds"] for name, phase in row["phases"].items() if name != "reload"}
    results.add(
        kind="peer",
        tool=tool,
        method=method,
        round=number,
        seconds=sum(phases.values()),
        phases=phases,
        peak_bytes=row["peak_bytes"],
        baseline_bytes=row["start_bytes"],
        model_bytes=row["model_bytes"],
        finding=row["finding"],
        sparsity=(row.get("sparsity_reached") or {}).get("mean"),
        versions=row["versions"],
    )


def summarize_peers(results: Results) -> None:
    """Ratios of ours to each peer, round by round."""
    rows = [row for row in results.record["rows"] if row["kind"] == "peer" and "peak_bytes" in row]
    for method in ("wanda", "sparsegpt"):
        for own in ("hf_mlopt in-memory", "hf_mlopt stream"):
            for tool in dict.fromkeys(row["tool"] for row in rows if not row["tool"].startswith("hf_mlopt")):
                for quantity in ("seconds", "peak_bytes"):
                    found = {
                        (row["tool"], row["round"]): row[quantity]
                        for row in rows
                        if row["method"] == method and not row.get("finding")
                    }
                    ratios = [
                        found[own, number] / found[tool, number]
                        for name, number in found
                        if name == own and (tool, number) in found
                    ]
                    if ratios:
                        results.add(
                            kind="peer ratio",
                            name=f"{own} / {tool}",
                            method=method,
                            quantity=quantity,
                            ratio_median=statistics.median(ratios),
                            ratio_min=min(ratios),
                            ratio_max=max(ratios),
                        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="2 and 4 layers, one pair, one seed; no peers.")
    parser.add_argument("--folder", type=Path, help="Where the checkpoints are written (and removed); default: temp.")
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=list(PARTS), help="Parts to run; rows of the others are kept."
    )
    arguments = parser.parse_args()
    name = "pruning_scale_short" if arguments.short else "pruning_scale"
    command = "python benchmarks/pruning_scale.py" + (" --short" if arguments.short else "")
    depths = (2, 4) if arguments.short else (8, 32)
    from scale_plot import plot
    from scale_quality import measure_quality

    results = Results(name, command)
    results.keep_others({kind for part in arguments.only for kind in PARTS[part]})
    if arguments.short:
        results.note(not_run="peers, 8 and 32 layers, seeds 1 and 2")
    results.note(tokens=[SAMPLES, LENGTH], batch_size=BATCH)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        if "depth" in arguments.only or "wall" in arguments.only:
            measure_depth(folder, results, depths)
        if "wall" in arguments.only:
            measure_wall(folder, results, depths[0], 1 if arguments.short else 3)
        if "peers" in arguments.only and not arguments.short:
            measure_peers(folder, results, 3)
    if "quality" in arguments.only and SHARED.is_dir():
        measure_quality(results, (0,) if arguments.short else (0, 1, 2))
    plot(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
