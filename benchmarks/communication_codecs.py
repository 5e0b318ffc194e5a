"""The parts of `communication.py` that need no second process: what a codec loses, and how quick it is."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import SHARED, Results, paired_ratio

from hf_mlopt.communication.config import EXEMPT
from hf_mlopt.communication.ddp import exempt_parameters
from hf_mlopt.communication.quantizers import BinGradB, BinGradPB, Codec, ScaledSign, codec


BLOCK = 2048
BINARY = ("sign", "bingrad-b", "bingrad-pb")
ORQ = [f"orq-{levels}{clip}" for levels in (3, 5, 9) for clip in ("", "-2.5sigma", "-optimal")]
SHARED_ORQ = ("orq-9-shared", "orq-9-shared-optimal")
EVEN = ("terngrad", "terngrad-2.5sigma", "qsgd-5", "qsgd-9", "linear-5", "linear-9", "linear-16")
OTHERS = ("top-k-0.01", "top-k-0.05", "fp8", "bf16")
CODECS = (*BINARY, *EVEN, *ORQ, *SHARED_ORQ, *OTHERS)
# Scaled by the largest magnitude and by the range; both take 4 bits and round stochastically.
FOUR_BITS = ("qsgd-15", "linear-16")
DISTRIBUTIONS = {
    "Gaussian": lambda size, rng: rng.normal(size=size),
    "Laplace": lambda size, rng: rng.laplace(size=size),
    "Student-t3": lambda size, rng: rng.standard_t(3, size),
    "skewed": lambda size, rng: np.where(
        rng.random(size) < 0.7, rng.normal(-0.5, 0.25, size), rng.normal(1, 0.5, size)
    ),
}


def measure_errors(results: Results, seeds: tuple[int, ...], blocks: int, draws: int, steps: tuple[int, ...]) -> None:
    """Every codec on every distribution, then on recorded gradients."""
    for name, sample in DISTRIBUTIONS.items():
        for seed in seeds:
            values = sample(blocks * BLOCK, np.random.default_rng(seed)).astype(np.float32)
            _add_errors(results, torch.from_numpy(values), draws, {"source": name, "seed": seed})
    if not SHARED.is_dir():
        return
    for name, record in {"transformer": transformer_gradients, "ResNet": resnet_gradients}.items():
        for step, flat in record(steps):
            rows = flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)
            chosen = rows[torch.linspace(0, len(rows) - 1, min(2 * blocks, len(rows))).long()]
            _add_errors(results, chosen.flatten(), draws, {"source": name, "seed": 0, "step": step})


def _add_errors(results: Results, flat: torch.Tensor, draws: int, where: dict) -> None:
    least = _least_errors(flat.view(-1, BLOCK))
    for (levels, ends), error in least.items():
        results.add(kind="optimum", **where, levels=levels, ends=ends, error=error)
    for name in CODECS:
        used = codec(name)
        bits = 8 * used.wire_bytes(len(flat)) / len(flat)
        error, best = relative_error(used, flat, draws), least.get(optimum_of(used))
        row = {"codec": name, "bits": bits, "error": error, "gaussian_bound": 4.0**-bits}
        results.add(kind="error", **where, **row, optimum=best, of_optimum=best and error / best)


def relative_error(used: Codec, flat: torch.Tensor, draws: int) -> float:
    """E‖Q(v) - v‖² / ‖v‖², the mean over draws where rounding is stochastic."""
    exact = flat.double()
    errors = [
        (used.decode(used.encode(flat, (draw,))).double() - exact).square().sum()
        for draw in range(draws if used.stochastic else 1)
    ]
    return float(sum(errors) / len(errors) / exact.square().sum())


def optimum_of(used: Codec) -> tuple[int, str] | None:
    """Levels and ends of the least error that a code of this kind can have."""
    if isinstance(used, ScaledSign | BinGradB):
        return 2, "nearest"
    if isinstance(used, BinGradPB):
        return 2, "free"
    if getattr(used, "alphabet", 256) == 256:
        return None
    return used.alphabet, "entries" if getattr(used, "clip", "none") == "none" else "free"


def _least_errors(rows_ND: torch.Tensor) -> dict[tuple[int, str], float]:
    """By levels and ends, over all blocks and relative to their norm."""
    sums: dict[tuple[int, str], float] = {}
    for row in rows_ND.double().numpy():
        points = np.sort(row)
        errors = {(2, "nearest"): least_of_two(points)}
        cost = rounding_cost(points)
        for ends, counts in (("entries", (3, 5, 9, 16)), ("free", (2, 3, 5, 9))):
            found = least_rounding_errors(points, cost, max(counts), ends == "free")
            errors |= {(levels, ends): found[levels] for levels in counts}
        for key, error in errors.items():
            sums[key] = sums.get(key, 0.0) + error
    norm = float(rows_ND.double().square().sum())
    return {key: error / norm for key, error in sums.items()}


def rounding_cost(points: np.ndarray) -> np.ndarray:
    """`[d, d]`: E error of stochastic rounding between levels at sorted points i and j of what lies there, i <= j."""
    count, sums, squares = _prefix_sums(points)
    low, high = points[:, None], points[None, :]
    between = np.subtract.outer(sums, sums).T
    cost = (low + high) * between - low * high * np.subtract.outer(count, count).T
    cost -= np.subtract.outer(squares, squares).T
    cost[np.tril_indices(len(points), -1)] = np.inf
    return cost


def least_rounding_errors(points: np.ndarray, cost: np.ndarray, most: int, is_free: bool) -> dict[int, float]:
    """
    The least error of any levels among the points, for 2 … `most` of them, by dynamic programming in O(L d²): the
    least error of what lies below point j with a level there is min_i best_i + cost_ij. With free ends what lies
    beyond saturates; the best end may lie between two points, whose error is lower by next to nothing.
    """
    count, sums, squares = _prefix_sums(points)
    if is_free:
        best = count * points**2 - 2 * points * sums + squares
        after = len(points) - count
        beyond = (squares[-1] + points[-1] ** 2 - squares) - 2 * points * (sums[-1] + points[-1] - sums)
        beyond += after * points**2
    else:
        best, beyond = np.full(len(points), np.inf), np.full(len(points), np.inf)
        best[0] = beyond[-1] = 0.0
    total, errors = np.empty_like(cost), {}
    for levels in range(2, most + 1):
        np.add(best[:, None], cost, out=total)
        best = total.min(axis=0)
        errors[levels] = float((best + beyond).min())
    return errors


def least_of_two(points: np.ndarray) -> float:
    """The least error of rounding to the nearer of two levels, which are then means of what lies on either side."""
    count, sums, squares = _prefix_sums(points)
    left = squares[1:] - sums[1:] ** 2 / count[1:]
    rest, after = sums[-1] + points[-1] - sums[1:], len(points) - count[1:]
    right = squares[-1] + points[-1] ** 2 - squares[1:] - rest**2 / after
    return float((left + right).min())


def _prefix_sums(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number, sum and sum of squares of the points before each."""
    before = [np.concatenate(([0.0], np.cumsum(values)[:-1])) for values in (points, points**2)]
    return np.arange(len(points), dtype=np.float64), *before


