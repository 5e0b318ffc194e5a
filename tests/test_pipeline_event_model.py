"""The event model against closed forms and the figures of the specification; memory against its formulas."""

import random

import pytest

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.pipeline import parse, time_per_batch
from hf_mlopt.pipeline.event_model import memory


F, B = [1.0] * 4, [2.0] * 4


def slow_stage(stage, kind, batch):
    return 2.0 if stage == 1 else 1.0


def stragglers(probability, factor):
    generator = random.Random(0)
    return lambda stage, kind, batch: factor if generator.random() < probability else 1.0


@pytest.mark.parametrize(
    "mode, settings, plain, slow, half, far",  # units of F: no delay; stage 1 twice as slow; links of 0.5 F and 1.5 F
    [
        ("gpipe", {}, 4.12, 7.12, 4.50, 5.25),
        ("1f1b", {}, 4.12, 6.62, 5.12, 7.12),
        ("1f1b", {"micro_batches": 32}, 3.28, 6.16, 4.09, 5.72),
        ("lag1", {}, 3.0, 6.0, 3.75, 5.25),
        ("dsp", {}, 3.0, 6.0, 3.0, 3.0),
        ("dsp:18,12,6,0", {}, 3.0, 6.0, 3.0, 3.0),
        ("dsp", {"recompute": F}, 4.0, 8.0, 4.0, 4.0),
    ],
)
def test_steady_times(mode, settings, plain, slow, half, far):
    found = [
        time_per_batch(mode, F, B, num_batches=2048, **settings, **extra)
        for extra in ({}, {"slowdown": slow_stage}, {"latency": 0.5}, {"latency": 1.5})
    ]
    assert found == pytest.approx([plain, slow, half, far], rel=0.005)


def test_back_propagation_and_short_runs_are_exact():
    assert time_per_batch("bp", F, B, num_batches=10) == 12.0
    assert time_per_batch("bp", F, B, num_batches=10, latency=0.25) == 12.0 + 6 * 0.25
    assert time_per_batch("bp", F, B, recompute=F, num_batches=10) == 12.0  # nothing is in flight, nothing repeated
    for mode in ("gpipe", "1f1b"):
        assert time_per_batch(mode, F, B, num_batches=16) == (8 + 3) / 8 * 3
    # K = 2, two batches: F0 . F0+B0 . B0 at stage 0, with F1 in between and F1+B1 at stage 1 after its first step.
    assert time_per_batch("lag1", F[:2], B[:2], num_batches=2) == (1 + 3 + 3 + 2) / 2


@pytest.mark.parametrize(
    "mode, often, strong",  # a third of the operations take 2 and 4 times as long
    [
        ("gpipe", 6.30, 10.66),
        ("1f1b", 6.23, 10.68),
        ("lag1", 4.99, 8.97),
        ("dsp", 4.32, 7.43),
        ("dsp:18,12,6,0", 4.10, 6.49),
    ],
)
def test_transient_stragglers(mode, often, strong):
    found = [time_per_batch(mode, F, B, num_batches=4096, slowdown=stragglers(1 / 3, factor)) for factor in (2, 4)]
    assert found == pytest.approx([often, strong], rel=0.03)


def test_a_recomputation_hides_the_way_of_the_gradient():
    # One batch at a time would take K (F + B) + 2 (K - 1) c = 15; R of stages 0 to 2 starts before the gradient comes.
    assert time_per_batch("lag1", F, B, recompute=F, num_batches=1, latency=0.5) == 15.0


def test_a_schedule_for_other_stages_is_refused():
    with pytest.raises(ConfigurationError, match="the schedule is for 3"):
        time_per_batch(parse("dsp", 3), F, B)


def test_memory_of_a_stage():
    # The two-layer Llama stage of the specification, MiB: input 0.5, graph 20.3, weights 5.5, six batches in flight.
    sizes = {"weights": 0.0, "boundary_in": 0.5, "boundary_out": 0.5, "graph": 20.3, "stages": 4}
    first = memory("dsp", 0, **sizes)
    assert first == pytest.approx(7 * 0.5 + 20.3 + 0.5)  # 23.8 and the queue of gradients
    assert memory("dsp", 1, **sizes) == pytest.approx(5 * 0.5 + 20.3 + 2 * 0.5)
    assert memory("dsp", 0, **{**sizes, "weights": 5.5}) - first == pytest.approx(4 * 5.5)
    assert memory("dsp", 0, **{**sizes, "weights": 5.5}, predict=True) - first == pytest.approx(6 * 5.5)
    assert memory("dsp", 3, **{**sizes, "weights": 5.5}, predict=True) == pytest.approx(4 * 5.5 + 20.3 + 0.5 + 0.5)
    assert memory("dsp", 0, **sizes, recompute=False) == pytest.approx(7 * (0.5 + 20.3) + 0.5)
    sizes |= {"weights": 5.5, "optimizer_factor": 0.0}
    assert memory("pipedream", 0, **sizes) == pytest.approx(5.5 * (3 + 2) + 4 * 20.8)
    assert memory("1f1b", 0, **sizes) == pytest.approx(11 + 4 * 20.8)
    assert memory("1f1b", 3, **sizes) == pytest.approx(11 + 20.8)
    assert memory("gpipe", 3, **sizes) == pytest.approx(11 + 8 * 20.8)
