"""The vector of staleness, what it implies, and which vectors cannot run."""

import itertools

import pytest
from reference.pipeline import updates_before

from hf_mlopt.configuration import load_config, to_dict
from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline import PipelineConfig, Schedule, choose, parse
from hf_mlopt.pipeline.schedule import Updates


@pytest.mark.parametrize(
    "mode, p, q, m",
    [
        ("bp", (0, 0, 0), (0, 0, 0), (0, 0, 0)),
        ("fr", (0, 0, 0), (1, 1, 0), (2, 1, 0)),
        ("lag1", (1, 1, 0), (0, 0, 0), (2, 1, 0)),
        ("dsp", (1, 1, 0), (1, 1, 0), (4, 2, 0)),
        ("dsp:4,2,0", (1, 1, 0), (1, 1, 0), (4, 2, 0)),
        ("dsp:2,2,0;6,3,0", (2, 2, 0), (1, 1, 0), (6, 3, 0)),
        ("dsp:3,3,0;10,5,0", (3, 3, 0), (2, 2, 0), (10, 5, 0)),
        ("dsp:7,7,0", (0, 4, 0), (0, 3, 0), (7, 7, 0)),
    ],
)
def test_presets_and_vectors(mode, p, q, m):
    schedule = parse(mode, 3)
    assert (schedule.p, schedule.q, schedule.m) == (p, q, m)
    assert parse(schedule.text, 3) == schedule
    for k in range(2):
        assert schedule.feature_capacity(k) == max(1, p[k]) and schedule.gradient_capacity(k) == max(1, q[k])


@pytest.mark.parametrize(
    "mode, text",
    [
        ("dsp:2,4,0", "m must not increase: stage 0 has 2, stage 1 has 4"),
        ("dsp:4,2,1", "the last stage owns the loss"),
        ("dsp:1,1,1;4,2,0", "the last stage owns the loss"),
        ("dsp:3,1,0;4,2,0", "p of stage 0 must be from 0 to m_0 - m_1 = 2"),
        ("dsp:-1,1,0;4,2,0", "p of stage 0 must be from 0"),
        ("dsp:4,-2,0", "m must not increase: stage 1 has -2, stage 2 has 0"),
        ("dsp:4,0", "one value for each of 3 stages"),
        ("dsp:1,1,0;4,2,0;1,1,0", "one value for each of 3 stages"),
        ("dsp:4,x,0", "a vector is numbers"),
        ("pipedream", "must be one of auto, bp, fr, lag1, dsp, gpipe, 1f1b"),
    ],
)
def test_vectors_that_cannot_run(mode, text):
    with pytest.raises(ConfigurationError, match=text) as error:
        parse(mode, 3)
    assert error.value.field == "mode"