def transformer_gradients(steps: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """Of a Llama of two layers that learns the bytes of TinyStories, at numbers of steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = (SHARED / "text" / "tinystories.txt").read_bytes()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **shape))

    def loss() -> torch.Tensor:
        starts = torch.randint(len(tokens) - 128, (8,))
        rows = torch.stack([tokens[start : start + 128] for start in starts])
        return model(input_ids=rows, labels=rows).loss

    yield from _recorded(model, torch.optim.AdamW(model.parameters(), 1e-3), loss, steps)


def resnet_gradients(steps: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """Of the ResNet of `optimizers.py` that learns a part of CIFAR-10, at numbers of steps."""
    from optimizers_quality import Images

    task = Images("CIFAR-10 subset", short=False)
    torch.manual_seed(0)
    model = task.model()
    loss = lambda: task.loss(model, torch.randint(len(task.train), (task.batch,)))  # noqa: E731
    yield from _recorded(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), loss, steps)


def _recorded(model, optimizer, loss: Callable[[], torch.Tensor], steps: tuple[int, ...]):
    """The gradients that would travel coded, at these steps, the first of which is 1."""
    exempt = exempt_parameters(model, list(EXEMPT))
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        loss().backward()
        if step in steps:
            yield step, torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name not in exempt])
        optimizer.step()


def synchronizer(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


class Timed:
    """
    A codec at work on a gradient.

    Args:
        name (`str`): Of the codec.
        flat (`torch.Tensor`): `[elements]`, float32.
    """

    def __init__(self, name: str, flat: torch.Tensor):
        self.codec, self.flat, self.out = codec(name), flat, torch.empty_like(flat)
        self.wait = synchronizer(flat.device.type)
        self.payload = self.codec.encode(flat, (0,))

    def encode(self) -> None:
        self.codec.encode(self.flat, (0,))
        self.wait()

    def decode(self) -> None:
        self.codec.decode(self.payload, self.out)
        self.wait()

    def both(self) -> None:
        self.encode()
        self.decode()

    def copy(self) -> None:
        self.out.copy_(self.flat)
        self.wait()


def gradient(elements: int, device: str) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(device)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def measure_codec(results: Results, name: str, flat: torch.Tensor, pairs: int) -> None:
    """Elements per second, and how many copies of a float32 tensor fit in the time."""
    timed, elements = Timed(name, flat), len(flat)
    row = {"device": device_name(flat.device.type), "codec": name, "elements": elements}
    row["bytes_per_element"] = timed.codec.wire_bytes(elements) / elements
    for part, work in (("encode", timed.encode), ("decode", timed.decode)):
        ratio = paired_ratio(work, timed.copy, pairs)
        row[f"{part}_per_second"] = elements / (ratio["ratio_median"] * ratio["baseline_seconds"])
        row |= {f"{part}_in_copies_{key}": ratio[f"ratio_{key}"] for key in ("median", "min", "max")}
    results.add(kind="codec", **row, copy_bytes_per_second=8 * elements / ratio["baseline_seconds"], pairs=pairs)


def measure_claims(results: Results, flat: torch.Tensor, pairs: int) -> None:
    """ORQ with nine levels against even levels in as many bits, in turn."""
    claim, device = (1.5 if flat.is_cuda else 4.0), device_name(flat.device.type)
    for name in ("orq-9", "orq-9-shared"):
        for baseline in FOUR_BITS:
            ours, theirs = Timed(name, flat), Timed(baseline, flat)
            for part in ("encode", "decode", "both"):
                ratio = paired_ratio(getattr(ours, part), getattr(theirs, part), pairs)
                row = {"device": device, "elements": len(flat), "codec": name, "baseline": baseline, "part": part}
                results.add(kind="codec-ratio", **row, **ratio, claim_at_most=claim if part == "both" else None)
