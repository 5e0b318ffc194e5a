"""Coded means between real processes, against means that one process computes from all vectors."""

import threading

import pytest
import torch
import torch.distributed as dist
from processes import together

from hf_mlopt.communication import codec
from hf_mlopt.communication.collectives import all_gather_mean, shard_bounds, two_phase_mean
from hf_mlopt.communication.fifo import Fifo


CODECS = ("none", "bingrad-pb", "top-k-0.1")  # exact, drawn, of the whole vector
LENGTHS = (1, 5, 64, 135)  # fewer than ranks, less than a block, whole blocks, a rest


def make(name):
    return codec(name, **({} if name in ("none", "bf16") or "top-k" in name else {"block": 16}))


def vector(rank, length):
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * length + rank))


def key(phase, rank):
    return (7, phase, rank)


def decoded(used, values, *which):
    return used.decode(used.encode(values, key(*which)))


def mean_of(parts):
    total = torch.zeros_like(parts[0])
    for part in parts:  # in rank order: float32 sums depend on it
        total += part
    return total / len(parts)


def check_all_gather(rank, world, name, length):
    used = make(name)
    result = all_gather_mean(vector(rank, length), used, key, None, want_sent=True)
    sent = [decoded(used, vector(other, length), 0, other) for other in range(world)]
    assert torch.equal(result.mean, mean_of(sent)) and torch.equal(result.sent, sent[rank])
    assert result.bytes_sent == (world - 1) * used.wire_bytes(length)
    without = all_gather_mean(vector(rank, length), used, key, None, want_sent=False)
    assert torch.equal(without.mean, result.mean) and without.sent is None


def check_two_phase(rank, world, name, length):
    up, down = make(name), make("sign")
    residual = torch.zeros(length)
    bounds = shard_bounds(length, world, getattr(up, "block", 1))
    first, last = bounds[rank]
    residual[first:last] = vector(99 + rank, length)[first:last]
    result = two_phase_mean(vector(rank, length), up, down, key, None, True, residual)
    expected, bytes_up = torch.empty(length), 0
    for shard, (start, stop) in enumerate(bounds):
        parts = [decoded(up, vector(k, length)[start:stop], 0, k * world + shard) for k in range(world)]
        assert torch.equal(result.sent[start:stop], parts[rank])
        mean = mean_of(parts) + vector(99 + shard, length)[start:stop]
        expected[start:stop] = decoded(down, mean, 1, shard)
        bytes_up += up.wire_bytes(stop - start) if shard != rank else 0
        if shard == rank:
            assert torch.equal(result.down_error[start:stop], mean - expected[start:stop])
    assert torch.equal(result.mean, expected)
    assert not result.down_error[:first].any() and not result.down_error[last:].any()
    longest = max(down.wire_bytes(stop - start) for start, stop in bounds)
    assert result.bytes_sent == bytes_up + (world - 1) * longest
    plain = two_phase_mean(vector(rank, length), up, down, key, None, want_sent=False)
    assert plain.sent is None and plain.down_error is None


def check_broken(rank, world, name):
    """What is not finite on one rank is not finite on all of them, at the same places."""
    for value in (torch.nan, torch.inf):
        flat = vector(rank, 200)
        if rank == world - 1:
            flat[77] = value
        means = [
            all_gather_mean(flat, make(name), key, None, False).mean,
            two_phase_mean(flat, make(name), make(name), key, None, False).mean,
        ]
        for mean in means:
            everywhere = [torch.empty_like(mean) for _ in range(world)]
            dist.all_gather(everywhere, mean)
            for other in everywhere:
                assert other.view(torch.int32).equal(mean.view(torch.int32)) and not other[77].isfinite()
            assert mean.isfinite().sum() >= 200 - 16 * 2 or "top-k" in name


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.distributed
def test_a_coded_mean_is_the_mean_of_what_was_decoded(world):
    def run(rank):
        assert dist.get_world_size() == world
        for name in CODECS:
            for length in LENGTHS:
                check_all_gather(rank, world, name, length)
                check_two_phase(rank, world, name, length)
            check_broken(rank, world, name)

    assert together(run, world) == [None] * world


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("block", [1, 16, 2048])
def test_shards_are_whole_blocks_as_even_as_they_come(world, block):
    for numel in (0, 1, block - 1, block, block + 1, 5 * block, 23 * block + 3):
        bounds = shard_bounds(numel, world, block)
        assert len(bounds) == world and bounds[0][0] == 0 and bounds[-1][1] == numel
        assert all(one[1] == other[0] for one, other in zip(bounds, bounds[1:], strict=False))
        assert all(start % block == 0 or start == numel for start, _ in bounds)
        blocks = [-(-(stop - start) // block) for start, stop in bounds]
        assert max(blocks) - min(blocks) <= 1


def test_tasks_run_in_the_order_they_came_beside_their_caller():
    fifo, seen, wait = Fifo("test"), [], threading.Event()

    def task(number):
        wait.wait(10)
        seen.append((number, threading.current_thread().name))
        return torch.tensor(number)

    futures = [fifo.submit(lambda number=number: task(number)) for number in range(5)]
    assert not futures[0].done()
    wait.set()
    assert [int(future.wait()) for future in futures] == list(range(5))
    assert seen == [(number, "test") for number in range(5)]
    fifo.close()
    with pytest.raises(RuntimeError, match="test has ended: wrap the model in DDP anew"):
        fifo.submit(lambda: task(5))


def test_after_a_task_that_failed_no_other_runs():
    fifo, ran = Fifo("test"), []

    def fail():
        raise ValueError("no such wire")

    first, second = fifo.submit(fail), fifo.submit(lambda: ran.append(1))
    with pytest.raises(Exception, match="no such wire"):
        first.wait()
    with pytest.raises(Exception, match="an earlier exchange failed: no such wire"):
        second.wait()
    assert not ran
    fifo.close()
