"""The state of a stage in the middle of training, with batches in flight."""

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_mlopt.errors import InputError
from hf_mlopt.pipeline.stage import InFlight


if TYPE_CHECKING:
    from hf_mlopt.pipeline.worker import Worker


def worker_state(worker: "Worker") -> dict:
    """
    What a stage needs to go on bit by bit after T local steps.

    By then stage k has done T forwards and max(0, T - m_k) backwards since the last time the pipeline was empty. The
    channels of features are empty; the gradients that stage k + 1 is ahead by, max(0, T - m_{k+1}) - max(0, T - m_k),
    are part of the state of k. Of random numbers nothing is kept: they are a function of the batch.

    Args:
        worker ([`Worker`]): Between two calls of `run`.

    Returns:
        `dict`: Plain containers of tensors and numbers, which `torch.save` and a safe load take.

    Raises:
        InputError: If graphs are in flight (`recompute="no"`), which cannot be saved.
    """
    if any(flight.outputs is not None for flight in worker.stash.values()):
        raise InputError(
            f"recompute='no': stage {worker.index} has graphs of {len(worker.stash)} batches in flight, which cannot "
            "be saved: run to the end of the feed first (a drain), or use recompute='yes'"
        )
    return {
        **_identity(worker),
        "forwards": worker.forwards,
        "backwards": worker.backwards,
        "drains": list(worker.updates.drains),
        "block": worker.block.state_dict(),
        "optimizer": worker.optimizer.state_dict(),
        "scheduler": worker.scheduler.state_dict() if worker.scheduler is not None else None,
        "prediction": worker.prediction.state_dict() if worker.prediction else None,
        "norms": worker.norms.state_dict() if worker.norms else None,
        "gradients": {name: p.grad for name, p in worker.block.named_parameters() if p.grad is not None},
        "group_loss": worker.group_loss,
        "stash": [(n, tuple(x.detach() for x in flight.boundary), flight.batch) for n, flight in worker.stash.items()],
        "pending": list(worker.pending),
        "tied": list(worker.tied.pending) if worker.tied else None,
    }


def load_worker_state(worker: "Worker", state: dict) -> None:
    """
    Args:
        worker ([`Worker`]): Built as the one that was saved.
        state (`dict`): From [`worker_state`].

    Raises:
        InputError: If the stage, the schedule or what else decides the order of updates differs.
    """
    for name, value in _identity(worker).items():
        if state[name] != value:
            raise InputError(f"{name}={value!r}: the checkpoint was written with {state[name]!r}; use the same")
    worker.forwards, worker.backwards = state["forwards"], state["backwards"]
    worker.updates = replace(worker.updates, drains=list(state["drains"]))
    worker.block.load_state_dict(state["block"])
    worker.optimizer.load_state_dict(state["optimizer"])
    for part in ("scheduler", "prediction", "norms"):
        if state[part] is not None:
            getattr(worker, part).load_state_dict(state[part])
    device = next((p.device for p in worker.block.parameters()), None)
    for name, parameter in worker.block.named_parameters():
        gradient = state["gradients"].get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device).clone()
    worker.group_loss = state["group_loss"]
    worker.stash = {
        n: InFlight(tuple(x.to(device).clone().requires_grad_() for x in boundary), batch)
        for n, boundary, batch in state["stash"]
    }
    worker.pending.clear()
    worker.pending.extend((n, tuple(g.to(device) for g in tensors), meta) for n, tensors, meta in state["pending"])
    if worker.tied:
        worker.tied.pending.clear()
        worker.tied.pending.extend((version, weight.to(device)) for version, weight in state["tied"])


def _identity(worker: "Worker") -> dict:
    """What must be the same for the rest of the run to be the same."""
    config = worker.config
    return {
        "stage": worker.index,
        "schedule": worker.schedule.text,
        "update_every": worker.updates.update_every,
        "period": worker.updates.period,
        "recompute": worker.stage.recompute,
        "predict": config.predict,
        "clip": config.clip,
        "seed": config.seed,
    }
