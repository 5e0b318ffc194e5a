"""Step-ahead error feedback in update space: its listing, several real processes, and what one of them keeps."""

import copy
import functools
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers would import it, in every process
from processes import in_processes
from reference import saef as listing

from hf_mlopt.communication.quantizers import QSGD, ScaledSign, TopK
from hf_mlopt.communication.saef import SAEFOptimizer
from hf_mlopt.communication.saef_exchange import PerTensor
from hf_mlopt.errors import ConfigurationError, InputError


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

SHAPES = [(3, 4), (5,), (2, 2)]
SIZES = [12, 5, 4]
STEPS = 12
LR = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
LRS = [0.05] * 6 + [0.02] * 6


def start():
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(7))


def parameters(flat=None):
    parts = (start() if flat is None else torch.as_tensor(flat)).split(SIZES)
    return [torch.nn.Parameter(part.view(shape).clone()) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(k, y, t):
    """Of a least-squares loss that is another one for every rank, with noise of the step."""
    generator = torch.Generator().manual_seed(100 + k)
    matrix = torch.randn(8, sum(SIZES), generator=generator, dtype=torch.float64) / 3
    target = torch.randn(8, generator=generator, dtype=torch.float64)
    noise = torch.randn(8, generator=torch.Generator().manual_seed(1000 * t + k), dtype=torch.float64)
    return matrix.T @ (matrix @ y - target + 0.3 * noise)


def gradient_of_lists(k, y, t):
    values = gradient(k, torch.tensor(sum(y, []), dtype=torch.float64), t)
    return [part.tolist() for part in values.split(SIZES)]


def set_gradients(params, rank, t):
    for parameter, part in zip(params, gradient(rank, flat(params).double(), t).split(SIZES), strict=True):
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)


def states(optimizer, params, name):
    return flat([optimizer.state[p].get(name, torch.zeros_like(p)) for p in params]).tolist()


def train(optimizer, params, rank, steps=STEPS, begin=0, lrs=None):
    """Of every step: y, the x it leads to, and what this rank keeps."""
    seen = []
    for t in range(begin, begin + steps):
        y = flat(params).tolist()
        set_gradients(params, rank, t)
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[t]
        optimizer.step()
        x = flat([optimizer.state[p].get("x", p) for p in params]).tolist()
        kept = {"e": "residual", "m": "momentum_buffer", "s": "server_residual"}
        seen.append({"x": x, "y": y} | {name: states(optimizer, params, key) for name, key in kept.items()})
    return seen


@functools.cache
def all_cases(n):
    """What every rank has seen in every case of n ranks."""

    def run(rank):
        seen = {}
        for case, (world, options, *_) in CASES.items():
            if world == n:
                params = parameters()
                seen[case] = train(SAEFOptimizer(params, **{**LR, **options}), params, rank, lrs=LRS)
        return seen

    return in_processes(run, n) if n > 1 else [json.loads(json.dumps(run(0)))]


def twin(n, C, C_down=None, **options):
    x = [part.tolist() for part in start().split(SIZES)]
    given = {"mu": LR["momentum"], "wd": LR["weight_decay"]}
    run = listing.saef(x, gradient_of_lists, n, LRS, C=C, C_down=C_down, **given, **options)
    return list(run)


def row(model):
    return np.array(sum(model, []))


def assert_follows(answers, expected):
    for rank, seen in enumerate(answers):
        for t, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
            where = f"rank {rank}, step {t}"
            for name in ("y", "m"):
                np.testing.assert_allclose(ours[name], row(theirs[name][rank]), atol=2e-5, err_msg=f"{name} {where}")
            np.testing.assert_allclose(ours["x"], row(theirs["x"]), atol=2e-5, err_msg=f"x {where}")
            assert ours["x"] == answers[0][t]["x"], where


