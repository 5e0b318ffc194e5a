"""torch's GPipe and 1F1B give plain back-propagation; and our stale schedule on torch's runtime gives our own."""

import io
import os

import pytest
import torch
import torch.distributed as dist
from pipelines import OPTIMIZERS, Last, Middle, digest, make_batch, make_blocks, make_config, tied_blocks, train
from processes import together
from torch import nn
from torch.distributed.pipelining import PipelineStage

from hf_mlopt.errors import InputError
from hf_mlopt.pipeline.torch_pp import SynchronousWorker


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
TOTAL, PERIOD, EVERY = 16, 7, 4
GROUPS = [(0, 4), (4, 7), (7, 9), (9, 11), (11, 14), (14, 16)]  # of 4, cut by epochs of 7, a drain at 9 and the end


def vary(n):
    """Batches of unlike and growing size; from the second group on the loss is divided by a number of items."""
    return {**make_batch(n, rows=2 + n % 3 + 2 * (n // 9)), "num_items_in_batch": 9 if n >= 4 else None}


def decay(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def at_once(function, world):
    def work(rank):
        answer = function(rank)
        dist.barrier()  # with rank 0 goes the store, which the others may still need
        return answer

    return together(work, world)


def make_worker(blocks, mode, rank=None, update_every=EVERY, worker=None, **settings):
    rank = dist.get_rank() if rank is None else rank
    optimizer = OPTIMIZERS["momentum"](blocks[rank].parameters())
    extra = {"period": PERIOD, "scheduler": decay(optimizer), **(worker or {})}
    stages = settings.pop("stages", len(blocks))
    settings = {"transport": "gloo", "recompute": "auto", "update_every": update_every, **settings}
    config = make_config(stages, "gpipe", **settings)
    return SynchronousWorker(blocks[rank], rank, stages, mode, optimizer, config=config, **extra)


def flat(block):
    return nn.utils.parameters_to_vector(block.parameters()).tolist()


def close(values):
    return pytest.approx(values, rel=0, abs=1e-12)


def accumulate(blocks, groups, batch, max_norm=0.0):
    """Plain training of all blocks in one process; returns the losses of the groups."""
    optimizers = [OPTIMIZERS["momentum"](block.parameters()) for block in blocks]
    schedulers = [decay(optimizer) for optimizer in optimizers]
    losses = []
    for first, end in groups:
        losses.append(0.0)
        for n in range(first, end):
            boundary = ()
            for block in blocks:
                boundary = block(boundary, batch(n))
            scale = 1.0 if batch(n)["num_items_in_batch"] else 1.0 / (end - first)
            (boundary[0] * scale).backward()
            losses[-1] += boundary[0].item() * scale
        for block, optimizer, scheduler in zip(blocks, optimizers, schedulers, strict=True):
            if max_norm:
                nn.utils.clip_grad_norm_(block.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses


def train_in_process(stages, mode):
    """Drained amid a group, stopped and resumed amid the next; and what was evaluated in the end."""
    calls, updates = [], []
    extra = {"before_step": lambda: calls.append(0), "on_update": updates.append}
    worker = make_worker(make_blocks(stages), mode, worker=extra, max_grad_norm=0.05)
    losses = [worker.advance(vary(n)) for n in range(9)]
    stash = worker.telemetry.largest["stash"]
    with pytest.raises(InputError, match="2 batches wait"):
        next(worker.evaluate(vary, 1))
    worker.drain()
    worker.drain()
    losses.append(worker.advance(vary(9)))
    worker.hold()
    saved = io.BytesIO()
    torch.save(worker.state_dict(), saved)
    saved.seek(0)
    blocks = make_blocks(stages)
    for block in blocks:
        nn.init.zeros_(block.linear.weight)
    worker = make_worker(blocks, mode, worker=extra, max_grad_norm=0.05)
    worker.load_state_dict(torch.load(saved, weights_only=True))
    assert (worker.forwards, worker.backwards, worker.num_updates) == (10, 9, 3)
    losses += [worker.advance(vary(n), n == TOTAL - 1) for n in range(10, TOTAL)]
    evaluated = [outputs[0].item() for outputs in worker.evaluate(vary, 4) if outputs]
    told = [[u.index, u.first, u.end, u.loss] for u in updates]
    numbers = [dist.get_world_size(), worker.num_updates, len(calls), stash]
    return numbers, flat(worker.block), losses, told, evaluated


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
def test_equals_plain_accumulation(stages, mode):
    blocks = make_blocks(stages)
    expected = accumulate(blocks, GROUPS, vary, max_norm=0.05)
    answers = at_once(lambda rank: train_in_process(stages, mode), stages)
    for k, (numbers, weights, losses, told, evaluated) in enumerate(answers):
        stash = 4 if mode == "gpipe" else stages - k  # graphs alive at once, which tells the schedules apart
        assert numbers == [stages, len(GROUPS), len(GROUPS), stash]
        assert weights == close(flat(blocks[k]))
        assert [update[:3] for update in told] == [[i + 1, *group] for i, group in enumerate(GROUPS)]
        if k < stages - 1:
            assert losses == [None] * TOTAL and evaluated == []
            assert all(update[3] is None for update in told)
    assert [update[3] for update in told] == close(expected)
    ends = {end - 1: loss for (_, end), loss in zip(GROUPS, expected, strict=True) if end != 9}  # drained: only told
    assert losses == close([ends.get(n, 0.0) for n in range(TOTAL)])
    for n, loss in enumerate(evaluated):
        boundary = ()
        for block in blocks:
            boundary = block(boundary, vary(n))
        assert loss == close(boundary[0].item())


def test_pipelines_beside_each_other_are_plain_accumulation_bit_for_bit_without_clipping():
    def work(rank):
        stages, index = (1, 0) if rank == 0 else (2, rank - 1)
        ranks = [0] if rank == 0 else [1, 2]
        worker = make_worker(make_blocks(stages), "1f1b", index, worker={"ranks": ranks})
        for n in range(PERIOD):
            worker.advance(vary(n))
        return dist.get_world_size(), digest([worker.block])

    one, two = make_blocks(1), make_blocks(2)
    for blocks in (one, two):
        accumulate(blocks, GROUPS[:2], vary)
    assert at_once(work, 3) == [[3, digest([block])] for block in (*one, *two)]


def random_layers(k):
    return nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3))


class Extra(Middle):
    """Adds tensors that need no gradient or get none, of two types and no dimension."""

    def forward(self, boundary, batch):
        (x,) = super().forward(boundary[:1], batch)
        return x, torch.zeros((), dtype=torch.float32), x[:1, :2] * 2


def extra_blocks():
    torch.manual_seed(1)
    blocks = [Extra(first=True).double(), Extra().double(), Last().double()]
    blocks[0].requires_grad_(False)
    return blocks


def test_forwards_and_evaluation_run_in_the_context():
    def context():
        return torch.autocast("cpu", torch.bfloat16)

    def batch(n):
        return {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in vary(n).items()}

    def blocks():
        return [block.float() for block in make_blocks(2)]

    def work(rank):
        worker = make_worker(blocks(), "gpipe", worker={"period": None, "context": context})
        for n in range(8):
            worker.advance(batch(n))
        evaluated = [outputs for outputs in worker.evaluate(batch, 2) if outputs]
        assert not any(outputs[0].requires_grad for outputs in evaluated)
        return dist.get_world_size(), digest([worker.block]), [outputs[0].item() for outputs in evaluated]

    own = blocks()
    settings = {"update_every": EVERY, "scheduler": decay, "worker": {"context": context}}
    train(own, "bp", "momentum", 8, batch, **settings)
    with context(), torch.no_grad():
        expected = [own[1](own[0]((), batch(n)), batch(n))[0].item() for n in range(2)]
    assert at_once(work, 2) == [[2, digest([own[0]]), []], [2, digest([own[1]]), expected]]


def test_equals_our_own_runtime_and_plain_training_for_unusual_blocks():
    """Dropout and BatchNorm, a tied weight, and tensors without a gradient, in one start of processes."""
    settings = {"update_every": 4, "max_grad_norm": 0.5, "scheduler": decay}
    cases = {
        "random": lambda: make_blocks(3, layers=random_layers),
        "tied": tied_blocks,
    }

    def work(rank):
        answers = [dist.get_world_size()]
        for make in (*cases.values(), extra_blocks):
            worker = make_worker(make(), "1f1b", worker={"period": None}, max_grad_norm=0.5)
            for n in range(8):
                worker.advance(vary(n))
            answers.append(flat(worker.block) if make is extra_blocks else digest([worker.block]))
        return answers

    answers = at_once(work, 3)
    assert [answer[0] for answer in answers] == [3, 3, 3]
    for i, (name, make) in enumerate(cases.items(), 1):
        blocks = make()
        train(blocks, "bp", "momentum", 8, vary, tied=name == "tied", **settings)
        assert [answer[i] for answer in answers] == [digest([block]) for block in blocks], name
    blocks = extra_blocks()
    frozen = digest(blocks[:1])
    accumulate(blocks, [(0, 4), (4, 8)], vary, max_norm=0.5)
    assert [answer[3] for answer in answers] == [close(flat(block)) for block in blocks]
    assert frozen == digest(blocks[:1])


def test_what_torch_s_schedules_cannot_do_is_refused():
    def message(*args, **settings):
        with pytest.raises(InputError) as caught:
            make_worker(*args, **settings)
        return str(caught.value)

    def work(rank):
        blocks = make_blocks(2)
        found = [
            message(blocks, "dsp"),
            message(blocks, "gpipe", stages=3),
            message(blocks, "gpipe", worker={"ranks": [1, 0]}),
            message(blocks, "gpipe", transport="local"),
            message(blocks, "gpipe", clip="lagged_global"),
            message(blocks, "gpipe", recompute="yes"),
            message(blocks, "1f1b", update_every=1),
        ]
        state = make_worker(blocks, "gpipe").state_dict()
        with pytest.raises(InputError) as caught:
            make_worker(blocks, "1f1b").load_state_dict(state)
        return [*found, str(caught.value)]

    assert at_once(work, 2) == [
        [
            "mode='dsp': must be one of gpipe, 1f1b",
            "stages=3: a pipeline needs as many processes, and there are 2",
            f"ranks=[1, 0]: must ascend, with rank {rank} at stage {rank}",
            "transport='local': mode=gpipe sends by nccl from CUDA devices, else by gloo; this stage is on cpu",
            "clip='lagged_global': mode=gpipe clips by block",
            "recompute='yes': mode=gpipe keeps graphs: use no or auto",
            "update_every=1: 1f1b needs at least as many batches of an update as stages, 2; or use gpipe",
            "schedule='1f1b': the checkpoint was written with 'gpipe'; use the same",
        ]
        for rank in range(2)
    ]


class Unforeseen(Middle):
    """Returns as many rows as the data say, or a type that they say."""

    def forward(self, boundary, batch):
        (y,) = super().forward(boundary, batch)
        return (y[: int(batch["keep"])],) if batch["double"] else (y.float(),)


def fail(mode, what):
    """How each stage ends when the last, or for `what` about shapes the first, goes wrong in the second group."""

    def work(rank):
        torch.manual_seed(0)
        blocks = [Unforeseen(first=True).double(), *make_blocks(3)[1:]]
        worker = make_worker(blocks, mode, timeout_seconds=600.0)  # longer than a test that hangs may take
        last = blocks[2].layer

        def batch(n):
            late = n >= EVERY
            if late and rank == 2:
                if what == "exception":
                    last.forward = lambda x: 1 / 0
                if what == "kill":
                    os.kill(os.getpid(), 9)
                if what == "nan":
                    last.forward = lambda x: x * float("nan")
            rows = 3 - (what == "types" and n == 5)  # a shape not seen before
            return {
                **make_batch(n, rows),
                "keep": 2 if late and what == "rows" else 3,
                "double": not (what == "types" and n == 5),
            }

        try:
            for n in range(3 * EVERY):
                worker.advance(batch(n))
        except Exception as error:
            if what != "kill":
                dist.barrier()  # nobody ends because another process did
            return type(error).__name__, str(error)

    return together(work, 3)


@pytest.mark.parametrize("mode, what", [("gpipe", "exception"), ("1f1b", "kill"), ("1f1b", "nan")])
def test_a_stage_that_fails_ends_the_others(mode, what):
    *others, failed = fail(mode, what)
    texts = {
        "exception": ["ZeroDivisionError", "division by zero"],
        "kill": None,
        "nan": ["FloatingPointError", "the loss of batch 4 is nan"],
    }
    assert failed == texts[what]
    for k, (name, text) in enumerate(others):
        if what == "nan":
            assert [name, text] == ["FloatingPointError", "the gradient of batches 4 to 6 is not finite"]
        else:
            assert name == "PipelineError" and text.startswith(
                f"stage {k}: another stage failed, is gone, or has been"
            )


@pytest.mark.parametrize("what", ["rows", "types"])
def test_shapes_that_torch_cannot_foresee_are_an_error_with_a_remedy(what):
    (name, text), *others = fail("gpipe", what)
    assert name == "ConfigurationError" and text.startswith("mode='gpipe': ") and text.endswith(": use lag1")
    assert len(others) == 2 and all(other is not None for other in others)


M, N = (4, 2, 0), 14


def on_torch_runtime(rank):
    """DSP as actions of torch's runtime: F(n), then B(n - m_k) with a repeated forward, and an update in it."""
    from torch.distributed.pipelining import schedules

    blocks = make_blocks(3)
    block, k, is_last = blocks[rank], rank, rank == 2
    optimizer = OPTIMIZERS["momentum"](block.parameters())
    example = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    inputs = () if k == 0 else (example,)
    stage = PipelineStage(block, k, 3, torch.device("cpu"), input_args=inputs, output_args=(example,))
    runtime = schedules._PipelineScheduleRuntime([stage], N, loss_fn=lambda *_: None, scale_grads=False)
    stash, losses = {}, []

    def forward(action, context):
        n = action.microbatch_index
        if k > 0:
            schedules._wait_batch_p2p(runtime.fwd_recv_ops.pop((k, n)))
        stash[n] = tuple(info.buffer.detach().clone() for info in stage.args_recv_info[n] if k > 0)
        if not is_last:
            with torch.no_grad():
                stage.fwd_cache[n] = block(stash[n], make_batch(n)), ()

    def backward(action, context):
        n = action.microbatch_index
        if not is_last:
            schedules._wait_batch_p2p(runtime.bwd_recv_ops.pop((k, n)))
        x = tuple(t.requires_grad_() for t in stash.pop(n))
        outputs = block(x, make_batch(n))
        if is_last:
            losses.append(outputs[0].item())
            outputs[0].backward()
        else:
            torch.autograd.backward(outputs, [info.buffer for info in stage.grad_recv_info[n]])
        stage.bwd_cache[n] = tuple(t.grad for t in x)
        optimizer.step()
        optimizer.zero_grad()

    runtime.register_custom_function(schedules.FORWARD, forward)
    runtime.register_custom_function(schedules.FULL_BACKWARD, backward)
    runtime.register_custom_function(schedules.REDUCE_GRAD, lambda action, context: None)
    order = {}
    for stage_index, m in enumerate(M):
        order[stage_index] = []
        for n in range(N + m):
            if n < N:
                order[stage_index].append(schedules._Action(stage_index, schedules.FORWARD, n))
            if n >= m:
                order[stage_index].append(schedules._Action(stage_index, schedules.FULL_BACKWARD, n - m))
    runtime._prepare_schedule_with_comms(order)
    runtime._has_backward = stage.has_backward = True
    runtime._step_microbatches()
    return dist.get_world_size(), digest([block], losses)


def test_dsp_on_torch_s_schedule_runtime_equals_our_own_bit_for_bit():
    from torch.distributed.pipelining import schedules

    runtime = getattr(schedules, "_PipelineScheduleRuntime", None)
    if not all(hasattr(runtime, name) for name in ("register_custom_function", "_prepare_schedule_with_comms")):
        pytest.skip(f"torch {torch.__version__} has no runtime that takes custom forwards and backwards")
    blocks = make_blocks(3)
    _, losses = train(blocks, "dsp:4,2,0", "momentum", N)
    expected = [[3, digest([block], losses if k == 2 else ())] for k, block in enumerate(blocks)]
    assert at_once(on_torch_runtime, 3) == expected
