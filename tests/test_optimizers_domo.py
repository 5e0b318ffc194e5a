"""DOMO and its variants over four clients: against their twin, and what they equal in special cases."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from hf_mlopt.optimizers import DOMO, VARIANTS
from tests.least_squares import LeastSquares, flat, parameters, set_gradients, set_lr
from tests.reference import domo as twin
from tests.reference.rsgd import AdamW, Momentum


PROBLEM = LeastSquares()
NUM_PARAMETERS = len(PROBLEM.start)
WEIGHTS = (0.1, 0.2, 0.3, 0.4)
EQUAL = (0.25,) * 4
LOCAL_STEPS = 7
CONSTANT = [[0.02] * LOCAL_STEPS] * 12
# Warm-up and decay inside the rounds; two rounds without a learning rate, one of them the last; a short one.
SCHEDULE = [[0.002 * (t + 1) for t in range(LOCAL_STEPS)]]
SCHEDULE += [[0.03 * (1 - (7 * r + i) / 150) for i in range(LOCAL_STEPS)] for r in range(18)]
SCHEDULE[9] = [0.0] * LOCAL_STEPS
SCHEDULE += [[0.01, 0.0, 0.005], [0.0] * LOCAL_STEPS]
MOMENTA = {"server_momentum": 0.6, "server_lr": 0.7}


class Clients:
    """Copies of a model, each with an optimizer; `make(params)` returns the latter."""

    def __init__(self, make, p=WEIGHTS, dtype=torch.float64):
        self.p, self.sent, self.calls = p, [None] * len(p), 0
        self.params = [parameters(PROBLEM.start, dtype) for _ in p]
        self.optimizers = [make(params) for params in self.params]

    def local_steps(self, r, etas):
        """[client][step]: parameters."""
        paths = [[] for _ in self.p]
        for k, (params, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            for i, eta in enumerate(etas):
                set_lr(optimizer, eta)
                set_gradients(params, PROBLEM.client_gradient(k, flat(params), r, i))
                optimizer.step()
                paths[k].append(flat(params))
        return paths

    def sync(self, buffers=None):
        """Every client in a thread of its own, as `average` waits for the vectors of the others."""
        barrier = threading.Barrier(len(self.p), timeout=20)
        self.sent = [None] * len(self.p)

        def of_client(k):
            def average(vector):
                self.sent[k] = vector.clone()
                self.calls += 1
                barrier.wait()
                return sum(p * sent for p, sent in zip(self.p, self.sent, strict=True))

            try:
                self.optimizers[k].sync(average, buffers[k] if buffers else ())
            finally:
                if self.sent[k] is None:
                    barrier.abort()  # the others would wait

        with ThreadPoolExecutor(len(self.p)) as pool:
            list(pool.map(of_client, range(len(self.p))))

    def models(self):
        return [flat(params) for params in self.params]

    def model(self):
        """The parameters, which have to be those of every client to the last bit."""
        first, *others = self.models()
        for other in others:
            np.testing.assert_array_equal(other, first)
        return first

    def evaluated(self):
        """The same at the evaluation point."""
        for optimizer in self.optimizers:
            optimizer.eval()
        model = self.model()
        for optimizer in self.optimizers:
            optimizer.train()
        return model

    def state(self, k, name):
        return flat([self.optimizers[k].state[parameter][name] for parameter in self.params[k]])


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-13)


# ---- the twin


LOCAL = {"reset": "zero", "average": "average", "keep": "keep"}
FUSED = {"domo": "before", "domo-s": "inside", "diloco": "before"}
CASES = {
    **{name: {"variant": name} for name in ("fedavg", "fedavg-lm", "fedavg-lm-z", "fedavg-sm", "fedavg-slm")},
    **{name: {"variant": name} for name in ("fedavg-slm-z", "domo", "domo-s", "slowmo", "diloco")},
    "domo in units of parameters": {"variant": "domo", "server_unit": "param"},
    "domo over AdamW": {"variant": "domo", "base": "AdamW"},
    "domo with averaged momenta": {"variant": "domo", "local_state": "average"},
    "diloco in units of gradients": {"variant": "diloco", "server_unit": "grad"},
    "fedavg-slm with kept momenta": {"variant": "fedavg-slm", "local_state": "keep"},
}
# What the names stand for, from the specification: local, server_unit, base.
MEANING = {
    "fedavg-lm": ("average", "grad", "SGD"),
    "fedavg-slm": ("average", "grad", "SGD"),
    "slowmo": ("keep", "grad", "SGD"),
    "diloco": ("keep", "param", "AdamW"),
}


def twin_of(variant, rounds, fusion, mu_l, wd, server_unit=None, local_state=None, base=None, **server):
    local, unit, inner = MEANING.get(variant, ("reset", "grad", "SGD"))
    adaptive = (base or inner) == "AdamW"
    bases = [AdamW(wd=wd) if adaptive else Momentum(mu_l, wd) for _ in WEIGHTS]
    return twin.domo(
        PROBLEM.start,
        PROBLEM.client_gradient,
        rounds,
        bases,
        WEIGHTS,
        server["server_lr"],
        server["server_momentum"],
        fusion,
        FUSED.get(variant),
        LOCAL[local_state or local],
        server_unit or unit,
    )


@pytest.mark.parametrize("case", CASES)
def test_twin(case):
    options = dict(CASES[case])
    variant = options["variant"]
    fusion = 0.5 if variant in FUSED else 0.0
    momentum = 0.0 if variant in ("fedavg", "fedavg-sm") else 0.8
    rounds = SCHEDULE if case in ("domo", "domo-s", "fedavg-slm", "diloco") else SCHEDULE[-12:]
    expected = list(twin_of(rounds=rounds, fusion=fusion, mu_l=momentum, wd=0.05, **MOMENTA, **options))
    if "AdamW" not in (options.get("base"), VARIANTS[variant].base):
        options["momentum"] = momentum

    options |= {"fusion": fusion, "eval_point": "x", "weight_decay": 0.05, **MOMENTA}
    clients = Clients(lambda params: DOMO(params, lr=0.1, **options))
    for r, (x, y, m, paths) in enumerate(expected):
        assert_close(clients.local_steps(r, rounds[r]), paths)
        clients.sync()
        assert_close(clients.model(), y)
        assert_close(clients.evaluated(), x)
        assert_close(clients.state(0, "server_momentum_buffer"), m)
    assert clients.calls == len(rounds) * len(WEIGHTS)


def test_twin_with_groups():
    """Options and a schedule of their own in each group; the second has no learning rate in some rounds."""
    rounds = [[(eta, 0.0 if r % 3 == 1 else 0.02, 2 * eta) for eta in etas] for r, etas in enumerate(SCHEDULE[-12:])]
    names = ("momentum", "weight_decay", "server_lr", "server_momentum", "fusion")
    options = [dict(zip(names, values, strict=True)) for values in [(0.9, 0, 1, 0.5, 0.5), (0, 0.1, 0.7, 0.9, 0.6)]]
    options.append(dict(zip(names, (0.5, 0.05, 1, 0, 0), strict=True)))
    sizes = (3, 4, 1)
    values = {name: np.repeat([group[name] for group in options], sizes) for name in names}
    expected = twin_of(
        "domo",
        [[np.repeat(eta, sizes) for eta in etas] for etas in rounds],
        values.pop("fusion"),
        values.pop("momentum"),
        values.pop("weight_decay"),
        **values,
    )

    def make(params):
        return DOMO([{"params": [p], **group} for p, group in zip(params, options, strict=True)], lr=0.1)

    clients = Clients(make)
    for r, (x, y, _, paths) in enumerate(expected):
        assert_close(clients.local_steps(r, rounds[r]), paths)
        clients.sync()
        assert_close(clients.model(), y)
        assert_close(clients.evaluated(), x)


# ---- the variants


@pytest.mark.parametrize(
    ("variant", "momentum", "server_momentum", "server_lr", "fusion"),
    [
        ("fedavg", 0, 0, 1, 0),
        ("fedavg-lm", 0.9, 0, 1, 0),
        ("fedavg-lm-z", 0.9, 0, 1, 0),
        ("fedavg-sm", 0, 0.9, 1, 0),
        ("fedavg-slm", 0.9, 0.9, 1, 0),
        ("fedavg-slm-z", 0.9, 0.9, 1, 0),
        ("domo", 0.9, 0.9, 1, 0.9),
        ("domo-s", 0.9, 0.9, 1, 0.9),
        ("slowmo", 0.9, 0.5, 1, 0),
        ("diloco", None, 0.9, 0.7, 0.63),
    ],
)
def test_numbers_of_the_variants(variant, momentum, server_momentum, server_lr, fusion):
    (group,) = DOMO(parameters(PROBLEM.start), lr=0.1, variant=variant).param_groups
    found = (group.get("momentum"), group["server_momentum"], group["server_lr"], group["fusion"])
    assert found == pytest.approx((momentum, server_momentum, server_lr, fusion))
    assert group["eval_point"] == ("y" if variant == "diloco" else "x")


def test_every_variant_is_in_these_tests():
    assert set(VARIANTS) == {case["variant"] for case in CASES.values()}


def test_fusion_follows_what_the_server_is_given():
    (group,) = DOMO(parameters(PROBLEM.start), lr=0.1, server_lr=0.5, server_momentum=0.4).param_groups
    assert group["fusion"] == pytest.approx(0.2)


# ---- what it equals


def of_torch(base, **options):
    """A function that makes local steps with an optimizer of torch; `keep`: the same one in every round."""
    keep = options.pop("keep")
    kept = {}

    def local_model(k, y, r):
        params, optimizer = kept.get(k, (None, None))
        if params is None or not keep:
            params = parameters(y)
            optimizer = base(params, **options)
            kept[k] = params, optimizer
        with torch.no_grad():
            for parameter, value in zip(params, parameters(y), strict=True):
                parameter.copy_(value)
        for i in range(LOCAL_STEPS):
            set_gradients(params, PROBLEM.client_gradient(k, flat(params), r, i))
            optimizer.step()
        return flat(params)

    return local_model


@pytest.mark.parametrize("unit", ["grad", "param"])
@pytest.mark.parametrize(
    ("variant", "base", "options"),
    [("domo", torch.optim.SGD, {"momentum": 0.8}), ("diloco", torch.optim.AdamW, {"weight_decay": 0.1})],
)
def test_fusion_at_the_product_is_nesterov_outside(variant, base, options, unit):
    """torch's Nesterov steps on what the clients have changed; y of DOMO is what it trains."""
    local_model = of_torch(base, lr=0.02, keep=variant == "diloco", **options)
    of_outer = parameters(PROBLEM.start)
    outer = torch.optim.SGD(of_outer, lr=0.7, momentum=0.6, nesterov=True)
    options = {"server_lr": 0.7, "server_momentum": 0.6, "server_unit": unit, **options}
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant=variant, **options))
    for r, etas in enumerate(CONSTANT):
        y = flat(of_outer)
        local = [local_model(k, y, r) for k in range(len(WEIGHTS))]
        set_gradients(of_outer, y - sum(p * z for p, z in zip(WEIGHTS, local, strict=True)))
        outer.step()
        clients.local_steps(r, etas)
        clients.sync()
        assert_close(clients.model(), flat(of_outer))
        if variant == "diloco":
            np.testing.assert_array_equal(clients.evaluated(), clients.model())


