"""The part of `communication.py` that trains over a throttled link. Run as a script, it is one of the ranks."""

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from communication_network import Network, NoNamespaces, free_port
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from hf_mlopt.communication import compress
from hf_mlopt.communication.fifo import Fifo
from hf_mlopt.communication.pays import decide, measure


FEEDBACK = {"error_feedback": "step-ahead"}
# What a user would take: error feedback around what is biased. The baselines are torch's own.
CASES = {
    "bf16": None,
    "fp32": None,
    "bingrad-b": FEEDBACK,
    "sign": FEEDBACK,
    "top-k-0.01": FEEDBACK,
    "orq-3": {},
    "orq-5": {},
    "orq-9": {},
    "orq-9-shared": {},
    "linear-16": {},
    "powersgd-4": None,  # the last: where it hangs, the others are done
}
CROSSING = ("bf16", "bingrad-b", "orq-3", "orq-9", "orq-9-shared")
SHORT_CASES = ("bf16", "fp32", "bingrad-b", "orq-9", "powersgd-4")
TOKENS, WARMUP, SECONDS_AT_MOST = 64, 2, 480


def measure_link(results, short: bool) -> None:
    """Two ranks at four bandwidths, four ranks at two; then where a codec and bfloat16 take the same time."""
    for world in (2, 4):
        plan = {1e8: tuple(CASES), 3e8: CROSSING, 1e9: tuple(CASES), 3e9: CROSSING}
        if world == 4:
            plan = {bandwidth: plan[bandwidth] for bandwidth in (1e8, 1e9)}
        if short:
            plan = {1e8: SHORT_CASES, 1e9: SHORT_CASES} if world == 2 else {1e9: SHORT_CASES[:3]}
        rows = []
        try:
            with Network(world) as network:
                for bandwidth, cases in plan.items():
                    network.limit(bandwidth)
                    job = {"cases": cases, "bandwidth": bandwidth, "emulated": False, "layers": 1 if short else 8}
                    rows += _run(results, world, job, network)
        except NoNamespaces as error:
            results.note(link_emulated_because=str(error))
            for bandwidth, cases in plan.items():
                job = {"cases": cases, "bandwidth": bandwidth, "emulated": True, "layers": 1 if short else 8}
                rows += _run(results, world, job, None)
        for row in _crossovers(rows):
            results.add(kind="crossover", ranks=world, **row)


