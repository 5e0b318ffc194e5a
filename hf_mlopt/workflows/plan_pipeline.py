"""`hf-mlopt plan-pipeline`: where a model would be cut, and what every mode would take, from a measurement."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_mlopt.errors import ConfigurationError
from hf_mlopt.hub import resolve_checkpoint
from hf_mlopt.planning.machine import available_memory
from hf_mlopt.workflows.train_model import check_model_type, load_config


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class PipelinePlanRecipe:
    """
    What is planned. The layers are measured with random weights on this machine; only `config.json` is read.

    Args:
        model (`str`, *optional*): Local directory or Hub id.
        task (`str`, *optional*, defaults to `"causal-lm"`): `causal-lm` or `image-classification`.
        model_type (`str`, *optional*): Architecture of transformers instead of a model.
        model_config (`dict`, *optional*): Fields of its configuration that differ from the defaults.
        stages (`int`, *optional*, defaults to 2): Processes of a pipeline.
        batch_size (`int`, *optional*, defaults to 4): Rows of a batch.
        sequence_length (`int`, *optional*, defaults to 128): Tokens of a row.
        image_size (`int`, *optional*): Pixels on a side; by default what the configuration says.
        latency (`float`, *optional*, defaults to 0.0): Milliseconds from a stage to its neighbour.
        jitter (`float`, *optional*, defaults to 0.0): Milliseconds by which a step may be late.
        batches_per_update (`int`, *optional*, defaults to 8): Between two flushes of GPipe and 1F1B.
        optimizer_states (`float`, *optional*, defaults to 2.0): Numbers an optimizer keeps for each weight: 0 for SGD,
            1 with momentum, 2 for Adam.
        device (`str`, *optional*): What is measured on; by default a GPU if there is one.
    """

    model: str | None = None
    task: Literal["causal-lm", "image-classification"] = "causal-lm"
    model_type: str | None = None
    model_config: dict[str, Any] | None = None
    stages: int = 2
    batch_size: int = 4
    sequence_length: int = 128
    image_size: int | None = None
    latency: float = 0.0
    jitter: float = 0.0
    batches_per_update: int = 8
    optimizer_states: float = 2.0
    device: str | None = None

    def __post_init__(self):
        for name in ("stages", "batch_size", "sequence_length", "batches_per_update"):
            if getattr(self, name) < 1:
                raise ConfigurationError(name, getattr(self, name), "must be at least 1")
        for name in ("latency", "jitter", "optimizer_states"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(name, getattr(self, name), "must be at least 0")
        if (self.model is None) == (self.model_type is None):
            raise ConfigurationError("model", self.model, "name a model, or a model_type")
        if self.model_type is not None:
            check_model_type(self.task, self.model_type)


@dataclass(frozen=True)
class PipelinePlan:
    """
    Args:
        name (`str`): Of the model, with its number of parameters.
        device (`str`): What was measured on.
        bounds (`list[int]`): Number of the first layer of every block, and the number of layers.
        times (`list[tuple[float, float]]`): Seconds of forward and backward of every block.
        rows (`list[dict]`): Of every mode: `mode`, `recompute`, `in_flight` (batches, by stage), `seconds` (a batch),
            `memory` (bytes, by stage).
    """

    name: str
    device: str
    bounds: list[int]
    times: list[tuple[float, float]]
    rows: list[dict]


def plan_pipeline(recipe: PipelinePlanRecipe) -> PipelinePlan:
    """
    Measures the layers of a model and models every mode.

    Args:
        recipe ([`PipelinePlanRecipe`]): What is planned.

    Raises:
        InputError: If the model is unknown, cannot be cut, or does not fit.
    """
    import torch

    from hf_mlopt.pipeline import balance, choose, layer_costs, split
    from hf_mlopt.pipeline.partition import num_layers

    device = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _build(recipe, device)
    layers = num_layers(model)
    if recipe.stages > layers:
        raise ConfigurationError("stages", recipe.stages, f"the model has {layers} layers: take at most as many")
    shape = _batch_shape(recipe, model.config)
    costs = layer_costs(model, shape)
    bounds = balance(costs, recipe.stages, recompute=True)
    times = [tuple(map(sum, zip(*costs[a:b], strict=True))) for a, b in zip(bounds, bounds[1:], strict=False)]
    forward, backward = map(list, zip(*times, strict=True))
    seconds = [recipe.latency / 1e3, recipe.jitter / 1e3]
    schedules = {
        repeats: choose(forward, backward, forward if repeats else [0.0] * recipe.stages, *seconds)
        for repeats in (True, False)
    }
    sizes = _sizes(split(model, bounds), shape, model)
    asked = [("bp", False), ("gpipe", False), ("1f1b", False), ("fr", True), ("lag1", True), ("lag1", False)]
    asked += [("dsp", True), ("dsp", False), ("auto", True), ("auto", False)]
    rows = [
        _row(recipe, mode, schedules[repeats] if mode == "auto" else mode, repeats, times, sizes)
        for mode, repeats in asked
    ]
    name = f"{recipe.model or recipe.model_type}, {model.num_parameters():,} parameters"
    return PipelinePlan(name, device.type, bounds, times, rows)


def _build(recipe: PipelinePlanRecipe, device: "torch.device") -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    config = load_config(recipe, resolve_checkpoint(recipe.model) if recipe.model else None)
    auto = AutoModelForCausalLM if recipe.task == "causal-lm" else AutoModelForImageClassification
    with torch.device("meta"):
        needed = 12 * auto.from_config(config).num_parameters()  # weights, gradients, and what a layer takes
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()
    if room is not None and needed > room:
        remedy = (
            f"takes about {needed / 1e9:.1f} GB to measure, {room / 1e9:.1f} GB are free; plan fewer of its layers "
        )
        remedy += "(--model-type and --model-config)"
        raise ConfigurationError("model", recipe.model or recipe.model_type, remedy)
    torch.manual_seed(0)
    return auto.from_config(config).to(device).train()


def _batch_shape(recipe: PipelinePlanRecipe, config) -> tuple[int, ...]:
    if recipe.task == "causal-lm":
        return recipe.batch_size, recipe.sequence_length
    size = recipe.image_size or getattr(config, "image_size", 224)
    return recipe.batch_size, config.num_channels, size, size


def _sizes(blocks: list, shape: tuple[int, ...], model) -> list[dict[str, float]]:
    """Bytes of every block: weights, what it is sent, and the graph of a batch."""
    import torch

    from hf_mlopt.pipeline.adapters import adapter_of

    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in adapter_of(model).random_batch(shape).items()}
    boundary, sizes = (), []
    for block in blocks:
        leaves = tuple(x.detach().requires_grad_() for x in boundary)
        known = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor, known=known, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = block(leaves, batch)
        sizes.append(
            {
                "weights": sum(parameter.nbytes for parameter in block.parameters()),
                "boundary_in": sum(x.nbytes for x in boundary),
                "boundary_out": 0 if block.is_last else sum(x.nbytes for x in outputs),
                "graph": sum(kept.values()),
            }
        )
        boundary = outputs
    return sizes


def _row(recipe: PipelinePlanRecipe, name: str, mode, repeats: bool, times: list, sizes: list[dict]) -> dict:
    from hf_mlopt.pipeline import parse, time_per_batch
    from hf_mlopt.pipeline.event_model import memory
    from hf_mlopt.pipeline.schedule import SYNCHRONOUS

    forward, backward = map(list, zip(*times, strict=True))
    per_batch = time_per_batch(
        mode, forward, backward, recompute=forward if repeats else None, latency=recipe.latency / 1e3,
        micro_batches=recipe.batches_per_update, num_batches=512,
    )  # fmt: skip
    if mode in SYNCHRONOUS:
        most = recipe.batches_per_update
        in_flight = [most if mode == "gpipe" else min(most, recipe.stages - k) for k in range(recipe.stages)]
    else:
        schedule = parse(mode, recipe.stages) if isinstance(mode, str) else mode
        in_flight = [m + 1 for m in schedule.m]
    used = [
        memory(
            mode, k, stages=recipe.stages, **of, optimizer_factor=recipe.optimizer_states, recompute=repeats,
            micro_batches=recipe.batches_per_update,
        )
        for k, of in enumerate(sizes)
    ]  # fmt: skip
    return {"mode": name, "recompute": repeats, "in_flight": in_flight, "seconds": per_batch, "memory": used}
