"""
Stages as processes, over gloo or NCCL.

Each channel has a thread at either end. A message is a header of fixed size (shapes, types, metadata), so that batches
may differ in shape, then the tensors. The receiver posts a header at all times, but tensors only once it has a slot
for them; the sender holds a message until it is taken. The two directions have process groups of their own, so that
neither waits behind the other. Headers always travel over gloo: they wait without a limit, since a neighbour may be
evaluating, and end at once when it dies. The stage itself counts the time.
"""

import contextlib
import json
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline.schedule import SENDER_SLOTS, Schedule
from hf_mlopt.pipeline.transport.base import Channels, Mailbox, Message, PipelineError
from hf_mlopt.pipeline.transport.local import gradient_slots, tied_slots


HEADER_BYTES = 4096
NUM_TAGS = 2**15  # of batches; 0 is the tag of headers
FOREVER = timedelta(days=365)
GOODBYE_SECONDS = 2.0  # how long a failed stage tries to tell its neighbours why


class HostWire:
    """Tensors travel through the memory of the host."""

    def __init__(self, device: torch.device):
        self.device = device

    def stamp(self) -> None:
        return None

    def send(self, message: Message, peer: int, group: dist.ProcessGroup) -> None:
        for tensor in message.tensors:
            dist.send(tensor.cpu().contiguous(), peer, group, tag=_tag(message.n))

    def receive(self, n: int, shapes: list, peer: int, group: dist.ProcessGroup) -> tuple:
        tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes]
        for tensor in tensors:
            dist.recv(tensor, peer, group, tag=_tag(n))
        return tuple(tensor.to(self.device) for tensor in tensors), None

    def take(self, message: Message) -> tuple[torch.Tensor, ...]:
        return message.tensors


class DeviceWire:
    """Tensors travel from device to device on a stream of their own; the host does not wait for them."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def stamp(self) -> torch.cuda.Event:
        """Marks what the caller's stream has to finish first."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def send(self, message: Message, peer: int, group: dist.ProcessGroup) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(message.ready)
            for tensor in message.tensors:
                tensor = tensor.contiguous()
                dist.send(tensor, peer, group)
                tensor.record_stream(self.stream)

    def receive(self, n: int, shapes: list, peer: int, group: dist.ProcessGroup) -> tuple:
        with torch.cuda.stream(self.stream):
            tensors = [torch.empty(s, dtype=getattr(torch, dtype), device=self.device) for s, dtype in shapes]
            for tensor in tensors:
                dist.recv(tensor, peer, group)
            event = torch.cuda.Event()
            event.record(self.stream)
        return tuple(tensors), event

    def take(self, message: Message) -> tuple[torch.Tensor, ...]:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(message.ready)
        for tensor in message.tensors:
            tensor.record_stream(stream)
        return message.tensors


class Sender:
    """
    One end of a channel.

    Args:
        stage (`int`): The neighbour, for error messages.
        peer (`int`): Its rank.
        control, payload (`dist.ProcessGroup`): For headers, and for tensors.
        wire ([`HostWire`] or [`DeviceWire`]): Moves tensors.
        timeout (`float`): Seconds to wait for a slot.
        on_error (`Callable`): Called with what went wrong.
    """

    def __init__(
        self,
        stage: int,
        peer: int,
        control: dist.ProcessGroup,
        payload: dist.ProcessGroup,
        wire: HostWire | DeviceWire,
        timeout: float,
        on_error: Callable[[Exception], None],
    ):
        self.mailbox = Mailbox(SENDER_SLOTS, f"channel to stage {stage}", timeout)
        self.stage, self.peer, self.control, self.payload = stage, peer, control, payload
        self.wire, self.on_error = wire, on_error
        self.thread = threading.Thread(target=self._work, name=f"to stage {stage}", daemon=True)
        self.thread.start()

    def put(self, n: int, tensors: tuple[torch.Tensor, ...], meta: dict) -> None:
        self.mailbox.reserve()
        self.mailbox.deliver(Message(n, tensors, meta, self.wire.stamp()))

    def close(self) -> None:
        """Tells the other end that nothing follows, once all is sent."""
        with contextlib.suppress(PipelineError):
            self.mailbox.put(-1, (), {})

    def say(self, header: dict) -> None:
        dist.send(_encode(header), self.peer, self.control, tag=0)

    def _work(self) -> None:
        try:
            while (message := self.mailbox.peek(forever=True)).n >= 0:
                shapes = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in message.tensors]
                self.say({"n": message.n, "shapes": shapes, "meta": message.meta})
                self.wire.send(message, self.peer, self.payload)
                self.mailbox.drop()
            self.say({"closed": True})
        except Exception as error:
            self.on_error(_gone(self.stage, error))


