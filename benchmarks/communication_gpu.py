"""
Gradient codecs on one GPU, and two ranks on it.

    python benchmarks/communication_gpu.py                                    # planned for under 3 minutes
    python benchmarks/communication_gpu.py --device cpu --elements 1000000    # checks that it runs

equal        whether the GPU and the CPU make the same message of the same gradient and key: share of the bytes of
             codes that differ, and the largest difference of levels and of decoded values
codec-ratio  ORQ-9 against 4-bit codes of evenly spaced levels, in turn; the claim is at most 1.5 times their time
codec        elements per second, and the time in copies of a float32 tensor of the same length, as in
             communication.py. All codecs are plain torch operations; there is no compiled variant. Those whose turn
             has not come after --codec-seconds are named at the end
smoke        two ranks that share the GPU, 20 steps of a small MLP: NCCL, which usually refuses that, and gloo with
             gradients on the GPU. Whether replicas are the same to the bit, loss falls, and how much is sent

A row says what failed; the others go on. Needs torch, transformers, accelerate and what they bring; no data, no
network.
"""

import argparse
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Results
from communication_codecs import CODECS, device_name, gradient, measure_claims, measure_codec
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_mlopt.communication import codec, compress


WORLD, STEPS = 2, 20
SECONDS_AT_MOST = {"nccl": 45, "gloo": 75}
RUNS = {
    "fp32": None,
    "bingrad-b, step-ahead": {"grad_codec": "bingrad-b", "error_feedback": "step-ahead"},
    "bingrad-b, step-ahead, two-phase": {
        "grad_codec": "bingrad-b", "error_feedback": "step-ahead", "collective": "two-phase",
    },
    "orq-9": {"grad_codec": "orq-9"},
    "orq-9, two-phase": {"grad_codec": "orq-9", "collective": "two-phase"},
}  # fmt: skip


def measure_equality(results: Results, name: str, device: str) -> None:
    """One codec on the CPU and on the device."""
    flat, used, key = gradient((1 << 20) + 5, "cpu") * 0.01, codec(name), (1, 2, 3)
    there, here = used.encode(flat.to(device), key), used.encode(flat, key)
    codes, decoded = there.codes.cpu(), used.decode(there).cpu()
    levels = (there.levels.cpu() - here.levels).abs()
    apart = (decoded - used.decode(here)).abs()
    results.add(
        kind="equal",
        device=device_name(device),
        codec=name,
        code_bytes_that_differ=float((codes != here.codes).double().mean()),
        levels_max_difference=float(levels.max()) if len(levels) else 0.0,
        decoded_max_difference=float(apart.max()),
        decoded_relative_difference=float(apart.norm() / flat.norm()),
    )


def measure_smoke(results: Results, backend: str, device: str) -> None:
    """Both ranks in processes of their own, which end with the first that fails or with the time."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_rank, (backend, device, port, queue), nprocs=WORLD, join=False)
    end = time.perf_counter() + SECONDS_AT_MOST[backend]
    try:
        done = False
        while not done:
            if time.perf_counter() > end:
                raise TimeoutError(f"not done after {SECONDS_AT_MOST[backend]} s")
            done = ranks.join(timeout=1)
    finally:
        for process in ranks.processes:
            process.kill()
        while not queue.empty():
            results.add(kind="smoke", device=device_name(device), backend=backend, ranks=WORLD, **queue.get())


def _rank(rank: int, backend: str, device: str, port: int, queue) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
    dist.all_reduce(torch.ones(1, device=device))
    for name, settings in RUNS.items():
        row = _train(rank, device, settings)
        if rank == 0:
            queue.put({"run": name, "steps": STEPS, **row})
    dist.destroy_process_group()


def _train(rank: int, device: str, settings: dict | None) -> dict:
    torch.manual_seed(0)
    sizes = (64, 512, 512, 10)
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
    model = DistributedDataParallel(nn.Sequential(*layers).to(device), bucket_cap_mb=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    compression = compress(model, optimizer, **settings) if settings else None
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(rank)).to(device)
    labels = (inputs @ torch.randn(64, 10, generator=torch.Generator().manual_seed(9)).to(device)).argmax(1)
    losses = []
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seconds = (time.perf_counter() - start) / STEPS
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    most, least = weights.clone(), weights.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    row = {"first_loss": losses[0], "last_loss": losses[-1], "loss_falls": losses[-1] < losses[0]}
    row |= {"bit_identical": bool(torch.equal(most, least)), "seconds_per_step": seconds}
    if compression is not None:
        logs = compression.logs()
        row |= {"bytes_per_step": logs["grad_bytes"], "of_bf16": logs["grad_of_bf16"]}
        compression.detach()
    return row


def attempt(results: Results, part: str, measure, *words) -> None:
    """Goes on with what is left where something fails."""
    failed = None
    try:
        measure(*words)
    except Exception as error:
        said = [line for line in str(error).splitlines() if line and not line.startswith((" ", "-", "Traceback"))]
        failed = " / ".join([type(error).__name__, *said[-4:]])
    if failed is not None:  # outside of the handler, which holds on to memory
        results.add(kind="failed", part=part, error=failed)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--codec-seconds", type=float, default=60.0)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    results = Results("communication_gpu", "python benchmarks/communication_gpu.py")
    for name in CODECS:
        attempt(results, f"equal: {name}", measure_equality, results, name, args.device)
    flat = gradient(args.elements, args.device)
    attempt(results, "codec-ratio", measure_claims, results, flat, args.pairs)
    late, end = [], time.perf_counter() + args.codec_seconds
    for name in CODECS:
        if time.perf_counter() > end:
            late.append(name)
        else:
            attempt(results, f"codec: {name}", measure_codec, results, name, flat, args.pairs)
    del flat
    for backend in ("nccl", "gloo"):
        if backend == "gloo" or args.device == "cuda":
            attempt(results, f"smoke: {backend}", measure_smoke, results, backend, args.device)
    results.note(not_run=[f"codec: {name}" for name in late], seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
