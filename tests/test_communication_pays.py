"""Whether a codec pays: the rule against simulated steps, bytes against what is sent, turning off, choosing bits."""

import gc
import itertools
import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compressed import DEPTH, WIDTH, Layers, coded, digest, flat, train
from processes import together

from hf_mlopt.communication import auto_off, pays
from hf_mlopt.communication.auto_off import Watch, send_in_bf16
from hf_mlopt.communication.bits import Budget, choose, relative_errors
from hf_mlopt.communication.collectives import all_gather_mean, two_phase_mean
from hf_mlopt.communication.pays import bf16_bytes, bytes_sent, decide, measure
from hf_mlopt.communication.quantizers.registry import codec
from hf_mlopt.errors import ConfigurationError


PAGE = Path(__file__).parent.parent / "docs" / "compress.md"


def key(phase, rank):
    return (0, phase, rank)


@pytest.mark.parametrize("world, gathers_all", [(2, True), (2, False), (3, False)])
def test_bytes_are_those_that_the_collectives_send(world, gathers_all):
    numel, up, down = 10 * 64 + 7, codec("bingrad-b", block=64), codec("orq-9", block=64)

    def sent(rank):
        vector = torch.randn(numel)
        if gathers_all:
            return all_gather_mean(vector, up, key, None, False).bytes_sent
        return two_phase_mean(vector, up, down, key, None, False).bytes_sent

    counted = together(sent, world)
    assert len(counted) == world
    assert bytes_sent(up, down, numel, world, gathers_all) == pytest.approx(sum(counted) / world)


@pytest.mark.parametrize(
    "name, world, expected",
    [
        ("bingrad-b", 2, 0.129), ("orq-3", 2, 0.206), ("orq-9", 2, 0.518),
        ("bingrad-b", 8, 0.226), ("orq-3", 8, 0.360), ("orq-5", 8, 0.600), ("orq-9", 8, 0.906), ("orq-9", 64, 1.02),
    ],
)  # fmt: skip
def test_bytes_of_the_specification(name, world, expected):
    numel, used = world * 2048 * 100, codec(name)
    assert bytes_sent(used, used, numel, world, world == 2) / numel == pytest.approx(expected, abs=0.006)


TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.-]+)` \| (\d.*?) \| [^|]*\|$", TEXT[: TEXT.index("## When does it pay")], re.M)
RECORD = json.loads((PAGE.parent.parent / "benchmarks" / "results" / "communication.json").read_text())


@pytest.mark.parametrize("name, row", ROWS, ids=[name for name, _ in ROWS])
def test_the_documentation_says_what_codecs_take_and_are(name, row):
    numel, used = 64 * 2048 * 128, codec(name)
    numbers = [8 * used.wire_bytes(numel) / numel]
    numbers += [bytes_sent(used, used, numel, world, world == 2) / numel for world in (2, 8, 64)]
    properties = ["yes" if used.biased else "no", {True: "yes", None: "depends"}[used.contractive]]
    assert row.split(" | ") == [*(f"{number:.3f}" for number in numbers), *properties]


def _shown(heading):
    """Rows of a table of the section of measurements: first cell, and the numbers of the others as they are shown."""
    section = TEXT[TEXT.index("## Measured") :]
    part = section[section.index(heading) :]
    part = part[: part.index("\n\n", part.index("|---"))]
    lines = [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:1] == "|"]
    return lines[0], lines[2:]


def test_the_documentation_says_what_was_measured():
    """Every number of the tables of errors, steps and losses is that of the record."""
    errors = [row for row in RECORD["rows"] if row["kind"] == "error"]
    sources = [("Gaussian", None), ("Student-t3", None), ("transformer", 100), ("ResNet", 100)]
    for name, *cells in _shown("**Error**")[1]:
        for cell, (source, step) in zip(cells, sources, strict=True):
            of = [r for r in errors if (r["codec"], r["source"], r.get("step")) == (name, source, step)]
            assert float(cell.split()[0]) == pytest.approx(sum(r["error"] for r in of) / len(of), abs=6e-4)
            if "%" in cell:
                above = 100 * (sum(r["of_optimum"] for r in of) / len(of) - 1)
                assert float(cell.split("+")[1].split()[0]) == pytest.approx(above, abs=0.6)
    steps = {(r["ranks"], r["bandwidth"], r["codec"]): r for r in RECORD["rows"] if r["kind"] == "link"}
    header, rows = _shown("**A step**")
    names = [{"PowerSGD, rank 4": "powersgd-4"}.get(name, name) for name in header[1:]]
    for what, *cells in rows:
        ranks, bandwidth = int(what.split()[0]), {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9}[what.split(", ")[1]]
        for name, cell in zip(names, cells, strict=True):
            assert float(cell) == pytest.approx(steps[ranks, bandwidth, name]["step_seconds_median"], rel=0.011)
    losses = {entry["mode"]: entry["over_bf16"] for entry in RECORD["quality_summary_LM"]}
    modes = ("none", "classic", "a tenth ahead", "step-ahead", "step-ahead, averaged")
    shown = 0
    for name, *cells in _shown("**Loss**")[1]:
        for mode, cell in zip(modes, cells[:-1], strict=True):
            if cell:
                assert float(cell) == pytest.approx(losses[f"{name} / {mode}"], abs=6e-4)
                shown += 1
    assert shown == len(losses) - 2  # all but fp32 and bf16


def test_the_documentation_has_all_kinds():
    assert {name for name, _ in ROWS} >= {"bf16", "orq-9", "orq-5-optimal", "orq-3-optimal", "bingrad-b", "top-k-0.01"}


def step_seconds(exchange, coding, backward):
    """A step in plain steps: coding takes the processor, the exchange runs beside the backward pass."""
    return backward + coding + max(exchange - backward, 0)


def test_the_rule_is_what_two_steps_take_and_its_crossover_is_where_they_meet():
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        numel, world = int(random.integers(1000, 10**7)), int(random.choice([2, 3, 8]))
        name = str(random.choice(["bingrad-b", "orq-9", "top-k-0.1", "fp8"]))
        given = {"bandwidth": 10 ** random.uniform(7, 11), "codec_rate": 10 ** random.uniform(7, 10)}
        backward = float(random.choice([0, 10 ** random.uniform(-4, 0)]))
        verdict = decide(name, numel, world, backward_seconds=backward, **given)
        coded_bytes = bytes_sent(codec(name), codec(name), numel, world, world == 2)
        plain = step_seconds(bf16_bytes(numel, world) / given["bandwidth"], 0, backward)
        ours = step_seconds(coded_bytes / given["bandwidth"], numel / given["codec_rate"], backward)
        assert verdict.step_seconds == pytest.approx(plain)
        assert verdict.saved_seconds == pytest.approx(plain - ours, abs=1e-9 * plain)
        assert verdict.pays == (given["bandwidth"] < verdict.crossover) == (ours < plain)
        assert verdict.ratio == pytest.approx(coded_bytes / bf16_bytes(numel, world))
        seen.add((verdict.pays, backward > 0))
    assert len(seen) == 4


def test_the_crossover_of_the_specification():
    numel, rate = 8 * 2048 * 100, 3e8
    verdict = decide("bingrad-b", numel, 8, bandwidth=1e9, codec_rate=rate)
    b = bytes_sent(codec("bingrad-b"), codec("bingrad-b"), numel, 8, False) / numel
    assert verdict.crossover == pytest.approx((3.5 - b) * rate)
    assert verdict.crossover == pytest.approx(1e9, rel=0.02)  # 3.27 bytes of each gradient are saved


def test_an_exchange_that_is_hidden_cannot_be_made_shorter():
    given = {"bandwidth": 1e8, "codec_rate": 1e9}
    assert decide("bingrad-b", 10**6, 2, **given).pays
    assert not decide("bingrad-b", 10**6, 2, **given, backward_seconds=1.0).pays
    # The exchange takes 20 ms. What is measured wins over what is reckoned.
    exposed = decide("bingrad-b", 10**6, 2, **given, backward_seconds=1.0, exposed_seconds=0.005)
    assert exposed.pays and exposed.saved_seconds == pytest.approx(0.005 - 0.001)
    assert exposed.step_seconds == pytest.approx(1.005)


def test_the_codec_of_the_way_back_counts_in_two_phases_only():
    given = {"bandwidth": 1e8, "codec_rate": 1e9}
    same, other = decide("bingrad-b", 10**6, 8, **given), decide("bingrad-b", 10**6, 8, **given, down="orq-9")
    assert other.ratio > 1.5 * same.ratio and other.codec == "bingrad-b (back orq-9)"
    both = [decide("bingrad-b", 10**6, 8, **given, down=down, gathers_all=True) for down in (None, "orq-9")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    "world, bandwidth, words",
    [
        (2, 1e8, "orq-9 sends 0.26 of bf16's bytes; at the measured 0.1 GB/s a step saves 12.8 ms of 20: it pays"),
        (
            2, 1e10,
            "orq-9 sends 0.26 of bf16's bytes, but at the measured 10 GB/s coding takes 2 ms and a step of 0.2 ms "
            "becomes 1.85 ms longer: it does not pay, take bf16, grad_codec=None or a codec that is quicker; it pays "
            "below 0.74 GB/s",
        ),
    ],
)  # fmt: skip
def test_it_says_why(world, bandwidth, words):
    assert decide("orq-9", 10**6, world, bandwidth=bandwidth, codec_rate=5e8).text == words


def test_all_gather_of_many_ranks_pays_on_no_link():
    verdict = decide("orq-9", 10**6, 64, bandwidth=1e3, codec_rate=1e12, gathers_all=True)
    assert not verdict.pays and verdict.crossover == 0 and "on any link" in verdict.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"world_size": 1}, "world_size=1: must be at least 2"),
        ({"numel": 0}, "numel=0"),
        ({"bandwidth": 0.0}, "bandwidth=0.0"),
        ({"codec_rate": float("nan")}, "codec_rate=nan"),
        ({"up": "orq"}, "codec='orq'"),
    ],
)
def test_what_is_refused(change, message):
    given = {"up": "orq-9", "numel": 10, "world_size": 2, "bandwidth": 1.0, "codec_rate": 1.0} | change
    with pytest.raises(ConfigurationError, match=message):
        decide(**given)


def _measured(rank, world, **settings):
    """With a clock that says what a test wants: rank 1 is the slowest at coding, rank 0 at the exchange."""
    told = iter([4.0 - rank, 0.1 + rank, 0.01 + rank, 1.0 + rank, 0.5 + rank, 0.2 + rank])
    pays._seconds = lambda *_: next(told)
    result = measure(numel=1000, **settings)
    return result.bandwidth, result.codec_rate, dist.get_world_size()


@pytest.mark.parametrize(
    "world, down, feedback, seconds",
    [
        (2, "bingrad-b", False, 1.1 + 2 * 1.01),
        (3, "bingrad-b", False, 2.1 + 2.01 + 2.1 / 3 + 2.01),
        (3, "bingrad-b", True, 2.1 + 2 * 2.01 + 2.1 / 3 + 2.01 + 3.0),  # the fourth is that of feedback
        (3, "orq-9", True, 2.1 + 2 * 2.01 + 3.0 / 3 + 2.5 + 2.2),
    ],
)
def test_what_a_rank_codes_in_a_step_and_the_slowest_counts(world, down, feedback, seconds):
    given = {"up": codec("bingrad-b"), "down": codec(down), "feedback": feedback}
    answers = together(lambda rank: _measured(rank, world, **given), world)
    for bandwidth, rate, processes in answers:
        assert processes == world
        assert bandwidth == pytest.approx(bf16_bytes(1000, world) / 4.0)
        assert rate == pytest.approx(1000 / seconds)


def test_measuring_on_a_live_group():
    def run(rank):
        slow = type("Slow", (type(codec("sign")),), {"encode": lambda s, *a: time.sleep(0.05 * rank) or s.fast(*a)})
        slow.fast = type(codec("sign")).encode
        result = measure(slow(), slow(), 4096, repeats=2)
        return result.bandwidth, result.codec_rate

    first, second = together(run)
    assert first == second and first[0] > 0
    assert 0 < first[1] < 4096 / 0.05  # rank 1 sleeps


class Spend(torch.autograd.Function):
    """Lets the hands of a clock move on while gradients pass."""

    @staticmethod
    def forward(ctx, x, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += ctx.seconds
        return gradient, None, None


def test_the_window_in_which_an_exchange_can_hide(monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(auto_off, "time", clock)
    before, after = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    window = auto_off._BackwardWindow([before, after])
    assert window.seconds == 0
    for between, at_first in ((2.0, 0.0), (0.5, 3.0), (2.5, 0.0)):
        hidden = Spend.apply(before * 2, clock, between)
        Spend.apply(hidden * after, clock, at_first).sum().backward()
        window.end_pass()
    assert window.seconds == 0.5  # the shortest pass, from the first gradient on
    window.close()
    (before * after).sum().backward()
    window.end_pass()
    assert window.seconds == 0.5


def _watched(rank, bandwidth):
    logging.getLogger("hf_mlopt").setLevel(logging.INFO)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logging.getLogger("hf_mlopt.communication.auto_off").addHandler(handler)
    auto_off.measure = lambda *_: pays.Measured(bandwidth, 1e6)
    found = {"verdicts": []}
    for turn_off in (False, True):
        model, optimizer, compression = coded(
            rank, grad_codec="bingrad-b", error_feedback="step-ahead", error_average_period=2, collective="two-phase"
        )
        watch = Watch(compression, auto_off=turn_off)
        decided_at = []

        def evaluate(_, model=model, watch=watch, decided_at=decided_at):
            with torch.no_grad():
                model(torch.zeros(1, WIDTH))  # is no time to find out: ranks may evaluate on their own
            decided_at.append(watch.verdict is not None)

        train(model, optimizer, rank, 8, after=evaluate)
        compression.take_traffic()
        train(model, optimizer, rank, 2, start=8)
        weights = DEPTH * WIDTH * WIDTH + WIDTH
        traffic = compression.take_traffic()
        found["verdicts"].append(
            {
                "decided": decided_at.index(True),
                "pays": watch.verdict.pays,
                "codec": compression.state.up.name,
                "coded": traffic.coded == 2 * weights,
                "of_bf16": (traffic.bytes_sent - 2 * 4 * (traffic.elements / 2 - weights)) / (2 * 2 * weights),
                "digest": digest(model),
                "ahead": compression.ahead.coefficient,
            }
        )
    return {**found, "lines": lines, "world": dist.get_world_size()}


@pytest.mark.parametrize("bandwidth", [10, 1e9])
def test_it_is_turned_off_on_all_ranks_where_it_does_not_pay(bandwidth):
    first, second = together(lambda rank: _watched(rank, bandwidth))
    assert first["world"] == 2
    for ours, theirs in zip(first["verdicts"], second["verdicts"], strict=True):  # shards are not even
        assert ours == {**theirs, "of_bf16": pytest.approx(theirs["of_bf16"], rel=0.02)}
    kept, asked = first["verdicts"]
    # One plain step, three coded ones: it is found out when the fifth begins.
    assert kept["decided"] == asked["decided"] == 4 and kept["pays"] == asked["pays"] == (bandwidth == 10)
    assert kept["codec"] == "bingrad-b" and kept["ahead"] == 0.1 and kept["coded"] and kept["of_bf16"] < 0.8
    assert second["lines"] == []
    if asked["pays"]:
        assert asked == kept
        assert [level for level, _ in first["lines"]] == ["INFO", "INFO"]
    else:
        assert asked["codec"] == "bf16" and asked["ahead"] == 0 and asked["coded"]
        assert asked["of_bf16"] == pytest.approx(1)  # and no averages of errors
        assert all(level == "WARNING" and "it does not pay" in said for level, said in first["lines"])
        is_off = [said.endswith("; from here on gradients travel in bf16.") for _, said in first["lines"]]
        assert is_off == [False, True]


def test_casts_are_not_watched():
    def run(rank):
        model, optimizer, compression = coded(rank, grad_codec="bf16", grad_codec_args={})
        watch = Watch(compression, steps=1)
        train(model, optimizer, rank, 4)
        return watch.verdict is None and not watch._window._handles[0].hooks_dict_ref()

    assert together(run) == [True, True]


def _carried_over(rank):
    """Sums of what was wanted, what was applied, and what is still to come, with coding turned off in between."""
    model, optimizer, compression = coded(
        rank, grad_codec="bingrad-b", error_feedback="classic", warmup_steps_uncompressed=0, exempt=[]
    )
    parameters = list(model.module.parameters())
    wanted = torch.zeros(sum(p.numel() for p in parameters))
    unsent = []

    def still_to_come():
        state, names = compression.state, [name for name, _ in model.module.named_parameters()]
        own = flat([state.residuals.get(name) / 3 for name in names])
        lost = flat([state.down_residuals.get(name) for name in names])
        both = own + lost
        dist.all_reduce(both)
        return both

    for step in range(12):
        if step == 8:
            unsent.append(float(still_to_come().norm()))
            send_in_bf16(compression)
        local = []
        handles = [
            p.register_hook(lambda g, local=local, i=i: local.append((i, g.clone()))) for i, p in enumerate(parameters)
        ]
        train(model, optimizer, rank, 1, start=step)
        for handle in handles:
            handle.remove()
        gradient = flat([g for _, g in sorted(local, key=lambda pair: pair[0])])
        dist.all_reduce(gradient)
        wanted += gradient / 3
    start = flat(Layers().parameters())
    applied = (start - flat(parameters)) / optimizer.param_groups[0]["lr"]
    unsent.append(float(still_to_come().norm()))
    error = float((wanted - applied - still_to_come()).norm() / wanted.norm())
    return {"error": error, "unsent": unsent, "digest": digest(model), "world": dist.get_world_size()}


def test_nothing_is_lost_when_coding_is_turned_off():
    answers = together(_carried_over, world=3)
    assert [answer["world"] for answer in answers] == [3, 3, 3]
    assert len({answer["digest"] for answer in answers}) == 1
    for answer in answers:
        assert answer["error"] < 1e-5
        assert answer["unsent"][1] < 0.05 * answer["unsent"][0]


def cheapest(errors_BC, bytes_BC, budget):
    """Every way to choose, tried."""
    best = np.inf
    for picks in itertools.product(range(errors_BC.shape[1]), repeat=len(errors_BC)):
        rows = range(len(errors_BC))
        if bytes_BC[rows, picks].sum() <= budget:
            best = min(best, errors_BC[rows, picks].sum())
    return best


@pytest.mark.parametrize("scale", [1, 1e7])
def test_bits_are_chosen_as_if_all_ways_were_tried(scale):
    random = np.random.default_rng(1)
    for _ in range(12):
        errors_BC = np.sort(random.uniform(size=(4, 4)), axis=1)[:, ::-1]
        bytes_BC = scale * np.sort(random.integers(1, 60, size=(4, 4)), axis=1)
        budget = scale * random.integers(bytes_BC.min(axis=1).sum() / scale + 1, 200)
        picks, rows = choose(errors_BC, bytes_BC, budget), range(4)
        assert bytes_BC[rows, picks].sum() <= budget
        assert errors_BC[rows, picks].sum() <= cheapest(errors_BC, bytes_BC, budget * (1 - 4 / 65536)) + 1e-12
        assert errors_BC[rows, picks].sum() >= cheapest(errors_BC, bytes_BC, budget) - 1e-12


def test_a_budget_that_is_too_small_says_what_is_needed():
    sizes = np.array([[10, 20], [5, 30]])
    assert choose(1 / sizes, sizes, 15) == [0, 0] and choose(1 / sizes, sizes, 50) == [1, 1]
    assert choose(1 / sizes, 1_000_000 * sizes, 50_000_000 - 1) != [1, 1]  # by one byte
    with pytest.raises(ConfigurationError, match="max_bytes=14: the smallest codecs take 15 bytes"):
        choose(1 / sizes, sizes, 14)


def test_errors_are_those_of_all_ranks_together():
    names = ("bingrad-b", "orq-5-optimal")

    def vectors(rank):
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(300, generator=generator) * (1 + 9 * rank), torch.zeros(40)]

    codecs = [codec(name, block=64) for name in names]
    answers = together(lambda rank: relative_errors(vectors(rank), codecs, seed=3).tolist())
    assert answers[0] == answers[1] and answers[0][1] == [0, 0]
    for number, used in enumerate(codecs):
        lost = norm = 0.0
        for rank in range(2):
            vector = vectors(rank)[0]
            for value, sent in zip(
                vector.tolist(), used.decode(used.encode(vector, (3, 0, rank))).tolist(), strict=True
            ):
                lost, norm = lost + (value - sent) ** 2, norm + value**2
        assert answers[0][0][number] == pytest.approx(lost / norm, rel=1e-5)


def _budgeted(rank, max_bytes):
    model, optimizer, compression = coded(rank, error_feedback="classic", exempt=["1d", "head"])
    budget = Budget(compression, max_bytes)
    chosen_at = []
    train(model, optimizer, rank, 4, after=lambda step: chosen_at.append(budget.chosen is not None))
    of_bucket = {",".join(names): used.name for names, used in compression.state.of_bucket.items()}
    return {"at": chosen_at.index(True), "chosen": budget.chosen, "of_bucket": of_bucket}


def test_every_bucket_gets_the_codec_that_its_gradients_ask_for():
    best = codec("orq-9-optimal", block=64)
    sizes = [WIDTH * WIDTH + WIDTH, *[WIDTH * WIDTH] * (DEPTH - 1)]  # the first bucket holds the output too
    whole = sum(map(best.wire_bytes, sizes))
    rich, poor = together(lambda rank: [_budgeted(rank, whole), _budgeted(rank, whole / 2)])[0]
    assert rich["chosen"] == {"orq-9-optimal": DEPTH} and rich["at"] == poor["at"] == 2
    names = [f"layers.{layer}.weight" for layer in reversed(range(DEPTH))]
    assert list(rich["of_bucket"]) == [f"head.weight,{names[0]}", *names[1:]]
    spent = [
        codec(name, block=64).wire_bytes(size) for name, size in zip(poor["of_bucket"].values(), sizes, strict=True)
    ]
    assert whole / 2 - 100 < sum(spent) <= whole / 2
    assert sum(poor["chosen"].values()) == DEPTH and len(poor["chosen"]) > 1


def test_bits_need_blocks():
    def run(rank):
        _, _, compression = coded(rank, grad_codec="top-k-0.1", grad_codec_args={})
        with pytest.raises(ConfigurationError, match="grad_codec='top-k-0.1'"):
            Budget(compression, 100)
        return True

    assert together(run) == [True, True]


def _steps_with_a_budget(rank):
    model, optimizer, compression = coded(rank, error_feedback="classic", collective="two-phase")
    best = codec("orq-9-optimal", block=64)
    sizes = [WIDTH * WIDTH + WIDTH, *[WIDTH * WIDTH] * (DEPTH - 1)]
    budget = Budget(compression, sum(bytes_sent(best, best, size, 2, False) for size in sizes) / 2)
    train(model, optimizer, rank, 3)
    compression.take_traffic()
    train(model, optimizer, rank, 4, start=3)
    traffic = compression.take_traffic()
    plain = 4 * (traffic.elements - traffic.coded)
    return {"coded": traffic.bytes_sent - plain, "budget": 4 * budget.max_bytes, "digest": digest(model)}


def test_buckets_travel_in_the_codecs_that_were_chosen():
    first, second = together(_steps_with_a_budget)
    assert first["digest"] == second["digest"]
    both = first["coded"] + second["coded"]  # their shards differ by a block
    assert 0.9 * first["budget"] < both / 2 <= first["budget"]


def _trained(rank, bandwidth, folder):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from hf_mlopt import MLOptTrainer, MLOptTrainingArguments

    for state in (AcceleratorState, GradientState, PartialState):  # forked: forget the parent's single process
        state._reset_state()
    auto_off.measure = lambda *_: pays.Measured(bandwidth, 1e6)

    class WithLoss(Layers):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    rows = [{"x": x, "labels": x.sum().sin()} for x in torch.randn(64, WIDTH)]
    args = MLOptTrainingArguments(
        folder, grad_codec="bingrad-b", compress_min_bytes=0, compress_auto_off=True, max_steps=8, report_to="none",
        use_cpu=True, ddp_backend="gloo", save_strategy="no", disable_tqdm=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = MLOptTrainer(WithLoss(), args, train_dataset=rows)
    trainer.train()
    return [trainer._compression.compression.state.up.name, trainer._compression.watch.verdict.pays]


def test_trainer_turns_it_off_where_it_does_not_pay(tmp_path):
    import hf_mlopt.training.trainer  # noqa: F401  once, before the forks

    gc.freeze()  # or each copies it all when it collects its garbage
    answers = together(lambda rank: _trained(rank, 1e9, str(tmp_path)), group=False)
    gc.unfreeze()
    assert answers == [["bf16", False]] * 2
