"""Stages as threads of one process."""

import threading
from collections.abc import Callable

from hf_mlopt.pipeline.schedule import SENDER_SLOTS, Schedule
from hf_mlopt.pipeline.transport.base import Channels, Mailbox, PipelineError


def local_channels(
    schedule: Schedule, *, timeout: float = 600.0, latency: float = 0.0, free: bool = False, tied: bool = False
) -> list[Channels]:
    """
    Args:
        schedule ([`Schedule`]): Decides the number of slots.
        timeout (`float`, *optional*, defaults to 600.0): Seconds a stage waits for another.
        latency (`float`, *optional*, defaults to 0.0): Seconds a message takes, to emulate a link.
        free (`bool`, *optional*, defaults to `False`): For a free-running queue: see [`gradient_slots`].
        tied (`bool`, *optional*, defaults to `False`): Adds channels between the first and the last stage.

    Returns:
        `list[Channels]`: One for each stage.
    """
    conditions = [threading.Condition() for _ in range(schedule.stages)]
    channels = [Channels(condition=condition, is_private=False) for condition in conditions]
    mailboxes = []
    for k in range(schedule.stages - 1):
        names = f"channel from stage {k} to {k + 1}", f"channel from stage {k + 1} to {k}"
        slots = schedule.feature_capacity(k) + SENDER_SLOTS, gradient_slots(schedule, k, free) + SENDER_SLOTS
        features = Mailbox(slots[0], names[0], timeout, conditions[k + 1], latency)
        gradients = Mailbox(slots[1], names[1], timeout, conditions[k], latency)
        channels[k].forward_out = channels[k + 1].forward_in = features
        channels[k].backward_in = channels[k + 1].backward_out = gradients
        mailboxes += [features, gradients]

    if tied:
        names = f"channel from stage 0 to {schedule.stages - 1}", f"channel from stage {schedule.stages - 1} to 0"
        up, down = (Mailbox(tied_slots(schedule) + SENDER_SLOTS, name, timeout, latency=latency) for name in names)
        channels[0].tied_out = channels[-1].tied_in = up
        channels[0].tied_in = channels[-1].tied_out = down
        mailboxes += [up, down]

    def abort(text: str) -> None:
        for mailbox in mailboxes:
            mailbox.fail(PipelineError(text))

    for one in channels:
        one.on_abort = abort
    return channels


def gradient_slots(schedule: Schedule, k: int, free: bool, pauses: bool = False) -> int:
    """
    Slots at the receiver from stage k + 1 to k.

    Free-running stages back-propagate in another order, so that a queue of q could fill while stage k waits to send
    forward; the batches in flight at k bound what can come back. Where all stages pause after the same local step,
    stage k + 1 has sent m_k - m_{k+1} gradients by then that k has not taken.
    """
    if free:
        return schedule.m[k] + 1
    return max(1, schedule.m[k] - schedule.m[k + 1]) if pauses else schedule.gradient_capacity(k)


def tied_slots(schedule: Schedule) -> int:
    """Slots at the receiver between the first and the last stage: as many as may be under way, so that none waits."""
    return schedule.m[0] + 1


def run_local(workers: list, batches: Callable[[int], dict], num_batches: int, stop_at: int | None = None) -> list:
    """
    Runs a worker for each stage, each in a thread.

    Args:
        workers (`list[Worker]`): All stages, in order.
        batches, num_batches, stop_at: As in `Worker.run`.

    Returns:
        `list[float]`: The losses of the last stage.

    Raises:
        Exception: The error of the stage that failed first.
    """
    results: dict[int, list[float]] = {}
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            results[k] = workers[k].run(batches, num_batches, stop_at)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,), name=f"stage {k}") for k in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, PipelineError)), errors[0])
    return results[len(workers) - 1]