def _run(results, world: int, job: dict, network: Network | None) -> list[dict]:
    """The cases of a job, one after the other in the same ranks; rows as rank 0 prints them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "JOB": json.dumps(job)}
    environment |= network.environment() if network else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            [*(network.prefix(rank) if network else []), sys.executable, str(Path(__file__).resolve())],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    watchdog = threading.Timer(SECONDS_AT_MOST, lambda: [rank.kill() for rank in ranks])
    watchdog.start()
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(ranks[0].stderr), daemon=True)
    listener.start()
    where = {"ranks": world, "bandwidth": job["bandwidth"], "network": "emulated" if job["emulated"] else "tc tbf"}
    rows, reference = [], None
    try:
        for line in ranks[0].stdout:
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            reference = row["step_seconds_median"] if row["codec"] == "bf16" else reference
            row["of_bf16_time"] = row["step_seconds_median"] / reference
            rows.append(where | row)
            results.add(kind="link", **where, **row)
    finally:
        watchdog.cancel()
        for rank in ranks:
            rank.kill()  # the others wait for one that has failed
            rank.wait()
        listener.join()
    missing = [name for name in job["cases"] if name not in [row["codec"] for row in rows]]
    for number, name in enumerate(missing):
        errors = [line.strip() for line in said if "Error" in line]
        why = errors[-1] if errors else f"not done after {SECONDS_AT_MOST} s"
        results.add(kind="link", **where, codec=name, error=why if number == 0 else f"not run, as {missing[0]} failed")
    return rows


def _crossovers(rows: list[dict]) -> list[dict]:
    """
    The bandwidth, in bit/s, at which a codec's step takes as long as with bfloat16. What a step loses to the wire goes
    with 1 / bandwidth, so the difference is interpolated in that.
    """
    times: dict[str, dict[float, float]] = {}
    for row in rows:
        times.setdefault(row["codec"], {})[row["bandwidth"]] = row["step_seconds_median"]
    found = []
    for name in CROSSING[1:]:
        common = sorted(times.get("bf16", {}).keys() & times.get(name, {}).keys())
        if not common:
            continue
        saved = [(1 / bandwidth, times["bf16"][bandwidth] - times[name][bandwidth]) for bandwidth in common]
        crossings = [
            1 / (x - y * (x - next_x) / (y - next_y))
            for (x, y), (next_x, next_y) in zip(saved, saved[1:], strict=False)
            if y > 0 >= next_y
        ]
        row = {"codec": name, "bandwidths": common, "saved_seconds": [seconds for _, seconds in saved]}
        row["measured"] = crossings[0] if crossings else None
        if not crossings:
            row["beyond"] = "pays at all of these" if saved[-1][1] > 0 else "pays at none of these"
        predicted = [one for one in rows if one["codec"] == name and "predicted" in one]
        row |= predicted[-1]["predicted"] if predicted else {}
        found.append(row)
    return found


def make_model(layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, use_cache=False, **shape))


def _rank(job: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in job["cases"]:
        row = _case(name, CASES[name], job)
        gc.collect()  # DDP's reducer must be gone before the next one is made
        if dist.get_rank() == 0:
            print(json.dumps({"codec": name, **row}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _case(name: str, settings: dict | None, job: dict) -> dict:
    module = make_model(job["layers"])
    is_power = name.startswith("powersgd")
    # Same seed, same weights: they need not travel. PowerSGD on gloo needs all gradients in one bucket.
    model = DistributedDataParallel(module, init_sync=False, **({"bucket_cap_mb": 1_000} if is_power else {}))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    compression, slow = None, job["bandwidth"] if job["emulated"] else None
    if settings is None:
        _hook_of_torch(model, name, slow)
    else:
        compression = compress(model, optimizer, grad_codec=name, warmup_steps_uncompressed=0, **settings)
        if slow:
            _slow_down(compression.state, slow)
    ids = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    steps = 5 if dist.get_world_size() == 2 else 3  # of which each takes longer
    if name in ("bf16", "fp32") and job["bandwidth"] <= 1e8:
        steps = 2
    row = _timed_steps(model, optimizer, ids, steps, compression)
    row |= {"error_feedback": (settings or {}).get("error_feedback", "none"), "tokens": TOKENS}
    row["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    if compression is not None:
        if job["bandwidth"] >= 1e9 and name in CROSSING:
            row["predicted"] = _predicted(module, compression, ids)
        compression.detach()
    return row


def _hook_of_torch(model: DistributedDataParallel, name: str, slow: float | None) -> None:
    if name.startswith("powersgd"):
        if slow:
            raise RuntimeError("PowerSGD's own collectives cannot be slowed down: it runs in namespaces only")
        rank = int(name.rpartition("-")[2])
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=WARMUP)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif slow:
        model.register_comm_hook(*_slow_ring(torch.bfloat16 if name == "bf16" else torch.float32, slow))
    elif name == "bf16":
        model.register_comm_hook(None, _bf16_hook)


def _timed_steps(model, optimizer, ids: torch.Tensor, steps: int, compression) -> dict:
    times = []
    for step in range(WARMUP + steps):
        dist.barrier()
        if step == WARMUP:
            sent = _bytes_sent()
            if compression is not None:
                compression.take_traffic()
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    times = times[WARMUP:]
    row = {"step_seconds_median": statistics.median(times), "step_seconds_min": min(times)}
    row |= {"step_seconds_max": max(times), "steps": steps}
    if sent is not None:  # headers and acknowledgements included
        row["bytes_on_wire_per_step"] = (_bytes_sent() - sent) / steps
    if compression is not None:
        logs = compression.logs()
        row |= {"bytes_per_step": logs["grad_bytes"], "exchange_seconds": logs["grad_seconds"]}
    return row


def _predicted(module, compression, ids: torch.Tensor) -> dict:
    """What `pays` says of these ranks, in bit/s, if nothing hides behind the backward pass and if all of it can."""
    state, world = compression.state, dist.get_world_size()
    coded = sum(p.numel() for name, p in module.named_parameters() if name not in state.exempt)
    measured = measure(
        state.up, state.down, 1 << 22, gathers_all=state.gathers_all, feedback=state.config.has_feedback
    )
    backward = []
    for _ in range(3):
        loss = module(input_ids=ids, labels=ids).loss
        dist.barrier()
        start = time.perf_counter()
        loss.backward()
        backward.append(time.perf_counter() - start)
    known = {"bandwidth": measured.bandwidth, "codec_rate": measured.codec_rate, "gathers_all": state.gathers_all}
    found = {"codec_rate": measured.codec_rate, "backward_seconds": statistics.median(backward), "coded": coded}
    for name, seconds in (("predicted", 0.0), ("predicted_with_hiding", found["backward_seconds"])):
        verdict = decide(state.up, coded, world, down=state.down, backward_seconds=seconds, **known)
        found[name] = 8 * verdict.crossover
    return found


def _bf16_hook(state, bucket):
    """torch's own, which DDP refuses by name on gloo though it runs there."""
    return default_hooks.bf16_compress_hook(state, bucket)


def _bytes_sent() -> int | None:
    """By this rank's interface, in a namespace."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if "GLOO_SOCKET_IFNAME" in os.environ and counter.is_file() else None


def _slow_down(state, bandwidth: float) -> None:
    """Has every exchange of coded gradients sleep as long as what it sends would take."""
    exchange = state.exchange

    def slow(bucket) -> None:
        before = state.traffic.bytes_sent
        exchange(bucket)
        time.sleep(8 * (state.traffic.bytes_sent - before) / bandwidth)

    state.exchange = slow


def _slow_ring(dtype: torch.dtype, bandwidth: float):
    """State and hook of an all-reduce that sleeps as long as a ring would take."""
    world = dist.get_world_size()

    def hook(fifo, bucket):
        buffer = bucket.buffer()

        def task() -> torch.Tensor:
            sent = buffer.to(dtype)
            dist.all_reduce(sent)
            buffer.copy_(sent).div_(world)
            time.sleep(8 * 2 * (world - 1) / world * sent.nbytes / bandwidth)
            return buffer

        return fifo.submit(task)

    return Fifo("ring"), hook


if __name__ == "__main__":
    _rank(json.loads(os.environ["JOB"]))
