"""The hook under DDP, in real processes: equal replicas, the bytes that leave, and what travels uncoded."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from compressed import DEPTH, SETTINGS, WIDTH, Layers, backward, coded, digest, flat, loss_of, sgd, train, wrap
from processes import in_processes
from torch import nn

from hf_mlopt.communication import CompressionConfig, compress
from hf_mlopt.communication.ddp import exempt_parameters


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
AHEAD = {"error_feedback": "step-ahead", "error_average_period": 7}
TOP_K = {"grad_codec": "top-k-0.1", "grad_codec_args": {}}
BF16 = {"grad_codec": "bf16", "grad_codec_args": {}}
MATRICES = DEPTH * WIDTH * WIDTH + WIDTH  # what is coded by default
VECTORS = DEPTH * WIDTH


def momentum(model):
    return sgd(model, momentum=0.9)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


# (accumulation, DDP's settings, ours)
REPLICAS = {
    2: [
        (1, {}, {**AHEAD, "optimizer": momentum}),
        (4, {"find_unused_parameters": True}, {**AHEAD, **BF16, "collective": "two-phase", "optimizer": adam}),
    ],
    3: [(4, {"gradient_as_bucket_view": True}, {**AHEAD, **TOP_K, "optimizer": momentum, "exempt": []})],
    4: [(1, {}, {**AHEAD, **BF16, "optimizer": momentum, "exempt": []})],
}
MORE = [
    (accumulation, {"find_unused_parameters": unused, "gradient_as_bucket_view": view}, {**AHEAD, "optimizer": adam})
    for accumulation in (1, 4)
    for unused in (False, True)
    for view in (False, True)
]


@pytest.mark.parametrize(
    "world, cases",
    [*REPLICAS.items(), *(pytest.param(world, MORE, marks=pytest.mark.slow) for world in (2, 3, 4))],
    ids=lambda value: value if isinstance(value, int) else len(value),
)
def test_replicas_are_equal_bit_by_bit(world, cases, steps=50):
    def run(rank):
        answers = []
        for accumulation, ddp, settings in cases:
            settings = dict(settings)
            make = settings.pop("optimizer", sgd)
            net = Layers(idle=2 if ddp.get("find_unused_parameters") else 0)
            start = digest(net)
            seen = []
            model, _, compression = coded(
                rank, steps, net, make, accumulation, lambda step, net=net, seen=seen: seen.append(digest(net)), ddp,
                **settings
            )  # fmt: skip
            traffic = compression.take_traffic()
            assert start not in seen and len(set(seen)) == steps and flat(net.parameters()).isfinite().all()
            assert traffic.steps == steps and traffic.buckets / steps > 5.5  # no_sync exchanges nothing
            assert len(compression.state.layout) >= 6 and traffic.coded > 0.8 * (steps - 1) * (MATRICES - 2 * WIDTH**2)
            answers.append(seen)
        return answers

    answers = in_processes(run, world)
    assert all(answer == answers[0] for answer in answers[1:])


class Pixels(nn.Module):
    """Parameters whose memory is not in the order of their indices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.last = nn.Conv2d(4, 5, 2).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.last(self.first(x.view(-1, 1, 4, 4)).tanh()).square().mean((1, 2, 3))


def test_the_identity_codec_is_plain_ddp():
    """Exactly for two ranks; for three and four the sums are in another order, here rank by rank."""

    def run(rank):
        world, furthest = dist.get_world_size(), 0.0
        nets = [(Layers, {}, 1), (Layers, {"find_unused_parameters": True}, 2), (Pixels, {"static_graph": True}, 1)]
        for net, ddp, accumulation in nets if world == 2 else nets[:1]:
            plain = wrap(net(), **ddp)
            train(plain, momentum(plain), rank, 4, accumulation)
            for collective in ("two-phase", "all-gather") if world == 2 else ("two-phase",):
                for ours in ({}, {"error_feedback": "step-ahead"}):
                    model, *_ = coded(
                        rank, 4, net(), momentum, accumulation, ddp=ddp, grad_codec="none", grad_codec_args={},
                        collective=collective, exempt=[], **ours
                    )  # fmt: skip
                    one, other = flat(model.parameters()), flat(plain.parameters())
                    furthest = max(furthest, float((one - other).abs().max()))
        return furthest

    assert in_processes(run, 2) == [0.0, 0.0]
    assert max(in_processes(run, 3)) < 1e-6