CASES = {
    "sign both ways": (2, {"codec": "sign", "codec_down": "sign"}, listing.sign, listing.sign, {}),
    "sign, three ranks": (
        3,
        {"codec": "sign", "codec_down": "sign", "average_period": 4},
        listing.sign,
        listing.sign,
        {"p": 4},
    ),
    "sign of each tensor": (2, {"codec": "sign", "per_tensor": True}, listing.sign_per_tensor, None, {}),
    "top-k": (
        3,
        {"codec": "top-k-0.3", "codec_down": "top-k-0.3", "average_period": 3, "reset_period": 5},
        listing.top_k(0.3),
        listing.top_k(0.3),
        {"p": 3, "reset": 5},
    ),
    "classic": (
        2,
        {"codec": "sign", "codec_down": "sign", "average_period": 4, "error_feedback": "classic"},
        listing.sign,
        listing.sign,
        {"p": 4, "mode": "classic"},
    ),
    "none": (
        2,
        {"codec": "sign", "codec_down": "sign", "error_feedback": "none"},
        listing.sign,
        listing.sign,
        {"mode": "none"},
    ),
    "in shards": (
        3,
        {"codec": "sign", "codec_down": "sign", "collective": "two-phase", "average_period": 5},
        listing.sign_of_shards(3),
        listing.sign_of_shards(3),
        {"p": 5},
    ),
    "one process": (1, {"codec": "sign", "codec_down": "sign"}, listing.sign, listing.sign, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_listing(case):
    """Weights, momentum and point of the gradient on every rank and step; x is bit for bit the same on all."""
    world, options, C, C_down, of_twin = CASES[case]
    expected = twin(world, C, C_down, **of_twin)
    answers = [seen[case] for seen in all_cases(world)]
    assert_follows(answers, expected)
    # They part enough for a rule that leaves something out to be seen.
    assert np.abs(row(expected[-1]["x"]) - start().numpy()).max() > 0.1
    served = sum(np.array(seen[-1]["s"]) for seen in answers)
    served = served if options.get("collective") else served / world
    np.testing.assert_allclose(served, row(expected[-1]["s"]), atol=2e-5)


def test_averaging_makes_errors_equal_and_keeps_their_mean():
    """And only when it is due; without, they part."""

    def run(rank):
        seen = []
        for period in (3, 0):
            params = parameters()
            optimizer = SAEFOptimizer(params, **LR, codec="top-k-0.3", average_period=period)
            seen.append([one["e"] for one in train(optimizer, params, rank, steps=6)])
        return seen

    (first, plain_first), (second, plain_second) = in_processes(run)
    same = [one == other for one, other in zip(first, second, strict=True)]
    assert same == [False, True, False, False, True, False]  # what the third and the sixth step begin with
    assert not any(one == other for one, other in zip(plain_first, plain_second, strict=True))
    # Until then the two runs are one: the mean of what they would have gone on with.
    mean = (np.array(plain_first[1]) + np.array(plain_second[1])) / 2
    np.testing.assert_allclose(first[1], mean, atol=1e-7)


@pytest.mark.parametrize("mode", ["step-ahead", "classic", "none"])
def test_nothing_coded_is_sgd_of_the_mean_gradient(mode):
    """The mean of local momenta is the momentum of the mean. To rounding: float32 sums in another order."""
    params = parameters()
    sgd = torch.optim.SGD(params, **LR)
    expected = []
    for t in range(STEPS):
        y = flat(params).double()
        for parameter, part in zip(params, ((gradient(0, y, t) + gradient(1, y, t)) / 2).split(SIZES), strict=True):
            parameter.grad = part.view(parameter.shape).float()
        sgd.step()
        expected.append(flat(params).numpy().copy())

    def run(rank):
        params = parameters()
        optimizer = SAEFOptimizer(params, **LR, codec="fp32", codec_down="fp32", error_feedback=mode)
        return train(optimizer, params, rank)

    for seen in in_processes(run):
        for t, one in enumerate(seen):
            np.testing.assert_allclose(one["x"], expected[t], atol=2e-6)
            assert not any(one["e"] + one["s"]) and one["y"] == (seen[t - 1]["x"] if t else start().tolist())


def moved_through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("view", ["train", "eval"])
def test_resume_is_exact(view):
    """From every rank's own state and the weights of the first rank, at whichever point they were saved."""
    options = {**LR, "codec": "top-k-0.3", "codec_down": "top-k-0.3", "average_period": 4}

    def run(rank):
        params = parameters()
        optimizer = SAEFOptimizer(params, **options)
        train(optimizer, params, rank, steps=5)
        getattr(optimizer, view)()
        weights, state = [flat(params)], moved_through_a_file(optimizer.state_dict())
        torch.distributed.broadcast_object_list(weights, src=0)
        optimizer.train()
        straight = train(optimizer, params, rank, steps=5, begin=5)
        params = parameters(weights[0])
        resumed = SAEFOptimizer(params, **{**options, "lr": 1.0})
        resumed.load_state_dict(state)
        resumed.train()
        return straight, train(resumed, params, rank, steps=5, begin=5)

    answers = in_processes(run)
    for straight, resumed in answers:
        assert resumed == straight
    assert answers[0][0][0]["y"] != answers[1][0][0]["y"]


def test_evaluation_is_at_the_clean_weights_and_comes_back_bit_by_bit():
    params = parameters()
    optimizer = SAEFOptimizer(params, **LR, codec="top-k-0.1")
    train(optimizer, params, 0, steps=4)
    ahead, x = flat(params).clone(), states(optimizer, params, "x")
    optimizer.eval()
    optimizer.eval()
    assert flat(params).tolist() == x and not torch.equal(flat(params), ahead)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    assert torch.equal(flat(params), ahead)


def test_parameters_that_are_not_used():
    """By all ranks: they keep every bit, though a sign has no zero. By one: the others' gradients count."""

    def run(rank):
        params = parameters()
        optimizer = SAEFOptimizer(params, **LR, codec="sign", codec_down="sign", average_period=2)
        for t in range(6):
            set_gradients(params, rank, t)
            params[0].grad = None
            if rank == 1:
                params[1].grad = None
            optimizer.step()
        optimizer.eval()
        return [parameter.flatten().tolist() for parameter in params]

    first, second = in_processes(run)
    before = start().split(SIZES)
    assert first == second and first[0] == before[0].tolist()
    assert np.abs(np.array(first[1]) - before[1].numpy()).min() > 1e-3


def test_a_gradient_that_is_not_finite_makes_the_step_none_on_all():
    def run(rank):
        seen = []
        for steps in ([0, 1, None, 2, 3], [0, 1, 2, 3]):
            params = parameters()
            optimizer = SAEFOptimizer(params, **LR, codec="sign", codec_down="sign", average_period=3)
            for t in steps:
                set_gradients(params, rank, t or 0)
                if t is None and rank == 1:
                    params[1].grad[2] = float("nan")
                optimizer.step()
            seen.append([flat(params).tolist(), *(states(optimizer, params, n) for n in ("residual", "x"))])
        return seen

    for skipped, straight in in_processes(run):
        assert skipped == straight


def test_ranks_that_disagree_are_told():
    def run(rank):
        told = []
        for options, begin in (({"codec": ["sign", "bf16"][rank]}, start()), ({}, start() + rank * 1e-6)):
            params = parameters(begin)
            set_gradients(params, rank, 0)
            try:
                SAEFOptimizer(params, lr=0.1, **options).step()
            except InputError as error:
                told.append(str(error))
        return told

    for options, weights in in_processes(run):
        assert "codec: [" in options and "ScaledSign" in options and "bf16" in options and "weights" not in options
        assert "disagree about weights" in weights


def test_bytes_are_counted():
    """Elements 12 + 5 + 4. sign: 3 bytes of codes, 4 of the scale. top-k 0.3: 4 + 2 + 2 entries of 8 bytes."""
    settings = [
        {"codec": "sign"},
        {"codec": "sign", "codec_down": "sign"},
        {"codec": "top-k-0.3", "average_period": 3},
        {"codec": "sign", "codec_down": "sign", "collective": "two-phase"},
    ]

    def run(rank):
        sent = []
        for options in settings:
            params = parameters()
            optimizer = SAEFOptimizer(params, **LR, **options)
            train(optimizer, params, rank, steps=1)
            traffic = optimizer.take_traffic()
            train(optimizer, params, rank, steps=1, begin=1)
            sent.append([traffic.bytes_sent, optimizer.take_traffic().bytes_sent])
            assert traffic.elements == traffic.coded == 21 and traffic.steps == 1 and 0 < traffic.error < traffic.norm
        return sent

    first, second = in_processes(run)
    # Averaged before the third step, in float32: half of the vector to the other rank, the longer half of the mean.
    assert first == [[7, 7], [14, 14], [64, 64 + 4 * (11 + 11)], [12, 12]]
    assert second == [[7, 7], [7, 7], [64, 64 + 4 * (10 + 11)], [12, 12]]


def test_ranks_draw_different_numbers():
    """Of the same vector: else the noise of stochastic rounding would not average out."""

    def run(rank):
        params = parameters()
        optimizer = SAEFOptimizer(params, lr=1.0, codec=QSGD(levels=3), error_feedback="none")
        set_gradients(params, 0, 0)
        optimizer.step()
        return flat(params).tolist()

    first, second = in_processes(run)
    params = parameters()
    set_gradients(params, 0, 0)
    lost = (start() - torch.tensor(first)).div(flat([p.grad for p in params]).abs().max())
    assert first == second and (lost.abs() - 0.5).abs().min() < 1e-5  # one rank up and the other not


@pytest.mark.parametrize("inner", [TopK(ratio=0.3), ScaledSign(block=5), QSGD(levels=5)])
def test_per_tensor_is_each_by_itself(inner):
    coder = PerTensor(inner=inner, sizes=tuple(SIZES))
    payload = coder.encode(start(), (1, 2))
    message = coder.to_bytes(payload)
    assert len(message) == coder.wire_bytes(21) == sum(inner.wire_bytes(size) for size in SIZES)
    parts = [inner.decode(inner.encode(part, (1, 2, i))) for i, part in enumerate(start().split(SIZES))]
    decoded = coder.decode(coder.from_bytes(message, 21))
    assert torch.equal(decoded, torch.cat(parts))
    added = coder.decode(payload, torch.ones(21), accumulate=True)
    assert torch.equal(added, torch.cat(parts) + 1)


# ---- one process


def test_groups_have_their_own_options():
    """As if each were alone, with a codec that sees each by itself."""
    first = {"lr": 0.05, "momentum": 0.9, "average_period": 2}
    second = {"lr": 0.01, "weight_decay": 0.1, "reset_period": 3}
    ours, theirs = parameters(), parameters()
    groups = [{"params": ours[:1], **first}, {"params": ours[1:], **second}]
    together_ = SAEFOptimizer(groups, lr=1.0, codec="top-k-0.3")
    alone = [SAEFOptimizer(theirs[:1], codec="top-k-0.3", **first)]
    alone.append(SAEFOptimizer(theirs[1:], codec="top-k-0.3", **second))
    for t in range(7):
        set_gradients(ours, 0, t)
        set_gradients(theirs, 0, t)
        before = [parameter.grad.clone() for parameter in ours]
        for optimizer in (together_, *alone):
            optimizer.step()
        assert all(torch.equal(parameter.grad, kept) for parameter, kept in zip(ours, before, strict=True))
        assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_as_the_original(copied):
    params = parameters()
    optimizer = SAEFOptimizer(params, **LR, codec="sign", codec_down="sign", reset_period=4)
    train(optimizer, params, 0, steps=3)
    other, its = copied((optimizer, params))
    assert train(other, its, 0, begin=3) == train(optimizer, params, 0, begin=3)


def test_a_loss_scale_is_taken_out():
    """By the step itself, as the scaler of one rank must not skip it alone."""
    params, others = parameters(), parameters()
    optimizer, plain = SAEFOptimizer(params, **LR), SAEFOptimizer(others, **LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        for its, factor in ((params, scaler.scale(torch.ones(()))), (others, 1)):
            set_gradients(its, 0, t)
            for parameter in its:
                parameter.grad *= factor
        if t == 2:
            params[0].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if t != 2:
            plain.step()
        assert torch.equal(flat(params), flat(others))
    assert scaler.get_scale() == 512.0


def test_float64_parameters_and_a_tensor_as_lr():
    params, others = [p.detach().double().requires_grad_() for p in parameters()], parameters()
    wide, narrow = SAEFOptimizer(params, lr=torch.tensor(0.05)), SAEFOptimizer(others, lr=0.05)
    train(wide, params, 0), train(narrow, others, 0)
    np.testing.assert_allclose(flat(params), flat(others), atol=1e-5)
    assert flat(params).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"codec": "gzip"}, "codec='gzip': must be one of"),
        ({"codec_down": "orq-3"}, "codec_down='orq-3"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"average_period": -1}, "average_period=-1"),
        ({"reset_period": 1.5}, "reset_period=1.5"),
        ({"error_feedback": "on"}, "must be one of step-ahead, classic, none"),
        ({"error_feedback": "none", "reset_period": 2}, "reset_period=2: needs error_feedback"),
        ({"collective": "ring"}, "must be one of all-gather, two-phase"),
        ({"collective": "two-phase", "per_tensor": True}, "per_tensor=True"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(ConfigurationError) as error:
        SAEFOptimizer(parameters(), **{"lr": 0.1, **options})
    assert told in str(error.value)


def test_narrow_weights_are_refused():
    with pytest.raises(ConfigurationError, match="bfloat16.*autocast"):
        SAEFOptimizer([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1)
