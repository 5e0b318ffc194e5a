"""A weight of the first and the last stage: an owner, and a copy whose gradients arrive late by a fixed lag."""

import pytest
import torch
from pipelines import OPTIMIZERS, digest, make_batch, make_workers, tied_blocks, train
from reference.pipeline import simulate

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline import parse, run_local


TOTAL = 13


def weight(block):
    return block.linear.weight


@pytest.mark.parametrize("mode", ["bp", "lag1", "dsp", "dsp:6,3,0"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("every", [1, 2])
def test_it_equals_the_index_form(mode, optimizer, every):
    batches = [make_batch(n) for n in range(TOTAL)]
    m = parse(mode, 3).m
    expected = simulate(
        tied_blocks(), [OPTIMIZERS[optimizer]] * 3, m, batches, every, drains=(5,), tied=(weight, weight)
    )
    workers = make_workers(tied_blocks(), mode, optimizer, tied=True, update_every=every)
    losses = run_local(workers, make_batch, 5) + run_local(workers, make_batch, TOTAL)
    assert digest([w.block for w in workers], losses) == digest(*expected)
    assert torch.equal(weight(workers[0].block), weight(workers[2].block))


def test_without_staleness_it_trains_the_tied_model():
    workers, losses = train(tied_blocks(), "bp", "momentum", 8, tied=True)
    blocks = tied_blocks()
    blocks[0].linear.weight = blocks[2].linear.weight
    parameters = {id(p): p for block in blocks for p in block.parameters()}
    optimizer = OPTIMIZERS["momentum"](parameters.values())
    for n in range(8):
        boundary = ()
        for block in blocks:
            boundary = block(boundary, make_batch(n))
        assert boundary[0].item() == pytest.approx(losses[n], rel=1e-12)
        boundary[0].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_it_resumes_bit_by_bit(stop, refresh_every):
    def new():
        return make_workers(tied_blocks(), "dsp", "momentum", tied=True, worker={"refresh_every": refresh_every})

    workers = new()
    expected = run_local(workers, make_batch, TOTAL)
    assert torch.equal(weight(workers[0].block), weight(workers[2].block))  # refreshed at the end in any case
    stopped, fresh = new(), new()
    losses = run_local(stopped, make_batch, TOTAL, stop)
    for worker, other in zip(fresh, stopped, strict=True):
        worker.load_state_dict(other.state_dict())
    losses += run_local(fresh, make_batch, TOTAL)
    assert digest([w.block for w in workers], expected) == digest([w.block for w in fresh], losses)


def test_what_it_does_not_go_with():
    for settings in ({"clip": "lagged_global"}, {"queue": "free"}):
        with pytest.raises(ConfigurationError, match="tied='owner_lagged'"):
            make_workers(tied_blocks(), "dsp", tied=True, **settings)