@pytest.mark.parametrize("schedule", ["constant", "falls from round to round"])
def test_without_fusion_it_is_slowmo(schedule):
    rounds = CONSTANT if schedule == "constant" else [[0.03 / (r + 1)] * LOCAL_STEPS for r in range(12)]
    clients = Clients(lambda params: DOMO(params, lr=0.02, fusion=0.0, momentum=0.8, **MOMENTA))

    def local_model(k, x, r):
        return of_torch(torch.optim.SGD, lr=rounds[r][0], momentum=0.8, keep=False)(k, x, r)

    expected = twin.slowmo(PROBLEM.start, local_model, rounds, WEIGHTS, alpha=0.7, beta=0.6)
    for r, x in enumerate(expected):
        clients.local_steps(r, rounds[r])
        clients.sync()
        assert_close(clients.model(), x)
        assert_close(clients.evaluated(), x)


def test_with_one_local_step_it_is_nesterov_on_the_mean_gradient():
    clients = Clients(lambda params: DOMO(params, lr=0.02, momentum=0.0, server_momentum=0.8), EQUAL)
    params = parameters(PROBLEM.start)
    optimizer = torch.optim.SGD(params, lr=0.02, momentum=0.8, nesterov=True)
    for r in range(60):
        clients.local_steps(r, [0.02])
        clients.sync()
        set_gradients(params, sum(PROBLEM.client_gradient(k, flat(params), r, 0) for k in range(4)) / 4)
        optimizer.step()
        assert_close(clients.model(), flat(params))