@pytest.mark.parametrize(
    "setting, value",
    [
        ("stages", 0),
        ("mode", "dsp:0,1"),
        ("recompute", "maybe"),
        ("predict", "nesterov"),
        ("update_every", 0),
        ("timeout_seconds", 0.0),
        ("max_grad_norm", -1.0),
        ("predict_limit", float("nan")),
        ("transport", "mpi"),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ConfigurationError) as error:
        PipelineConfig(**{setting: value})
    assert error.value.field == setting


@pytest.mark.parametrize("settings", [{"mode": "1f1b", "queue": "free"}, {"queue": "free", "clip": "lagged_global"}])
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(ConfigurationError, match="deterministic|fixed order"):
        PipelineConfig(**settings)


def test_the_configuration_goes_through_yaml():
    config = PipelineConfig(stages=3, mode="dsp:4,2,0", predict="none")
    assert load_config(PipelineConfig, overrides=to_dict(config)) == config


@pytest.mark.parametrize("every, period, drains", [(1, None, ()), (3, None, ()), (3, None, (4, 9, 11)), (3, 5, ())])
def test_updates_are_counted_as_batches_are_grouped(every, period, drains):
    updates = Updates(every, period, list(drains))
    if period:  # the twin knows no epochs: their ends are as good as drains, which start groups anew
        ends = [i for i in range(1, 31) if i % period == 0 or (i % period) % every == 0]
        expected = [sum(end <= n for end in ends) for n in range(31)]
    else:
        expected = [updates_before(n, every, drains) for n in range(31)]
    assert [updates.before(n) for n in range(31)] == expected
    assert [updates.drained(n) for n in (0, 4, 10, 30)] == ([0, 4, 9, 11] if drains else [0] * 4)
    for n in range(30):
        first, end = updates.group(n, min(d for d in (*drains, 29, 30) if d > n))
        assert first <= n < end
        assert {updates.before(i) for i in range(first, end)} == {updates.before(n)}
        assert first == 0 or updates.before(first - 1) == updates.before(n) - 1
    grown = Updates(every, period)
    for n in drains:
        grown.add_drain(n)
    assert grown.drains == list(drains) and grown.before(30) == updates.before(30)


def test_versions_and_staleness():
    schedule, updates = parse("dsp", 3), Updates(2, drains=[8])
    assert [schedule.forward_version(0, n, updates) for n in range(14)] == [0, 0, 0, 0, 0, 0, 1, 1, 4, 4, 4, 4, 4, 4]
    assert [schedule.staleness(0, n, updates) for n in range(14)] == [0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 2, 2]
    assert all(schedule.staleness(2, n, updates) == 0 for n in range(14))


def test_auto_takes_the_least_staleness_without_a_bubble():
    assert choose([1.0] * 4, [2.0] * 4, [0.0] * 4).m == (3, 2, 1, 0)
    assert choose([1.0] * 4, [2.0] * 4, [0.0] * 4, latency=1.5).m == (6, 4, 2, 0)
    assert choose([1.0] * 4, [2.0] * 4, [0.0] * 4, latency=1.51).m == (9, 6, 3, 0)
    assert choose([1.0] * 3, [2.0] * 3, [1.0, 1.0, 0.0], latency=[0.0, 3.0]).m == (4, 3, 0)
    assert choose([1.0] * 3, [2.0] * 3, [0.0] * 3, jitter=[0.0, 1.0]).m == (3, 2, 0)
    assert choose([1.0], [2.0], [0.0]).m == (0,)
    with pytest.raises(ConfigurationError, match="nothing was measured"):
        choose([0.0], [0.0], [0.0])


def deadlocks(m, features, gradients, num_batches):
    """Tokens only: every stage does F(n), then B(n - m_k); takes and sends block."""
    stages = len(m)
    steps = [
        [op for n in range(num_batches + lag) for op in ["F"] * (n < num_batches) + ["B"] * (n >= lag)] for lag in m
    ]
    actions = []  # take, then send
    for k in range(stages):
        mine = []
        for kind in steps[k]:
            source, target = (k - 1, k + 1) if kind == "F" else (k + 1, k - 1)
            mine += [("take", kind, source)] * (0 <= source < stages) + [("send", kind, target)] * (
                0 <= target < stages
            )
        actions.append(mine)
    queues, at = {}, [0] * stages
    while True:
        has_moved = False
        for k in range(stages):
            while at[k] < len(actions[k]):
                what, kind, other = actions[k][at[k]]
                pair = (kind, other, k) if what == "take" else (kind, k, other)
                held, slots = queues.get(pair, 0), (features if kind == "F" else gradients)[min(k, other)]
                if (held == 0) if what == "take" else (held >= slots):
                    break
                queues[pair] = held + (1 if what == "send" else -1)
                at[k], has_moved = at[k] + 1, True
        if not has_moved:
            return any(position < len(mine) for position, mine in zip(at, actions, strict=True))


def test_a_pipeline_deadlocks_exactly_if_the_slots_are_fewer_than_the_batches_that_travel():
    for before, after in itertools.product(range(5), repeat=2):
        m = (before + after, after, 0)
        for features, gradients in itertools.product(itertools.product((1, 2, 3, 5), repeat=2), repeat=2):
            slots = [f + g for f, g in zip(features, gradients, strict=True)]
            is_short = slots[0] < before or slots[1] < after
            assert deadlocks(m, features, gradients, 14) == is_short, (m, features, gradients)
    assert deadlocks((1, 2, 0), (9, 9), (9, 9), 14)  # no number of slots helps


def test_no_vector_that_is_accepted_deadlocks():
    for before, after in itertools.product(range(6), repeat=2):
        for p in itertools.product(range(before + 1), range(after + 1)):
            schedule = Schedule((*p, 0), (before + after, after, 0))
            features = [schedule.feature_capacity(k) for k in range(2)]
            gradients = [schedule.gradient_capacity(k) for k in range(2)]
            assert not deadlocks(schedule.m, features, gradients, 16)
