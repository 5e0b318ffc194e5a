"""What each rank keeps comes back bit by bit, for as many ranks as before; for another number the mean is kept."""

import os

import pytest
import torch
import torch.distributed as dist
from compressed import Layers, coded, digest, flat, loss_of, sgd, train
from processes import in_processes

from hf_mlopt.communication import Compression
from hf_mlopt.errors import InputError


pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
AHEAD = {"error_feedback": "step-ahead"}
ALIKE = {"find_unused_parameters": True}


def momentum(model):
    return sgd(model, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


CASES = [
    (2, momentum, {}, {**AHEAD, "grad_codec": "bingrad-pb"}),  # draws
    (2, adam, ALIKE, {**AHEAD, "collective": "two-phase", "error_average_period": 5}),
    (3, momentum, {}, {**AHEAD, "error_average_period": 5}),
]


def go_on(rank, path, optimizer, ddp, settings):
    """Eight steps straight through, with a file after four; and four more from that, with everything made anew."""
    straight, resumed = [], []

    def save(step):
        straight.append(digest(net))
        if step == 3:
            ours = {"model": net.state_dict(), "optimizer": made.state_dict()}
            torch.save({**ours, "compression": compression.state_dict()}, path)

    net = Layers()
    model, made, compression = coded(rank, net=net, optimizer=optimizer, ddp=ddp, **settings)
    train(model, made, rank, 8, after=save)

    content = torch.load(path, weights_only=True)
    other = Layers(seed=9)
    model, made, compression = coded(rank, net=other, optimizer=optimizer, ddp=ddp, **settings)
    other.load_state_dict(content["model"])
    made.load_state_dict(content["optimizer"])
    compression.load_state_dict(content["compression"])
    train(model, made, rank, 4, start=4, after=lambda step: resumed.append(digest(other)))
    assert len(set(straight)) == 8 and resumed == straight[4:], settings
    return straight


@pytest.mark.parametrize("world", [2, 3])
def test_as_many_ranks_go_on_bit_by_bit(tmp_path, world):
    """Also with the buckets of before: DDP made anew has one, until its second step."""
    cases = [case[1:] for case in CASES if case[0] == world]

    def run(rank):
        return [go_on(rank, tmp_path / f"{rank}.pt", *case) for case in cases]

    first, *others = in_processes(run, world)
    assert len(first) == len(cases) > 0 and all(other == first for other in others)


@pytest.mark.parametrize("before, after", [(3, 2), (2, 4)])
def test_another_number_of_ranks_keeps_the_mean_of_what_is_to_come(tmp_path, before, after):
    """x - P (ē + e^s), the weights without compression, is what it was: for all new ranks, which begin alike."""

    def first(rank):
        net = Layers()
        *_, compression = coded(rank, 5, net, momentum, collective="two-phase", **AHEAD)
        state = compression.state_dict()
        torch.save(state, tmp_path / f"{rank}.pt")
        unsent = flat(state["residuals"]["values"].values())
        dist.all_reduce(unsent)
        lost = flat(state["down_residuals"]["values"].values())
        dist.all_reduce(lost)
        assert unsent.any() and lost.any()
        return [(unsent / before + lost).tolist(), list(state["residuals"]["values"])]

    def second(rank):
        states = [torch.load(tmp_path / f"{other}.pt", weights_only=True) for other in range(before)]
        net = Layers()
        model, optimizer, compression = coded(rank, net=net, optimizer=momentum, collective="two-phase", **AHEAD)
        compression.load_state_dict(Compression.merged(states))
        state = compression.state_dict()
        assert state["step"] == 5 and not state["down_residuals"]["values"]
        train(model, optimizer, rank, 2, start=5)
        return [flat(state["residuals"]["values"].values()).tolist(), list(state["residuals"]["values"]), digest(net)]

    to_come, names = in_processes(first, before)[0]
    answers = in_processes(second, after)
    assert all(answer == answers[0] for answer in answers[1:]) and answers[0][1] == names
    assert torch.allclose(torch.tensor(answers[0][0]), torch.tensor(to_come), atol=1e-7, rtol=1e-6)


def test_a_model_that_has_changed_is_refused():
    def run(rank):
        *_, compression = coded(rank, 3, **AHEAD)
        state = compression.state_dict()
        changed, messages = [], []
        renamed = {
            ("other.weight" if n == "layers.0.weight" else n): v for n, v in state["residuals"]["values"].items()
        }
        reshaped = {**state["residuals"]["values"], "layers.0.weight": torch.zeros(32, 8)}
        for values in (renamed, reshaped):
            changed.append({**state, "residuals": {"groups": [], "values": values}})
        for other in changed:
            try:
                compression.load_state_dict(other)
            except InputError as error:
                messages.append(str(error))
        same = compression.state_dict()["residuals"]["values"]
        assert all(torch.equal(value, same[name]) for name, value in state["residuals"]["values"].items())
        return messages

    for renamed, reshaped in in_processes(run):
        assert renamed == "other.weight: the checkpoint holds [16, 16] unsent numbers, the model has no such parameter"
        assert reshaped == "layers.0.weight: the checkpoint holds [32, 8] unsent numbers, the model has [16, 16]"


def test_a_state_taken_within_a_step_is_that_of_its_begin():
    def run(rank):
        model, optimizer, compression = coded(rank, 3, **AHEAD)
        begin = compression.state_dict()
        loss_of(model, rank, 3).backward()
        within = compression.state_dict()
        optimizer.step()
        end = compression.state_dict()
        names = list(begin["residuals"]["values"])
        values = [[state["residuals"]["values"][name] for name in names] for state in (begin, within, end)]
        assert torch.equal(flat(values[0]), flat(values[1])) and not torch.equal(flat(values[0]), flat(values[2]))
        compression.reset()
        assert not compression.state_dict()["residuals"]["values"]
        optimizer.zero_grad()
        train(model, optimizer, rank, 1, start=4)

    assert in_processes(run) == [None, None]