class Wire:
    """Bytes that this rank hands to collectives for the others."""

    def __init__(self):
        self.bytes, self.calls = 0, {"all_to_all_single": 0, "all_gather": 0, "all_reduce": 0}
        world, rank = dist.get_world_size(), dist.get_rank()
        to_all, gather, reduce = dist.all_to_all_single, dist.all_gather, dist.all_reduce

        def all_to_all_single(incoming, outgoing, received, sent, group=None):
            self._count("all_to_all_single", outgoing, sum(sent) - sent[rank])
            return to_all(incoming, outgoing, received, sent, group=group)

        def all_gather(gathered, message, group=None):
            self._count("all_gather", message, message.numel() * (world - 1))
            return gather(gathered, message, group=group)

        def all_reduce(tensor, *args, **kwargs):
            self._count("all_reduce", tensor, 2 * (world - 1) / world * tensor.numel())
            return reduce(tensor, *args, **kwargs)

        dist.all_to_all_single, dist.all_gather, dist.all_reduce = all_to_all_single, all_gather, all_reduce

    def _count(self, name, tensor, elements):
        self.calls[name] += 1
        self.bytes += elements * tensor.itemsize


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_that_leave_are_those_of_the_formula(world):
    """(n-1) w elements where all gather, (n-1)/n (w₁ + w₂) in two phases, w = q/8 + Lβ/d; in float32 2 (n-1)/n · 4."""
    blocks = {"grad_codec_args": {"block": 64}}  # a matrix is 4 of them: a whole number for every rank
    kinds = [
        ({"grad_codec": "bingrad-b", **blocks}, 1 / 8 + 2 * 4 / 64),
        ({"grad_codec": "sign", **blocks}, 1 / 8 + 1 * 4 / 64),
        (BF16, 2.0),
        ({"grad_codec": "qsgd-9", **blocks}, 4 / 8 + 1 * 4 / 64),
    ]

    def run(rank):
        wire = Wire()
        for settings, each in kinds if world == 2 else kinds[:2]:
            model, optimizer, compression = coded(rank, 2, exempt=["1d", "head.weight"], **settings)
            compression.take_traffic()
            wire.bytes = 0
            train(model, optimizer, rank, 2, start=2)
            traffic = compression.take_traffic()
            exempt = VECTORS + WIDTH
            ours = (world - 1) * each if world == 2 else (world - 1) / world * 2 * each
            expected = 2 * ((MATRICES - WIDTH) * ours + exempt * 2 * (world - 1) / world * 4)
            assert traffic.bytes_sent == pytest.approx(expected, rel=0.01), settings
            assert wire.bytes == pytest.approx(traffic.bytes_sent, rel=1e-6)
            assert traffic.elements == 2 * (MATRICES + VECTORS) and traffic.coded == 2 * (MATRICES - WIDTH)
            train(model, optimizer, rank, 2, start=4)
            logs = compression.logs()
            assert logs["grad_bytes"] == pytest.approx(expected / 2)
            in_bf16 = 2 * (world - 1) / world * 2 * (MATRICES + VECTORS)
            assert logs["grad_of_bf16"] == pytest.approx(expected / 2 / in_bf16)
            assert logs["grad_plain_buckets"] == 0 and logs["grad_seconds"] > 0 and "grad_unsent" not in logs
            assert compression.logs()["grad_bytes"] == 0  # nothing since
        return wire.calls

    first, *others = in_processes(run, world)
    assert first["all_gather"] > 0 and (first["all_to_all_single"] > 0) is (world > 2)
    assert all(other == first for other in others)


def test_exempt_parameters_and_small_buckets_get_the_exact_mean():
    def run(rank):
        local = Layers()
        loss_of(local, rank, 0).backward()
        exact = {name: p.grad.clone() for name, p in local.named_parameters()}
        for gradient in exact.values():
            dist.all_reduce(gradient.div_(2))

        def equal(**settings):
            net = Layers()
            # step 0 is in one bucket, 1 in many; both at the same weights
            model, _, compression = coded(rank, net=net, warmup_steps_uncompressed=0, **settings)
            for _ in range(2):
                model.zero_grad()
                backward(model, rank, 0)
            plain = compression.take_traffic().plain_buckets
            return {name for name, p in net.named_parameters() if torch.equal(p.grad, exact[name])}, plain

        names = set(exact)
        vectors = {name for name in names if "bias" in name}
        assert equal() == (vectors, 0)
        assert equal(exempt=[]) == (set(), 0)
        assert equal(exempt=["layers.3", "head.weight"]) == ({"layers.3.weight", "layers.3.bias", "head.weight"}, 0)
        matrix = 4 * WIDTH * WIDTH
        assert equal(min_bytes=matrix) == (vectors, 0)
        # The head is in the bucket of the last layer.
        assert equal(min_bytes=matrix + 4 * WIDTH) == (names - {"layers.5.weight", "head.weight"}, 5)
        assert equal(min_bytes=matrix + 4 * WIDTH + 1) == (names, 6)
        assert equal(min_bytes=1 << 20) == (names, 7)

    assert in_processes(run, 2) == [None, None]


