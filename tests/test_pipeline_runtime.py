"""The loop of the stages against the index form of its definition, and what must not change results."""

import math

import numpy as np
import pytest
import torch
from pipelines import OPTIMIZERS, Middle, digest, make_batch, make_blocks, make_config, make_workers, train
from reference.pipeline import simulate
from torch import nn

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.pipeline import PipelineError, Worker, local_channels, parse, run_local
from hf_mlopt.pipeline.clipping import LaggedNorm
from hf_mlopt.pipeline.prediction import Prediction


TOTAL = 13
MODES = [
    (2, "bp"),
    (2, "lag1"),
    (2, "dsp:1,0;2,0"),
    (3, "dsp:1,1,0;4,2,0"),
    (3, "dsp:2,2,0;6,3,0"),
    (3, "dsp:0,0,0;2,1,0"),
    (3, "dsp:4,0,0"),
    (3, "dsp:3,3,0"),
]


def index_form(stages, mode, optimizer="sgd", total=TOTAL, **settings):
    batches = [make_batch(n) for n in range(total)]
    return simulate(make_blocks(stages), [OPTIMIZERS[optimizer]] * stages, parse(mode, stages).m, batches, **settings)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stages, mode", MODES)
def test_the_runtime_equals_the_index_form_bit_for_bit(stages, mode, optimizer, every):
    expected = index_form(stages, mode, optimizer, every=every)
    workers, losses = train(make_blocks(stages, sleep=0.002), mode, optimizer, TOTAL, update_every=every)
    assert losses == expected[1]
    assert digest([worker.block for worker in workers], losses) == digest(*expected)


@pytest.mark.parametrize("recompute", ["yes", "no"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_staleness_it_is_back_propagation(optimizer, recompute):
    blocks = make_blocks(3)
    optimizers = [OPTIMIZERS[optimizer](block.parameters()) for block in blocks]
    losses = []
    for n in range(8):
        boundary = ()
        for block in blocks:
            boundary = block(boundary, make_batch(n))
        boundary[0].backward()
        losses.append(boundary[0].item())
        for each in optimizers:
            each.step()
            each.zero_grad()
    workers, found = train(make_blocks(3), "bp", optimizer, 8, recompute=recompute)
    assert digest([w.block for w in workers], found) == digest(blocks, losses)


def test_features_replay_and_lag_one_are_points_of_the_same_engine():
    digests = set()
    for mode in ("fr", "lag1", "dsp:2,1,0", "dsp:1,0,0;2,1,0"):
        workers, losses = train(make_blocks(3), mode, "momentum")
        digests.add(digest([w.block for w in workers], losses))
    assert len(digests) == 1
    workers, losses = train(make_blocks(3), "dsp", "momentum")
    assert digest([w.block for w in workers], losses) not in digests


def test_emptying_the_pipeline_is_part_of_the_contract():
    workers = make_workers(make_blocks(3), "dsp", "momentum", update_every=2)
    losses = sum((run_local(workers, make_batch, end) for end in (5, 9, TOTAL)), [])
    expected = index_form(3, "dsp", "momentum", every=2, drains=(5, 9))
    assert digest([w.block for w in workers], losses) == digest(*expected)
    assert [w.num_updates for w in workers] == [9] * 3  # 2 2 1 1 2 1 2 1 1


@pytest.mark.parametrize("clip", ["block", "lagged_global"])
@pytest.mark.parametrize("every", [1, 2])
def test_clipping(clip, every):
    expected = index_form(3, "dsp", every=every, max_norm=0.1, lagged=clip == "lagged_global")
    workers, losses = train(make_blocks(3), "dsp", "sgd", TOTAL, update_every=every, clip=clip, max_grad_norm=0.1)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-12)
    plain = index_form(3, "dsp", every=every)
    assert abs(losses[-1] - plain[1][-1]) > 1e-4
    for worker, block in zip(workers, expected[0], strict=True):
        torch.testing.assert_close(worker.block.state_dict(), block.state_dict(), rtol=1e-11, atol=1e-13)


def test_weights_predicted_by_momentum():
    expected = index_form(3, "dsp", "momentum", predict=0.9)
    workers, losses = train(make_blocks(3), "dsp", "momentum", TOTAL, predict="momentum", predict_limit=10.0)
    assert digest([w.block for w in workers], losses) == digest(*expected)
    assert [w.prediction.fallbacks if w.prediction else None for w in workers] == [0, 0, None]


def test_a_prediction_that_goes_too_far_is_left_out():
    workers, losses = train(make_blocks(3), "dsp", "momentum", TOTAL, predict="momentum", predict_limit=1e-9)
    plain, same = train(make_blocks(3), "dsp", "momentum", TOTAL)
    assert digest([w.block for w in workers], losses) == digest([w.block for w in plain], same)
    assert workers[0].prediction.fallbacks == TOTAL - 1 - 4  # the first five forwards come before any update


@pytest.mark.parametrize("kind, beta, factor", [("momentum", 0.5, 0.875), ("adam", 0.9, 3.0)])
def test_the_predicted_weights(kind, beta, factor):
    linear = nn.Linear(2, 2).double()
    groups = {"momentum": beta} if kind == "momentum" else {"betas": (beta, 0.999)}
    optimizer = type("Optimizer", (), {"param_groups": [{"params": list(linear.parameters()), **groups}]})()
    prediction = Prediction(linear, optimizer, kind, 100.0)
    assert prediction.weights(3) is None
    prediction.before_step()
    before = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight += 0.25
    prediction.after_step()
    torch.testing.assert_close(prediction.weights(3)["weight"], linear.weight + factor * (linear.weight - before))
    assert prediction.weights(0) is None
    with torch.no_grad():
        linear.bias += math.nan
    assert prediction.weights(3) is None and prediction.fallbacks == 1


class Factors(nn.Module):
    """Two scalars: y = w2 (w1 x)."""

    def __init__(self, first):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.5, 0.7))
        self.first = first

    def forward(self, boundary, batch):
        y = self.w2 * (self.w1 * (batch["x"] if self.first else boundary[0]))
        return (y,) if self.first else ((y - 1.0).square().sum(), y)


