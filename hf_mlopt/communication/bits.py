"""Bits where they help most: a codec for every bucket, of the least sum of relative errors under a budget of bytes."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils import logging

from hf_mlopt.communication.pays import bytes_sent
from hf_mlopt.communication.quantizers import Codec
from hf_mlopt.communication.quantizers.interface import BlockCodec
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.errors import ConfigurationError


if TYPE_CHECKING:
    from hf_mlopt.communication.ddp import Compression

logger = logging.get_logger(__name__)

CHOICES = ("bingrad-b", "orq-3-optimal", "orq-5-optimal", "orq-9-optimal")  # all fit for error feedback
_UNITS = 1 << 16  # a budget is spent in parts of this number


# B buckets   C codecs


def relative_errors(vectors: list[torch.Tensor], codecs: list[Codec], group=None, seed: int = 0) -> np.ndarray:
    """
    ‖Q(v) - v‖² / ‖v‖² of every codec on every vector, the sums over all ranks; the same numbers on all of them.

    Args:
        vectors (`list[torch.Tensor]`): Flat gradients, one a bucket, as many and as long on all ranks.
        codecs (`list[Codec]`): What may send them.
        group (`ProcessGroup`, *optional*): The ranks.
        seed (`int`, *optional*, defaults to 0): Of stochastic rounding.

    Returns:
        `numpy.ndarray`: `[buckets, codecs]`; 0 for a vector of zeros.
    """
    sums_BC = []
    for number, vector in enumerate(vectors):
        lost = [
            used.decode(used.encode(vector, (seed, number, dist.get_rank(group)))).sub_(vector).square().sum()
            for used in codecs
        ]
        sums_BC.append(torch.stack([*lost, vector.float().square().sum()]))
    sums = torch.stack(sums_BC)
    dist.all_reduce(sums, group=group)
    sums = sums.double().cpu().numpy()
    return sums[:, :-1] / np.where(sums[:, -1:] > 0, sums[:, -1:], 1)


def choose(errors_BC: np.ndarray, bytes_BC: np.ndarray, max_bytes: float) -> list[int]:
    """
    The codec of every bucket, so that the sum of errors is least and all take at most `max_bytes`: a dynamic programme
    over the bytes spent, counted in parts of 1/65536 of the budget and rounded up (exact up to 65536 bytes).

    Args:
        errors_BC (`numpy.ndarray`): Error of a codec on a bucket.
        bytes_BC (`numpy.ndarray`): Bytes it takes there.
        max_bytes (`float`): The budget.

    Returns:
        `list[int]`: Number of a codec for each bucket.

    Raises:
        ConfigurationError: If the smallest codecs take more.
    """
    unit = max(1, math.ceil(max_bytes / _UNITS))
    cost_BC = np.ceil(np.asarray(bytes_BC) / unit).astype(int)
    budget = int(max_bytes // unit)
    least = np.full(budget + 1, np.inf)  # error of the buckets so far, by what they take
    least[0] = 0
    picks = []
    for error_C, cost_C in zip(errors_BC, cost_BC, strict=True):
        spent_CU = np.full((len(error_C), budget + 1), np.inf)
        for number, (error, cost) in enumerate(zip(error_C, cost_C, strict=True)):
            if cost <= budget:
                spent_CU[number, cost:] = least[: budget + 1 - cost] + error
        picks.append(spent_CU.argmin(axis=0))
        least = spent_CU.min(axis=0)
    spent = int(least.argmin())
    if not np.isfinite(least[spent]):
        needed = unit * int(cost_BC.min(axis=1).sum())
        raise ConfigurationError("max_bytes", max_bytes, f"the smallest codecs take {needed} bytes a step; allow more")
    chosen = []
    for pick, cost_C in zip(reversed(picks), reversed(cost_BC), strict=True):
        chosen.append(int(pick[spent]))
        spent -= cost_C[chosen[-1]]
    return chosen[::-1]


class Budget:
    """
    Gives every bucket a codec of its own, by the gradients of the first coded step: those of the ranks, before coding
    and without what was left from earlier steps. Once, on all ranks together; a run that is resumed chooses anew.

    Args:
        compression (`Compression`): Of [`compress`].
        max_bytes (`float`): What a rank may send in a step for coded gradients; what is exempt comes on top.
        choices (`tuple[str]`, *optional*): Codecs to choose from, with the block of the one in use.

    `chosen` is the number of buckets by codec, and None until then.

    Raises:
        ConfigurationError: If the codec in use has no blocks; in training, if the budget is too small.
    """

    def __init__(self, compression: "Compression", max_bytes: float, choices: tuple[str, ...] = CHOICES):
        up = compression.state.up
        if not isinstance(up, BlockCodec):
            raise ConfigurationError("grad_codec", up.name, "must be a codec of blocks, whose shards stay the same")
        self.compression, self.max_bytes = compression, max_bytes
        self.codecs = [codec(name, block=up.block) for name in choices]
        self.chosen: dict[str, int] | None = None
        self._gradients: dict[str, torch.Tensor] = {}
        self._until: int | None = None
        module = compression.model.module
        self._handles = [module.register_forward_pre_hook(lambda module, _: self._before_forward(module))]
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in compression.state.exempt:
                self._handles.append(parameter.register_hook(lambda gradient, name=name: self._keep(name, gradient)))

    def close(self) -> None:
        """Ends it."""
        for handle in self._handles:
            handle.remove()
        self._gradients = {}

    def _keep(self, name: str, gradient: torch.Tensor) -> None:
        if self._until is not None and self.compression.state.step == self._until - 1:
            self._gradients[name] = gradient.detach().clone()  # DDP writes the mean into it

    def _before_forward(self, module: torch.nn.Module) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        state = self.compression.state
        if self._until is None:  # not earlier: a checkpoint may have been loaded in between
            self._until = max(state.step, state.config.warmup_steps_uncompressed) + 1
        if state.step < self._until or state.residuals.has_pending:
            return
        self._choose(dict(module.named_parameters()))
        self.close()

    def _choose(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        state = self.compression.state
        buckets = [tuple(name for name in names if name not in state.exempt) for names in state.layout]
        sizes = {names: sum(parameters[name].numel() for name in names) for names in buckets if names}
        sizes = {names: numel for names, numel in sizes.items() if 4 * numel >= state.config.min_bytes}
        self.chosen = {}
        if not sizes:
            return
        vectors = [
            torch.cat([self._gradients.get(name, torch.zeros_like(parameters[name])).flatten() for name in names])
            for names in sizes
        ]
        world = dist.get_world_size(state.group)
        bytes_BC = [
            [bytes_sent(c, c, numel, world, state.gathers_all) for c in self.codecs] for numel in sizes.values()
        ]
        errors_BC = relative_errors(vectors, self.codecs, state.group, state.config.seed)
        picks = choose(errors_BC, np.array(bytes_BC), self.max_bytes)
        state.of_bucket = {names: self.codecs[number] for names, number in zip(sizes, picks, strict=True)}
        self.chosen = {c.name: picks.count(number) for number, c in enumerate(self.codecs) if number in picks}
        if dist.get_rank(state.group) == 0:
            logger.info(f"buckets by codec, for {self.max_bytes:.3g} bytes a step: {self.chosen}.")
