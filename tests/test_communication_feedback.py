"""Error feedback and step-ahead: what is sent, kept and shifted, against a twin of the authors' listing."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from compressed import Layers, backward, batch, coded, digest, flat, loss_of, sgd, train
from processes import in_processes, together
from reference.error_feedback import sign_of_pairs, step_ahead, top_k
from torch import nn

from hf_mlopt.communication import ddp as module
from hf_mlopt.communication import hook
from hf_mlopt.communication.residuals import Residuals
from hf_mlopt.communication.step_ahead import StepAhead, logger, reach


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TOP_K = {"grad_codec": "top-k-0.25", "grad_codec_args": {}}
PAIRS = {"grad_codec": "sign", "grad_codec_args": {"block": 2}}
AHEAD = {"error_feedback": "step-ahead"}
ALIKE = {"find_unused_parameters": True}  # DDP keeps the buckets it begins with


def momentum(model):
    return sgd(model, momentum=0.9)


class Tanh(nn.Module):
    """One matrix, so that there is one vector to code."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 6))

    def forward(self, x):
        return (x @ self.weight).tanh().sum(1)


def gradient(k, t, y):
    net = Tanh()
    net.weight.data = torch.from_numpy(y).view(16, 6)
    loss_of(net, k, t).backward()
    return net.weight.grad.flatten().numpy()


LISTINGS = {
    2: [
        ({**TOP_K, **AHEAD}, top_k(0.25), 0),
        ({**TOP_K, "error_feedback": "classic", "error_average_period": 3}, top_k(0.25), 3),
    ],
    3: [
        ({**PAIRS, **AHEAD}, sign_of_pairs, 0),
        ({**PAIRS, **AHEAD, "error_average_period": 4}, sign_of_pairs, 4),
    ],
}


@pytest.mark.parametrize("world", LISTINGS)
@pytest.mark.distributed
def test_the_hook_is_the_authors_listing_to_the_bit(world, eta=2.0**-4, steps=12):
    """In units of an update: without momentum and with η a power of two, codecs that follow scale do the same."""

    def run(rank):
        answers = []
        for settings, _, _ in LISTINGS[world]:
            net = Tanh()
            *_, compression = coded(
                rank, steps, net, lambda model: sgd(model, eta), warmup_steps_uncompressed=0,
                error_average_codec="none", step_ahead=1.0, **settings
            )  # fmt: skip
            state = compression.state_dict()
            kept = [list(state[kind]["values"].values()) for kind in ("residuals", "down_residuals")]
            answers.append([flat(values).tolist() if values else [] for values in [[net.weight], *kept]])
        return answers

    start, answers = Tanh().weight.detach().flatten().numpy(), in_processes(run, world)
    for number, (settings, compress, p) in enumerate(LISTINGS[world]):
        alpha = float(settings["error_feedback"] == "step-ahead")
        x, e, e_s = step_ahead(
            start, gradient, compress, world, steps, np.float32(eta), p=p, server=world > 2, alpha=alpha
        )
        assert x.dtype == np.float32 and not np.array_equal(x, start)
        lost = np.zeros_like(x)
        for rank, (weights, unsent, down) in enumerate(answer[number] for answer in answers):
            assert np.array_equal(np.float32(weights), x)
            assert np.array_equal(np.float32(unsent) * np.float32(eta), e[rank]) and e[rank].any()
            lost += np.float32(down or 0) * np.float32(eta)
        assert np.array_equal(lost, e_s) and e_s.any() == (world > 2)


def names_of(net):
    return [name for name, parameter in net.named_parameters() if parameter.dim() > 1]


class Ledger:
    """Sums, by parameter: the gradients of this rank, and what the optimizer got."""

    def __init__(self, net):
        self.net = net
        self.own = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}
        self.got = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in net.named_parameters()}

    def add_own(self, loss):
        grads = torch.autograd.grad(loss, list(self.net.parameters()), allow_unused=True)
        for total, gradient in zip(self.own.values(), grads, strict=True):
            total += gradient if gradient is not None else 0

    def add_got(self):
        for total, parameter in zip(self.got.values(), self.net.parameters(), strict=True):
            total += parameter.grad if parameter.grad is not None else 0

    def owed(self, compression):
        """The mean over the ranks of their gradients, less what the optimizer got, less what is kept for later."""
        state, world, owed = compression.state_dict(), dist.get_world_size(), {}
        for name, total in self.own.items():
            mine = total.clone()
            if name in state["residuals"]["values"]:
                mine -= state["residuals"]["values"][name]
            if name in state["down_residuals"]["values"]:
                mine -= world * state["down_residuals"]["values"][name].double()
            dist.all_reduce(mine)
            owed[name] = float((mine / world - self.got[name]).abs().max())
        return max(owed.values())