def test_without_recomputation_gradients_mix_old_activations_and_new_weights():
    lag, lr, total = 2, 0.05, 9
    a1, a2, b1, b2 = 0.5, 0.7, 0.5, 0.7
    waiting, losses = [], []
    xs = [1.0 + 0.1 * n for n in range(total)]
    for step in range(total + lag):
        if step < total:
            waiting.append((xs[step], a1 * xs[step], a2 * (a1 * xs[step])))
        if step >= lag:
            x, hidden, h = waiting.pop(0)
            y = b2 * (b1 * h)
            losses.append((y - 1) ** 2)
            dy = 2 * (y - 1)
            dh = b1 * (b2 * dy)
            b1, b2 = b1 - lr * (b2 * dy) * h, b2 - lr * dy * (b1 * h)
            a1, a2 = a1 - lr * (a2 * dh) * x, a2 - lr * dh * hidden  # `a2` is new, `hidden` is old
    blocks = [Factors(True), Factors(False)]

    def batch(n):
        return {"x": torch.tensor([xs[n]], dtype=torch.float64)}

    workers, found = train(blocks, "dsp", "sgd", total, batch, recompute="no")
    assert losses == pytest.approx(found, rel=1e-12)
    assert [blocks[0].w1.item(), blocks[0].w2.item()] == pytest.approx([a1, a2], rel=1e-12)
    assert found != pytest.approx(train([Factors(True), Factors(False)], "dsp", "sgd", total, batch)[1], rel=1e-6)
    assert workers[0].telemetry.counts["R"] == 0


def test_prediction_without_recomputation_trains_the_weights_themselves():
    settings = {"recompute": "no", "predict_limit": 10.0}
    workers, losses = train(make_blocks(3), "dsp", "momentum", 30, predict="momentum", **settings)
    plain, other = train(make_blocks(3), "dsp", "momentum", 30, **settings)
    assert losses != other and np.mean(losses[-5:]) < np.mean(losses[:5])
    for worker, start in zip(workers, make_blocks(3), strict=True):
        assert not torch.equal(worker.block.linear.weight, start.linear.weight)


