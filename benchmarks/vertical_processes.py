"""The parts of `vertical.py` that run parties: as processes over gRPC, or as threads."""

import json
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.sparse
from common import SHARED, Results

from hf_mlopt.configuration import load_config
from hf_mlopt.resources import resource_dir
from hf_mlopt.vertical.aggregate import PlainSharing
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.party import VerticalParty
from hf_mlopt.vertical.transport.in_process import InProcessHub
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.vertical.updates.saga import SAGA
from hf_mlopt.workflows.vertical import simulate, speed_up
from hf_mlopt.workflows.vertical_recipe import SimulationRecipe


OPEN = {"query_budget": None, "accept_gram_disclosure": True}
DELAY = 0.02  # seconds


def processes(results: Results, short: bool) -> None:
    # a9a needs 5,000 steps of the slow party, ten minutes a run: it is on the event clock alone.
    names = ("breast_cancer",) if short else ("breast_cancer", "credit")
    for name in names:
        path = resource_dir("recipes") / "vertical" / f"{name}.yaml"
        given = load_config(SimulationRecipe, path, {"output_dir": "none"}).data
        files = given if name == "breast_cancer" else [str(SHARED / "vertical" / file) for file in given]
        for compensation in (True,) if short else (True, False):
            options = {"data": files, "straggler": "1:3", "parties": 4 if short else 8, "algorithm": "saga"}
            options |= {"delay_compensation": compensation, "plot": False}
            with tempfile.TemporaryDirectory() as folder:
                recipe = load_config(SimulationRecipe, path, options | {"output_dir": str(Path(folder) / "out")})
                found = simulate(recipe)
            row = {"data": name, "algorithm": "saga", "parties": recipe.parties, "step_seconds": 0.05}
            times = {f"{mode}_seconds": one["seconds_to_gap"] for mode, one in found["modes"].items()}
            results.add(kind="processes", **row, compensation=compensation, **times, speed_up=speed_up(found))


class LateAnswers:
    """A transport to which one peer's answers and pushed frames come late; others are as they were."""

    def __init__(self, transport, peer: str):
        self._transport, self._peer = transport, peer

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def request(self, peer, frame, timeout):
        reply = self._transport.request(peer, frame, timeout)
        if peer != self._peer:
            return reply
        late: Future = Future()

        def pass_on(done: Future):
            error = done.exception()
            act = (lambda: late.set_exception(error)) if error else (lambda: late.set_result(done.result()))
            threading.Timer(DELAY, act).start()

        reply.add_done_callback(pass_on)
        return late

    def serve(self, on_request, on_push):
        late, ready = [], threading.Condition()

        def loop():
            while True:
                with ready:
                    ready.wait_for(lambda: late)
                    due, peer, frame = late.pop(0)
                time.sleep(max(0.0, due - time.monotonic()))
                on_push(peer, frame)

        def push(peer, frame):
            if peer != self._peer:
                return on_push(peer, frame)
            with ready:
                late.append((time.monotonic() + DELAY, peer, frame))
                ready.notify()

        threading.Thread(target=loop, daemon=True).start()
        self._transport.serve(on_request, push)


def late(results: Results, short: bool) -> None:
    rows, steps = 20_000, 100 if short else 500
    X, y = _synthetic(rows, 60)
    for kind, options in (("asked", {}), ("in flight", {"inflight": 8}), ("pushed", {"push_ahead": 8})):
        rates = [_rate(X, y, is_late, max_steps=steps, **options) for is_late in (False, True)]
        results.add(kind="late", way=kind, updates_per_second=rates, ratio=rates[1] / rates[0], step_seconds=0.01)