# Residuals move between buckets where DDP begins with one of all, into buckets too small for a codec with min_bytes.
IDENTITY = [
    (2, {**AHEAD}),
    (2, {"error_feedback": "classic", "min_bytes": 1500}),
    (3, {**AHEAD, "error_average_period": 4, "error_average_codec": "none"}),
    (3, {**TOP_K, **AHEAD, "min_bytes": 1500}),
]


@pytest.mark.distributed
def test_what_was_sent_and_what_is_kept_are_all_gradients():
    """Σ mean of gradients = Σ of what the optimizer got + mean of residuals + what the shards of the mean lost."""

    def run(rank):
        world, owed = dist.get_world_size(), []
        for _, settings in (case for case in IDENTITY if case[0] == world):
            net = Layers()
            model, optimizer, compression = coded(
                rank, net=net, optimizer=momentum, warmup_steps_uncompressed=0, **settings
            )
            ledger = Ledger(net)
            for step in range(6):
                ledger.add_own(loss_of(net, rank, step))
                backward(model, rank, step)
                ledger.add_got()
                optimizer.step()
                optimizer.zero_grad()
            kept = flat(compression.state_dict()["residuals"]["values"].values())
            assert kept.any() == ("min_bytes" not in settings)  # sent with the first plain bucket
            owed.append(ledger.owed(compression))
            assert max(float(total.abs().max()) for total in ledger.own.values()) > 0.1
        return owed

    for world in (2, 3):
        for owed in in_processes(run, world):
            assert max(owed) < 2e-5


@pytest.mark.distributed
def test_each_rank_has_sent_its_gradients_but_for_what_it_keeps():
    def run(rank):
        sent = []
        for name in ("all_gather_mean", "two_phase_mean"):
            original = getattr(hook, name)

            def recorded(*args, original=original, **kwargs):
                result = original(*args, **kwargs)
                sent.append(result.sent.double())
                return result

            setattr(hook, name, recorded)
        owed = []
        for collective in ("all-gather", "two-phase"):
            sent.clear()
            net = Layers()
            model, optimizer, compression = coded(
                rank, net=net, ddp=ALIKE, warmup_steps_uncompressed=0, collective=collective, **AHEAD
            )
            ledger = Ledger(net)
            for step in range(5):
                ledger.add_own(loss_of(net, rank, step))
                train(model, optimizer, rank, 1, start=step)
            order = [name for names in compression.state.layout for name in names if name in names_of(net)]
            kept = compression.state_dict()["residuals"]["values"]
            total = torch.cat(sent).view(5, -1).sum(0) + flat(kept[name] for name in order)
            owed.append(float((total - flat(ledger.own[name] for name in order)).abs().max()))
        return max(owed)

    assert max(in_processes(run)) < 2e-5


@pytest.mark.distributed
def test_two_backward_passes_with_an_exchange_each_are_one_step():
    """Without no_sync: the second sends what the first has not; and a step that is dropped in between is none."""

    def run(rank):
        owed = []
        for settings in (AHEAD, {"error_feedback": "classic", "collective": "two-phase"}):
            net = Layers()
            model, optimizer, compression = coded(rank, net=net, ddp=ALIKE, **settings)
            ledger = Ledger(net)
            for step in range(4):
                for part in range(2):
                    ledger.add_own(loss_of(net, rank, step, part))
                    loss_of(model, rank, step, part).backward()
                ledger.add_got()
                optimizer.step()
                optimizer.zero_grad()
                loss_of(model, rank, 99).backward()
                optimizer.zero_grad()
            owed.append(ledger.owed(compression))
        return owed

    for owed in in_processes(run):
        assert max(owed) < 2e-5


@pytest.mark.distributed
def test_no_step_ahead_is_classic_and_one_is_not():
    def run(rank):
        runs = []
        for settings in (
            {"error_feedback": "classic"},
            {**AHEAD, "step_ahead": 0.0},
            AHEAD,
            {**AHEAD, "step_ahead": 0.5},
        ):
            runs.append(digest(coded(rank, 6, optimizer=momentum, **settings)[0]))
        return runs

    one, other = in_processes(run)
    assert one == other and one[0] == one[1] and len(set(one)) == 3


