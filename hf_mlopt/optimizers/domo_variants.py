"""DOMO and the family it is compared with, as settings of one rule."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """
    Named settings of [`DOMO`].

    Args:
        momentum (`float`): μ_l of the local steps; unused where `base` is not SGD.
        server_momentum (`float`): μ_s.
        fusion (`float`, *optional*): β; α μ_s where absent.
        fusion_at (`str`, *optional*, defaults to `"start"`): Whether the server momentum moves the `start` of a round,
            or every local `step`.
        local_state (`str`, *optional*, defaults to `"reset"`): What a round begins with: no local momentum, the
            average over the clients, or its own (`keep`).
        server_lr (`float`, *optional*, defaults to 1.0): α.
        server_unit (`str`, *optional*, defaults to `"grad"`): Unit of the server momentum.
        eval_point (`str`, *optional*, defaults to `"x"`): What is evaluated and saved.
        base (`str`, *optional*, defaults to `"SGD"`): Optimizer of the local steps.
        origin (`str`): Where it comes from.
    """

    momentum: float
    server_momentum: float
    fusion: float | None
    origin: str
    fusion_at: Literal["start", "step"] = "start"
    local_state: Literal["reset", "average", "keep"] = "reset"
    server_lr: float = 1.0
    server_unit: Literal["grad", "param"] = "grad"
    eval_point: Literal["x", "y"] = "x"
    base: str = "SGD"


# L: local momentum, S: server momentum, Z: the local one begins every round at zero.
VARIANTS = {
    "fedavg": Variant(0.0, 0.0, 0.0, "FedAvg, huggingface.co/papers/1602.05629"),
    "fedavg-lm": Variant(0.9, 0.0, 0.0, "FedAvg with local momentum, averaged", local_state="average"),
    "fedavg-lm-z": Variant(0.9, 0.0, 0.0, "FedAvg with local momentum, zeroed"),
    "fedavg-sm": Variant(0.0, 0.9, 0.0, "FedAvg with server momentum: FedAvgM"),
    "fedavg-slm": Variant(0.9, 0.9, 0.0, "FedAvg with both momenta, the local one averaged", local_state="average"),
    "fedavg-slm-z": Variant(0.9, 0.9, 0.0, "FedAvg with both momenta, the local one zeroed"),
    "domo": Variant(0.9, 0.9, None, "DOMO, huggingface.co/papers/2102.03970"),
    "domo-s": Variant(0.9, 0.9, None, "DOMO with the fusion inside every local step", fusion_at="step"),
    "slowmo": Variant(0.9, 0.5, 0.0, "SlowMo, huggingface.co/papers/1910.00643", local_state="keep"),
    "diloco": Variant(
        0.0,
        0.9,
        None,
        "DiLoCo, huggingface.co/papers/2311.08105: AdamW inside, Nesterov outside",
        local_state="keep",
        server_lr=0.7,
        server_unit="param",
        eval_point="y",
        base="AdamW",
    ),
}
