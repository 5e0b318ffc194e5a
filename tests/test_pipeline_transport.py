"""Stages in processes of their own give what threads give, and none outlives another that failed."""

import os

import pytest
import torch.distributed as dist
from pipelines import OPTIMIZERS, digest, make_batch, make_blocks, make_config, tied_blocks, train
from processes import together

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline import Worker, distributed_channels, parse


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
TOTAL = 11


def vary(n):
    return make_batch(n, rows=2 + n % 3)


def stage_in_process(rank, blocks, mode, batch=vary, total=TOTAL, tied=False, **settings):
    stages = len(blocks)
    schedule, config = parse(mode, stages), make_config(stages, mode, transport="gloo", **settings)
    channels = distributed_channels(schedule, timeout=config.timeout_seconds, free=config.queue == "free", tied=tied)
    optimizer = OPTIMIZERS["momentum"](blocks[rank].parameters())
    worker = Worker(blocks[rank], rank, stages, schedule, optimizer, channels, config=config)
    losses = worker.run(batch, total, 5)
    assert worker.forwards == 5
    losses += worker.run(batch, total)
    evaluated = [outputs[0].item() for outputs in worker.evaluate(batch, 4) if outputs]
    channels.close()
    return dist.get_world_size(), digest([blocks[rank]], losses), losses, evaluated


@pytest.mark.parametrize("stages, mode, tied", [(2, "dsp", True), (3, "dsp:2,2,0;6,3,0", False)])
def test_processes_equal_threads_bit_for_bit_with_batches_of_different_shape(stages, mode, tied):
    make = tied_blocks if tied else make_blocks
    settings = {"update_every": 2, "clip": "block" if tied else "lagged_global", "max_grad_norm": 0.5, "tied": tied}
    workers, losses = train(make(stages), mode, "momentum", TOTAL, vary, **settings)
    evaluated = []
    for n in range(4):
        boundary = ()
        for worker in workers:
            boundary = worker.block(boundary, vary(n))
        evaluated.append(boundary[0].item())
    at_end = [([], [])] * (stages - 1) + [(losses, evaluated)]
    expected = [[stages, digest([w.block], end[0]), *end] for w, end in zip(workers, at_end, strict=True)]
    assert together(lambda rank: stage_in_process(rank, make(stages), mode, **settings), stages) == expected


def test_free_running_processes():
    def work(rank):
        return stage_in_process(rank, make_blocks(2), "dsp:5,0", total=30, queue="free")

    (_, _, nothing, _), (world, _, losses, _) = together(work)
    assert world == 2 and nothing == [] and len(losses) == 30


def test_a_stage_that_fails_ends_the_others_with_its_name():
    def work(rank):
        blocks = make_blocks(3)
        if rank == 2:
            blocks[2].layer.forward = lambda x: 1 / 0
        try:
            stage_in_process(rank, blocks, "dsp")
        except Exception as error:
            return type(error).__name__, str(error)

    first, middle, failed = together(work, 3)
    assert failed == ["ZeroDivisionError", "division by zero"]
    assert first == middle == ["PipelineError", "stage 2 failed: ZeroDivisionError: division by zero"]


def test_a_stage_that_is_killed_ends_the_others():
    def work(rank):
        def batch(n):
            if rank == 1 and n == 4:
                os.kill(os.getpid(), 9)
            return make_batch(n)

        try:
            stage_in_process(rank, make_blocks(3), "dsp", batch, total=1000)
        except Exception as error:
            return type(error).__name__, str(error)

    first, killed, last = together(work, 3)
    assert killed is None
    for name, text in (first, last):
        assert name == "PipelineError" and text.startswith("stage 1 is gone: ")


def test_a_pipeline_needs_as_many_processes_as_stages():
    def work(rank):
        try:
            distributed_channels(parse("dsp", 3))
        except ConfigurationError as error:
            dist.barrier()  # the first holds the store through which the other may still find it
            return str(error)

    assert together(work) == ["stages=3: a pipeline needs as many processes, and there are 2"] * 2
