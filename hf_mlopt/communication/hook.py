"""The DDP communication hook that codes gradients."""

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hf_mlopt.communication.collectives import Exchange, all_gather_mean, naming_this_rank, two_phase_mean
from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.fifo import Fifo
from hf_mlopt.communication.hierarchical import NodeGroups, hierarchical_mean
from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.communication.residuals import Residuals


@dataclass
class Traffic:
    """
    Sums over the buckets since they were last read.

    Args:
        bytes_sent (`int`): Bytes that left this rank.
        bytes_across (`int`): Of these, coded bytes that left its node, with `collective="hierarchical"`.
        elements (`int`): Gradients exchanged, coded or not.
        coded (`int`): Of these, coded.
        seconds (`float`): Spent coding and exchanging.
        error (`float`), norm (`float`): Sums of squares of what was not sent, and of what should have been.
        product (`float`): Sum of their products.
        down_error (`float`), down_norm (`float`): The same of what this rank's shards of the mean sent back.
        spread (`float`), spread_of (`float`): When errors were averaged: sums of squares of their distance to the
            mean, and of them.
        buckets (`int`), plain_buckets (`int`): Buckets, and those that travelled in float32.
        steps (`int`): Backward passes that ended in an exchange.
    """

    bytes_sent: int = 0
    bytes_across: int = 0
    elements: int = 0
    coded: int = 0
    seconds: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    product: float = 0.0
    down_error: float = 0.0
    down_norm: float = 0.0
    spread: float = 0.0
    spread_of: float = 0.0
    buckets: int = 0
    plain_buckets: int = 0
    steps: int = 0

    def logs(self, bf16_bytes: float) -> dict[str, float]:
        """
        As numbers for a log; bytes and seconds are those of a step.

        Args:
            bf16_bytes (`float`): What a rank sends for each gradient in bfloat16.
        """
        return {
            "grad_bytes": self.bytes_sent / max(self.steps, 1),
            "grad_of_bf16": self.bytes_sent / max(bf16_bytes * self.elements, 1),
            "grad_seconds": self.seconds / max(self.steps, 1),
            "grad_plain_buckets": self.plain_buckets / max(self.buckets, 1),
        }

    @property
    def unsent(self) -> float:
        """Length of what was not sent, over that of what should have been."""
        return _ratio(self.error, self.norm)

    @property
    def cosine(self) -> float:
        """Of what was sent, with what should have been."""
        sent = self.norm - 2 * self.product + self.error
        return (self.norm - self.product) / (self.norm * sent) ** 0.5 if self.norm > 0 and sent > 0 else 0.0

    def feedback_logs(self) -> dict[str, float]:
        """What error feedback knows; some is there only with a coded way back, or when errors were averaged."""
        logs = {
            "grad_unsent": self.unsent,
            "grad_cosine": self.cosine,
            "grad_unsent_norm": (self.error / max(self.steps, 1)) ** 0.5,
        }
        if self.down_norm:
            logs["grad_unsent_down"] = _ratio(self.down_error, self.down_norm)
        if self.spread_of:
            logs["grad_unsent_spread"] = _ratio(self.spread, self.spread_of)
        return logs


@dataclass
class _Bucket:
    """A bucket as the thread gets it: everything is read off DDP's own object before the hook returns."""

    index: int
    gradients: dict[str, torch.Tensor]
    step: int
    is_plain: bool


