"""
Synchronous pipelines: torch's own GPipe and 1F1B, which empty the pipeline at every update.

No parameter is stale, and the gradients are those of plain back-propagation. The price is the share of time in which
the pipeline fills and empties, (K - 1) / (M + K - 1) with M batches of an update and K stages
([GPipe](https://huggingface.co/papers/1811.06965)).
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.config import PipelineConfig
from hf_mlopt.pipeline.schedule import SYNCHRONOUS, Updates
from hf_mlopt.pipeline.stage import Stage, Tensors, replayed
from hf_mlopt.pipeline.telemetry import Telemetry
from hf_mlopt.pipeline.tied import add_to_owner, gradient_of_copy, owner_weight, refresh_copy
from hf_mlopt.pipeline.torch_pp_messages import (
    Boundary,
    Unpack,
    described,
    example_messages,
    flat_message,
    message_sizes,
)
from hf_mlopt.pipeline.transport.base import PipelineError
from hf_mlopt.pipeline.updating import BlockUpdate, Update


HANG_UP_TAG = 1  # torch's schedules send everything with tag 0


class SynchronousWorker:
    """
    Trains one block of a pipeline that torch's `ScheduleGPipe` or `Schedule1F1B` runs, a group of batches at a time.

    torch's stages take messages of one size, known before. Tensors between stages are therefore sent flat, padded to
    the largest of the group. Their shapes are found with an additional forward, without graph, of the first batch of
    every new shape. A tied weight is trained exactly: nothing is lagged.

    Args:
        block (`nn.Module`): See [`Stage`].
        index (`int`): Position k of the block.
        stages (`int`): Number of blocks, K.
        mode (`str`): `gpipe`, all forwards before the backwards; or `1f1b`, which keeps at most K - k graphs. A last
            group with fewer batches than stages, which torch's 1F1B refuses, runs as `gpipe`: gradients are the same.
        optimizer (`torch.optim.Optimizer`): Of the block's parameters, stepped once an update.
        config ([`PipelineConfig`], keyword): `predict` has no meaning here, as nothing is stale.
        scheduler (*optional*): Learning-rate scheduler, stepped after the optimizer.
        on_update (`Callable`, *optional*): Called with an [`Update`] after each step.
        before_step (`Callable`, *optional*): Called when the gradient of a group is complete.
        context (`Callable`, *optional*): Makes the context of every forward, such as autocast.
        period (`int`, *optional*): Batches of an epoch, which ends a group.
        ranks (`list[int]`, *optional*): Ranks of the stages of this pipeline, ascending; by default all.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where this stage computes.

    Raises:
        ConfigurationError: For what these schedules cannot do.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        stages: int,
        mode: str,
        optimizer: torch.optim.Optimizer,
        *,
        config: PipelineConfig,
        scheduler=None,
        on_update: Callable[[Update], None] | None = None,
        before_step: Callable[[], None] | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        period: int | None = None,
        ranks: list[int] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.ranks = list(range(dist.get_world_size())) if ranks is None else ranks
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        _check(mode, index, stages, self.ranks, self.device, config)
        self.block, self.index, self.stages, self.mode, self.config = block, index, stages, mode, config
        self.optimizer, self.scheduler, self.on_update, self.context = optimizer, scheduler, on_update, context
        self.telemetry = Telemetry()
        self.stage = Stage(block, index, stages, seed=config.seed, context=context, telemetry=self.telemetry)
        self.is_last = index == stages - 1
        self.is_tied = bool(getattr(block, "tied", None)) and stages > 1
        self.updates = Updates(config.update_every, period)
        self.update = BlockUpdate(optimizer, scheduler, config.max_grad_norm, before_step=before_step)
        self.group = dist.new_group(
            self.ranks,
            timedelta(seconds=config.timeout_seconds),
            backend=config.transport,
            use_local_synchronization=True,  # the ranks of other replicas make groups of their own
        )
        self.forwards = self.backwards = 0  # batches taken, and trained on
        self.pending: list[dict] = []  # batches of the group that is not complete
        self._boundaries: dict[tuple, tuple[Boundary, Boundary]] = {}
        self._built: tuple | None = None
        self._num_graphs = 0
        self._failure: BaseException | None = None  # of the block

    def advance(self, batch: dict, is_last: bool = False) -> float | None:
        """
        Takes the next batch, and trains on its group if it completes that. Every stage has to be given the same.

        Args:
            batch (`dict`): The next batch.
            is_last (`bool`, *optional*, defaults to `False`): The feed ends, and the group with it.

        Returns:
            `float`, *optional*: At the last stage the loss of the group with its last batch, else 0.

        Raises:
            FloatingPointError: If a loss or a gradient of this stage is not finite.
            PipelineError: If another stage failed or keeps silent.
        """
        n = self.forwards
        self.pending.append(batch)
        self.forwards += 1
        _, end = self.updates.group(n, self.forwards if is_last else sys.maxsize)
        loss = self._train() if end == self.forwards else 0.0
        if is_last:
            self.updates.add_drain(self.forwards)
        return loss if self.is_last else None

    def drain(self) -> None:
        """Closes the group between two calls of [`advance`]; every stage has to. `on_update` is told its loss."""
        if self.pending:
            self._train()
        self.updates.add_drain(self.forwards)

    def hold(self) -> None:
        """As [`Worker.hold`]; there is nothing to do, as nothing is in flight between two calls of [`advance`]."""

    def evaluate(self, batches: Callable[[int], dict], num_batches: int) -> Iterator[Tensors]:
        """
        Forwards other batches through the pipeline; the mode of the block is the caller's.

        Args:
            batches (`Callable`): `batches(n)` is batch n of the evaluation.
            num_batches (`int`): Number of batches.

        Yields:
            `tuple[torch.Tensor]`: For each batch what the last stage returns; at the others an empty tuple.

        Raises:
            InputError: If batches wait for the rest of their group.
        """
        if self.pending:
            raise InputError(f"evaluation: {len(self.pending)} batches wait for the rest of their group, drain before")
        with self._hanging_up():
            for n in range(num_batches):
                batch = batches(n)
                boundary = self._receive()
                with torch.no_grad(), self.context():
                    outputs = self.block(boundary, batch)
                self._send(() if self.is_last else outputs)
                yield outputs if self.is_last else ()

    @property
    def num_updates(self) -> int:
        return self.updates.before(self.backwards)

    def state_dict(self) -> dict:
        """Everything this stage needs to go on bit by bit, the batches of an incomplete group included."""
        return {
            **self._identity(),
            "forwards": self.forwards,
            "drains": list(self.updates.drains),
            "block": self.block.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "pending": list(self.pending),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Takes up what [`state_dict`] returned; every stage has to.

        Raises:
            InputError: If the stage, the mode or what else decides the order of updates differs.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise InputError(
                    f"{name}={value!r}: the checkpoint was written with {state.get(name)!r}; use the same"
                )
        self.pending = list(state["pending"])
        self.forwards, self.backwards = state["forwards"], state["forwards"] - len(self.pending)
        self.updates = replace(self.updates, drains=list(state["drains"]))
        self.block.load_state_dict(state["block"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def _identity(self) -> dict:
        return {
            "stage": self.index,
            "schedule": self.mode,
            "update_every": self.updates.update_every,
            "period": self.updates.period,
            "seed": self.config.seed,
        }

    def _train(self) -> float:
        """One update from the batches that wait; the loss of the group at the last stage, elsewhere 0."""
        first, end = self.backwards, self.forwards
        with self._hanging_up():
            self._expected = [self._describe(first + i, batch) for i, batch in enumerate(self.pending)]
            self._run_schedule(torch.arange(end - first))
            loss = self._group_loss(first)
            with self.telemetry.span("step", end - 1):
                squared = self._step(first, end)
            index = self.updates.before(first) + 1
            self.pending, self.backwards = [], end
            if self.on_update is not None:
                self.on_update(Update(index, first, end, loss if self.is_last else None, math.sqrt(squared)))
        return loss

    def _run_schedule(self, numbers: torch.Tensor) -> None:
        """torch hands out one of the numbers with each micro-batch, and so tells which it is."""
        self._losses: list[torch.Tensor] = []
        start, busy = time.monotonic(), self._busy()
        with self._from_neighbours():
            self._schedule().step(target=numbers if self.is_last else None, number=numbers)
        self.telemetry.seconds["wait"] += time.monotonic() - start - (self._busy() - busy)

    def _busy(self) -> float:
        return self.telemetry.seconds["F"] + self.telemetry.seconds["B"]

    def _group_loss(self, first: int) -> float:
        losses = [loss.item() for loss in self._losses]
        for n, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of batch {n} is {loss}")
        return sum(losses)

    def _step(self, first: int, end: int) -> float:
        """The update; returns the squared norm of the block's gradient."""
        if self.is_tied and self.index == 0:
            self._send((gradient_of_copy(self.block),), self.stages - 1)
        elif self.is_tied and self.is_last:
            add_to_owner(self.block, *self._receive(0))
        squared = self.update.complete(first, end)
        self.update.step(end, squared, has_graphs=False)
        if self.is_tied and self.is_last:
            self._send((owner_weight(self.block),), 0)
        elif self.is_tied and self.index == 0:
            refresh_copy(self.block, *self._receive(self.stages - 1))
        return squared

    def _schedule(self) -> ScheduleGPipe | Schedule1F1B:
        """torch's schedule of the group, kept while groups are of the same size."""
        count = len(self.pending)
        received, sent = (message_sizes(self.mode, group) for group in zip(*self._expected, strict=True))
        if self._built is None or self._built[0] != (count, received, sent):
            stage = _WatchedStage(
                _MicroBatch(self._forward),
                self.index,
                self.stages,
                self.device,
                input_args=example_messages(received),
                output_args=(torch.zeros(1),) if self.is_last else example_messages(sent),
                group=self.group,
            )
            stage.watch = self._watch
            kind = Schedule1F1B if self.mode == "1f1b" and count >= self.stages else ScheduleGPipe
            schedule = kind(stage, count, loss_fn=lambda _, number: self._losses[int(number)], scale_grads=False)
            self._built = (count, received, sent), schedule
        return self._built[1]

    def _forward(self, *messages: torch.Tensor, number: torch.Tensor) -> Tensors:
        """The forward of a micro-batch; torch's stage calls it."""
        i = int(number)
        n, batch, (received, sent) = self.backwards + i, self.pending[i], self._expected[i]
        self._num_graphs += 1
        self.telemetry.sample("stash", self._num_graphs)
        seeded = replayed(self.config.seed, self.index, n, self.device)
        with self._watch("F", i), seeded, self.context():
            outputs = self.block(Unpack.apply([shape for shape, _ in received], *messages) if received else (), batch)
            if not self.is_last and described(outputs) != sent:
                found = f"stage {self.index} gives {described(outputs)} for batch {n}, where {sent} was expected"
                raise ConfigurationError("mode", self.mode, f"{found} from the shapes of its inputs: use lag1")
        if not self.is_last:
            sizes = self._built[0][2]
            return tuple(flat_message(x, numel) for x, (numel, _) in zip(outputs, sizes, strict=True))
        scale = 1.0 if batch.get("num_items_in_batch") is not None else 1.0 / len(self.pending)
        self._losses.append(outputs[0] * scale)
        return (torch.zeros(1),)  # in place of the loss, whose type is not known before

    @contextmanager
    def _watch(self, kind: str, number: int) -> Iterator[None]:
        try:
            with self.telemetry.span(kind, self.backwards + number):
                yield
        except Exception as error:
            self._failure = error.__cause__ if kind == "B" and error.__cause__ else error  # torch wraps it
            raise
        self._num_graphs -= kind == "B"

    def _describe(self, n: int, batch: dict) -> tuple[Boundary, Boundary]:
        """Shapes and types of what the block gets and returns for a batch; found out once for batches of a shape."""
        key = tuple((name, x.shape) for name, x in batch.items() if isinstance(x, torch.Tensor))
        if key not in self._boundaries:
            boundary, outputs = self._receive(), ()
            if not self.is_last:
                outputs, _ = self.stage.forward(n, boundary, batch, 0)
                self._send(outputs)
            self._boundaries[key] = described(boundary), described(outputs)
        return self._boundaries[key]

    def _send(self, tensors: Tensors, stage: int | None = None) -> None:
        """To another stage, by default the next, if there is one."""
        stage = self.index + 1 if stage is None else stage
        if stage < self.stages:
            with self._from_neighbours():
                peer = self.ranks[stage]
                dist.send_object_list([described(tensors)], peer, self.group, self.device)
                for tensor in tensors:
                    dist.send(tensor.detach().contiguous(), peer, self.group)

    def _receive(self, stage: int | None = None) -> Tensors:
        """From another stage, by default the one before, if there is one."""
        stage = self.index - 1 if stage is None else stage
        if stage < 0:
            return ()
        with self._from_neighbours():
            peer, descriptions = self.ranks[stage], [None]
            dist.recv_object_list(descriptions, peer, self.group, self.device)
            tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in descriptions[0])
            for tensor in tensors:
                dist.recv(tensor, peer, self.group)
        return tensors

    @contextmanager
    def _from_neighbours(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self._failure is not None:
                raise self._failure from None
            limit = f"or has been silent for {self.config.timeout_seconds} s"
            raise PipelineError(f"stage {self.index}: another stage failed, is gone, {limit}: {error}") from error

    @contextmanager
    def _hanging_up(self) -> Iterator[None]:
        """A stage that fails ends the others: a receive that times out closes a gloo connection at both ends."""
        try:
            yield
        except GeneratorExit:  # nobody wants the rest of an evaluation
            raise
        except BaseException:
            for rank in self.ranks if self.config.transport == "gloo" else ():
                if rank != dist.get_rank():
                    with contextlib.suppress(RuntimeError):
                        work = dist.irecv(torch.empty(1), rank, self.group, tag=HANG_UP_TAG)
                        work.wait(timedelta(milliseconds=1))
            raise


class _WatchedStage(PipelineStage):
    """torch's stage, which tells when it does a backward."""

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs) -> None:
        with self.watch("B", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


class _MicroBatch(nn.Module):
    """The module that torch's stage wants; the parameters are the worker's affair."""

    def __init__(self, forward: Callable[..., Tensors]):
        super().__init__()
        self.forward = forward


def _check(mode: str, index: int, stages: int, ranks: list[int], device: torch.device, config: PipelineConfig) -> None:
    if mode not in SYNCHRONOUS:
        raise ConfigurationError("mode", mode, f"must be one of {', '.join(SYNCHRONOUS)}")
    if len(ranks) != stages:
        raise ConfigurationError("stages", stages, f"a pipeline needs as many processes, and there are {len(ranks)}")
    if ranks != sorted(ranks) or not 0 <= index < stages or ranks[index] != dist.get_rank():
        raise ConfigurationError("ranks", ranks, f"must ascend, with rank {dist.get_rank()} at stage {index}")
    if config.transport != ("nccl" if device.type == "cuda" else "gloo"):
        remedy = f"mode={mode} sends by nccl from CUDA devices, else by gloo; this stage is on {device}"
        raise ConfigurationError("transport", config.transport, remedy)
    if config.clip != "block":
        raise ConfigurationError("clip", config.clip, f"mode={mode} clips by block")
    if config.recompute == "yes":
        raise ConfigurationError("recompute", config.recompute, f"mode={mode} keeps graphs: use no or auto")
    if mode == "1f1b" and config.update_every < stages:
        remedy = f"1f1b needs at least as many batches of an update as stages, {stages}; or use gpipe"
        raise ConfigurationError("update_every", config.update_every, remedy)
