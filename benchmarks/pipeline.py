"""
What an asynchronous pipeline gains in time, and what its staleness costs.

    python benchmarks/pipeline.py                        # an hour on 2 idle cores
    python benchmarks/pipeline.py --short                # 3 minutes
    python benchmarks/pipeline.py --parts speed real     # these alone; rows of other parts stay
    python benchmarks/pipeline.py --parts quality --workers 16 --resume     # runs at a time; finished ones stay

speed       4 minutes. Seconds for a batch of four stages as processes over gloo, each a device that is emulated by
            sleep: a forward takes 20 ms, a backward 40. Sequential model parallel (bp), GPipe and 1F1B of torch with
            4, 8 and 32 batches between two flushes, and fr, lag1 and dsp with and without repeated forwards; in turn,
            five times, filling and emptying included. The claims: dsp without repeated forwards at least 3.3 times as
            fast as bp and 1.25 times as 1F1B with 8, with them 2.6 times as bp; all within 20 % of the event model.
            Without repeated forwards it is another estimator: read its time beside its loss
stragglers  13 minutes. The same with a third of the operations 2 and 4 times as long (drawn anew each time; the model
            is given the same ones), links of half a forward and of 1.5 forwards, and one device of half the speed,
            before and after layers are moved away from it
quality     40 minutes. Loss on held-out data at equal samples, three seeds, of a ResNet with batch normalisation and a
            ViT on images of CIFAR-10 and a Llama on TinyStories, all in four stages, and the cosine of each block's
            gradient with that of back-propagation at the same weights. pipeline_quality.py says more
memory      1 minute. Peak of what each stage of a Llama holds of its batches (saved by autograd, stashed, in its
            queues), beside the formula; PipeDream, which keeps weights as well, and 1F1B by the formula alone
real        3 minutes. Nothing emulated: a Llama of 8 layers in two stages on two cores, a thread each, against one
            process with one thread. Wants an idle machine
"""

import argparse
import os
from collections import Counter

import torch
from common import SHARED, Results
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from hf_mlopt.pipeline import PipelineConfig, Worker, local_channels, memory, parse, run_local
from hf_mlopt.pipeline.partition import even, split


PARTS = {
    "speed": ("speed",),
    "stragglers": ("straggler",),
    "quality": ("tuning", "quality"),
    "memory": ("memory",),
    "real": ("real",),
}
STAGES = 4
MEASURED = (("bp", "no"), ("lag1", "yes"), ("lag1", "no"), ("dsp", "yes"), ("dsp", "no"))


class Saved:
    """A tensor that autograd keeps for a backward pass; the meter is told of its end."""

    def __init__(self, tensor: torch.Tensor, meter: "Meter"):
        self.tensor, self.meter = tensor, meter
        self.address = tensor.untyped_storage().data_ptr()
        meter.held[self.address] += 1
        meter.sizes[self.address] = tensor.untyped_storage().nbytes()

    def __del__(self):
        self.meter.held[self.address] -= 1