def _rate(X: np.ndarray, y: np.ndarray, is_late: bool, **options) -> float:
    """Updates a second of the parties that are not late, without masks; a step is a sleep of 10 ms."""
    arguments = VerticalArguments(mask="none", allow_unsafe=True, **OPEN, **options)
    names, parts = ("p0", "p1", "p2"), np.array_split(np.arange(X.shape[1]), 3)
    facts = Parties(len(y), {name: len(part) for name, part in zip(names, parts, strict=True)}, "p0")
    hub, seconds = InProcessHub(names), {}
    threads = []
    for name, part in zip(names, parts, strict=True):
        transport = hub.transports[name]
        transport = LateAnswers(transport, "p2") if is_late and name != "p2" else transport
        given = (arguments, facts, transport, PlainSharing(names), X[:, part], y)
        party = VerticalParty(*given, compute=lambda: time.sleep(0.01))

        def run(party=party):
            start = time.monotonic()
            party.train(lambda updater: seconds.update({party.name: time.monotonic() - start}))

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for transport in hub.transports.values():
        transport.close()
    return arguments.max_steps / max(seconds["p0"], seconds["p1"])


def wire(results: Results, short: bool) -> None:
    rows, columns = (5000, 33) if short else (100_000, 330)
    X, y = _synthetic(rows, columns)
    with tempfile.TemporaryDirectory() as folder:
        content = {"id": range(rows), "y": (y > 0).astype(int), **{f"x{n}": X[:, n] for n in range(columns)}}
        pa.parquet.write_table(pa.table(content), Path(folder) / "all.parquet")
        two = {"mask": "none", "accept_two_party_disclosure": True}
        open_ = {"mask": "none", "allow_unsafe": True}
        kinds = [(2, two), (3, {}), (3, open_), (3, {"plaintext": True}), (4, {}), (8, {}), (16, {})]
        for number, (parties, options) in enumerate(kinds[: 4 if short else None]):
            output = Path(folder) / f"out{number}"
            recipe = SimulationRecipe(
                data=[str(Path(folder) / "all.parquet")], label_column="y", parties=parties, step_seconds=0.0,
                batch_size=1024, learning_rate=0.1, num_epochs=1 if short else 3, algorithm="sgd", modes=["async"],
                trace_steps=1000, eval_share=0.0, plot=False, output_dir=str(output), **OPEN, **options,
            )  # fmt: skip
            found = simulate(recipe)["modes"]["async"]["parties"]
            log = (output / "async" / "p01" / "audit.jsonl").read_text().splitlines()
            answers = [line for line in map(json.loads, log) if line["event"] == "answered"]
            updates = sum(party["updates"] for party in found.values())
            slowest = max(party["updates"] / party["updates_per_second"] for party in found.values())
            row = {
                "rows": rows,
                "columns": columns,
                "parties": parties,
                "mask": recipe.mask,
                "tls": not recipe.plaintext,
            }
            row |= {"seconds_per_epoch": slowest / recipe.num_epochs, "updates_per_second": updates / slowest}
            payload = sum(line["bytes"] for line in answers) / len(answers) * (parties - 1)
            results.add(kind="wire", **row, payload_bytes_per_update=payload)


def sparse(results: Results, short: bool) -> None:
    rows, columns = (6000, 5904) if short else (60_000, 5904)
    rng = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((rows, columns), density=73 / 8 / columns, rng=rng, format="csr")
    labels = np.where(rng.random(rows) < 0.5, 1.0, -1.0)
    tracemalloc.start()  # NumPy's arrays are traced
    arguments = VerticalArguments(batch_size=256)
    optimizer = SAGA(FeatureBlock(matrix, arguments.schedule(rows)), make_loss("logistic"), labels)
    weights = optimizer.initial_weights()
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    start, steps = time.perf_counter(), 200
    for step in range(steps):
        batch = step % len(optimizer.block.batches)
        part = optimizer.block.batches[batch]
        update = optimizer.update(batch, part.forward(weights.read(part.columns)))
        weights.step(update, 0.1, 1e-4)
    seconds = (time.perf_counter() - start) / steps
    row = {
        "rows": rows,
        "columns": columns,
        "nonzeros": matrix.nnz,
        "csr_megabytes": _csr_bytes(matrix) / 1e6,
        "dense_megabytes": rows * columns * 8 / 1e6,
    }
    results.add(kind="sparse", **row, megabytes=megabytes, step_milliseconds=1000 * seconds)


def _csr_bytes(matrix) -> int:
    return matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes


def _synthetic(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(rows, columns))
    return X, np.where(X @ rng.normal(size=columns) + rng.normal(size=rows) > 0, 1.0, -1.0)