class CompressionState:
    """
    What the hook keeps between its calls.

    Args:
        config (`CompressionConfig`): How gradients travel.
        names (`dict[int, str]`): Name by `id` of every parameter.
        exempt (`set[str]`): Names of parameters that travel in float32.
        group (`ProcessGroup`): Of these collectives alone, so that DDP's own never mix with them.
        nodes (`NodeGroups`, *optional*): For `collective="hierarchical"`.
    """

    def __init__(
        self,
        config: CompressionConfig,
        names: dict[int, str],
        exempt: set[str],
        group,
        nodes: NodeGroups | None = None,
    ):
        self.config, self.names, self.exempt, self.group, self.nodes = config, names, exempt, group, nodes
        self.up, self.down = config.up, config.down
        self.of_bucket: dict[tuple[str, ...], Codec] = {}  # coded both ways in a codec of its own, see `Budget`
        self.residuals, self.down_residuals = Residuals(), Residuals()
        self.zeros: dict[str, torch.Tensor] = {}  # by name: where a weight stays zero
        self.traffic = Traffic()
        self.step = 0
        self.is_finite = True
        self.loss_scale = 1.0
        self.layout: list[tuple[str, ...]] = []
        self.saved_layout: list[tuple[str, ...]] = []
        self._fifo = Fifo("gradient compression")
        world = dist.get_world_size(group)
        self.gathers_all = config.collective == "all-gather" or (config.collective == "auto" and world == 2)

    def __getstate__(self):  # DDP copies a hook's state in `__getstate__` of its own
        return {key: value for key, value in self.__dict__.items() if key not in ("group", "nodes", "_fifo")}

    def close(self) -> None:
        """Ends the thread."""
        self._fifo.close()

    def commit(self, unused: Collection[str] = ()) -> None:
        """
        The optimizer has taken its step with these gradients.

        Args:
            unused (`Collection[str]`): Names of parameters that DDP has left without a gradient on all ranks.
        """
        self.residuals.commit(unused)
        self.down_residuals.commit(unused)

    def discard(self) -> None:
        """The step was skipped: what was not sent is what it was before."""
        self.residuals.discard()
        self.down_residuals.discard()

    def exchange(self, bucket: _Bucket) -> None:
        """Replaces the gradients of a bucket by their mean; all of it in the order of the buckets."""
        start = time.perf_counter()
        coded = {name: gradient for name, gradient in bucket.gradients.items() if name not in self.exempt}
        if bucket.is_plain or 4 * sum(gradient.numel() for gradient in coded.values()) < self.config.min_bytes:
            coded = {}
            self.traffic.plain_buckets += 1
        plain = {name: gradient for name, gradient in bucket.gradients.items() if name not in coded}
        if plain:
            self._exchange_plain(plain)
        if coded:
            self._exchange_coded(bucket, tuple(coded), list(coded.values()))
        self.traffic.buckets += 1
        self.traffic.seconds += time.perf_counter() - start

    def mask(self, names: tuple[str, ...], sizes: list[int], *flats: torch.Tensor | None) -> None:
        """
        Zeroes what belongs to weights that stay zero: codes of few levels know no zero, and would move them.

        Args:
            names (`tuple[str]`), sizes (`list[int]`): Of the parameters, and their elements.
            *flats (`torch.Tensor`, *optional*): Vectors of these parameters, in place.
        """
        for flat in flats if any(name in self.zeros for name in names) else ():
            for name, part in zip(names, () if flat is None else flat.split(sizes), strict=flat is not None):
                if name in self.zeros:
                    part.masked_fill_(self.zeros[name].view(-1), 0)

    def _unsent(self, names: tuple[str, ...], sizes: list[int], device: torch.device) -> torch.Tensor:
        unsent = self.residuals.flat(names, sizes, device)
        if not self.gathers_all and names not in self.down_residuals.groups():
            # The shards are other ones now. What this rank's has lost goes up again, from this rank alone: world
            # times, then, which keeps the mean.
            lost = self.down_residuals.flat(names, sizes, device)
            unsent.add_(lost, alpha=dist.get_world_size(self.group))
            lost.zero_()
        return unsent

    def _exchange_plain(self, named: dict[str, torch.Tensor]) -> None:
        for name, gradient in named.items():
            if self.residuals.get(name) is not None:  # it was coded before; what was not sent then goes now
                unsent = self._unsent((name,), [gradient.numel()], gradient.device)
                gradient.add_(unsent.view(gradient.shape), alpha=self.loss_scale)
                self.residuals.propose((name,), torch.zeros_like(unsent))
        gradients = list(named.values())
        world = dist.get_world_size(self.group)
        whole = len(gradients) == 1 and gradients[0].is_contiguous()
        flat = gradients[0].view(-1) if whole else torch.cat([gradient.flatten() for gradient in gradients])
        flat = flat.float()
        with naming_this_rank():
            dist.all_reduce(flat, group=self.group)
        flat.div_(world)
        self.mask(tuple(named), [gradient.numel() for gradient in gradients], flat)
        _scatter(flat, gradients)
        self.is_finite = self.is_finite and bool(flat.isfinite().all())
        self.traffic.bytes_sent += round(2 * (world - 1) / world * 4 * flat.numel())
        self.traffic.elements += flat.numel()

    def _exchange_coded(self, bucket: _Bucket, names: tuple[str, ...], gradients: list[torch.Tensor]) -> None:
        feedback, sizes = self.config.has_feedback, [gradient.numel() for gradient in gradients]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).float()
        if self.loss_scale != 1.0:
            flat.div_(self.loss_scale)
        if feedback:
            flat.add_(self._unsent(names, sizes, flat.device))
        self.mask(names, sizes, flat)
        result = self._coded_mean(bucket, names, sizes, flat)
        self.mask(names, sizes, result.mean, result.sent, result.down_error)
        is_finite = bool(result.mean.isfinite().all())  # the same on every rank: all have decoded the same bytes
        if feedback and is_finite:
            unsent = flat.sub(result.sent)
            self.traffic.error += float(unsent.square().sum())
            self.traffic.norm += float(flat.square().sum())
            self.traffic.product += float(flat.dot(unsent))
            self.residuals.propose(names, unsent)
            if result.down_error is not None:
                self.down_residuals.propose(names, result.down_error)
                self.traffic.down_error += float(result.down_error.square().sum())
                self.traffic.down_norm += result.down_norm
        self.is_finite = self.is_finite and is_finite
        if self.loss_scale != 1.0:
            result.mean.mul_(self.loss_scale)
        _scatter(result.mean, gradients)
        self.traffic.bytes_sent += result.bytes_sent
        self.traffic.elements += flat.numel()
        self.traffic.coded += flat.numel()

    def _coded_mean(self, bucket: _Bucket, names: tuple[str, ...], sizes: list[int], flat: torch.Tensor) -> Exchange:
        feedback = self.config.has_feedback

        def key(phase: int, rank: int) -> tuple[int, ...]:
            return (self.config.seed, bucket.step, bucket.index, phase, rank)

        up, back = [self.of_bucket.get(names, used) for used in (self.up, self.down)]
        if self.gathers_all:
            return all_gather_mean(flat, up, key, self.group, feedback)
        down = self.down_residuals.flat(names, sizes, flat.device) if feedback else None
        if self.nodes is not None:
            result = hierarchical_mean(flat, up, back, key, self.nodes, feedback, down)
            self.traffic.bytes_across += result.bytes_across
            return result
        return two_phase_mean(flat, up, back, key, self.group, feedback, down)