class Meter:
    """Bytes that a stage holds of its batches: saved by autograd, stashed, or waiting in its queues."""

    def __init__(self, block: nn.Module):
        self.held, self.sizes, self.peak = Counter(), {}, 0
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
        self.worker: Worker | None = None

    def context(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda saved: saved.tensor)

    def pack(self, tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor.detach(), self)
        self.peak = max(self.peak, self.bytes())
        return saved

    def bytes(self) -> int:
        live = {address: self.sizes[address] for address, count in self.held.items() if count}
        for flight in self.worker.stash.values():
            for tensor in (*flight.boundary, *(flight.outputs or ())):
                live[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        queued = sum(end.size() for end in (self.worker.channels.forward_in, self.worker.channels.backward_in) if end)
        return queued * BOUNDARY + sum(size for address, size in live.items() if address not in self.weights)


SHAPE, HIDDEN = (4, 128), 256
BOUNDARY = 4 * SHAPE[0] * SHAPE[1] * HIDDEN  # bytes of the hidden states of a batch


def peaks(mode: str, recompute: str, layers: int, num_batches: int) -> list[tuple[int, int]]:
    """Bytes of the weights of each stage, and the peak of what it holds of its batches."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=SHAPE[1], use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    blocks = split(LlamaForCausalLM(config), even(layers, STAGES))
    ids = torch.randint(256, SHAPE)
    settings = PipelineConfig(
        STAGES, mode, recompute=recompute, predict="none", update_every=num_batches, transport="local"
    )
    schedule, meters, workers = parse(mode, STAGES), [], []
    for k, (block, channels) in enumerate(zip(blocks, local_channels(schedule), strict=True)):
        meters.append(Meter(block))
        optimizer = torch.optim.AdamW(block.parameters())
        worker = Worker(block, k, STAGES, schedule, optimizer, channels, config=settings, context=meters[-1].context)
        meters[-1].worker = worker
        workers.append(worker)
    run_local(workers, lambda n: {"input_ids": ids, "labels": ids}, num_batches)
    weights = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    return list(zip(weights, (meter.peak for meter in meters), strict=True))


def measure_memory(results: Results, short: bool) -> None:
    """Totals add weights, gradients and the two moments of Adam to what is held of the batches."""
    layers, num_batches = (4, 7) if short else (8, 16)
    found = {case: peaks(*case, layers, num_batches) for case in MEASURED}
    for mode, recompute in (*MEASURED, ("pipedream", "no"), ("1f1b", "no")):
        for k in range(STAGES):
            weights, held_by_bp = found["bp", "no"][k]
            inputs, outputs = (BOUNDARY if k > 0 else 0), (BOUNDARY if k < STAGES - 1 else 0)
            graph = held_by_bp - inputs
            sizes = {"boundary_in": inputs, "boundary_out": outputs, "graph": graph, "recompute": recompute == "yes"}
            total = memory(mode, k, stages=STAGES, weights=weights, **sizes)
            row = {"kind": "memory", "mode": mode, "recompute": recompute, "stage": k, "weight_bytes": weights}
            row |= {"graph_bytes": graph, "boundary_bytes": inputs, "model_total_bytes": total}
            if (mode, recompute) in found:
                held, model = found[mode, recompute][k][1], total - 4 * weights
                row |= {"held_bytes": held, "model_held_bytes": model, "of_model": held / model}
                row["total_bytes"] = held + 4 * weights
            results.add(**row)


def beside(rows: list[dict]) -> dict:
    """Every speed with the loss of the same mode: ratio of bp's time to its own, and its loss over bp's less 1."""
    from pipeline_quality import MODES, summaries

    speed = {row["label"]: row["over_bp"] for row in rows if row["kind"] == "speed"}
    found = {label: {"speed_over_bp": ratio} for label, ratio in speed.items() if label.startswith(("gpipe", "1f1b"))}
    quality = summaries(rows)["quality_summary"]
    for name, mode in MODES.items():
        entry = found.setdefault(name, {"speed_over_bp": speed.get(mode.speed_label)})
        entry["loss_over_bp"] = {task: modes[name].get("over_bp") for task, modes in quality.items() if name in modes}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="Little of everything: checks that it runs.")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="Only these (default: all).")
    parser.add_argument("--resume", action="store_true", help="Keep the rows of quality that are there.")
    parser.add_argument("--workers", type=int, default=2, help="Runs of quality at a time.")
    parser.add_argument("--tune-all", action="store_true", help="Every mode of quality at its own learning rate.")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    torch.set_num_threads(1)
    words = " --short" if args.short else ""
    results = Results(f"pipeline{words.replace(' --', '_')}", f"python benchmarks/pipeline.py{words}")
    kept = {"quality"} if args.resume else set()
    results.keep_others({kind for part in args.parts if part not in kept for kind in PARTS[part]})
    there = {row["kind"] for row in results.record["rows"]}  # of earlier runs
    not_run = [part for part in PARTS if part not in args.parts and not there & set(PARTS[part])]
    if "speed" in args.parts or "stragglers" in args.parts or "real" in args.parts:
        import pipeline_speed

        for part in ("speed", "stragglers", "real"):
            if part in args.parts:
                getattr(pipeline_speed, f"measure_{part}")(results, args.short)
    if "memory" in args.parts:
        measure_memory(results, args.short)
    if "quality" in args.parts and SHARED.is_dir():
        from pipeline_quality import measure_quality

        measure_quality(results, args.short, args.workers, args.tune_all)
    elif "quality" in args.parts:
        not_run.append("quality: no shared data")
    # Parts may have run on other machines.
    machines = {**results.record.get("machines", {}), **dict.fromkeys(args.parts, results.record["environment"])}
    results.note(not_run=not_run, machines=machines, speed_beside_quality=beside(results.record["rows"]))
    from pipeline_plot import draw

    draw(results)
    print(f"written to {results.path} and {results.path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
