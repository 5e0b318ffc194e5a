"""
Does a codec pay? It has to beat an all-reduce in bfloat16, on the link and the processor at hand.

Coding takes the processor that the backward pass runs on, so it counts in full; what travels hides behind the backward
pass as far as that lasts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_mlopt.communication.collectives import shard_bounds
from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.errors import ConfigurationError


def bytes_sent(up: Codec, down: Codec, numel: int, world_size: int, gathers_all: bool) -> float:
    """
    Bytes that leave a rank, levels and all, when `numel` gradients are averaged; the mean over the ranks.

    Args:
        up (`Codec`), down (`Codec`): How parts and their means travel.
        numel (`int`): Gradients.
        world_size (`int`): Ranks.
        gathers_all (`bool`): Whether every rank sends all to all others, in `up`, instead of in two phases.
    """
    if gathers_all:
        return float((world_size - 1) * up.wire_bytes(numel))
    sizes = [stop - start for start, stop in shard_bounds(numel, world_size, getattr(up, "block", 1))]
    upward = (world_size - 1) / world_size * sum(up.wire_bytes(size) for size in sizes)
    return upward + (world_size - 1) * max(down.wire_bytes(size) for size in sizes)  # gathered at equal lengths


def bf16_bytes(numel: int, world_size: int) -> float:
    """Bytes that leave a rank in a ring all-reduce in bfloat16."""
    return 2 * (world_size - 1) / world_size * 2 * numel


@dataclass(frozen=True)
class Measured:
    """
    What [`decide`] needs to know of a machine; the same on all ranks.

    Args:
        bandwidth (`float`): Bytes per second that leave a rank during an all-reduce in bfloat16.
        codec_rate (`float`): Gradients per second through all encoding and decoding that a rank does in a step.
    """

    bandwidth: float
    codec_rate: float


@dataclass(frozen=True)
class Verdict:
    """
    Whether a codec pays against bfloat16.

    Args:
        codec (`str`): Its name, or those of both ways.
        ratio (`float`): Bytes sent, over those of bfloat16.
        bandwidth (`float`), crossover (`float`): Bytes per second: of this link, and below which the codec pays.
        coding_seconds (`float`): Encoding and decoding in a step.
        saved_seconds (`float`): What a step becomes shorter by; below 0 it becomes longer.
        step_seconds (`float`): Backward pass, and the part of an exchange in bfloat16 that it does not hide.
    """

    codec: str
    ratio: float
    bandwidth: float
    crossover: float
    coding_seconds: float
    saved_seconds: float
    step_seconds: float

    @property
    def pays(self) -> bool:
        return self.saved_seconds > 0

    @property
    def text(self) -> str:
        """In a sentence."""
        sends = f"{self.codec} sends {self.ratio:.2f} of bf16's bytes"
        link = f"at the measured {_rate(self.bandwidth)}"
        step = f"{1e3 * self.step_seconds:.3g}"
        if self.pays:
            return f"{sends}; {link} a step saves {1e3 * self.saved_seconds:.3g} ms of {step}: it pays"
        remedy = "take bf16, grad_codec=None or a codec that is quicker"
        if self.ratio >= 1:
            return f"{sends}: it does not pay on any link, {remedy}"
        longer = f"{link} coding takes {1e3 * self.coding_seconds:.3g} ms and a step of {step} ms becomes"
        longer += f" {-1e3 * self.saved_seconds:.3g} ms longer"
        return f"{sends}, but {longer}: it does not pay, {remedy}; it pays below {_rate(self.crossover)}"


def decide(
    up: str | Codec,
    numel: int,
    world_size: int,
    *,
    bandwidth: float,
    codec_rate: float,
    backward_seconds: float = 0.0,
    exposed_seconds: float | None = None,
    down: str | Codec | None = None,
    gathers_all: bool | None = None,
) -> Verdict:
    """
    Whether a codec makes a step shorter than bfloat16 does.

    It pays below the smaller of (r - b) C and r N / (H + N / C) bytes per second, where b and r are the bytes of a
    gradient in the codec and in bfloat16, C the codec's gradients per second, N the gradients of a step, and H the
    seconds of their exchange that the backward pass can hide; the former for H = 0.

    Args:
        up (`str` or `Codec`): What a rank sends.
        numel (`int`): Gradients coded in a step.
        world_size (`int`): Ranks, at least 2.
        bandwidth (`float`), codec_rate (`float`): As in [`Measured`].
        backward_seconds (`float`, *optional*, defaults to 0): From the first gradient to the last.
        exposed_seconds (`float`, *optional*): Of an exchange in bfloat16, what the backward pass does not hide. By
            default what goes beyond `backward_seconds`.
        down (`str` or `Codec`, *optional*): What is sent back; by default as `up`.
        gathers_all (`bool`, *optional*): As for [`bytes_sent`]; by default for two ranks.

    Raises:
        ConfigurationError: If there is nothing to send, or a measurement is not positive.
    """
    positive = {"numel": numel, "world_size": world_size - 1, "bandwidth": bandwidth, "codec_rate": codec_rate}
    for name, value in positive.items():
        if not value > 0:
            allowed = "must be at least 2" if name == "world_size" else "must be above 0"
            raise ConfigurationError(name, world_size if name == "world_size" else value, allowed)
    up = codec(up) if isinstance(up, str) else up
    down = codec(down) if isinstance(down, str) else down or up
    gathers_all = world_size == 2 if gathers_all is None else gathers_all
    coded, reference = bytes_sent(up, down, numel, world_size, gathers_all), bf16_bytes(numel, world_size)
    coding, exchange = numel / codec_rate, reference / bandwidth
    hidden = backward_seconds if exposed_seconds is None else max(exchange - exposed_seconds, 0.0)
    exposed = max(exchange - hidden, 0.0)
    return Verdict(
        codec=up.name if gathers_all or up == down else f"{up.name} (back {down.name})",
        ratio=coded / reference,
        bandwidth=bandwidth,
        crossover=max(0.0, min((reference - coded) / coding, reference / (hidden + coding))),
        coding_seconds=coding,
        saved_seconds=exposed - max(coded / bandwidth - hidden, 0.0) - coding,
        step_seconds=backward_seconds + exposed,
    )


def measure(
    up: Codec,
    down: Codec,
    numel: int,
    group=None,
    device: torch.device | str = "cpu",
    gathers_all: bool | None = None,
    feedback: bool = False,
    repeats: int = 3,
) -> Measured:
    """
    Times an all-reduce in bfloat16 and the codecs; all ranks call it at the same time, and get what the slowest found.

    Args:
        up (`Codec`), down (`Codec`): What a rank sends, and what is sent back.
        numel (`int`): Gradients to time them on.
        group (`ProcessGroup`, *optional*): The ranks.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where gradients are.
        gathers_all (`bool`, *optional*): As for [`bytes_sent`]; by default for two ranks.
        feedback (`bool`, *optional*, defaults to `False`): Whether a rank keeps what it has not sent.
        repeats (`int`, *optional*, defaults to 3): Times each is timed, after once for nothing.
    """
    world = dist.get_world_size(group)
    gathers_all = world == 2 if gathers_all is None else gathers_all
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device)
    half, sum_ = flat.bfloat16(), torch.zeros_like(flat)
    times = {"exchange": lambda: dist.all_reduce(half, group=group)}
    for way, used in (("up", up), ("down", down)):
        payload = used.encode(flat, (0,))
        times[f"encode {way}"] = lambda used=used: used.encode(flat, (0,))
        times[f"decode {way}"] = lambda used=used, payload=payload: used.decode(payload, sum_, accumulate=True)
        if gathers_all or down == up:
            break
    if feedback:
        times["feedback"] = lambda: _feedback_arithmetic(flat, sum_)
    seconds = torch.tensor([_seconds(call, group, flat.device, repeats) for call in times.values()], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    slowest = dict(zip(times, seconds.tolist(), strict=True))
    encode, decode = slowest["encode up"], slowest["decode up"]
    if gathers_all:
        coding = encode + world * decode
    else:
        back = slowest.get("encode down", encode) / world + slowest.get("decode down", decode)
        coding = encode + (1 + feedback) * decode + back
    coding += slowest.get("feedback", 0.0)
    return Measured(bf16_bytes(numel, world) / slowest["exchange"], numel / coding)


def _feedback_arithmetic(flat: torch.Tensor, kept: torch.Tensor) -> None:
    """What error feedback does beside coding: adds what was kept, keeps the rest, moves the weights and moves back."""
    wanted = flat.clone().add_(kept)
    unsent = wanted.sub(kept)
    for other in (unsent, wanted):
        other.dot(unsent)
    wanted.dot(wanted)
    clean = flat.clone()
    torch.sub(clean, unsent, out=wanted)
    wanted.copy_(clean)


def _seconds(call: Callable, group, device: torch.device, repeats: int) -> float:
    """The median time of a call; all ranks begin together, as in a step they share processor and link."""
    taken = []
    for _ in range(1 + repeats):
        dist.barrier(group)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.2g} GB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.2g} MB/s"