def test_fedavg_of_one_step_is_sgd_on_the_mean_gradient():
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant="fedavg"))
    params = parameters(PROBLEM.start)
    optimizer = torch.optim.SGD(params, lr=0.02)
    for r in range(20):
        clients.local_steps(r, [0.02])
        clients.sync()
        set_gradients(params, sum(p * PROBLEM.client_gradient(k, flat(params), r, 0) for k, p in enumerate(WEIGHTS)))
        optimizer.step()
        assert_close(clients.model(), flat(params))


@pytest.mark.parametrize("variant", ["fedavg", "fedavg-slm", "domo", "domo-s", "diloco"])
def test_one_client_alone_needs_no_average(variant):
    alone, together = (Clients(lambda params: DOMO(params, lr=0.02, variant=variant), (1.0,)) for _ in range(2))
    for r in range(5):
        for clients in (alone, together):
            clients.local_steps(r, [0.02] * 3)
        together.sync()
        alone.optimizers[0].sync()
        np.testing.assert_array_equal(alone.model(), together.model())


# ---- what is averaged


def test_buffers_are_averaged_in_place_by_the_same_call():
    clients = Clients(lambda params: DOMO(params, lr=0.02))
    buffers = [[torch.full((2, 3), float(k), dtype=torch.float32), torch.tensor(k * 10.0)] for k in range(4)]
    clients.local_steps(0, [0.02])
    clients.sync(buffers)
    mean = sum(p * k for k, p in enumerate(WEIGHTS))
    for matrix, number in buffers:
        torch.testing.assert_close(matrix, torch.full((2, 3), mean))
        torch.testing.assert_close(number, torch.tensor(10 * mean))
    assert clients.calls == len(WEIGHTS)
    with_buffers = clients.sent[0].numel()
    clients.local_steps(1, [0.02])
    clients.sync()
    assert with_buffers - clients.sent[0].numel() == 7


