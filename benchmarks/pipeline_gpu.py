"""
Stages of a pipeline as processes on one GPU: are they right there, and what does repeating forwards cost.

    python benchmarks/pipeline_gpu.py    # planned for under 2 minutes

same      a Llama of 8 layers in 2 and 4 stages over gloo, tensors on the card, against the same stages as threads of
          one process: losses and weights, to the bit. Back-propagation in stages against the whole model, too
transport NCCL refuses two ranks on one card, which is recorded; its transport has run nowhere yet
step      seconds a batch with and without a repeated forward, beside back-propagation in stages and in one process.
          The stages share the card, so that none of this is a speed-up of a pipeline

Needs torch and transformers; no data, no network.
"""

import argparse
import hashlib
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Results
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_mlopt.pipeline import PipelineConfig, Worker, distributed_channels, local_channels, parse, run_local, split


MODES = (("bp", "yes"), ("lag1", "yes"), ("lag1", "no"), ("dsp", "yes"), ("dsp", "no"))
LAYERS, BATCHES, LAYER_SIZES = 8, 24, {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}


def make_model(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, num_hidden_layers=LAYERS, num_key_value_heads=8, use_cache=False, **LAYER_SIZES
    )
    return LlamaForCausalLM(config).to(device).train()


def batches(device: str):
    def make(n: int) -> dict:
        generator = torch.Generator().manual_seed(n % 4)
        tokens = torch.randint(1024, (8, 256), generator=generator).to(device)
        return {"input_ids": tokens, "labels": tokens, "num_items_in_batch": None}

    return make


def make_worker(block, k: int, stages: int, mode: str, recompute: str, channels) -> Worker:
    config = PipelineConfig(stages=stages, mode=mode, recompute=recompute, predict="none", update_every=2)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.02, momentum=0.9)
    return Worker(block, k, stages, parse(mode, stages), optimizer, channels, config=config)


def bounds(stages: int) -> list[int]:
    return [LAYERS * k // stages for k in range(stages + 1)]


def digest(block) -> str:
    sha = hashlib.sha256()
    for value in block.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def run_stage(
    rank: int, stages: int, mode: str, recompute: str, transport: str, device: str, port: int, answers
) -> None:
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=stages)
    block = split(make_model(device), bounds(stages))[rank]
    channels = distributed_channels(parse(mode, stages), transport=transport, device=device, timeout=60)
    worker = make_worker(block, rank, stages, mode, recompute, channels)
    worker.run(batches(device), BATCHES // 4)
    dist.barrier()
    start = time.perf_counter()
    losses = worker.run(batches(device), BATCHES)
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    seconds = (time.perf_counter() - start) / (BATCHES - BATCHES // 4)
    answers[rank] = {"losses": losses, "digest": digest(block), "seconds": seconds}
    channels.close()
    dist.destroy_process_group()


def in_processes(stages: int, mode: str, recompute: str, transport: str, device: str, port: int) -> list[dict]:
    with mp.Manager() as manager:
        answers = manager.dict()
        arguments = (stages, mode, recompute, transport, device, port, answers)
        mp.start_processes(run_stage, arguments, nprocs=stages, start_method="spawn")
        return [answers[rank] for rank in range(stages)]


def in_threads(stages: int, mode: str, recompute: str, device: str) -> tuple[list[float], list[str]]:
    blocks = split(make_model(device), bounds(stages))
    channels = local_channels(parse(mode, stages), timeout=60)
    workers = [make_worker(block, k, stages, mode, recompute, channels[k]) for k, block in enumerate(blocks)]
    run_local(workers, batches(device), BATCHES // 4)
    return run_local(workers, batches(device), BATCHES), [digest(block) for block in blocks]


def plain(device: str) -> tuple[list[float], float]:
    model = make_model(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses, start = [], 0.0
    for n in range(BATCHES):
        if n == BATCHES // 4:
            start = time.perf_counter()
        batch = batches(device)(n)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        (loss / 2).backward()
        losses.append(loss.item())
        if n % 2:
            optimizer.step()
            optimizer.zero_grad()
    return losses[BATCHES // 4 :], (time.perf_counter() - start) / (BATCHES - BATCHES // 4)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--port", type=int, default=29611)
    args = parser.parse_args(words)
    logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    results, begun, port = Results("pipeline_gpu", "python benchmarks/pipeline_gpu.py"), time.perf_counter(), args.port
    whole, seconds = plain(args.device)
    results.add(kind="step", stages=1, mode="one process", seconds_per_batch=seconds, last_loss=whole[-1])
    for stages in args.stages:
        for mode, recompute in MODES:
            port += 1
            try:
                answers = in_processes(stages, mode, recompute, "gloo", args.device, port)
                losses, digests = in_threads(stages, mode, recompute, args.device)
            except Exception:
                results.add(kind="failed", stages=stages, mode=mode, error=traceback.format_exc()[-600:])
                continue
            found = answers[-1]["losses"]
            results.add(
                kind="same", stages=stages, mode=mode, recompute=recompute, transport="gloo",
                losses_equal_threads=found == losses, weights_equal_threads=[a["digest"] for a in answers] == digests,
                largest_difference_to_whole=max(map(abs, (a - b for a, b in zip(found, whole, strict=True)))),
                first_loss=found[0], last_loss=found[-1], seconds_per_batch=max(a["seconds"] for a in answers),
            )  # fmt: skip
    if args.device == "cuda":
        try:
            in_processes(2, "lag1", "yes", "nccl", args.device, port + 1)
            results.add(kind="transport", transport="nccl", runs=True)
        except Exception as error:
            results.add(kind="transport", transport="nccl", runs=False, error=str(error)[-400:])
    results.note(seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
