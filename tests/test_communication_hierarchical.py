"""Means inside and between nodes: four real processes as two nodes of two, and other shapes."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compressed import SETTINGS, Layers, coded, digest, sgd, train, wrap
from processes import in_processes

from hf_mlopt.communication import CompressionConfig, compress
from hf_mlopt.communication.collectives import shard_bounds, two_phase_mean
from hf_mlopt.communication.hierarchical import hierarchical_mean, node_groups
from hf_mlopt.communication.quantizers import QSGD, Cast, ScaledSign, TopK
from hf_mlopt.errors import ConfigurationError


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

BLOCK = 8
SIGN = ScaledSign(block=BLOCK)


def vector(rank, numel, step=0):
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * step + rank))


def key(*names):
    return (0, *names)


def expected_mean(vectors, size, code, inside=lambda v: v):
    """In float64 and plain loops: node means, coded slice by slice and shard by shard; their mean, coded once more."""
    numel, nodes = len(vectors[0]), len(vectors) // size
    blocks = -(-numel // BLOCK)
    slices = [min(numel, blocks * i // size * BLOCK) for i in range(size)] + [numel]
    out = np.zeros(numel)
    for i in range(size):
        here = slice(slices[i], slices[i + 1])
        of_nodes = [
            sum(inside(vectors[node * size + local][here]).astype(np.float64) for local in range(size)) / size
            for node in range(nodes)
        ]
        mean = sum(code(of_node) for of_node in of_nodes) / nodes
        out[here] = code(mean)
    return out


def sign_of_blocks(values):
    out = np.zeros(len(values))
    for begin in range(0, len(values), BLOCK):
        block = values[begin : begin + BLOCK]
        out[begin : begin + BLOCK] = np.where(block >= 0, 1, -1) * np.abs(block).mean()
    return out


def bfloat16(values):
    return torch.tensor(values).bfloat16().float().numpy()


@pytest.mark.parametrize(("world", "size"), [(4, 2), (4, 1), (6, 3)])
def test_mean(world, size):
    """Two nodes, or four, against plain loops: nothing coded, signs between nodes, bfloat16 inside."""
    numels = (100, 37, 5, 1)  # slices and shards that are not even, or empty

    def run(rank):
        groups, seen = node_groups(size), []
        for numel in numels:
            flat = vector(rank, numel)
            for codec, inside in ((Cast(), None), (SIGN, None), (SIGN, Cast(format="bf16"))):
                result = hierarchical_mean(flat, codec, codec, key, groups, False, inside=inside)
                assert torch.equal(flat, vector(rank, numel)) and result.sent is None and result.down_error is None
                seen.append(result.mean.tolist())
        return seen

    answers = in_processes(run, world)
    assert all(answer == answers[0] for answer in answers)  # bit for bit
    seen = iter(answers[0])
    for numel in numels:
        vectors = [vector(rank, numel).numpy() for rank in range(world)]
        np.testing.assert_allclose(next(seen), np.mean(vectors, axis=0), atol=1e-6)
        np.testing.assert_allclose(next(seen), expected_mean(vectors, size, sign_of_blocks), atol=1e-6)
        np.testing.assert_allclose(next(seen), expected_mean(vectors, size, sign_of_blocks, bfloat16), atol=1e-6)


def test_one_rank_a_node_is_two_phase():
    """Bit for bit, with random numbers too."""

    def run(rank):
        groups, flat = node_groups(1), vector(rank, 100)
        residual, codec = vector(9, 100), QSGD(levels=5, block=BLOCK)
        ours = hierarchical_mean(flat, codec, codec, key, groups, True, residual)
        theirs = two_phase_mean(flat, codec, codec, key, None, True, residual)
        assert ours.bytes_sent == ours.bytes_across == theirs.bytes_sent
        torch.testing.assert_close(ours.sent, theirs.sent, rtol=0, atol=1e-6)
        return [torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("mean", "down_error")]

    assert in_processes(run, 3) == [[True, True]] * 3


@pytest.mark.parametrize("inside", [Cast(), Cast(format="bf16")])
def test_sent_and_kept_is_all_there_was(inside):
    """Error feedback both ways over a few steps, as the hook has it: means, and what is still to come, add up."""
    numel, steps, world = 100, 5, 4

    def run(rank):
        groups, e, lost, total = node_groups(2), torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
        for step in range(steps):
            flat = vector(rank, numel, step) + e
            result = hierarchical_mean(flat, TopK(ratio=0.2), SIGN, key, groups, True, lost, inside)
            e, lost, total = flat - result.sent, result.down_error, total + result.mean
        return total.tolist(), e.tolist(), lost.tolist()

    answers = in_processes(run, world)
    total, e, lost = (torch.tensor([answer[i] for answer in answers]) for i in range(3))
    assert all(torch.equal(one, total[0]) for one in total)
    expected = sum(vector(rank, numel, step) for rank in range(world) for step in range(steps)) / world
    torch.testing.assert_close(total[0] + e.mean(0) + lost.sum(0), expected, rtol=0, atol=1e-5)
    # Errors are kept where a slice is owned, but for what bfloat16 has lost; each is lost by one rank.
    own = [slice(0, 50) if rank % 2 == 0 else slice(50, 100) for rank in range(world)]
    limit = 0 if inside == Cast() else 0.02
    for rank in range(world):
        elsewhere = torch.cat([e[rank][: own[rank].start], e[rank][own[rank].stop :]])
        assert elsewhere.abs().max() <= limit and e[rank][own[rank]].abs().max() > 0.1
    assert ((lost != 0).sum(0) <= 1).all()


def test_bytes():
    """
    96 elements: slices of 48 = 6 blocks, shards of 24. Signs of a shard take 3 bytes and 3 scales, up to the other
    node and down to it; inside, 48 float32 go to the other owner and 48 come back.
    """

    def run(rank):
        groups, flat = node_groups(2), vector(rank, 96)
        sent = []
        for inside in (None, Cast(format="bf16")):
            result = hierarchical_mean(flat, SIGN, SIGN, key, groups, False, inside=inside)
            sent.append([result.bytes_across, result.bytes_sent])
        return sent

    assert in_processes(run, 4) == [[[30, 30 + 192 + 192], [30, 30 + 96 + 192]]] * 4


def test_slices_draw_different_numbers():
    """Of equal slices: else the noise of one would be that of the other."""

    def run(rank):
        groups, flat = node_groups(2), torch.tensor([1.0] + [0.3] * 31).repeat(2)
        codec = QSGD(levels=3, block=32)
        return hierarchical_mean(flat, codec, Cast(), key, groups, False).mean.tolist()

    mean = in_processes(run, 4)[0]
    assert mean[:32] != mean[32:]


def test_nodes_are_found_or_refused():
    def run(rank):
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        groups = node_groups()
        found = [dist.get_process_group_ranks(groups.inside), dist.get_process_group_ranks(groups.across)]
        told = []
        for size in (3, 4):
            try:
                node_groups(size)
            except ConfigurationError as error:
                told.append(str(error))
        return found, told

    for rank, (found, told) in enumerate(in_processes(run, 4)):
        assert found == [[0, 1] if rank < 2 else [2, 3], [0, 2] if rank % 2 == 0 else [1, 3]]
        assert [text.split(":")[0] for text in told] == ["ranks_per_node=3", "ranks_per_node=4"]


def leaves_node(numel, rank, size=2, nodes=2):
    """Bytes of a bucket that `rank` sends to other nodes: a shard of its slice up, and its own shard down."""
    wire = CompressionConfig(grad_codec_args={"block": 64}).up.wire_bytes
    begin, end = shard_bounds(numel, size, 64)[rank % size]
    shards = [wire(stop - start) for start, stop in shard_bounds(end - begin, nodes, 64)]
    return sum(shards) - shards[rank // size] + max(shards) * (nodes - 1)


@pytest.mark.parametrize("feedback", ["none", "step-ahead"])
def test_through_the_hook(feedback):
    """Two nodes of two: replicas stay the same, and what is coded leaves a node once; float32 equals plain DDP."""

    def run(rank):
        options = {"collective": "hierarchical", "ranks_per_node": 2, "exempt": []}
        logs = []

        def after(step):
            logs.append(compression.logs())

        model = wrap(Layers())
        optimizer = sgd(model)
        compression = compress(model, optimizer, **{**SETTINGS, **options, "error_feedback": feedback})
        train(model, optimizer, rank, 6, after=after)
        plain = wrap(Layers())
        train(plain, sgd(plain), rank, 6)
        exact, *_ = coded(rank, 6, **options, grad_codec="fp32", grad_codec_args={})
        difference = max(
            float((a - b).abs().max()) for a, b in zip(exact.parameters(), plain.parameters(), strict=True)
        )
        sizes = {name: parameter.numel() for name, parameter in Layers().named_parameters()}
        expected = sum(leaves_node(sum(sizes[name] for name in names), rank) for names in compression.state.layout)
        return digest(model), digest(plain), difference, expected, logs[-1]

    answers = in_processes(run, 4)
    assert len({answer[0] for answer in answers}) == 1 and answers[0][0] != answers[0][1]
    assert answers[0][2] < 1e-6
    numel = sum(parameter.numel() for parameter in Layers().parameters())
    for *_, expected, logs in answers:
        assert logs["grad_bytes_across_nodes"] == expected
        assert logs["grad_bytes"] > expected + 4 * numel / 2


def test_a_hierarchy_is_refused_where_it_is_none():
    with pytest.raises(ConfigurationError, match="ranks_per_node=2: needs collective hierarchical"):
        CompressionConfig(ranks_per_node=2)
    with pytest.raises(
        ConfigurationError, match="collective='tree': must be one of auto, two-phase, all-gather, hier"
    ):
        CompressionConfig(collective="tree")

    def run(rank):
        try:
            coded(rank, 1, collective="hierarchical", ranks_per_node=2)
        except ConfigurationError as error:
            return [str(error)]

    assert all("ranks_per_node=2: must divide the 2 ranks" in told for (told,) in in_processes(run))
