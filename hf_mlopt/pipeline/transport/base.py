"""What stages speak through: bounded first-in-first-out channels that block, and fail together."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


class PipelineError(RuntimeError):
    """Another stage has failed, is gone, or keeps silent. The message names it."""


class Message(NamedTuple):
    n: int
    tensors: tuple[torch.Tensor, ...]
    meta: dict
    ready: Any = 0.0  # seconds of `time.monotonic` before which it has not arrived, or an event of the device


class Channel(Protocol):
    """One direction between two neighbours."""

    def put(self, n: int, tensors: tuple[torch.Tensor, ...], meta: dict) -> None:
        """Sends batch n; blocks while all slots are taken."""

    def get(self, n: int) -> tuple[tuple[torch.Tensor, ...], dict]:
        """Waits for the next message, which must be batch n."""

    def is_ready(self) -> bool:
        """Whether `get` would not wait."""

    def size(self) -> int:
        """Messages that wait to be taken."""


class Mailbox:
    """
    A bounded queue between threads, which is a channel by itself.

    Args:
        capacity (`int`): Slots.
        name (`str`): For error messages: what is waited for.
        timeout (`float`): Seconds after which waiting is an error.
        condition (`threading.Condition`, *optional*): Shared by mailboxes that one thread waits for together.
        latency (`float`, *optional*, defaults to 0.0): Seconds a message is on its way.
    """

    def __init__(
        self,
        capacity: int,
        name: str,
        timeout: float,
        condition: threading.Condition | None = None,
        latency: float = 0.0,
    ):
        self.capacity, self.name, self.timeout, self.latency = capacity, name, timeout, latency
        self.condition = condition or threading.Condition()
        self.error: Exception | None = None
        self._messages: deque[Message] = deque()
        self._ended: Exception | None = None
        self._reserved = 0

    def put(self, n: int, tensors: tuple[torch.Tensor, ...], meta: dict) -> None:
        self.reserve()
        self.deliver(Message(n, tensors, meta, time.monotonic() + self.latency))

    def reserve(self, forever: bool = False) -> None:
        """Takes a slot, once there is one."""
        with self.condition:
            self._wait(lambda: len(self._messages) + self._reserved < self.capacity, "nothing was taken", forever)
            self._reserved += 1

    def deliver(self, message: Message) -> None:
        """Fills a slot that was reserved."""
        with self.condition:
            self._reserved -= 1
            self._messages.append(message)
            self.condition.notify_all()

    def get(self, n: int) -> tuple[tuple[torch.Tensor, ...], dict]:
        message = self.peek()
        while self.latency and (late := message.ready - time.monotonic()) > 0:
            time.sleep(late)
        self.drop()
        if message.n != n:
            raise PipelineError(f"{self.name}: expected batch {n}, got {message.n}")
        return message.tensors, message.meta

    def peek(self, forever: bool = False) -> Message:
        """Waits for a message and leaves it in its slot."""
        with self.condition:
            self._wait(lambda: bool(self._messages) or self._ended is not None, "nothing came", forever)
            if not self._messages:
                raise self._ended
            return self._messages[0]

    def drop(self) -> None:
        """Frees the slot of the first message."""
        with self.condition:
            self._messages.popleft()
            self.condition.notify_all()

    def is_ready(self) -> bool:
        with self.condition:
            self._raise()
            return bool(self._messages) and not (self.latency and self._messages[0].ready > time.monotonic())

    def size(self) -> int:
        with self.condition:
            return len(self._messages)

    def end(self, error: Exception) -> None:
        """No message follows: whoever takes more than is there gets the error."""
        with self.condition:
            self._ended = error
            self.condition.notify_all()

    def fail(self, error: Exception) -> None:
        """Whoever waits, now or later, gets the error; the first one stays."""
        with self.condition:
            self.error = self.error or error
            self.condition.notify_all()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _wait(self, ready: Callable[[], bool], complaint: str, forever: bool = False) -> None:
        in_time = self.condition.wait_for(lambda: self.error or ready(), None if forever else self.timeout)
        self._raise()
        if not in_time:
            raise PipelineError(f"{self.name}: {complaint} for {self.timeout:g} s")


@dataclass
class Channels:
    """
    The channels of a stage.

    Args:
        forward_in, forward_out, backward_in, backward_out ([`Channel`], *optional*): None at the ends of the pipeline.
        tied_in, tied_out ([`Channel`], *optional*): Between the first and the last stage, for a weight of both.
        condition (`threading.Condition`, *optional*): Shared by the two inputs.
        on_abort (`Callable`, *optional*): Tells the other stages the text of an error.
        on_close (`Callable`, *optional*): Called at the end.
        is_private (`bool`, *optional*, defaults to `True`): Whether the stage has its process to itself.
    """

    forward_in: Channel | None = None
    forward_out: Channel | None = None
    backward_in: Channel | None = None
    backward_out: Channel | None = None
    tied_in: Channel | None = None
    tied_out: Channel | None = None
    condition: threading.Condition | None = None
    on_abort: Callable[[str], None] = lambda text: None
    on_close: Callable[[], None] = lambda: None
    is_private: bool = True

    def wait_for_input(self, timeout: float) -> None:
        """Returns once one of the two inputs is ready, or may be."""
        inputs = [channel for channel in (self.forward_in, self.backward_in) if channel is not None]
        latency = any(getattr(channel, "latency", 0.0) for channel in inputs)
        with self.condition:
            arrived = self.condition.wait_for(
                lambda: any(channel.is_ready() for channel in inputs), 0.001 if latency else timeout
            )
        if not arrived and not latency:
            raise PipelineError(f"the neighbours sent nothing for {timeout:g} s")

    def abort(self, stage: int, error: BaseException) -> None:
        """Makes the other stages fail with an error that names the stage which failed first."""
        is_relayed = isinstance(error, PipelineError)
        self.on_abort(str(error) if is_relayed else f"stage {stage} failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Ends the connection after the last run; every stage has to. A second time it does nothing."""
        on_close, self.on_close = self.on_close, lambda: None
        on_close()