def test_evaluation_needs_an_empty_pipeline():
    workers = make_workers(make_blocks(2), "dsp")
    run_local(workers, make_batch, 9, 4)
    for worker in workers:
        with pytest.raises(InputError, match="batches are in flight"):
            list(worker.evaluate(make_batch, 2))


def test_free_running_stages_keep_to_the_batches_in_flight():
    free = local_channels(parse("dsp", 3), free=True)
    assert [one.backward_in.capacity for one in free[:2]] == [4 + 2, 2 + 2]  # all that may come back: no deadlock
    for mode in ("dsp", "dsp:2,2,0;6,3,0", "lag1"):
        workers, losses = train(make_blocks(3, sleep=0.002), mode, "sgd", 30, queue="free")
        assert len(losses) == 30 and all(math.isfinite(loss) for loss in losses)
        for worker, m in zip(workers, parse(mode, 3).m, strict=True):
            assert worker.telemetry.largest["lag"] <= m and worker.telemetry.largest["stash"] <= m + 1


@pytest.mark.parametrize("recompute", ["yes", "no"])
def test_the_memory_of_a_stage_is_bounded(recompute):
    workers, _ = train(make_blocks(3, sleep=0.002), "dsp:2,2,0;6,3,0", "sgd", 20, recompute=recompute)
    schedule = workers[0].schedule
    for k, worker in enumerate(workers):
        largest = worker.telemetry.largest
        assert largest["stash"] == schedule.m[k] + 1
        assert k == 0 or largest["features"] <= max(1, schedule.p[k - 1]) + 1  # one is the sender's
        assert k == 2 or largest["gradients"] <= max(1, schedule.q[k]) + 1
        assert not worker.stash and largest["lag"] == schedule.m[k]
        channels = worker.channels
        assert k == 0 or channels.forward_in.capacity == max(1, schedule.p[k - 1]) + 1
        assert k == 2 or channels.backward_in.capacity == max(1, schedule.q[k]) + 1


def test_group_losses_and_learning_rates_follow_updates():
    seen = []

    def callbacks(k):
        return {"on_update": seen.append} if k == 2 else {}

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (1 + update))

    workers, losses = train(
        make_blocks(3), "dsp", "sgd", 10, scheduler=schedule, callbacks=callbacks, update_every=2, worker={"period": 5}
    )
    assert [(u.index, u.first, u.end) for u in seen] == [
        (1, 0, 2), (2, 2, 4), (3, 4, 5), (4, 5, 7), (5, 7, 9), (6, 9, 10)
    ]  # fmt: skip
    assert [u.loss for u in seen] == pytest.approx([np.mean(losses[u.first : u.end]) for u in seen])
    assert [w.optimizer.param_groups[0]["lr"] for w in workers] == pytest.approx([0.05 / 7] * 3)

    def counted(n):
        return {**make_batch(n), "num_items_in_batch": 3 * (1 if n % 5 == 4 else 2)}

    by_items, other = train(
        make_blocks(3), "dsp", "sgd", 10, counted, scheduler=schedule, update_every=2, worker={"period": 5}
    )
    for worker, same in zip(workers, by_items, strict=True):
        torch.testing.assert_close(worker.block.state_dict(), same.block.state_dict(), rtol=1e-12, atol=1e-14)
    assert sum(other) == pytest.approx(sum(u.loss for u in seen))


@pytest.mark.parametrize("stages, mode, total", [(1, "dsp", 3), (3, "dsp", 2), (3, "dsp", 0), (2, "dsp:5,0", 1)])
def test_few_batches_and_few_stages(stages, mode, total):
    expected = index_form(stages, mode, total=total)
    workers, losses = train(make_blocks(stages), mode, "sgd", total)
    assert digest([w.block for w in workers], losses) == digest(*expected)


class Sums(Middle):
    """Sends a running sum beside its states, as a mixture of experts does."""

    def forward(self, boundary, batch):
        (y,) = super().forward(boundary[:1], batch)
        return y, boundary[1] + y.mean() if boundary else y.sum()


