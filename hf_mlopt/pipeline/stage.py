"""One block of the model: forward without a graph, repeated forward with one, backward, and what both must share."""

import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from hf_mlopt.errors import InputError
from hf_mlopt.pipeline.prediction import Prediction
from hf_mlopt.pipeline.telemetry import Telemetry


Tensors = tuple[torch.Tensor, ...]

_cpu_generator = threading.Lock()  # the generator belongs to the process: stages that are threads take turns


@dataclass
class InFlight:
    """What a stage keeps of a batch between its forward and its backward."""

    boundary: Tensors
    batch: dict
    outputs: Tensors | None = None  # with their graph, where nothing is recomputed


class Stage:
    """
    Forward and backward of one block.

    Args:
        block (`nn.Module`): `block(boundary, batch)` returns the tensors the next block takes; the last returns
            `(loss, ...)`.
        index, stages (`int`): Position k of the block, and K.
        recompute (`bool`): Keep the inputs of a batch and repeat its forward, instead of keeping its graph.
        seed (`int`): Of dropout.
        replay (`bool`): Seed every forward; needed where anything in the block draws random numbers.
        prediction ([`Prediction`], *optional*): Weights of the forward.
        context (`Callable`, *optional*): Makes the context of every forward, such as autocast.
        telemetry ([`Telemetry`], *optional*): Takes the times.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        stages: int,
        *,
        recompute: bool = True,
        seed: int = 0,
        replay: bool = True,
        prediction: Prediction | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        telemetry: Telemetry | None = None,
    ):
        self.block, self.index, self.is_last = block, index, index == stages - 1
        self.recompute, self.seed, self.replay = recompute, seed, replay
        self.prediction, self.context = prediction, context
        self.telemetry = telemetry or Telemetry()

    def forward(self, n: int, boundary: Tensors, batch: dict, ahead: int) -> tuple[Tensors, InFlight]:
        """
        F of batch n; the last stage only keeps its input.

        Args:
            n (`int`): The batch.
            boundary (`tuple[torch.Tensor]`): Outputs of the stage before; empty at the first.
            batch (`dict`): What every stage may read of the batch.
            ahead (`int`): Updates until the backward of this batch, s_k(n).

        Returns:
            `tuple`: The outputs without graph, and what [`backward`] needs.

        Raises:
            InputError: If the block returns anything but floating-point tensors, or changes its input in place.
        """
        flight = InFlight(self._leaves(boundary), batch)
        if self.is_last:
            return (), flight
        with self.telemetry.span("F", n), ExitStack() as stack:
            if self.recompute:
                stack.enter_context(torch.no_grad())
                stack.enter_context(_batch_norm_frozen(self.block))
            weights = self.prediction.weights(ahead) if self.prediction else None
            versions = [x._version for x in flight.boundary]
            outputs = self._call(n, flight.boundary, batch, weights)
        if versions != [x._version for x in flight.boundary]:
            raise InputError(f"stage {self.index} changes its input in place: cut elsewhere")
        if not isinstance(outputs, tuple) or not all(
            isinstance(output, torch.Tensor) and output.is_floating_point() for output in outputs
        ):
            raise InputError(f"stage {self.index} must return a tuple of floating-point tensors to the next stage")
        if not self.recompute:
            flight.outputs = outputs
        return tuple(output.detach() for output in outputs), flight

    def rebuild(self, n: int, flight: InFlight) -> None:
        """R of batch n at the current weights, unless its graph was kept; at the last stage its only forward."""
        if flight.outputs is None:
            with self.telemetry.span("F" if self.is_last else "R", n):
                flight.outputs = self._call(n, flight.boundary, flight.batch, None)

    def backward(self, n: int, flight: InFlight, gradients: Tensors, scale: float = 1.0) -> Tensors:
        """
        B of batch n after [`rebuild`]; adds to `.grad` of the parameters.

        Args:
            n (`int`): The batch.
            flight ([`InFlight`]): What [`forward`] kept.
            gradients (`tuple[torch.Tensor]`): Of the outputs; ignored at the last stage.
            scale (`float`, *optional*, defaults to 1.0): Factor of the loss at the last stage.

        Returns:
            `tuple[torch.Tensor]`: Gradients of the inputs, zeros where there is none.

        Raises:
            InputError: If the gradients do not fit the outputs.
        """
        outputs = flight.outputs
        with self.telemetry.span("B", n):
            if self.is_last:
                (outputs[0] * scale).backward()
            else:
                self._check_shapes(n, outputs, gradients)
                pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
                if pairs:
                    torch.autograd.backward(*zip(*pairs, strict=True))
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in flight.boundary)

    def _leaves(self, boundary: Tensors) -> Tensors:
        return tuple(x.detach().requires_grad_(self.index > 0) for x in boundary)

    def _call(self, n: int, boundary: Tensors, batch: dict, weights: dict | None) -> Tensors:
        device = next((p.device for p in self.block.parameters()), torch.device("cpu"))
        seeded = replayed(self.seed, self.index, n, device) if self.replay else nullcontext()
        with seeded, self.context():
            if weights is None:
                return self.block(boundary, batch)
            return functional_call(self.block, weights, (boundary, batch))

    def _check_shapes(self, n: int, outputs: Tensors, gradients: Tensors) -> None:
        expected, got = [tuple(o.shape) for o in outputs], [tuple(g.shape) for g in gradients]
        if expected != got:
            raise InputError(f"stage {self.index}, batch {n}: outputs {expected}, but gradients {got} came back")


def random_seed(seed: int, stage: int, n: int) -> int:
    """64 bits for batch n at a stage, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(struct.pack("<qqq", seed, stage, n), digest_size=8).digest(), "little")


@contextmanager
def replayed(seed: int, stage: int, n: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside are a function of (seed, stage, n); outside, nothing has been drawn."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    with _cpu_generator:
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(random_seed(seed, stage, n))
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def draws_random_numbers(block: nn.Module) -> bool:
    """
    Whether a block has dropout, or a module with a positive number in an attribute named after dropout or jitter.

    Args:
        block (`nn.Module`): Looked at as it is now: a block in evaluation mode draws nothing.
    """

    def is_random(module: nn.Module) -> bool:
        if isinstance(module, _DropoutNd):
            return module.p > 0
        if isinstance(module, nn.RReLU):
            return True
        return any(
            isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
            for name, value in vars(module).items()
        )

    return any(module.training and is_random(module) for module in block.modules())


@contextmanager
def _batch_norm_frozen(block: nn.Module) -> Iterator[None]:
    """
    Batch statistics are used and nothing is written: the backward's forward counts the batch.

    `momentum=0` would still move `num_batches_tracked`.
    """
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
