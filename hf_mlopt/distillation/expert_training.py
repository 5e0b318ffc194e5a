"""
Trains the experts of one layer to give what the teacher's give: sum over experts of the mean of
||E_teacher(x) - E_student(x)||^2 over the tokens routed to each, as in Eq. (10) of
[MoE-Pruner](https://huggingface.co/papers/2410.12013), without cross-entropy.
"""

# T tokens   H hidden   K experts per token   E experts

import math
import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from hf_mlopt.distillation.config import LayerwiseConfig
from hf_mlopt.distillation.losses import expert_mse, expert_squared_error, tokens_per_expert
from hf_mlopt.moe import MoELayer
from hf_mlopt.moe.expert_outputs import expert_outputs


Read = Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]  # windows -> hidden_TH, index_TK

# The error falls by an order of magnitude within some hundred steps: a longer memory of the first gradients would
# shorten all later steps. Those of a mean over thousands of features lie below the usual eps of 1e-8.
_BETAS, _EPS = (0.9, 0.95), 1e-15


def window_batches(num_windows: int, config: LayerwiseConfig, layer: int) -> list[list[int]]:
    """
    The windows of every step: every epoch goes through all of them in another order, the same for the same seed and
    layer. The last step may have fewer.
    """
    rng = random.Random(f"seed {config.seed}, layer {layer}")
    total = max(1, round(config.epochs * num_windows))
    order: list[int] = []
    while len(order) < total:
        order += rng.sample(range(num_windows), num_windows)
    return [order[start : min(start + config.batch_size, total)] for start in range(0, total, config.batch_size)]


def learning_rate_at(step: int, steps: int, config: LayerwiseConfig) -> float:
    """The learning rate of a step, counted from 0: it rises to the highest one, then falls to 0 as a cosine."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class ExpertWeights:
    """
    The parameters of a layer's experts while they are trained: float32 masters of bfloat16 weights, float16 ones
    turned to float32 as their gradients would be too small, and the zeros of the matrices, which are held.

    Args:
        layer (`MoELayer`): Fused experts; their parameters are trained in place.
        weight_decay (`float`): As in AdamW.
    """

    @torch.no_grad()
    def __init__(self, layer: MoELayer, weight_decay: float):
        matrices = {id(getattr(layer.experts, projection)) for projection in layer.projections}
        self._parameters = list(layer.experts.parameters())
        self._stored = [parameter.detach().clone() for parameter in self._parameters]
        self._zeros = [parameter == 0 if id(parameter) in matrices else None for parameter in self._parameters]
        for parameter in self._parameters:
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._masters = [
            nn.Parameter(parameter.float()) if parameter.dtype == torch.bfloat16 else parameter
            for parameter in self._parameters
        ]
        self._optimizer = torch.optim.AdamW(
            self._masters, betas=_BETAS, eps=_EPS, weight_decay=weight_decay, fused=True
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step of AdamW on the gradients of the parameters, which are consumed."""
        weights = list(zip(self._parameters, self._masters, self._zeros, strict=True))
        for parameter, master, zeros in weights:
            if zeros is not None:
                parameter.grad.masked_fill_(zeros, 0)
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        for parameter, master, zeros in weights:
            if zeros is not None:
                master.masked_fill_(zeros, 0)
            if master is not parameter:
                parameter.copy_(master)

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the parameters their stored dtype back. A weight that training or rounding made zero keeps its old
        value, so that the zeros are those of the student and its report stays true."""
        self._masters, self._optimizer = [], None
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(stored.dtype)
            parameter.copy_(torch.where(parameter == 0, stored, parameter))

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes the training."""
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            parameter.copy_(stored)

    @torch.no_grad()
    def violations(self) -> int:
        """Weights that were zero and are not zero now."""
        pairs = zip(self._parameters, self._zeros, strict=True)
        return sum(int(((parameter != 0) & zeros).sum()) for parameter, zeros in pairs if zeros is not None)


def train(
    teacher: MoELayer,
    student: MoELayer,
    weights: ExpertWeights,
    read: Read,
    batches: Sequence[list[int]],
    config: LayerwiseConfig,
    logging_steps: int,
) -> list[dict]:
    """
    Trains the experts of one layer.

    Args:
        teacher (`MoELayer`), student (`MoELayer`): The layer of either model, on one device.
        weights (`ExpertWeights`): Those of the student.
        read (`Callable`): Gives the experts' inputs `[tokens, hidden]` and the teacher's routing `[tokens, top-k]` of
            some windows.
        batches (`Sequence[list[int]]`): The windows of every step.
        config (`LayerwiseConfig`): Learning rate and schedule.
        logging_steps (`int`): Steps between two entries of the curve.

    Returns:
        `list[dict]`: `step` and `mse`, the mean over the steps since the entry before.
    """
    curve: list[dict] = []
    total, since = 0.0, 0
    for step, windows in enumerate(batches):
        hidden_TH, index_TK = read(windows)
        error_E, tokens_E = _errors(teacher, student, hidden_TH, index_TK)
        loss = expert_mse(error_E, tokens_E, hidden_TH.shape[-1]).sum()
        loss.backward()
        weights.step(learning_rate_at(step, len(batches), config))
        total, since = total + loss.detach().double(), since + 1
        if since == logging_steps or step + 1 == len(batches):
            curve.append({"step": step + 1, "mse": float(total) / since})  # waits for the device
            total, since = 0.0, 0
    return curve


@torch.no_grad()
def measure(teacher: MoELayer, student: MoELayer, read: Read, batches: Iterable[list[int]]) -> float | None:
    """The loss over all tokens of some windows; None if there are none."""
    error_E, tokens_E, hidden_size = 0, 0, 0
    for windows in batches:
        hidden_TH, index_TK = read(windows)
        errors, tokens = _errors(teacher, student, hidden_TH, index_TK)
        error_E, tokens_E, hidden_size = error_E + errors.double(), tokens_E + tokens, hidden_TH.shape[-1]
    return expert_mse(error_E, tokens_E, hidden_size).sum().item() if hidden_size else None


def _errors(teacher: MoELayer, student: MoELayer, hidden_TH, index_TK) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error and tokens of every expert, with gradients for the student's weights."""
    with torch.no_grad():
        target_TKH = expert_outputs(teacher, hidden_TH, index_TK)
    dtype = next(student.experts.parameters()).dtype
    output_TKH = expert_outputs(student, hidden_TH.to(dtype), index_TK)
    error_E = expert_squared_error(output_TKH, target_TKH, index_TK, student.num_experts)
    return error_E, tokens_per_expert(index_TK, student.num_experts)