def test_a_tensor_nobody_uses_has_a_gradient_of_zeros():
    def blocks():
        torch.manual_seed(3)
        return [Sums(first=True).double(), Sums().double(), make_blocks(3)[2]]

    workers, losses = train(blocks(), "dsp", "sgd", 6)
    batches = [make_batch(n) for n in range(6)]
    before = blocks()
    narrow = [Middle(first=True).double(), Middle().double(), before[2]]
    for one, other in zip(narrow, before, strict=True):
        one.load_state_dict(other.state_dict())
    _, expected = simulate(narrow, [OPTIMIZERS["sgd"]] * 3, (4, 2, 0), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-13)


def test_what_is_not_finite_ends_all_stages_and_names_the_batch():
    def batch(n):
        made = make_batch(n)
        return {**made, "labels": made["labels"] * math.nan} if n == 5 else made

    workers = make_workers(make_blocks(3), "dsp")
    with pytest.raises(FloatingPointError, match="the loss of batch 5 is nan"):
        run_local(workers, batch, 20)
    with pytest.raises(PipelineError, match="stage 2 failed: FloatingPointError: the loss of batch 5 is nan"):
        workers[0].run(batch, 20)


def test_a_gradient_that_is_not_finite():
    blocks = make_blocks(2)
    blocks[0].linear.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="the gradient of batches 0 to 1 is not finite"):
        train(blocks, "dsp", update_every=2)


def test_bad_blocks_and_silent_neighbours():
    blocks = make_blocks(2)
    blocks[0].forward = lambda boundary, batch: [batch["x"]]
    with pytest.raises(InputError, match="stage 0 must return a tuple"):
        train(blocks, "dsp")
    blocks[0] = Middle(first=True).double()
    blocks[1].forward = lambda boundary, batch: (boundary[0].relu_().sum(),)
    with pytest.raises(RuntimeError, match="in-place"):
        train(blocks, "dsp")
    blocks = make_blocks(3)
    blocks[1].forward = lambda boundary, batch: (boundary[0].relu_(),)
    with pytest.raises(InputError, match="stage 1 changes its input in place"):
        train(blocks, "dsp")
    channels = local_channels(parse("lag1", 2), timeout=0.05)
    optimizer = OPTIMIZERS["sgd"](make_blocks(2)[1].parameters())
    last = Worker(make_blocks(2)[1], 1, 2, parse("lag1", 2), optimizer, channels[1], config=make_config(2, "lag1"))
    with pytest.raises(PipelineError, match="channel from stage 0 to 1: nothing came for 0.05 s"):
        last.run(make_batch, 3)
    with pytest.raises(ConfigurationError, match="stages=3"):
        Worker(last.block, 1, 3, parse("lag1", 2), optimizer, channels[1], config=make_config(3, "lag1"))


def test_a_channel_that_skips_a_batch_and_totals_that_are_sent_once():
    channel = local_channels(parse("lag1", 2))[0].forward_out
    channel.put(1, (), {})
    with pytest.raises(PipelineError, match="channel from stage 0 to 1: expected batch 0, got 1"):
        channel.get(0)
    norms = LaggedNorm(3)
    norms.add(1, 2.0)
    assert norms.take_new() == [[1, 2.0]] and norms.take_new() == []
    assert [norms.known(n, 9.0) for n in (3, 4, 5)] == [9.0, 2.0, 2.0]


def test_telemetry_tells_what_a_stage_did():
    workers, _ = train(make_blocks(3, sleep=0.002), "dsp", "sgd", 10, update_every=2)
    first, middle, last = (worker.telemetry for worker in workers)
    for telemetry in (first, middle):
        assert {kind: telemetry.counts[kind] for kind in ("F", "R", "B", "step")} == {
            "F": 10, "R": 10, "B": 10, "step": 5
        }  # fmt: skip
        events = sorted(telemetry.events)
        assert [e.batch for e in events if e.kind == "B"] == list(range(10))
        assert all(one.end <= two.start for one, two in zip(events, events[1:], strict=False))
    assert last.counts["R"] == 0 and last.counts["F"] == 10
    assert first.summary()["max_lag"] == 2 and first.summary()["seconds_F"] > 0