class Receiver:
    """The other end of a channel; takes what [`Sender`] takes, and the slots."""

    def __init__(
        self,
        stage: int,
        peer: int,
        control: dist.ProcessGroup,
        payload: dist.ProcessGroup,
        wire: HostWire | DeviceWire,
        timeout: float,
        on_error: Callable[[Exception], None],
        capacity: int,
        condition: threading.Condition,
    ):
        self.mailbox = Mailbox(capacity, f"channel from stage {stage}", timeout, condition)
        self.stage, self.peer, self.control, self.payload = stage, peer, control, payload
        self.wire, self.on_error = wire, on_error
        self.thread = threading.Thread(target=self._work, name=f"from stage {stage}", daemon=True)
        self.thread.start()

    def get(self, n: int) -> tuple[tuple[torch.Tensor, ...], dict]:
        message = self.mailbox.peek()
        _, meta = self.mailbox.get(n)
        return self.wire.take(message), meta

    def is_ready(self) -> bool:
        return self.mailbox.is_ready()

    def size(self) -> int:
        return self.mailbox.size()

    def _work(self) -> None:
        try:
            while True:
                data = torch.empty(HEADER_BYTES, dtype=torch.uint8)
                dist.recv(data, self.peer, self.control, tag=0)
                header = json.loads(data.numpy().tobytes().rstrip(b"\0"))
                if header.get("closed"):
                    self.mailbox.end(PipelineError(f"stage {self.stage} has closed its channels"))
                    return
                if "failed" in header:
                    self.on_error(PipelineError(header["failed"]))
                    return
                self.mailbox.reserve(forever=True)
                n = header["n"]
                tensors, ready = self.wire.receive(n, header["shapes"], self.peer, self.payload)
                self.mailbox.deliver(Message(n, tensors, header["meta"], ready))
        except Exception as error:
            self.on_error(_gone(self.stage, error))


def distributed_channels(
    schedule: Schedule,
    *,
    ranks: list[int] | None = None,
    transport: str = "gloo",
    device: torch.device | str = "cpu",
    timeout: float = 600.0,
    free: bool = False,
    tied: bool = False,
    pauses: bool = False,
) -> Channels:
    """
    Connects this process with the stages before and after it.

    Every process of the world has to call it, also those of other replicas of the pipeline.

    Args:
        schedule ([`Schedule`]): Decides the number of slots.
        ranks (`list[int]`, *optional*): Ranks of the stages of this pipeline; by default stage k is rank k.
        transport (`str`, *optional*, defaults to `"gloo"`): `gloo`, or `nccl` for tensors on CUDA devices.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where this stage computes.
        timeout (`float`, *optional*, defaults to 600.0): Seconds a stage waits for another.
        free (`bool`, *optional*, defaults to `False`): For a free-running queue.
        tied (`bool`, *optional*, defaults to `False`): Adds channels between the first and the last stage.
        pauses (`bool`, *optional*, defaults to `False`): All stages may pause after the same local step, as a Trainer
            does to log: makes room for what comes back until then.

    Returns:
        [`Channels`]: Of this stage.

    Raises:
        ConfigurationError: If the number of ranks is not the number of stages, or NCCL is asked for without a device.
    """
    ranks = list(range(dist.get_world_size())) if ranks is None else ranks
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # other threads have a current device of their own
        device = torch.device("cuda", torch.cuda.current_device())
    if len(ranks) != schedule.stages:
        raise ConfigurationError(
            "stages", schedule.stages, f"a pipeline needs as many processes, and there are {len(ranks)}"
        )
    if transport == "nccl" and device.type != "cuda":
        raise ConfigurationError("transport", transport, f"needs CUDA devices, not {device}: use gloo")
    controls = [dist.new_group(backend="gloo", timeout=FOREVER) for _ in range(4 if tied else 2)]
    payloads, wire_type = controls, HostWire
    if transport == "nccl":
        payloads = [dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout)) for _ in controls]
        wire_type = DeviceWire
    k = ranks.index(dist.get_rank())
    ends: list[Sender | Receiver] = []
    condition = threading.Condition()

    def fail(error: Exception) -> None:
        for end in ends:
            end.mailbox.fail(error)

    def connect(kind: type, direction: int, stage: int, *slots) -> Sender | Receiver:
        groups = controls[direction], payloads[direction]
        ends.append(kind(stage, ranks[stage], *groups, wire_type(device), timeout, fail, *slots))
        return ends[-1]

    channels = Channels(condition=condition)
    if k > 0:
        slots = schedule.feature_capacity(k - 1)
        channels.forward_in = connect(Receiver, 0, k - 1, slots, condition)
        channels.backward_out = connect(Sender, 1, k - 1)
    if k < schedule.stages - 1:
        channels.forward_out = connect(Sender, 0, k + 1)
        channels.backward_in = connect(Receiver, 1, k + 1, gradient_slots(schedule, k, free, pauses), condition)
    if tied and k in (0, schedule.stages - 1):
        other, (outward, inward) = (schedule.stages - 1, (2, 3)) if k == 0 else (0, (3, 2))
        channels.tied_out = connect(Sender, outward, other)
        channels.tied_in = connect(Receiver, inward, other, tied_slots(schedule), threading.Condition())
    channels.on_abort = lambda text: _say_goodbye(ends, text)

    def close() -> None:
        for end in ends:
            if isinstance(end, Sender):
                end.close()
        for end in ends:
            end.thread.join(timeout)

    channels.on_close = close
    return channels


def _say_goodbye(ends: list[Sender | Receiver], text: str) -> None:
    """Past the messages that wait: a neighbour that is gone must not keep this process."""

    def tell(end: Sender) -> None:
        with contextlib.suppress(RuntimeError):
            end.say({"failed": text[: HEADER_BYTES // 8]})

    senders = [end for end in ends if isinstance(end, Sender)]
    threads = [threading.Thread(target=tell, args=(end,), daemon=True) for end in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GOODBYE_SECONDS)


def _encode(header: dict) -> torch.Tensor:
    text = json.dumps(header).encode()
    if len(text) > HEADER_BYTES:
        raise ValueError(f"a message of {len(header.get('shapes', []))} tensors does not fit its header")
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def _tag(n: int) -> int:
    return 1 + n % NUM_TAGS


def _gone(stage: int, error: Exception) -> PipelineError:
    return error if isinstance(error, PipelineError) else PipelineError(f"stage {stage} is gone: {error}")
