"""The simulator of local rounds in `benchmarks/`: many clients and runs at once are as many of `DOMO`, one by one."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hf_mlopt.optimizers import DOMO, VARIANTS


FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "local_rounds.py"
SPEC = importlib.util.spec_from_file_location("local_rounds", FILE)
local_rounds = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(local_rounds)

SIZES, RUNS, CLIENTS, LOCAL_STEPS, ROUNDS, DECAY = (5, 4, 3), 2, 3, 4, 4, 0.01
LR = torch.tensor([0.05, 0.2], dtype=torch.float64)


def task():
    generator = torch.Generator().manual_seed(0)
    return local_rounds.Task(
        sizes=SIZES,
        inputs=torch.randn(40, 5, generator=generator, dtype=torch.float64),
        labels=torch.randint(0, 3, (40,), generator=generator),
        batches=torch.randint(0, 40, (ROUNDS * LOCAL_STEPS, RUNS, CLIENTS, 6), generator=generator),
        weights=torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.25, 0.25]], dtype=torch.float64),
        start=torch.stack([local_rounds.initial_parameters(SIZES, seed).double() for seed in range(RUNS)]),
        local_steps=LOCAL_STEPS,
        weight_decay=DECAY,
    )


def one_by_one(task, run, variant, fusion):
    """What every client of a run evaluates after each round, each with a `DOMO` of its own, in a thread of its own."""
    sent, meet = [None] * CLIENTS, threading.Barrier(CLIENTS, timeout=20)

    def client(k):
        def average(vector):
            sent[k] = vector.clone()
            meet.wait()
            mean = sum(weight * other for weight, other in zip(task.weights[run], sent, strict=True))
            meet.wait()
            return mean

        weights, start = [], task.start[run]
        for inputs, outputs in zip(SIZES, SIZES[1:], strict=False):
            weight, bias, start = start.split([inputs * outputs, outputs, len(start) - (inputs + 1) * outputs])
            weights += [weight.view(inputs, outputs).clone().requires_grad_(), bias.clone().requires_grad_()]
        optimizer = DOMO(weights, float(LR[run]), variant, fusion=fusion, weight_decay=DECAY)
        for t, batch in enumerate(task.batches[:, run, k], 1):
            hidden = (task.inputs[batch] @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]
            functional.cross_entropy(hidden, task.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if t % LOCAL_STEPS == 0:
                optimizer.sync(average)
                optimizer.eval()
                yield torch.cat([weight.detach().flatten() for weight in weights])
                optimizer.train()

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [torch.stack(rounds) for rounds in pool.map(lambda k: list(client(k)), range(CLIENTS))]


@pytest.mark.parametrize(
    "variant, fusion", [*((name, None) for name in VARIANTS), ("domo", 0.3), ("domo-s", 0.6), ("diloco", 0.2)]
)
def test_all_clients_at_once_equal_an_optimizer_each(variant, fusion):
    setting = task()
    together = torch.stack(list(local_rounds.simulate(setting, variant, LR, fusion)), dim=1)
    assert together.shape == (RUNS, ROUNDS, setting.start.shape[1])
    assert (together[:, -1] - setting.start).abs().max() > 0.01  # something was trained
    for run in range(RUNS):
        for alone in one_by_one(setting, run, variant, fusion):
            torch.testing.assert_close(together[run], alone, rtol=0, atol=1e-12)


def test_the_network_is_that_of_torch():
    flat = local_rounds.initial_parameters((5, 4, 3), seed=3)
    layers = [torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)]
    first_weight, first_bias, weight, bias = flat.split([20, 4, 12, 3])
    layers[0].weight.data, layers[0].bias.data = first_weight.view(5, 4).T, first_bias
    layers[2].weight.data, layers[2].bias.data = weight.view(4, 3).T, bias
    inputs = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    ours = local_rounds.logits((5, 4, 3), flat.expand(2, -1), inputs)
    torch.testing.assert_close(ours, torch.nn.Sequential(*layers)(inputs))
    assert first_weight.abs().max() <= 5**-0.5 and weight.abs().max() <= 0.5 and weight.abs().max() > 5**-0.5


def test_accuracy_is_of_each_run():
    setting = task()
    right = torch.stack(
        [local_rounds.logits(SIZES, row[None], setting.inputs[None])[0].argmax(-1) for row in setting.start]
    )
    found = local_rounds.accuracies(setting, setting.start, setting.inputs, right[1])
    assert found[1] == 1 and found[0] == (right[0] == right[1]).double().mean() < 1
