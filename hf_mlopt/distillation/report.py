"""What a distillation did: error of the experts per layer, losses, time and memory."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class DistilledLayer:
    """
    The experts of one decoder layer. Errors are sums over experts of the mean squared difference to the teacher's
    outputs; they describe the layer as it was written.

    Args:
        index (`int`): Index of the decoder layer.
        name (`str`): Qualified name of the experts module, or of the decoder layer where it has no experts.
        mse_before, mse_after (`float`, *optional*): On windows that were trained on; as many as there are held-out
            ones, see [`~distillation.layerwise.distill_layerwise`].
        eval_mse_before, eval_mse_after (`float`, *optional*): On held-out windows.
        steps (`int`): Optimizer steps.
        windows (`int`): Windows trained on, each as often as it was presented.
        seconds (`float`): Wall time.
        kept (`bool`): `False` where training made the held-out error worse, so that the weights stayed as they were.
        mask_violations (`int`): Weights that were zero before and are not zero now.
        curve (`list[dict]`): `step` and `mse`, the mean over the steps since the entry before.
    """

    index: int
    name: str
    mse_before: float | None = None
    mse_after: float | None = None
    eval_mse_before: float | None = None
    eval_mse_after: float | None = None
    steps: int = 0
    windows: int = 0
    seconds: float = 0.0
    kept: bool = True
    mask_violations: int = 0
    curve: list[dict] = field(default_factory=list)


@dataclass
class DistillationReport:
    """
    The whole run; `to_dict()` is what `distillation_report.json` holds.

    Args:
        mode (`str`): `layerwise` or `end-to-end`.
        samples, eval_samples, sequence_length (`int`): Windows trained on, windows evaluated on, tokens in each.
        epochs (`float`): Times the windows were gone through.
        tokens (`int`): Tokens trained on, each as often as it was presented; per layer where layers are trained one
            by one.
        steps (`int`): Optimizer steps; per layer where layers are trained one by one.
        learning_rate (`float`): The highest one.
        trained (`str`): `experts`, `all` or `lora`.
        seconds (`float`): Wall time.
        peak_memory_bytes (`int`): Peak resident memory of the process, or peak allocation on the accelerator.
        processes (`int`), sharded (`bool`), precision (`str`): How many trained together, whether FSDP2 split the
            models among them, and the mixed precision of accelerate, `no` or `bf16`.
        lmbda (`float`, *optional*): Weight of the experts' error.
        lora_rank (`int`, *optional*): Rank of the adapters that were merged.
        freeze_router (`bool`): Whether routers kept their weights.
        logit_weight, temperature (`float`): Of the divergence from the teacher's logits.
        mask_violations (`int`): Weights that were zero before and are not zero now.
        layers (`list[DistilledLayer]`): Those with experts, where layers are trained one by one.
        loss (`list[dict]`): What was logged, each with its `step`, where the whole model is trained.
        teacher, student, dataset, environment (`dict`): Provenance, filled in by who knows it.
    """

    mode: str
    samples: int
    eval_samples: int
    sequence_length: int
    epochs: float
    tokens: int
    steps: int
    learning_rate: float
    trained: str
    seconds: float
    peak_memory_bytes: int
    processes: int = 1
    sharded: bool = False
    precision: str = "no"
    lmbda: float | None = None
    lora_rank: int | None = None
    freeze_router: bool = False
    logit_weight: float = 0.0
    temperature: float = 1.0
    mask_violations: int = 0
    layers: list[DistilledLayer] = field(default_factory=list)
    loss: list[dict] = field(default_factory=list)
    teacher: dict = field(default_factory=dict)
    student: dict = field(default_factory=dict)
    dataset: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dicts."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{self.mode}: {self.steps:,} steps{' per layer' if self.layers else ''}, {self.tokens:,} tokens, "
            f"{self.mask_violations} mask violations, in {self.seconds:.1f} s"
        ]
        for layer in self.layers:
            line = f"  layer {layer.index}: error of the experts {_change(layer.mse_before, layer.mse_after)}"
            if layer.eval_mse_after is not None:
                line += f", held out {_change(layer.eval_mse_before, layer.eval_mse_after)}"
            lines.append(line + ("" if layer.kept else "; training made it worse, so it was left as it was"))
        if self.loss:
            named = ", ".join(
                f"{key} {rows[0][key]:.4g} -> {rows[-1][key]:.4g}"
                for key in ("loss", "ce", "expert_mse", "eval_loss")
                if (rows := [row for row in self.loss if key in row])
            )
            lines.append(f"  {named}")
        return "\n".join(lines)


def _change(before: float, after: float) -> str:
    return f"{before:.4g} -> {after:.4g}"
