"""Coded gradients where FSDP shares the weights out: both FSDPs, two real processes on CPUs."""

import copy
import os

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers would import it, in every process
import torch.distributed as dist
from compressed import loss_of
from processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.sharded import ShardedCompression, _Unit, compress_sharded
from hf_mlopt.errors import ConfigurationError, InputError


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

OPTIONS = {"grad_codec_args": {}, "min_bytes": 0, "warmup_steps_uncompressed": 0, "exempt": []}
CODED = {"grad_codec": "sign", "grad_codec_args": {"block": 64}, "error_feedback": "classic"}


class Net(nn.Module):
    """Two layers of 272 parameters and a head of 16, which are three units."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 1, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() + x
        return self.head(x).sum(1)  # not a view, of which FSDP2 warns


def fsdp1(net, **options):
    return FSDP1(
        net,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        **options,
    )


def fsdp2(net):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*net.layers, net):
        fully_shard(layer, mesh=mesh)
    return net


WRAPS = {"fsdp1": fsdp1, "fsdp2": fsdp2}


def trained(wrap, rank, steps, begin=0, model=None, load=None, **options):
    """Losses of a few steps, the weights of this rank's shards, the model, its compression."""
    model, compression = model if model is not None else wrap(Net()), None
    if options:
        compression = compress_sharded(model, **{**OPTIONS, **options})
    if load is not None:
        compression.load_state_dict(load)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(begin, begin + steps):
        loss = loss_of(model, rank, step % 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, local(model), model, compression


def local(model):
    return [getattr(p, "to_local", lambda p=p: p)().detach().flatten().tolist() for p in model.parameters()]


@pytest.mark.parametrize("wrap", WRAPS)
def test_nothing_coded_is_plain_fsdp(wrap):
    """Bit for bit on two ranks, where a sum has one order and a half is exact."""

    def run(rank):
        plain, seen = trained(WRAPS[wrap], rank, 4), []
        for options in ({"grad_codec": "fp32"}, {"grad_codec": "sign", "warmup_steps_uncompressed": 4}):
            losses, weights, _, compression = trained(WRAPS[wrap], rank, 4, **options)
            traffic = compression.take_traffic()
            seen.append([losses == plain[0], weights == plain[1], traffic.bytes_sent, traffic.steps])
            assert traffic.elements == traffic.coded + (4 * padded(wrap) if options["grad_codec"] == "sign" else 0)
        return seen

    for answer in in_processes(run):
        assert answer == [[True, True, 4 * 4 * padded(wrap) // 2, 4]] * 2


def padded(wrap):
    """Elements FSDP exchanges. FSDP2 gives each rank whole rows, and the head has one."""
    return 2 * 272 + (16 if wrap == "fsdp1" else 32)


@pytest.mark.parametrize("wrap", WRAPS)
def test_coded_trains_and_sends_few_bytes(wrap):
    def run(rank):
        plain, _, _, _ = trained(WRAPS[wrap], rank, 16)
        coded, _, _, compression = trained(WRAPS[wrap], rank, 16, **CODED)
        traffic = compression.take_traffic()
        # Each keeps its own error; in FSDP1 the root holds nothing.
        assert [unit.exchanges for unit in compression.units] == [0] * (wrap == "fsdp1") + [16] * 3
        return plain, coded, traffic.bytes_sent, traffic.coded, traffic.elements, traffic.error / traffic.norm

    answers = in_processes(run)
    plain, coded = (np.mean([answer[i] for answer in answers], axis=0) for i in (0, 1))
    assert coded[-4:].mean() < 0.5 * coded[:4].mean() and coded.tolist() != plain.tolist()
    for _, _, bytes_sent, was_coded, elements, error in answers:
        assert was_coded == elements == 16 * padded(wrap) and 0.1 < error < 1
        # A layer's shard of 136: 17 bytes of signs, three scales. The head's: of 8 or 16.
        head = 1 + 4 if wrap == "fsdp1" else 2 + 4
        assert bytes_sent == 16 * (2 * (17 + 12) + head)


@pytest.mark.parametrize("world", [2, 3])
def test_sent_and_kept_is_all_there_was(world):
    """Error feedback: the means that owners got, and the mean of what was not sent, add up to all gradients."""
    size, steps = 50, 5

    def gradient_of(rank, step):
        return torch.randn(size * world, generator=torch.Generator().manual_seed(10 * step + rank))

    def run(rank):
        compression = ShardedCompression(None, CompressionConfig(**{**OPTIONS, **CODED}), None)
        unit = _Unit(compression, is_exempt=False)
        total, shard = torch.zeros(size), torch.empty(size)
        for step in range(steps):
            gradient = gradient_of(rank, step)
            unit(shard, gradient, None, dist.ReduceOp.AVG if step else dist.ReduceOp.SUM)
            assert torch.equal(gradient, gradient_of(rank, step))
            total += shard if step else shard / world
        return total.tolist(), unit.unsent[size * world].tolist()

    answers = in_processes(run, world)
    sent = torch.tensor(sum((total for total, _ in answers), []))
    kept = torch.tensor([unsent for _, unsent in answers]).mean(0)
    expected = sum(gradient_of(rank, step) for rank in range(world) for step in range(steps)) / world
    torch.testing.assert_close(sent + kept, expected, rtol=0, atol=1e-5)
    assert kept.abs().mean() > 0.1


@pytest.mark.parametrize("wrap", WRAPS)
def test_resume_is_exact(wrap):
    def run(rank):
        _, _, model, compression = trained(WRAPS[wrap], rank, 3, **{**CODED, "grad_codec": "bingrad-pb"})
        state = copy.deepcopy(compression.state_dict())
        weights = copy.deepcopy(model.state_dict())
        other = WRAPS[wrap](Net(seed=1))
        other.load_state_dict(weights)
        _, straight, _, _ = trained(None, rank, 3, 3, model=model)
        options = {**CODED, "grad_codec": "bingrad-pb"}
        _, resumed, _, _ = trained(None, rank, 3, 3, model=other, load=state, **options)
        afresh = WRAPS[wrap](Net(seed=1))
        afresh.load_state_dict(weights)
        _, without, _, _ = trained(None, rank, 3, 3, model=afresh, **options)
        return resumed == straight, without == straight

    assert in_processes(run) == [[True, False]] * 2


def test_a_gradient_that_is_not_finite_is_not_kept():
    def run(rank):
        unit = _Unit(ShardedCompression(None, CompressionConfig(**{**OPTIONS, **CODED}), None), is_exempt=False)
        shard = torch.empty(64)
        unit(shard, torch.arange(128.0), None, dist.ReduceOp.AVG)
        before, gradient = unit.unsent[128].clone(), torch.arange(128.0)
        gradient[100] = float("inf") if rank == 0 else 0
        unit(shard, gradient, None, dist.ReduceOp.AVG)
        return bool(shard.isnan().all()), torch.equal(unit.unsent[128], before)

    first, second = in_processes(run)
    assert first == [False, True] and second == [True, False]  # the owner of the shard sees it, as in plain FSDP


def test_small_and_exempt_units_travel_plain():
    """FSDP2's head, by name; then layers by size."""

    def run(rank):
        counts = []
        for options in ({"exempt": ["head.weight"]}, {"min_bytes": 4 * 272 + 1}, {"min_bytes": 4 * 272}):
            *_, compression = trained(fsdp2, rank, 2, **{**CODED, **options})
            traffic = compression.take_traffic()
            counts.append([traffic.buckets, traffic.plain_buckets, traffic.coded])
        return counts

    assert in_processes(run) == [[[6, 2, 4 * 272], [6, 6, 0], [6, 2, 4 * 272]]] * 2


def test_what_cannot_be_coded_is_refused_with_the_reason():
    def told(function):
        try:
            function()
        except (ConfigurationError, InputError) as error:
            return str(error)
        return ""

    def run(rank):
        sharded, wrapped = fsdp2(Net()), fsdp1(Net())
        answers = {}
        for name, model in (("fsdp2", sharded), ("fsdp1", wrapped)):
            compress_sharded(model, **OPTIONS)
            answers[f"{name} again"] = told(lambda model=model: compress_sharded(model, **OPTIONS))
        whole = fsdp1(Net(), sharding_strategy=ShardingStrategy.NO_SHARD)
        answers["whole"] = told(lambda: compress_sharded(whole))
        replicated = Net()
        fully_shard(replicated, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
        answers["replicas"] = told(lambda: compress_sharded(replicated))
        different = fsdp2(Net())
        answers["different"] = told(lambda: compress_sharded(different, seed=rank))
        unit = _Unit(ShardedCompression(None, CompressionConfig(), None), is_exempt=False)
        factor = dist._make_nccl_premul_sum(0.5)
        answers["factor"] = told(lambda: unit(None, None, None, factor))
        del FSDPModule.set_custom_reduce_scatter
        answers["old torch"] = told(lambda: compress_sharded(fsdp2(Net())))
        return answers

    expected = {
        "fsdp2 again": "coded already",
        "fsdp1 again": "already registered",
        "whole": "NO_SHARD",
        "replicas": "one dimension",
        "different": "disagree about {'seed': [0, 1]}",
        "factor": "set_gradient_divide_factor",
        "old torch": "take a later torch",
    }
    for answer in in_processes(run):
        for name, part in expected.items():
            assert part in answer[name], (name, answer[name])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"error_feedback": "step-ahead"}, "error_feedback='step-ahead': shifts all weights of a rank"),
        ({"grad_codec_down": "bf16"}, "grad_codec_down='bf16'"),
        ({"error_feedback": "classic", "error_average_period": 2}, "error_average_period=2"),
        ({"collective": "two-phase"}, "collective='two-phase'"),
        ({}, "model='Net': is not in FSDP's shards; compress"),
    ],
)
def test_options_that_have_nothing_to_act_on(options, told):
    with pytest.raises(ConfigurationError) as error:
        compress_sharded(Net(), **options)
    assert told in str(error.value)
