"""`hf-mlopt speed`: whether pruning makes the experts of a model faster on this machine."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.hub import Checkpoint, environment, resolve_checkpoint
from hf_mlopt.hub.shards import write_errors
from hf_mlopt.workflows.loading import architecture_errors, choose_device


if TYPE_CHECKING:
    import torch

    from hf_mlopt.moe import MoELayer

logger = logging.getLogger(__name__)


@dataclass
class SpeedConfig:
    """
    What to measure, of which model.

    Args:
        model (`str`): Local directory or Hub id. No weights are read: the experts of one layer are filled with noise.
        tokens (`list[int]`, *optional*): Tokens in one forward pass: when decoding, one for each sequence of the
            batch; in prefill, all tokens of the prompts. 1, 8, 32, 512 and 2048 by default.
        drop_experts (`list[float]`, *optional*): Fractions of the experts to remove. 0.25 and 0.5 by default.
        report (`str`, *optional*): A `pruning_report.json` of this model; tokens are then sent to experts as unevenly
            as it counted. By default all experts get equally many.
        dtype (`str`, *optional*, defaults to `"auto"`): Of weights and activations; `auto` is what config.json says.
        device (`str`, *optional*, defaults to `"auto"`): `auto` is the first GPU, else the CPU.
        repeats (`int`, *optional*, defaults to 20): Rounds, in each of which everything runs once. Six are always run;
            after 20 seconds no more than those.
        output (`str`, *optional*): JSON file to write the result to.
    """

    model: str | None = None
    tokens: list[int] = field(default_factory=lambda: [1, 8, 32, 512, 2048])
    drop_experts: list[float] = field(default_factory=lambda: [0.25, 0.5])
    report: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    repeats: int = 20
    output: str | None = None

    def __post_init__(self):
        if not self.model:
            raise ConfigurationError("model", self.model, "is needed")
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigurationError("tokens", self.tokens, "must be one or more numbers, each at least 1")
        if not all(0 < drop < 1 for drop in self.drop_experts):
            raise ConfigurationError("drop_experts", self.drop_experts, "must be fractions between 0 and 1")
        if self.repeats < 6:
            raise ConfigurationError("repeats", self.repeats, "must be at least 6: with fewer, chance decides")


def measure_speed(config: SpeedConfig) -> dict:
    """
    Times the dense experts of one layer against half-zero, 2:4 and fewer experts, at the tokens per expert of a model.

    Returns:
        `dict`: JSON: `experts` (their shape), `variants` (what each is, and its bytes), `rows` (times and speed-ups,
            one for each number of tokens), `does_not_apply` (what was not measured, and why), `verdict` (in words),
            and where and how it was measured.

    Raises:
        InputError: For a dense model, a layout that is not understood, a report of another model, or a layer that does
            not fit the memory of the device.
    """
    checkpoint = resolve_checkpoint(config.model)
    if config.output and Path(config.output).exists():
        raise ConfigurationError("output", config.output, "exists already; name a new file")
    if config.output:
        with write_errors(Path(config.output)):
            Path(config.output).parent.mkdir(parents=True, exist_ok=True)

    import torch

    from hf_mlopt.speed import ExpertVariants, verdict

    layer, shape = _first_layer(checkpoint, config.dtype)
    load_E = _measured_load(config.report, layer.num_experts) if config.report else [1.0] * layer.num_experts
    device = choose_device(config.device, _needed_bytes(layer, max(config.tokens), on_gpu=True))
    _check_memory(config, layer, device)
    with torch.no_grad():
        variants = ExpertVariants(layer, device, config.drop_experts)
        rows = []
        for tokens in config.tokens:
            logger.info(f"measuring {tokens} tokens on {device}")
            rows.append(variants.measure(tokens, load_E, config.repeats))
    record = {
        "model": config.model,
        "experts": shape,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "routing": f"as counted in {config.report}" if config.report else "balanced",
        "variants": variants.described,
        "rows": rows,
        "does_not_apply": variants.does_not_apply,
        "verdict": verdict(variants.described, rows),
    }
    if config.output:
        with write_errors(Path(config.output)):
            Path(config.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _first_layer(checkpoint: Checkpoint, dtype: str) -> "tuple[MoELayer, dict]":
    """The first layer with experts, on the meta device, and its shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_mlopt.moe import moe_layers

    with architecture_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.name, revision=checkpoint.revision)
        chosen = getattr(config.get_text_config(), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        if chosen is None:
            raise ConfigurationError("dtype", dtype, "config.json names none; give bfloat16, float16 or float32")
        with torch.device("meta"):
            # Not only one layer of it: in some families the first ones have no experts.
            skeleton = AutoModelForCausalLM.from_config(config, dtype=chosen)
    layer = moe_layers(skeleton)[0]
    if not layer.is_fused or layer.top_k is None:
        what = "its experts are a ModuleList, not fused" if layer.top_k else "config.json names no experts per token"
        raise InputError(f"model={checkpoint.name!r}: {what}; such a layer cannot be measured alone.")
    dtype = str(chosen).removeprefix("torch.")
    if getattr(config, "quantization_config", None) is not None:
        logger.warning(f"{checkpoint.name} is quantized; measured are {dtype} weights, without quantization.")
    shape = {
        "model_type": config.model_type,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "hidden_size": layer.input_size("hidden"),
        "intermediate_size": layer.input_size("intermediate"),
        "dtype": dtype,
    }
    return layer, shape


def _measured_load(path: str, num_experts: int) -> list[float]:
    """Fraction of the routed tokens of each expert, the most used one first, averaged over the layers of a report."""
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
        counts = [_tokens_of_those_left(layer, num_experts) for layer in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError("report", path, f"is no pruning_report.json ({error})") from None
    counts = [sorted(layer, reverse=True) for layer in counts if sum(layer) > 0]
    if not counts:
        raise ConfigurationError("report", path, "holds no tokens per expert: that run used no calibration text")
    if any(len(layer) != num_experts for layer in counts):
        allowed = f"counts {len(counts[0])} experts, the model has {num_experts}; give the report of this model"
        raise ConfigurationError("report", path, allowed)
    shares = [[count / sum(layer) for count in layer] for layer in counts]
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def _tokens_of_those_left(layer: dict, num_experts: int) -> list[int]:
    """Calibration counted all experts; where some were removed, the model may be the one before or the one after."""
    counts, kept = layer["tokens_per_expert"], layer.get("kept_experts", [])
    return [counts[expert] for expert in kept] if len(kept) == num_experts and counts else counts


def _needed_bytes(layer: "MoELayer", tokens: int, on_gpu: bool) -> int:
    """Memory for weights and activations of everything that is measured."""
    weights = sum(parameter.nbytes for parameter in layer.experts.parameters())
    # Dense and half-zero; on a GPU also 2:4, and one copy of the experts that tokens are sent to.
    copies = 3.6 if on_gpu else 2
    widths = 4 * layer.input_size("hidden") + 4 * layer.input_size("intermediate")
    return int(copies * weights) + 4 * tokens * layer.top_k * widths


def _check_memory(config: SpeedConfig, layer: "MoELayer", device: "torch.device") -> None:
    import torch

    from hf_mlopt.planning.machine import available_memory

    on_gpu = device.type == "cuda"
    needed = _needed_bytes(layer, max(config.tokens), on_gpu)
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    if needed > available:
        raise InputError(
            f"model={config.model!r}: measuring one layer's experts takes {needed / 1e9:.1f} GB, and {device} has "
            f"{available / 1e9:.1f} GB available; use a machine with more, a smaller --dtype or fewer --tokens"
        )