@pytest.mark.parametrize(("variant", "models"), [("domo", 1), ("domo-s", 1), ("diloco", 1), ("fedavg-slm", 2)])
def test_traffic(variant, models):
    """A model for each round, and a number for each group."""
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant=variant))
    clients.local_steps(0, [0.02] * 3)
    clients.sync()
    assert clients.sent[0].numel() == models * NUM_PARAMETERS + 1
    assert clients.calls == len(WEIGHTS)


@pytest.mark.parametrize(("dtype", "sent"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("variant", ["domo", "domo-s", "fedavg-slm", "diloco"])
def test_low_precision_travels_as_float32(variant, dtype, sent):
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant=variant), dtype=dtype)
    for r in range(3):
        clients.local_steps(r, [0.02] * 3)
        clients.sync()
        clients.model()
    assert clients.sent[0].dtype == sent
    assert all(parameter.dtype == dtype for parameter in clients.params[0])


def test_a_parameter_without_a_gradient_on_one_client():
    """A router's expert without a token there: the client sends that it changed nothing."""
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant="fedavg-slm"))
    for r in range(3):
        start = clients.model().copy()
        for k, (params, optimizer) in enumerate(zip(clients.params, clients.optimizers, strict=True)):
            set_gradients(params, np.ones(NUM_PARAMETERS))
            if k == 2:
                params[1].grad = None
            optimizer.step()
        changed = clients.models()
        np.testing.assert_array_equal(changed[2][3:7], start[3:7])
        clients.sync()
        if r == 0:
            assert_close(clients.model()[3:7], start[3:7] - (1 - WEIGHTS[2]) * (start - changed[0])[3:7])
            for k, params in enumerate(clients.params):  # averaged with the momentum that it does not have
                momentum = clients.optimizers[k].state[params[1]]["base"]["momentum_buffer"]
                assert_close(momentum, np.full((2, 2), 1 - WEIGHTS[2]))


# ---- views and refusals


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["fedavg", "fedavg-slm", "domo", "domo-s", "diloco", "domo in units of parameters"])
@pytest.mark.parametrize("point", ["x", "y"])
def test_views_return_every_bit(case, point, dtype):
    clients = Clients(lambda params: DOMO(params, lr=0.02, eval_point=point, **CASES[case]), dtype=dtype)
    for r in range(3):
        before = clients.model()
        expected = clients.evaluated()
        np.testing.assert_array_equal(clients.model(), before)
        clients.local_steps(r, [0.02] * 3)
        local = clients.models()
        for _ in range(2):
            np.testing.assert_array_equal(clients.evaluated(), expected)
            np.testing.assert_array_equal(clients.models(), local)
        if point == "y":
            np.testing.assert_array_equal(expected, before)
        assert np.abs(local[0] - local[1]).max() > 0.001
        clients.sync()


def test_views_are_idempotent_and_leave_no_buffer():
    clients = Clients(lambda params: DOMO(params, lr=0.02))
    clients.local_steps(0, [0.02] * 2)
    local, optimizer, params = clients.models()[0], clients.optimizers[0], clients.params[0]
    names = {name for name in optimizer.state[params[0]]}
    for _ in range(2):
        optimizer.eval()
        np.testing.assert_array_equal(flat(params), PROBLEM.start)
    for _ in range(2):
        optimizer.train()
        np.testing.assert_array_equal(flat(params), local)
    assert set(optimizer.state[params[0]]) == names


