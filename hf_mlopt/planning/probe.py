"""Five seconds of measuring: how fast this machine multiplies, scores, reads and writes."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hf_mlopt.planning.costs import Run, targets
from hf_mlopt.planning.shape import ModelShape


_MATRIX_SECONDS, _SCORE_SECONDS, _DISK_SECONDS = 2.0, 0.8, 1.0
_PIECE = 16 << 20
_FILE_PIECES = 32  # at most, 512 MB
_SCORED = 1 << 22  # weights


@dataclass(frozen=True)
class Rates:
    """
    Of this machine, per second.

    Args:
        device (`str`): Where matrices were multiplied.
        flops (`float`): Multiplications and additions, in the shapes and the type of the model's experts.
        scored (`float`): Weights scored and compared.
        read_bytes (`float`), written_bytes (`float`): From and to the disk of the output.
    """

    device: str
    flops: float
    scored: float
    read_bytes: float
    written_bytes: float


def measure(shape: ModelShape, run: Run, directory: Path, device: str) -> Rates:
    """
    Measures this machine.

    Args:
        shape (`ModelShape`), run (`Run`): Give the shapes to multiply and the method to score with.
        directory (`Path`): On the disk to be measured; a file is written there and removed.
        device (`str`): `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    chosen, flops = _matrix_rate(shape, run, device)
    return Rates(chosen, flops, _score_rate(shape, run, chosen), *_disk_rates(directory))


def _matrix_rate(shape: ModelShape, run: Run, device: str) -> tuple[str, float]:
    """Multiplies what one expert is given of a batch by its largest matrix."""
    matrix = max((m for layer in shape.layers for m in layer.experts), key=lambda m: m.outputs * m.inputs)
    batch = min(run.config.batch_size, run.samples) * run.length
    tokens = max(1, batch * shape.top_k // shape.num_experts)
    try:
        import torch
    except ImportError:
        return "cpu", _numpy_rate(tokens, matrix.outputs, matrix.inputs)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[shape.dtype]
    hidden_TD = torch.randn(tokens, matrix.inputs).to(chosen, dtype)
    weight_OD = torch.randn(matrix.outputs, matrix.inputs).to(chosen, dtype)

    def multiply():
        result = hidden_TD @ weight_OD.T
        if chosen != "cpu":
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        return chosen, _repeated(multiply, _MATRIX_SECONDS) * 2 * tokens * matrix.outputs * matrix.inputs


def _numpy_rate(tokens: int, outputs: int, inputs: int) -> float:
    import numpy as np

    left, right = np.ones((tokens, inputs), np.float32), np.ones((inputs, outputs), np.float32)
    return _repeated(lambda: left @ right, _MATRIX_SECONDS) * 2 * tokens * outputs * inputs


def _score_rate(shape: ModelShape, run: Run, device: str) -> float:
    """Prunes noise by the method asked for; SparseGPT's work is counted in operations instead."""
    matrices = [matrix for layer in shape.layers for matrix in targets(layer, run.config)]
    if not matrices or run.has_hessians:
        return float("inf")
    try:
        import torch
    except ImportError:
        return float("inf")
    from hf_mlopt.pruning.apply import prune_weights_

    width = max(matrices, key=lambda matrix: matrix.numel).inputs
    weight_EOD = torch.randn(1, max(1, _SCORED // width), width, device=device)
    moments = torch.rand(1, width, device=device, dtype=torch.float64)

    def score():
        prune_weights_(weight_EOD.clone(), moments, run.config)
        if device != "cpu":
            torch.cuda.synchronize()

    with torch.no_grad():
        return _repeated(score, _SCORE_SECONDS) * weight_EOD.numel()


def _repeated(action, seconds: float) -> float:
    """Times an action is done in a second; the first one, which warms up, does not count unless it is the only one."""
    started = time.perf_counter()
    action()
    first = time.perf_counter() - started
    if first > seconds:
        return 1 / first
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        action()
        done += 1
    return done / elapsed


def _disk_rates(directory: Path) -> tuple[float, float]:
    """Bytes a second that are read and written, of a file that the system's cache is told to forget in between."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    piece, buffer = os.urandom(_PIECE), bytearray(_PIECE)
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".hf_mlopt-") as stream:
        descriptor = stream.fileno()

        def write(_number: int) -> int:
            count = os.write(descriptor, piece)
            os.fsync(descriptor)
            return count

        written, write_rate = _pieces(write, _FILE_PIECES)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        _, read_rate = _pieces(lambda number: os.preadv(descriptor, [buffer], number * _PIECE), written // _PIECE)
        return read_rate, write_rate


def _pieces(transfer, most: int) -> tuple[int, float]:
    """Moves pieces until the time is over, one at least; returns the bytes and the bytes a second."""
    started, moved, number = time.perf_counter(), 0, 0
    while number == 0 or (number < most and time.perf_counter() - started < _DISK_SECONDS):
        moved += transfer(number)
        number += 1
    return moved, moved / (time.perf_counter() - started)
