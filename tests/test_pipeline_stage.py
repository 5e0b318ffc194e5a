"""What the forward and the repeated forward of a batch must share, and what only one of them may write."""

import pytest
import torch
from pipelines import digest, make_batch, make_blocks, train
from torch import nn

from hf_mlopt.errors import InputError
from hf_mlopt.pipeline.stage import Stage, draws_random_numbers, random_seed, replayed
from hf_mlopt.pipeline.telemetry import slow_stage


class Noise(nn.Module):
    """Dropout that remembers its masks."""

    def __init__(self):
        super().__init__()
        self.drop, self.masks = nn.Dropout(0.5), []

    def forward(self, x):
        y = self.drop(x + 1.0)
        self.masks.append((y != 0).tolist())
        return y


def test_dropout_drops_the_same_in_both_forwards_and_leaves_no_trace():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    blocks = make_blocks(3, sleep=0.002, layers=lambda k: Noise())
    torch.set_rng_state(state)
    workers, losses = train(blocks, "dsp", "sgd", 6)
    assert torch.equal(torch.get_rng_state(), state)
    orders = ([0, 1, 2, 3, 4, 0, 5, 1, 2, 3, 4, 5], [0, 1, 2, 0, 3, 1, 4, 2, 5, 3, 4, 5], list(range(6)))
    of_batches = []
    for block, order in zip(blocks, orders, strict=True):
        masks = dict(zip(order, block.layer.masks, strict=False))
        assert [masks[n] for n in order] == block.layer.masks
        of_batches += masks.values()
    assert len({str(mask) for mask in of_batches}) == 18  # every batch and stage has its own
    again, same = train(make_blocks(3, layers=lambda k: Noise()), "dsp", "sgd", 6)
    assert digest(blocks, losses) == digest([w.block for w in again], same)
    other, different = train(make_blocks(3, layers=lambda k: Noise()), "dsp", "sgd", 6, seed=1)
    assert different != losses


def test_the_seed_of_a_batch_is_fixed():
    assert random_seed(7, 2, 5) == 377264959095356198  # a checkpoint of today must replay tomorrow
    seeds = {random_seed(seed, stage, n) for seed in range(3) for stage in range(4) for n in range(50)}
    assert len(seeds) == 600 and max(seeds) < 2**64
    with replayed(2**62, 3, 10**12, torch.device("cpu")):
        first = torch.rand(3)
    with replayed(2**62, 3, 10**12, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)


def test_what_draws_random_numbers_is_seen():
    class Attention(nn.Module):
        attention_dropout = 0.0

        def __init__(self, p):
            super().__init__()
            self.attention_dropout = p

    assert not draws_random_numbers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), Attention(0.0)))
    assert draws_random_numbers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert draws_random_numbers(nn.Sequential(Attention(0.1)))
    assert not draws_random_numbers(nn.Sequential(Attention(0.1), nn.RReLU()).eval())


def normed(k):
    return nn.BatchNorm1d(6)


@pytest.mark.parametrize("recompute", ["yes", "no"])
def test_batch_normalization_counts_a_batch_once(recompute):
    workers, losses = train(make_blocks(3, layers=normed), "dsp", "sgd", 7, recompute=recompute)
    assert [worker.block.layer.num_batches_tracked.item() for worker in workers] == [7] * 3
    assert all(worker.block.layer.track_running_stats for worker in workers)


def test_the_forward_uses_the_statistics_of_its_batch_and_writes_none():
    block = make_blocks(3, layers=normed)[0]
    stage = Stage(block, 0, 3)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    outputs, flight = stage.forward(0, (), make_batch(0), 0)
    assert not outputs[0].requires_grad and flight.outputs is None
    torch.testing.assert_close(dict(block.state_dict()), before, rtol=0, atol=0)
    stage.rebuild(0, flight)
    assert torch.equal(flight.outputs[0], outputs[0])
    assert block.layer.num_batches_tracked == 1 and not torch.equal(
        block.layer.running_mean, before["layer.running_mean"]
    )
    block.eval()
    evaluated, _ = stage.forward(1, (), make_batch(1), 0)
    assert torch.equal(evaluated[0], block((), make_batch(1))[0])  # running statistics, as ever


def test_gradients_must_fit_what_was_sent():
    stage = Stage(make_blocks(3)[0], 0, 3)
    _, flight = stage.forward(4, (), make_batch(4), 0)
    stage.rebuild(4, flight)
    with pytest.raises(InputError, match=r"stage 0, batch 4: outputs \[\(3, 6\)\], but gradients \[\(2, 6\)\]"):
        stage.backward(4, flight, (torch.zeros(2, 6, dtype=torch.float64),))


def test_a_graph_may_hold_weights_that_an_optimizer_changed():
    """Facts of PyTorch that the runtime rests on."""
    linear, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    linear(x).sum().backward()
    out = linear(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = linear(x)
    with torch.autograd._unsafe_preserve_version_counter(tuple(linear.parameters())):
        optimizer.step()
    out.sum().backward()
    norm = nn.BatchNorm1d(3, momentum=0.0)
    norm(x)
    assert norm.num_batches_tracked == 1  # why a momentum of zero does not freeze it
    norm.track_running_stats = False
    norm(x)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    "waits, slowest",
    [([0.02, 0.5, 0.6], 0), ([0.5, 0.6, 0.05], 2), ([0.02, 0.5, 0.2], None), ([0.2, 0.5, 0.6], None), ([0.0], None)],
)
def test_the_stage_that_all_wait_for(waits, slowest):
    assert slow_stage(waits) == slowest