@pytest.mark.distributed
def test_clean_weights_wherever_they_are_looked_at():
    def run(rank):
        net = Layers()
        model, optimizer, compression = coded(rank, 4, net, momentum, **AHEAD)
        seen = []
        for step in range(4, 10):
            clean, clean_hash = {n: v.clone() for n, v in net.state_dict().items()}, digest(net)
            expected = net.eval()(batch(0, 0)[0])
            net.train()
            with model.no_sync():
                loss_of(model, rank, step, 0).backward()
            shifted = digest(net)
            assert shifted != clean_hash and compression.ahead.is_ahead
            if step % 3 == 0:  # evaluation between micro-batches, through the wrapper and not
                assert torch.equal(model.eval()(batch(0, 0)[0]), expected)
                assert torch.equal(net(batch(0, 0)[0]), expected) and digest(net) == clean_hash
                model.train()
            elif step % 3 == 1:
                assert all(torch.equal(value, clean[name]) for name, value in model.module.state_dict().items())
                assert digest(net) == clean_hash
            else:
                with torch.no_grad():
                    assert torch.equal(model(batch(0, 0)[0]), expected)
            loss_of(model, rank, step, 1).backward()
            assert digest(net) == shifted  # the same shift in all of an update
            compression.ahead.back()
            assert digest(net) == clean_hash
            compression.ahead.go()
            optimizer.step()
            optimizer.zero_grad()
            seen.append([shifted, digest(net)])
        loss_of(model, rank, 10).backward()  # loading ends a shift as well, or its end would undo the loading
        net.load_state_dict(clean)
        net.eval()(batch(0, 0)[0])
        assert digest(net) == clean_hash
        return seen

    one, other = in_processes(run)
    assert len(one) == 6
    for (shift_one, end_one), (shift_other, end_other) in zip(one, other, strict=True):
        assert end_one == end_other and shift_one != shift_other


@pytest.mark.distributed
def test_gradients_that_are_not_finite_are_a_step_of_no_rank():
    def run(rank):
        for value, where, ddp, collective in (
            (torch.nan, "layers.2.weight", {}, "two-phase"),
            (-torch.inf, "layers.2.bias", {}, "auto"),
            (torch.inf, "head.weight", {"gradient_as_bucket_view": True}, "auto"),
        ):
            net = Layers()
            model, optimizer, compression = coded(rank, 3, net, momentum, ddp=ddp, collective=collective, **AHEAD)
            before, kept = digest(net), compression.state_dict()
            velocity = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
            handle = dict(net.named_parameters())[where].register_hook(
                lambda g, v=value: torch.full_like(g, v) if rank == 1 else g
            )
            train(model, optimizer, rank, 2, start=3)
            handle.remove()
            assert digest(net) == before and 0 < compression.logs()["grad_unsent"] < 1
            assert all(
                torch.equal(old, s["momentum_buffer"])
                for old, s in zip(velocity, optimizer.state.values(), strict=True)
            )
            now = compression.state_dict()
            for kind in ("residuals", "down_residuals"):
                for name, old in kept[kind]["values"].items():
                    assert torch.equal(old, now[kind]["values"][name]), name
            train(model, optimizer, rank, 1, start=5)
            assert digest(net) != before and flat(net.parameters()).isfinite().all()
        return digest(net)

    one, other = in_processes(run)
    assert one == other