def test_looking_does_not_change_training():
    """Views in the middle and at the end of rounds."""
    looked, plain = (Clients(lambda params: DOMO(params, lr=0.02)) for _ in range(2))
    for r in range(4):
        for clients in (looked, plain):
            clients.local_steps(r, [0.02] * 3)
            if clients is looked:
                clients.evaluated()
            clients.sync()
            if clients is looked:
                clients.evaluated()
        np.testing.assert_array_equal(looked.model(), plain.model())


@pytest.mark.parametrize("method", ["step", "sync"])
def test_refuses_to_go_on_at_the_evaluation_point(method):
    clients = Clients(lambda params: DOMO(params, lr=0.02), (1.0,))
    clients.local_steps(0, [0.02])
    clients.optimizers[0].eval()
    with pytest.raises(RuntimeError, match=rf"{method}\(\).*train\(\)"):
        getattr(clients.optimizers[0], method)()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_not_finite(value):
    clients = Clients(lambda params: DOMO(params, lr=0.02))
    for r in range(2):
        clients.local_steps(r, [0.02])
        clients.sync()
    clients.local_steps(2, [0.02])
    with torch.no_grad():
        clients.params[1][0][1] = value
    before, m = clients.models(), clients.state(0, "server_momentum_buffer")
    with pytest.raises(RuntimeError, match="round 2.*not finite"):
        clients.sync()
    np.testing.assert_array_equal(clients.models(), before)
    np.testing.assert_array_equal(clients.state(0, "server_momentum_buffer"), m)


# ---- going on from a checkpoint


@pytest.mark.parametrize("view", ["train", "eval"])
@pytest.mark.parametrize("variant", ["fedavg", "fedavg-slm", "domo", "domo-s", "fedavg-sm"])
def test_one_client_is_enough_at_the_end_of_a_round(variant, view):
    """What the first client saves there is all that the others need to go on, bit for bit."""
    clients = Clients(lambda params: DOMO(params, lr=0.02, variant=variant))
    for r in range(3):
        clients.local_steps(r, [0.02] * 3)
        clients.sync()
    if view == "eval":
        for optimizer in clients.optimizers:
            optimizer.eval()
    saved, model = clients.optimizers[0].state_dict(), clients.models()[0]

    resumed = Clients(lambda params: DOMO(params, lr=0.5, variant=variant))
    for params, optimizer in zip(resumed.params, resumed.optimizers, strict=True):
        with torch.no_grad():
            for parameter, value in zip(params, parameters(model), strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(saved))  # torch keeps the tensors it is given
    for one in (clients, resumed):
        for optimizer in one.optimizers:
            optimizer.train()
        for r in range(3, 5):
            one.local_steps(r, [0.02] * 3)
            one.sync()
    np.testing.assert_array_equal(resumed.model(), clients.model())


def test_the_state_of_another_variant_is_refused():
    optimizer = DOMO(parameters(PROBLEM.start), lr=0.02, variant="domo-s")
    saved = DOMO(parameters(PROBLEM.start), lr=0.02, variant="domo").state_dict()
    with pytest.raises(ValueError, match="variant='domo-s'.*'domo'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("step", range(1, 4))
def test_going_on_in_the_middle_of_a_round(step):
    """One client, saved and loaded at every place of a round, in its view as it was."""
    etas = [0.01, 0.02, 0.0, 0.03]
    clients, resumed = (Clients(lambda params: DOMO(params, lr=0.5), (1.0,)) for _ in range(2))
    clients.local_steps(0, etas)
    clients.sync()
    clients.local_steps(1, etas[:step])
    clients.optimizers[0].eval()
    resumed.optimizers[0].load_state_dict(copy.deepcopy(clients.optimizers[0].state_dict()))
    with torch.no_grad():
        for target, source in zip(resumed.params[0], clients.params[0], strict=True):
            target.copy_(source)
    for one in (clients, resumed):
        one.optimizers[0].train()
        one.local_steps(2, etas[step:])
        one.sync()
    np.testing.assert_array_equal(resumed.model(), clients.model())
    assert resumed.optimizers[0].param_groups[0]["last_lr_sum"] == pytest.approx(sum(etas))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_an_option_of_its_own_is_refused_among_those_of_the_base(name):
    with pytest.raises(ValueError, match=rf"base_args\.{name}=0\.5: is an option of its own"):
        DOMO([torch.nn.Parameter(torch.zeros(2))], lr=0.1, base_args={name: 0.5})


def test_a_base_without_weight_decay_is_taken():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = DOMO([parameter], lr=0.1, base="Rprop")
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert (parameter < 0).all()