def test_warm_up_steps_are_plain_and_so_is_one_rank():
    def run(rank):
        world, plain_steps, steps = dist.get_world_size(), [], []
        plain = wrap(Layers())
        train(plain, sgd(plain), rank, 4, after=lambda step: plain_steps.append(digest(plain)))
        net = Layers()
        _, _, compression = coded(
            rank, 4, net, after=lambda step: steps.append(digest(net)), warmup_steps_uncompressed=3, **AHEAD
        )
        same = [one == other for one, other in zip(steps, plain_steps, strict=True)]
        assert same == ([True, True, True, False] if world == 2 else [True] * 4)
        assert (compression.take_traffic().bytes_sent > 0) is (world == 2)

    assert in_processes(run, 2) == [None, None]
    assert in_processes(run, 1) == [None]


def test_groups_of_ranks_keep_to_themselves():
    """A model on two of four ranks: the others take no part in what sets compression up."""

    def run(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        net = Layers(seed=rank // 2)
        model = wrap(net, process_group=groups[rank // 2])
        optimizer = sgd(model)
        if rank < 2:
            compress(model, optimizer, **SETTINGS, **AHEAD)
        train(model, optimizer, rank, 4)
        return digest(net)

    one, two, three, four = in_processes(run, 4)
    assert one == two and three == four and one != three


def test_bfloat16_weights_and_gradients():
    """Coded in float32, also the residuals. What is left of a shift smaller than half an ulp is nothing."""

    def run(rank):
        net, seen = Layers(dtype=torch.bfloat16), []
        model, optimizer, compression = coded(rank, net=net, optimizer=momentum, **AHEAD)
        for step in range(12):
            before = [p.detach().clone() for p in net.parameters()]
            loss_of(model, rank, step).backward()
            shifted = compression.ahead.is_ahead and digest(net) != hash_of(before)
            assert all(p.grad.dtype == torch.bfloat16 for p in net.parameters())
            seen.append(shifted)
            compression.ahead.back()
            assert digest(net) == hash_of(before)  # to the bit, from a copy
            optimizer.step()
            optimizer.zero_grad()
        assert seen == [False] * 2 + [True] * 10
        residuals = compression.state_dict()["residuals"]["values"].values()
        assert all(value.dtype == torch.float32 and value.any() for value in residuals)
        return digest(net)

    one, other = in_processes(run, 2)
    assert one == other


def hash_of(tensors):
    return digest(nn.ParameterList(tensors))


def test_which_parameters_are_exempt():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)

        def get_output_embeddings(self):
            return self.head

    assert exempt_parameters(Net(), ["1d"]) == {"body.bias", "head.bias"}
    assert exempt_parameters(Net(), ["embeddings"]) == {"words.weight"}
    assert exempt_parameters(Net(), ["head"]) == {"head.weight", "head.bias"}
    assert exempt_parameters(Net(), ["body"]) == {"body.weight", "body.bias"}
    assert exempt_parameters(Net(), CompressionConfig().exempt) == {n for n, _ in Net().named_parameters()} - {
        "body.weight"
    }


@pytest.mark.parametrize("steps", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_no_deadlock_on_a_busy_machine(steps):
    """Buckets of all sizes, in the order of their gradients, while other processes take the CPUs."""

    def spin():
        while True:
            pass

    busy = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in busy:
        process.start()
    try:
        small = {"bucket_cap_mb": 0.0005}
        answers = in_processes(
            lambda rank: digest(coded(rank, steps, ddp=small, **AHEAD, **TOP_K)[0]), 3 if steps > 30 else 2
        )
    finally:
        for process in busy:
            process.kill()
    assert len(set(answers)) == 1