@pytest.mark.distributed
def test_a_loss_scale_changes_nothing():
    """A power of two, bit by bit: residuals are in units of the loss. A step that the scaler skips is none."""

    def spoil(rank, step, net):
        if step == 5 and rank == 1:
            net.layers[3].weight.register_hook(lambda gradient: gradient * torch.inf)
        elif net.layers[3].weight._backward_hooks:
            net.layers[3].weight._backward_hooks.clear()

    def run(rank):
        for settings in (AHEAD, {"error_feedback": "classic", "collective": "two-phase"}):
            plain, scaled = Layers(), Layers()
            model, optimizer, compression = coded(rank, net=plain, optimizer=momentum, **settings)
            for step in range(9):
                spoil(rank, step, plain)
                train(model, optimizer, rank, 1, start=step)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
            model, optimizer, other = coded(rank, net=scaled, optimizer=momentum, scaler=scaler, **settings)
            scales = []
            for step in range(9):
                spoil(rank, step, scaled)
                scaler.scale(loss_of(model, rank, step)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
            assert scales == [2.0**i for i in (10, 10, 11, 11, 11, 10, 10, 10, 11)]
            assert digest(plain) == digest(scaled)
            kept, also = (c.state_dict()["residuals"]["values"] for c in (compression, other))
            assert all(torch.equal(value, also[name]) for name, value in kept.items())
        return digest(scaled)

    one, other = in_processes(run)
    assert one == other


@pytest.mark.distributed
def test_averaged_residuals_are_equal_on_all_ranks_and_keep_their_mean():
    def run(rank):
        world = dist.get_world_size()
        for codec, allowed in (("none", 1e-6), ("bf16", 2.0**-7)):
            model, optimizer, compression = coded(rank, 4, error_average_period=6, error_average_codec=codec, **AHEAD)
            train(model, optimizer, rank, 1, start=4)
            before = flat(compression.state_dict()["residuals"]["values"].values())
            mean = before.clone()
            dist.all_reduce(mean)
            loss_of(model, rank, 5).backward()  # t = 5: (t + 1) % 6 = 0, at the begin of the step
            after = flat(compression.state_dict()["residuals"]["values"].values())
            others = [torch.empty_like(after) for _ in range(world)]
            dist.all_gather(others, after)
            assert all(torch.equal(after, other) for other in others) and not torch.equal(before, after)
            assert float((after - mean / world).abs().max()) <= allowed * float(mean.abs().max())
            assert compression.state_dict()["averaged_at"] == 5
        model, _, compression = coded(rank, 5, error_feedback="classic", error_average_period=6)
        compression.take_traffic()
        with model.no_sync():  # once in an update
            loss_of(model, rank, 5, 0)
            sent = compression.state.traffic.bytes_sent
            loss_of(model, rank, 5, 1)
        assert compression.state.traffic.bytes_sent == sent > 0

    assert in_processes(run, 3) == [None] * 3


@pytest.mark.distributed
def test_a_parameter_that_no_rank_used_keeps_what_it_has_not_sent():
    """DDP leaves it without a gradient, so that what was sent for it would be lost."""

    def run(rank):
        net = Layers()
        model, optimizer, compression = coded(rank, 4, net, ddp=ALIKE, collective="two-phase", **AHEAD)
        net.idle = 2
        idle = {f"layers.{number}.weight" for number in (4, 5)}
        before = compression.state_dict()
        train(model, optimizer, rank, 2, start=4)
        now = compression.state_dict()
        for kind in ("residuals", "down_residuals"):
            kept = {n for n, v in before[kind]["values"].items() if torch.equal(v, now[kind]["values"][n])}
            assert idle <= kept and "layers.1.weight" not in kept
        assert before["residuals"]["values"]["layers.5.weight"].any()

    assert in_processes(run) == [None, None]


def test_residuals_follow_their_parameters_and_wait_for_a_step():
    residuals, cpu = Residuals(), torch.device("cpu")
    residuals.flat(("a", "b"), [2, 3], cpu)
    residuals.flat(("c",), [1], cpu)
    residuals.propose(("a", "b"), torch.arange(5.0))
    residuals.propose(("c",), torch.tensor([9.0]))
    assert residuals.has_pending and not residuals.get("a").any()
    residuals.commit(unused={"c"})
    assert not residuals.has_pending and residuals.get("c").item() == 0
    assert residuals.flat(("b", "c"), [3, 1], cpu).tolist() == [2, 3, 4, 0]  # b has moved
    assert residuals.get("a").tolist() == [0, 1] and set(residuals.groups()) == {("b", "c")}
    residuals.propose(("b", "c"), torch.ones(4))
    assert residuals.flat(("b", "c"), [3, 1], cpu).tolist() == [1] * 4  # what goes on within the step
    residuals.discard()
    assert residuals.flat(("b", "c"), [3, 1], cpu).tolist() == [2, 3, 4, 0] and residuals.get("z") is None


def displacement(optimizer_of, gradient=1.0, steps=400, before=(0.0,)):
    """By how much a gradient in one step, after others, moves a weight in the end; and by how much [`reach`] says."""
    ends = []
    for late in (0.0, gradient):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optimizer_of([weight])
        for number, value in enumerate((*before, late, *[0.0] * steps)):
            if number == len(before):
                scale = reach(torch.tensor([gradient]), optimizer.param_groups[0], optimizer.state[weight])
            weight.grad = torch.tensor([value], dtype=torch.float64)
            optimizer.step()
        ends.append(weight.item())
    return ends[0] - ends[1], float(gradient * scale)


SGDS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.8, "nesterov": True}]


