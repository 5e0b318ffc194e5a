"""The loop of a stage: forward of batch n, then backward of batch n - m_k, and an update after every group."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers.utils import logging

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline.clipping import LaggedNorm
from hf_mlopt.pipeline.config import PipelineConfig
from hf_mlopt.pipeline.prediction import Prediction
from hf_mlopt.pipeline.resume import load_worker_state, worker_state
from hf_mlopt.pipeline.schedule import Schedule, Updates
from hf_mlopt.pipeline.stage import InFlight, Stage, Tensors, draws_random_numbers
from hf_mlopt.pipeline.telemetry import Telemetry
from hf_mlopt.pipeline.tied_exchange import TiedExchange
from hf_mlopt.pipeline.transport.base import Channels
from hf_mlopt.pipeline.updating import BlockUpdate, Update


logger = logging.get_logger(__name__)


class Worker:
    """
    Trains one block of a pipeline.

    Args:
        block (`nn.Module`): See [`Stage`].
        index (`int`): Position k of the block.
        stages (`int`): Number of blocks, K.
        schedule ([`Schedule`]): The same at every stage.
        optimizer (`torch.optim.Optimizer`): Of the block's parameters, stepped once an update.
        channels ([`Channels`]): To the neighbours.
        config ([`PipelineConfig`], keyword): `recompute="auto"` is taken as `yes`.
        scheduler (*optional*): Learning-rate scheduler, stepped after the optimizer.
        on_update (`Callable`, *optional*): Called with an [`Update`] after each step; may call [`request_stop`].
        before_step (`Callable`, *optional*): Called when the gradient of a group is complete, for instance to average
            it over replicas.
        context (`Callable`, *optional*): Makes the context of every forward, such as autocast.
        period (`int`, *optional*): Batches of an epoch, which ends a group.
        refresh_every (`int`, *optional*, defaults to 1): Updates between two refreshes of a tied weight's copy; only
            where `channels` connect the first and the last stage.

    Raises:
        ConfigurationError: If the schedule is for another number of stages.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        stages: int,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer,
        channels: Channels,
        *,
        config: PipelineConfig,
        scheduler=None,
        on_update: Callable[[Update], None] | None = None,
        before_step: Callable[[], None] | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        period: int | None = None,
        refresh_every: int = 1,
    ):
        if schedule.stages != stages or not 0 <= index < stages:
            raise ConfigurationError(
                "stages", stages, f"stage {index} of a schedule for {schedule.stages}: {schedule}"
            )
        if index == 0 and schedule.m[0] > 0 and config.update_every == 1:
            logger.warning("update_every=1 with a stale pipeline crosses the most updates; 2 or more learns better")
        self.block, self.index, self.schedule, self.config = block, index, schedule, config
        self.optimizer, self.scheduler, self.channels, self.on_update = optimizer, scheduler, channels, on_update
        self.telemetry = Telemetry()
        self.prediction = None
        if config.predict != "none" and schedule.m[index] > 0:
            self.prediction = Prediction(block, optimizer, config.predict, config.predict_limit)
        self.stage = Stage(
            block,
            index,
            stages,
            recompute=config.recompute != "no" and schedule.m[index] > 0,  # else the graph is used at once
            seed=config.seed,
            prediction=self.prediction,
            context=context,
            telemetry=self.telemetry,
        )
        self.is_last = index == stages - 1
        self.is_free = config.queue == "free"
        self.updates = Updates(config.update_every, period)
        self.norms = LaggedNorm(1 + schedule.m[0]) if config.clip == "lagged_global" else None
        self.update = BlockUpdate(optimizer, scheduler, config.max_grad_norm, self.prediction, self.norms, before_step)
        self.tied = None
        if channels.tied_in is not None:
            if self.norms or self.is_free:
                raise ConfigurationError("tied", "owner_lagged", "needs clip=block and queue=deterministic, or untie")
            self.tied = TiedExchange(block, index, schedule, channels, refresh_every)
        self.forwards = self.backwards = 0
        self.stash: dict[int, InFlight] = {}
        self.pending: deque[tuple[int, Tensors, dict]] = deque()  # gradients that came before a stop
        self.group_loss = self._scaled_loss = 0.0
        self._stop_requested = False

    def run(self, batches: Callable[[int], dict], num_batches: int, stop_at: int | None = None) -> list[float]:
        """
        Trains until batch `num_batches` and empties the pipeline, or stops before with batches in flight.

        Every stage has to be given the same numbers. A further call goes on where this one ended.

        Args:
            batches (`Callable`): `batches(n)` is batch n, asked for in order and once. Where it has no
                `num_items_in_batch`, the loss is a mean, and a group's gradient the mean over its batches.
            num_batches (`int`): Number of batches since the very first.
            stop_at (`int`, *optional*): Local steps T since the very first, after which all stages stop; at
                `num_batches` or later it has no effect. Free-running stages empty the pipeline at T.

        Returns:
            `list[float]`: At the last stage the losses of the batches that this call trained on.

        Raises:
            FloatingPointError: If a loss or a gradient of this stage is not finite.
            PipelineError: If another stage failed or keeps silent.
        """
        self._begin(num_batches)
        self._set_stop(num_batches if stop_at is None else min(stop_at, num_batches))
        with self._telling_others():
            while self.backwards < self._end and not self._is_stopped():
                if self._goes_forward():
                    self._forward(batches)
                if self._goes_backward():
                    self._backward()
            if self.backwards >= self._end:
                self.updates.add_drain(self.backwards)
            else:
                self._collect_gradients()
        return self._losses

    def advance(self, batch: dict, is_last: bool = False) -> float | None:
        """
        One local step of a feed whose end is not known: the forward of the next batch, then the backwards that are
        due. Every stage has to be given the same.

        Args:
            batch (`dict`): The next batch.
            is_last (`bool`, *optional*, defaults to `False`): Empty the pipeline after it, as at the end of `run`.

        Returns:
            `float`, *optional*: At the last stage the loss of the batch, as it counts in the loss of its group.

        Raises:
            FloatingPointError: If a loss or a gradient of this stage is not finite.
            PipelineError: If another stage failed or keeps silent.
        """
        self._begin(self.forwards + 1 if is_last else sys.maxsize)
        with self._telling_others():
            while not self._goes_forward():  # free-running: a gradient is there, or too many batches are in flight
                self._backward()
            self._forward(lambda n: batch)
            while self._goes_backward():
                self._backward()
            if is_last:
                self.updates.add_drain(self.backwards)
        return self._scaled_loss if self.is_last else None

    def drain(self) -> None:
        """
        Empties the pipeline between two calls of [`advance`]; every stage has to.

        That it would be emptied was not known in the last local step: gradients of a tied weight's copy that are still
        under way join the owner's next update.
        """
        if self.updates.drained(self.forwards) == self.forwards:
            return
        self._begin(self.forwards)
        with self._telling_others():
            while self.backwards < self._end:
                self._backward()
            if self.tied:
                self.tied.after_late_drain(self.backwards, self.updates)
            self.updates.add_drain(self.backwards)

    def hold(self) -> None:
        """Makes [`state_dict`] complete between two calls of [`advance`], batches in flight; every stage has to."""
        self._begin(sys.maxsize)
        with self._telling_others():
            self._collect_gradients()

    def evaluate(self, batches: Callable[[int], dict], num_batches: int) -> Iterator[Tensors]:
        """
        Forwards other batches through the pipeline, which must be empty; the mode of the block is the caller's.

        Args:
            batches (`Callable`): `batches(n)` is batch n of the evaluation.
            num_batches (`int`): Number of batches.

        Yields:
            `tuple[torch.Tensor]`: For each batch what the last stage returns; at the others an empty tuple.

        Raises:
            InputError: If batches are in flight, so that the blocks are of different ages.
        """
        if self.updates.drained(self.forwards) != self.forwards:
            raise InputError("evaluation: batches are in flight, run to the end of the feed before")
        with self._telling_others():
            for n in range(num_batches):
                batch = batches(n)
                boundary = self.channels.forward_in.get(n)[0] if self.index > 0 else ()
                with torch.no_grad(), self.stage.context():
                    outputs = self.block(boundary, batch)
                if not self.is_last:
                    self.channels.forward_out.put(n, outputs, {})
                yield outputs if self.is_last else ()

    def request_stop(self) -> None:
        """
        Stops all stages at the next common local step, as if it had been given as `stop_at`; to be called in `run`.

        The wish travels with the gradients to stage 0, and from there with the next batch to all.
        """
        self._stop_requested = True

    @property
    def num_updates(self) -> int:
        return self.updates.before(self.backwards)

    def state_dict(self) -> dict:
        """Everything this stage needs to go on bit by bit, batches in flight included; see [`worker_state`]."""
        return worker_state(self)

    def load_state_dict(self, state: dict) -> None:
        """Takes up what [`state_dict`] returned; every stage has to."""
        load_worker_state(self, state)

    def _begin(self, end: int) -> None:
        self.stage.replay = self.channels.is_private or draws_random_numbers(self.block)
        self._end, self._losses, self._stop, self._stop_requested = end, [], end, False

    @contextmanager
    def _telling_others(self) -> Iterator[None]:
        try:
            yield
        except GeneratorExit:  # nobody wants the rest of an evaluation
            raise
        except BaseException as error:
            self.channels.abort(self.index, error)
            raise

    def _set_stop(self, step: int) -> None:
        self._stop = step
        if self.is_free:  # what is in flight would depend on timing: empty the pipeline instead
            self._end = step

    def _is_stopped(self) -> bool:
        return self.forwards >= self._stop and self._stop < self._end

    def _goes_forward(self) -> bool:
        if self.forwards >= min(self._stop, self._end):
            return False
        if not self.is_free:
            return True
        if self.forwards - self.backwards > self.schedule.m[self.index]:
            return False
        if self.index > 0 and not self._has_gradient() and not self.channels.forward_in.is_ready():
            with self.telemetry.span("wait", self.forwards):
                self.channels.wait_for_input(self.config.timeout_seconds)
        return not self._has_gradient() and (self.index == 0 or self.channels.forward_in.is_ready())

    def _goes_backward(self) -> bool:
        if self.backwards == self.forwards:
            return False
        if self.is_free:
            must = self.forwards >= self._end or self.forwards - self.backwards > self.schedule.m[self.index]
            return must or self._has_gradient()
        return self.forwards - self.backwards > self.schedule.m[self.index] or self.forwards == self._end

    def _has_gradient(self) -> bool:
        return self.forwards > self.backwards and (self.is_last or self.channels.backward_in.is_ready())

    def _forward(self, batches: Callable[[int], dict]) -> None:
        n, boundary, meta = self.forwards, (), {}
        batch = batches(n)
        if self.index > 0:
            self.telemetry.sample("features", self.channels.forward_in.size())
            with self.telemetry.span("wait", n):
                boundary, meta = self.channels.forward_in.get(n)
            if self.norms:
                self.norms.receive(meta.get("norms", []))
        else:
            if self._stop_requested:
                meta["stop"] = True
            if self.norms:
                meta["norms"] = self.norms.take_new()
        if meta.get("stop"):
            self._stop_requested = False
            self._set_stop(n + 1)
        ahead = self.updates.before(n) - self.num_updates
        outputs, self.stash[n] = self.stage.forward(n, boundary, batch, ahead)
        self.forwards += 1
        self.telemetry.sample("lag", ahead)
        self.telemetry.sample("stash", len(self.stash))
        if not self.is_last:
            with self.telemetry.span("wait", n):
                self.channels.forward_out.put(n, outputs, meta)

    def _backward(self) -> None:
        n, gradients, meta = self.backwards, (), {}
        flight = self.stash.pop(n)
        self.stage.rebuild(n, flight)  # while the gradient is on its way
        if not self.is_last:
            gradients, meta = self._next_gradient(n)
        first, end = self.updates.group(n, self._end)
        scale = 1.0 if flight.batch.get("num_items_in_batch") is not None else 1.0 / (end - first)
        input_gradients = self.stage.backward(n, flight, gradients, scale)
        if self.is_last:
            self._note_loss(n, flight.outputs[0].item(), scale)
        own_meta = {"stop": True} if meta.get("stop") or (self.index > 0 and self._take_stop()) else {}
        squared = None
        if n + 1 == end and self.norms:
            squared = self.update.complete(first, end)
            own_meta["squared_norm"] = squared + meta.get("squared_norm", 0.0)
        if self.index > 0:  # before the step: others wait for it
            with self.telemetry.span("wait", n):
                self.channels.backward_out.put(n, input_gradients, own_meta)
        else:
            self._stop_requested |= "stop" in own_meta
            if "squared_norm" in own_meta:
                self.norms.add(n, own_meta["squared_norm"])
        if self.tied:
            self.tied.after_backward(n, self.updates, self._end)
        self.backwards += 1
        if n + 1 == end:
            self._step(first, end, squared)

    def _next_gradient(self, n: int) -> tuple[Tensors, dict]:
        self.telemetry.sample("gradients", self.channels.backward_in.size())
        if self.pending:
            _, gradients, meta = self.pending.popleft()
            return gradients, meta
        with self.telemetry.span("wait", n):
            return self.channels.backward_in.get(n)

    def _take_stop(self) -> bool:
        requested, self._stop_requested = self._stop_requested, False
        return requested

    def _note_loss(self, n: int, loss: float, scale: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of batch {n} is {loss}")
        self._losses.append(loss)
        self._scaled_loss = scale * loss
        self.group_loss += self._scaled_loss

    def _step(self, first: int, end: int, squared: float | None) -> None:
        with self.telemetry.span("step", end - 1):
            if squared is None:
                squared = self.update.complete(first, end)
            has_graphs = any(flight.outputs is not None for flight in self.stash.values())
            self.update.step(end, squared, has_graphs)
        version = self.updates.before(first) + 1
        if self.tied:
            self.tied.after_update(version, end == self._end)
        loss, self.group_loss = self.group_loss if self.is_last else None, 0.0
        if self.on_update is not None:
            self.on_update(Update(version, first, end, loss, math.sqrt(squared)))

    def _collect_gradients(self) -> None:
        """At a stop, what the stage after has sent is taken out of the channel, which may be too small to hold it."""
        if self.tied:
            self.tied.collect(self.num_updates, self.updates.before(self.forwards))
        if self.is_last:
            return
        sent = max(self.updates.drained(self.forwards), self.forwards - self.schedule.m[self.index + 1])
        for n in range(self.backwards + len(self.pending), sent):
            gradients, meta = self.channels.backward_in.get(n)
            meta.pop("stop", None)  # granted
            self.pending.append((n, gradients, meta))
