"""Stages that are fed one batch at a time, as a Trainer does, and emptied where nobody knew it before."""

import copy
import threading

import pytest
import torch
from pipelines import OPTIMIZERS, digest, make_batch, make_blocks, make_workers, tied_blocks
from reference.pipeline import simulate

from hf_mlopt.pipeline import parse


TOTAL = 12


def weight(block):
    return block.linear.weight


def together(workers, work):
    """`work(worker)` in a thread for every stage; what the last one returned."""
    results = {}

    def run(worker):
        results[worker.index] = work(worker)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results[len(workers) - 1]


@pytest.mark.parametrize("mode", ["bp", "lag1", "dsp", "dsp:6,3,0"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("is_known", [True, False])
def test_it_equals_the_index_form(mode, every, is_known):
    """Emptied after batches 4 and 12, told with the batch or afterwards."""
    batches = [make_batch(n) for n in range(TOTAL)]
    m = parse(mode, 3).m
    expected = simulate(make_blocks(3), [OPTIMIZERS["momentum"]] * 3, m, batches, every, drains=(4,))
    workers = make_workers(make_blocks(3), mode, "momentum", update_every=every)

    def work(worker):
        losses = []
        for n in range(TOTAL):
            ends = n + 1 in (4, TOTAL)
            losses.append(worker.advance(make_batch(n), is_last=is_known and ends))
            if ends:
                worker.drain()  # nothing is left to do where it was known
        assert worker.forwards == worker.backwards == TOTAL
        return losses

    losses = together(workers, work)
    assert digest([w.block for w in workers], [every * loss for loss in losses]) == digest(*expected)


@pytest.mark.parametrize("mode", ["lag1", "dsp"])
def test_a_tied_weight_and_an_end_that_was_known(mode):
    batches = [make_batch(n) for n in range(TOTAL)]
    m = parse(mode, 3).m
    expected = simulate(tied_blocks(), [OPTIMIZERS["sgd"]] * 3, m, batches, 1, drains=(5,), tied=(weight, weight))
    workers = make_workers(tied_blocks(), mode, tied=True)

    def work(worker):
        return [worker.advance(make_batch(n), is_last=n + 1 in (5, TOTAL)) for n in range(TOTAL)]

    losses = together(workers, work)
    assert digest([w.block for w in workers], losses) == digest(*expected)


def test_a_tied_weight_and_an_end_that_was_not():
    """Gradients of the copy that come too late are in the owner's next gradient, and none is lost."""
    workers = make_workers(tied_blocks(), "dsp", tied=True)
    own = {}

    def work(worker):
        for n in range(6):
            worker.advance(make_batch(n))
        before = None if worker.index < 2 else weight(worker.block).grad
        worker.drain()
        own[worker.index] = (before, weight(worker.block).grad)
        worker.advance(make_batch(6), is_last=True)

    together(workers, work)
    before, after = own[2]
    assert before is None and after is not None and float(after.norm()) > 0
    assert torch.equal(weight(workers[0].block), weight(workers[2].block))


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_what_is_held_goes_on_bit_by_bit(stop):
    def new():
        return make_workers(make_blocks(3), "dsp", "adamw", update_every=2, predict="momentum")

    def feed(first, last):
        return lambda worker: [worker.advance(make_batch(n), is_last=n + 1 == TOTAL) for n in range(first, last)]

    straight, stopped, resumed = new(), new(), new()
    together(straight, feed(0, TOTAL))
    states = {}

    def held(worker):
        feed(0, stop)(worker)
        worker.hold()
        states[worker.index] = copy.deepcopy(worker.state_dict())  # optimizers share what they are given

    together(stopped, held)
    for worker in resumed:
        worker.load_state_dict(states[worker.index])
    together(resumed, feed(stop, TOTAL))
    assert digest([w.block for w in resumed]) == digest([w.block for w in straight])
    together(stopped, feed(stop, TOTAL))  # and so does the one that was saved
    assert digest([w.block for w in stopped]) == digest([w.block for w in straight])
