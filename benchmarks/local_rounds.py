"""
DOMO and its relatives in local rounds of many clients and many runs at once, for `optimizers.py`.

All models lie in one matrix, a row for each client of each run, and a local step of all of them is one batched matrix
product for each layer, without a loop over clients. The rule is that of `hf_mlopt.optimizers.DOMO`, at a learning rate
that is constant in a run, where both units of the server momentum are the same; a test holds the two together.
"""

# R runs   K clients   M models = R * K   N parameters of a model   B batch   F features   T local steps in all

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from hf_mlopt.optimizers import VARIANTS


BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, as in torch


@dataclass
class Task:
    """
    What all variants are compared on.

    Args:
        sizes (`tuple[int]`): Widths of the layers of the network, features first, classes last.
        inputs (`torch.Tensor`): `[examples, F]`.
        labels (`torch.Tensor`): `[examples]`.
        batches (`torch.Tensor`): `[T, R, K, B]`, indices of examples.
        weights (`torch.Tensor`): `[R, K]`, of the clients in the average; rows sum to 1.
        start (`torch.Tensor`): `[R, N]`, parameters as [`initial_parameters`] lays them out.
        local_steps (`int`): Steps in a round.
        weight_decay (`float`): Of the local steps.
    """

    sizes: tuple[int, ...]
    inputs: torch.Tensor
    labels: torch.Tensor
    batches: torch.Tensor
    weights: torch.Tensor
    start: torch.Tensor
    local_steps: int
    weight_decay: float


def initial_parameters(sizes: tuple[int, ...], seed: int) -> torch.Tensor:
    """`[N]`: weight `[inputs, outputs]` and bias of each layer in turn, drawn as `torch.nn.Linear` draws them."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        uniform = 2 * torch.rand((inputs + 1) * outputs, generator=generator) - 1
        parts.append(uniform * inputs**-0.5)
    return torch.cat(parts)


def logits(sizes: tuple[int, ...], models_MN: torch.Tensor, inputs_MBF: torch.Tensor) -> torch.Tensor:
    """`[M, B, classes]`: every model on the batch of its own."""
    layers = list(zip(sizes, sizes[1:], strict=False))
    parts = iter(models_MN.split([size for i, o in layers for size in (i * o, o)], dim=1))
    hidden = inputs_MBF
    for number, (inputs, outputs) in enumerate(layers):
        weight, bias = next(parts).view(-1, inputs, outputs), next(parts).unsqueeze(1)
        hidden = torch.baddbmm(bias, hidden, weight)
        if number < len(layers) - 1:
            hidden = hidden.relu()
    return hidden


def simulate(task: Task, variant: str, lr_R: torch.Tensor, fusion: float | None = None) -> Iterator[torch.Tensor]:
    """
    Args:
        task ([`Task`]): The runs.
        variant (`str`): A name in `hf_mlopt.optimizers.VARIANTS`.
        lr_R (`torch.Tensor`): `[R]`, local learning rate of each run.
        fusion (`float`, *optional*): β, if another than that of the variant.

    Yields:
        `torch.Tensor`: `[R, N]` after each round, at the point that the variant evaluates.
    """
    rule = VARIANTS[variant]
    alpha, mu_s = rule.server_lr, rule.server_momentum
    beta = fusion if fusion is not None else rule.fusion if rule.fusion is not None else alpha * mu_s
    in_steps, num_clients = rule.fusion_at == "step", task.weights.shape[1]
    lr_R1 = lr_R.to(task.start)[:, None]
    lr_M1 = lr_R1.repeat_interleave(num_clients, 0)
    S = lr_R1 * task.local_steps
    x = y = task.start
    m = torch.zeros_like(x)  # of the server
    local = _Local(rule.base, rule.momentum, task.weight_decay, lr_M1)
    for batches in task.batches.split(task.local_steps):
        z_MN = y.repeat_interleave(num_clients, 0)
        drift_MN = (beta * m).repeat_interleave(num_clients, 0) * lr_M1 if in_steps else None
        if rule.local_state == "reset":
            local.reset()
        for batch_RKB in batches:
            z_MN = local.step(z_MN, _gradients(task, z_MN, batch_RKB.flatten(0, 1)))
            if in_steps:
                z_MN -= drift_MN
        change = y - _mean(z_MN, task.weights)
        if in_steps:
            change -= beta * S * m
        m = mu_s * m + change / S
        x = x - alpha * S * m
        y = x if in_steps else x - beta * S * m
        if rule.local_state == "average":
            local.average(task.weights)
        yield x if rule.eval_point == "x" else y


def accuracies(task: Task, models_RN: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[R]`: share of examples that the model of each run gets right."""
    found = logits(task.sizes, models_RN, inputs.expand(len(models_RN), -1, -1)).argmax(-1)
    return (found == labels).double().mean(1)


class _Local:
    """SGD with momentum or AdamW for all models at once."""

    def __init__(self, base: str, momentum: float, weight_decay: float, lr_M1: torch.Tensor):
        self.base, self.momentum, self.weight_decay, self.lr = base, momentum, weight_decay, lr_M1
        self.reset()

    def reset(self) -> None:
        self.first = self.second = 0.0
        self.steps = 0

    def average(self, weights_RK: torch.Tensor) -> None:
        if self.momentum:
            self.first = _mean(self.first, weights_RK).repeat_interleave(weights_RK.shape[1], 0)

    def step(self, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        if self.base == "AdamW":
            self.steps += 1
            self.first = BETAS[0] * self.first + (1 - BETAS[0]) * g
            self.second = BETAS[1] * self.second + (1 - BETAS[1]) * g * g
            first, second = (
                moment / (1 - beta**self.steps) for moment, beta in zip((self.first, self.second), BETAS, strict=True)
            )
            return z * (1 - self.lr * self.weight_decay) - self.lr * first / (second.sqrt() + EPS)
        g = g + self.weight_decay * z
        self.first = self.momentum * self.first + g
        return z - self.lr * self.first


def _gradients(task: Task, z_MN: torch.Tensor, batch_MB: torch.Tensor) -> torch.Tensor:
    """`[M, N]`. The sum over models of their losses has as its gradient that of each model, in its row."""
    z_MN = z_MN.detach().requires_grad_()
    found = logits(task.sizes, z_MN, task.inputs[batch_MB])
    loss = functional.cross_entropy(found.flatten(0, 1), task.labels[batch_MB].flatten(), reduction="sum")
    return torch.autograd.grad(loss / batch_MB.shape[1], z_MN)[0]


def _mean(models_MN: torch.Tensor, weights_RK: torch.Tensor) -> torch.Tensor:
    """`[R, N]`: weighted mean over the clients of each run."""
    by_client = models_MN.view(*weights_RK.shape, -1)
    return torch.einsum("rk,rkn->rn", weights_RK.to(models_MN), by_client)