def compression_hook(state: CompressionState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """
    Averages the gradients of a bucket over the ranks in the codec of `state`.

    Args:
        state (`CompressionState`): What it keeps.
        bucket (`GradBucket`): DDP's; its buffer is overwritten.
    """
    names, gradients = tuple(state.names[id(parameter)] for parameter in bucket.parameters()), bucket.gradients()
    index, buffer = bucket.index(), bucket.buffer()
    if index == 0:
        state.is_finite, state.layout = True, []
    is_plain = state.step < state.config.warmup_steps_uncompressed or dist.get_world_size(state.group) == 1
    parts = [(index, names)]
    if index == 0 and bucket.is_last() and sorted(names) == sorted(sum(state.saved_layout, ())):
        # DDP begins with all gradients in one bucket. A resumed run codes them as the one before has.
        parts = list(enumerate(state.saved_layout))
    of = dict(zip(names, gradients, strict=True))
    buckets = [_Bucket(number, {name: of[name] for name in part}, state.step, is_plain) for number, part in parts]
    state.layout += [part for _, part in parts]
    if bucket.is_last():
        state.step += 1
        state.traffic.steps += 1
        state.saved_layout = []

    def task() -> torch.Tensor:
        for part in buckets:
            state.exchange(part)
        return buffer

    return state._fifo.submit(task)


def _ratio(of_error: float, of_all: float) -> float:
    return (of_error / of_all) ** 0.5 if of_all else 0.0


def _scatter(flat: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