@pytest.mark.parametrize("settings", [*SGDS, {"maximize": True}], ids=str)
def test_the_reach_of_sgd_is_what_a_late_gradient_moves(settings):
    moved, formula = displacement(lambda params: torch.optim.SGD(params, lr=0.3, **settings))
    assert moved == pytest.approx(formula, rel=1e-9) and formula != 0


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_reach_of_adam_divides_by_the_root_of_the_second_moment_with_what_comes_late(kind):
    weight = nn.Parameter(torch.randn(5))
    optimizer = kind([weight], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    late = torch.randn(5)
    assert reach(late, optimizer.param_groups[0], optimizer.state.get(weight, {})) == 0.0
    v = torch.zeros(5)
    for step in range(1, 4):
        weight.grad = torch.randn(5)
        v = 0.95 * v + 0.05 * weight.grad**2
        optimizer.step()
        scale = reach(late, optimizer.param_groups[0], optimizer.state[weight])
        with_late = (0.95 * v + 0.05 * late**2) / (1 - 0.95 ** (step + 1))
        assert torch.allclose(scale, 0.01 / (with_late.sqrt() + 1e-3), rtol=1e-5)


def test_the_reach_of_adam_is_bounded_for_an_entry_that_was_never_sent():
    """lr / eps would be a million; the entry moves by lr / √(1 - β₂), 32 lr at most, once it is sent."""
    for steps, factor in ((1, 5), (50, 1.5), (400, 1.5)):  # at first the correction of v changes within the reach of m
        moved, formula = displacement(lambda params: torch.optim.Adam(params, lr=0.01), 1e-3, before=(0.0,) * steps)
        assert 0.01 < formula < 0.32 and 1 / factor < moved / formula < factor


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.Adadelta])
def test_an_optimizer_that_is_not_known_is_not_guessed(kind, monkeypatch):
    net = Layers()
    optimizer = kind(net.parameters(), **({"momentum": 0.9} if kind is torch.optim.RMSprop else {}))
    net(batch(0, 0)[0]).sum().backward()
    optimizer.step()
    residuals, warned = Residuals(), []
    residuals.flat(("head.weight",), [16], torch.device("cpu")).fill_(1.0)
    monkeypatch.setattr(logger, "warning_once", warned.append)
    before = digest(net)
    ahead = StepAhead(dict(net.named_parameters()), optimizer, residuals, 1.0)
    ahead.go()
    assert digest(net) == before and f"how far {kind.__name__} moves: error feedback is classic" in warned[0]
    ahead.back()
    named = StepAhead(dict(net.named_parameters()), optimizer, residuals, 0.5, lambda unsent, group, state: 0.25)
    clean = net.head.weight.detach().clone()
    named.go()
    named.go()  # once
    assert torch.equal(net.head.weight, clean - 0.125) and len(warned) == 1
    named.back()
    assert digest(net) == before


def test_what_the_log_says_of_errors():
    """Against sums in float64 over what the collectives were given and gave."""

    def run(rank):
        seen, averaged = [], []
        exchange, average = hook.two_phase_mean, module.two_phase_mean

        def watched(flat, *args):
            result = exchange(flat, *args)
            seen.append([flat.double(), result.sent.double(), result.mean.double(), result.down_error.double()])
            return result

        def watched_average(flat, *args, **kwargs):
            result = average(flat, *args, **kwargs)
            averaged.append([flat.double().clone(), result.mean.double()])
            return result

        hook.two_phase_mean, module.two_phase_mean = watched, watched_average
        *_, compression = coded(rank, 6, error_feedback="step-ahead", error_average_period=4, exempt=[])
        logs = compression.logs()
        flat, sent, mean, lost = (torch.cat(parts) for parts in zip(*seen, strict=True))
        errors, means = (torch.cat(parts) for parts in zip(*averaged, strict=True))
        unsent = flat - sent
        expected = {
            "grad_unsent": unsent.norm() / flat.norm(),
            "grad_cosine": flat.dot(sent) / flat.norm() / sent.norm(),
            "grad_unsent_norm": unsent.norm() / 6**0.5,
            "grad_unsent_down": lost.norm() / (mean + lost)[lost != 0].norm(),
            "grad_unsent_spread": (errors - means).norm() / errors.norm(),
        }
        return [[logs[name], float(value)] for name, value in expected.items()], dist.get_world_size()

    for pairs, world in together(run, 3):
        assert world == 3
        for ours, theirs in pairs:
            assert ours == pytest.approx(theirs, rel=1e-4) and ours > 0
