"""Turns compression off where it does not pay: finds out in the first coded steps of a run, on all ranks together."""

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from transformers.utils import logging

from hf_mlopt.communication.pays import Verdict, decide, measure
from hf_mlopt.communication.quantizers.casts import Cast


if TYPE_CHECKING:
    from hf_mlopt.communication.ddp import Compression

logger = logging.get_logger(__name__)

_MEASURED = 1 << 22  # elements; a bucket of DDP has six million


class Watch:
    """
    Finds out once, after the first coded steps of a run, whether its codec pays there, and says so in the log.

    Args:
        compression (`Compression`): Of [`compress`].
        auto_off (`bool`, *optional*, defaults to `False`): Go on in bfloat16, on all ranks, if it does not.
        steps (`int`, *optional*, defaults to 3): Coded steps whose backward passes are timed before.

    `verdict` is None until then.
    """

    def __init__(self, compression: "Compression", auto_off: bool = False, steps: int = 3):
        self.compression, self.auto_off, self.steps = compression, auto_off, steps
        self.verdict: Verdict | None = None
        self._until: int | None = None
        module = compression.model.module
        self._window = _BackwardWindow(p for p in module.parameters() if p.requires_grad)
        self._handle = module.register_forward_pre_hook(lambda module, _: self._before_forward(module))

    def close(self) -> None:
        """Ends it."""
        self._window.close()
        self._handle.remove()

    def _before_forward(self, module: torch.nn.Module) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        state = self.compression.state
        self._window.end_pass()
        if self._until is None:  # not earlier: a checkpoint may have been loaded in between
            self._until = max(state.step, state.config.warmup_steps_uncompressed) + self.steps
        if state.step < self._until or state.residuals.has_pending:  # in the middle of a step
            return
        self.close()
        parameters = module.named_parameters()
        coded = [p for name, p in parameters if p.requires_grad and name not in state.exempt]
        numel = sum(parameter.numel() for parameter in coded)
        if state.nodes is not None:
            return  # links inside a node and between nodes differ, and one measurement would mix them
        if numel and dist.get_world_size(state.group) > 1 and not isinstance(state.up, Cast):
            self._decide(numel, coded[0].device)

    def _decide(self, numel: int, device: torch.device) -> None:
        state = self.compression.state
        measured = measure(
            state.up, state.down, min(numel, _MEASURED), state.group, device, state.gathers_all,
            state.config.has_feedback,
        )  # fmt: skip
        backward = torch.tensor(self._window.seconds, device=device)
        dist.all_reduce(backward, op=dist.ReduceOp.MAX, group=state.group)
        self.verdict = decide(
            state.up,
            numel,
            dist.get_world_size(state.group),
            bandwidth=measured.bandwidth,
            codec_rate=measured.codec_rate,
            backward_seconds=float(backward),
            down=state.down,
            gathers_all=state.gathers_all,
        )
        is_off = self.auto_off and not self.verdict.pays
        if is_off:
            send_in_bf16(self.compression)
        if dist.get_rank(state.group) == 0:
            say = logger.info if self.verdict.pays else logger.warning
            say(self.verdict.text + ("; from here on gradients travel in bf16." if is_off else "."))


def send_in_bf16(compression: "Compression") -> None:
    """
    Turns coding off: from the next step on gradients travel in bfloat16, and what was not sent goes with them. All
    ranks call it, between two steps.

    Args:
        compression (`Compression`): Of [`compress`].
    """
    state, was = compression.state, compression.config
    feedback = "classic" if was.has_feedback else "none"  # without it, what was not sent would be lost
    config = replace(
        was, grad_codec="bf16", grad_codec_down=None, grad_codec_args={}, error_feedback=feedback,
        error_average_period=0,
    )  # fmt: skip
    compression.config = state.config = config
    state.up, state.down, state.of_bucket = config.up, config.down, {}
    # Shards of bf16 begin elsewhere. As in a new bucket, what they have lost goes up again.
    state.down_residuals.load_state_dict({**state.down_residuals.state_dict(), "groups": []})
    if compression.optimizer is not None:
        compression.ahead.coefficient = 0.0


class _BackwardWindow:
    """The time from the first gradient of a backward pass to the last, in which an exchange can hide."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self._marks: list = []
        self._shortest = float("inf")  # of the passes; the first ones also allocate
        self._handles = [parameter.register_hook(self._mark) for parameter in parameters]

    @property
    def seconds(self) -> float:
        return self._shortest if self._shortest < float("inf") else 0.0

    def _mark(self, gradient: torch.Tensor) -> None:
        if gradient.device.type == "cuda":  # the processor is ahead of the device
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks = [self._marks[0] if self._marks else now, now]

    def end_pass(self) -> None:
        if self._marks:
            first, last = self._marks
            if isinstance(first, torch.cuda.Event):
                last.synchronize()
                passed = first.elapsed_time(last) / 1e3
            else:
                passed = last - first
            self._shortest, self._marks = min(self._shortest, passed), []

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
