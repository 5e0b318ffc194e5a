"""Stopped anywhere with batches in flight, saved and loaded, training goes on bit by bit."""

import io
from functools import partial

import pytest
import torch
from pipelines import digest, make_batch, make_blocks, make_workers
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.pipeline import run_local


TOTAL = 15
EVERYTHING = {"update_every": 3, "predict": "momentum", "clip": "lagged_global", "max_grad_norm": 0.3}


def decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (1 + update))


def layers(k):
    return nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2))


def new_workers(mode="dsp", **settings):
    return make_workers(make_blocks(3, layers=layers), mode, "momentum", decay, **settings)


def reloaded(worker):
    file = io.BytesIO()
    torch.save(worker.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def finish(workers, losses):
    updates = []
    workers[2].on_update = lambda update: updates.append(update.loss)
    losses = losses + run_local(workers, make_batch, TOTAL)
    rates = [w.optimizer.param_groups[0]["lr"] for w in workers]
    return digest([w.block for w in workers], losses), rates, losses, updates[-1]


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 10, 14])
@pytest.mark.parametrize(
    "mode, settings", [("dsp:2,2,0;6,3,0", EVERYTHING), ("dsp", {}), ("lag1", {"update_every": 2})]
)
def test_it_goes_on_bit_by_bit(mode, settings, stop):
    expected = finish(new_workers(mode, **settings), [])
    stopped = new_workers(mode, **settings)
    losses = run_local(stopped, make_batch, TOTAL, stop)
    m = stopped[0].schedule.m
    for k, worker in enumerate(stopped):
        assert worker.forwards == stop and worker.backwards == max(0, stop - m[k])
        sent = max(0, stop - m[k + 1]) - max(0, stop - m[k]) if k < 2 else 0
        assert len(worker.pending) == sent and len(worker.stash) == min(stop, m[k])
    fresh = new_workers(mode, **settings)
    for worker in fresh:
        worker.block.requires_grad_(True)
        with torch.no_grad():
            for parameter in worker.block.parameters():
                parameter.zero_()
    for worker, state in zip(fresh, [reloaded(worker) for worker in stopped], strict=True):
        worker.load_state_dict(state)
    assert finish(fresh, losses) == expected
    assert finish(stopped, losses) == expected  # and so does what was only interrupted


def test_it_stops_again_and_again_between_drains():
    def run(workers, ends):
        losses = []
        for end, stop in ends:
            losses += run_local(workers, make_batch, end, stop)
        return finish(workers, losses)

    expected = run(new_workers(**EVERYTHING), [(7, None)])
    assert run(new_workers(**EVERYTHING), [(7, 2), (7, 6), (7, 6), (7, 99), (TOTAL, 8), (TOTAL, 9)]) == expected
    workers = new_workers(**EVERYTHING)
    losses = run_local(workers, make_batch, 7) + run_local(workers, make_batch, TOTAL, 9)
    fresh = new_workers(**EVERYTHING)
    for worker, other in zip(fresh, workers, strict=True):
        worker.load_state_dict(reloaded(other))
        assert worker.updates.drains == [7]
    assert finish(fresh, losses) == expected


@pytest.mark.parametrize("asking", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stop_that_stages_ask_for_reaches_all_at_one_step(asking):
    expected = finish(new_workers(), [])
    workers = new_workers()

    def ask(update, worker):
        if update.index == 3:
            worker.request_stop()

    for k in asking:
        workers[k].on_update = partial(ask, worker=workers[k])
    losses = run_local(workers, make_batch, TOTAL)
    assert {worker.forwards for worker in workers} == {{0: 8, 1: 9, 2: 9}[min(asking)] if len(asking) == 1 else 8}
    assert finish(workers, losses) == expected


def test_free_running_stages_are_emptied_at_a_stop():
    workers = make_workers(make_blocks(3), "dsp", queue="free", update_every=2)
    losses = run_local(workers, make_batch, TOTAL, 7)
    assert len(losses) == 7 and [w.backwards for w in workers] == [7] * 3
    assert not any(w.stash or w.pending for w in workers)
    assert len(run_local(workers, make_batch, TOTAL)) == TOTAL - 7


def test_graphs_in_flight_cannot_be_saved_but_go_on():
    expected = finish(new_workers(recompute="no"), [])
    workers = new_workers(recompute="no")
    losses = run_local(workers, make_batch, TOTAL, 6)
    with pytest.raises(InputError, match="recompute='no': stage 0 has graphs of 4 batches in flight"):
        workers[0].state_dict()
    assert finish(workers, losses) == expected
    workers[0].state_dict()


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"mode": "dsp:6,3,0"}, "schedule='dsp:2,2,0;6,3,0': the checkpoint was written with 'dsp:1,1,0;4,2,0'"),
        ({"update_every": 2}, "update_every=2"),
        ({"seed": 1}, "seed=1"),
        ({"predict": "momentum"}, "predict='momentum'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(settings, text):
    workers = new_workers()
    run_local(workers, make_batch, TOTAL, 6)
    with pytest.raises(InputError, match=text):
        new_workers(**settings)[0].load_state_dict(workers[0].state_dict())
    with pytest.raises(InputError, match="stage=1"):
        new_workers()[1].load_state_dict(workers[0].state_dict())
