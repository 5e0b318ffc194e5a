"""What all ranks agree on before a pipeline starts: where the model is cut, and who is how stale."""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from hf_mlopt import ranks
from hf_mlopt.errors import InputError
from hf_mlopt.pipeline.arguments import PipelineTrainingArguments
from hf_mlopt.pipeline.config import PipelineConfig
from hf_mlopt.pipeline.partition import balance, layer_costs
from hf_mlopt.pipeline.schedule import SYNCHRONOUS, choose, parse


logger = logging.get_logger(__name__)

FILE_NAME = "pipeline.json"  # in every checkpoint
_PINGS = 20


@dataclass
class Assembly:
    """
    Args:
        bounds (`list[int]`): Number of the first layer of every block, and the number of layers.
        mode (`str`): A vector as [`~hf_mlopt.pipeline.parse`] takes it, or `gpipe` or `1f1b`.
    """

    bounds: list[int]
    mode: str

    def to_dict(self) -> dict:
        return asdict(self)


def assemble(model: nn.Module, config: PipelineConfig, bounds: list[int] | None, batch_shape) -> Assembly:
    """
    Measures what is not given: the first rank times the layers, and the first two time the link between them.

    Args:
        model (`PreTrainedModel`): In the mode and precision that is to be trained; the same on all ranks.
        config ([`PipelineConfig`]): Its mode may be `auto`.
        bounds (`list[int]`, *optional*): Where to cut; by default balanced by the measured times.
        batch_shape (`Sequence[int]`, *optional*): Of the batches that are measured with.

    Returns:
        [`Assembly`]: The same on all ranks.

    Raises:
        ConfigurationError: If there are more stages than layers.
    """
    stages = config.stages
    found, is_auto = None, config.mode == "auto"
    links = _time_links() if is_auto and stages > 1 else (0.0, 0.0)
    if ranks.rank() == 0:
        costs = layer_costs(model, batch_shape) if bounds is None or is_auto else None
        cut = bounds or balance(costs, stages, recompute=config.recompute != "no")
        mode = _chosen(costs, cut, config, links) if is_auto else _vector(config)
        found = Assembly(list(cut), mode)
    if ranks.world_size() > 1:
        shared = [found]
        dist.broadcast_object_list(shared, src=0)
        found = shared[0]
    return found


def _vector(config: PipelineConfig) -> str:
    return config.mode if config.mode in SYNCHRONOUS else parse(config.mode, config.stages).text


def _chosen(costs: list, bounds: list[int], config: PipelineConfig, links: tuple[float, float]) -> str:
    """The least staleness without a bubble, at what was measured."""
    per_block = [costs[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
    forward = [sum(f for f, _ in block) for block in per_block]
    backward = [sum(b for _, b in block) for block in per_block]
    recompute = [0.0 if config.recompute == "no" or k == len(bounds) - 2 else f for k, f in enumerate(forward)]
    schedule = choose(forward, backward, recompute, *links)
    times = ", ".join(f"{1e3 * (f + b + r):.3g}" for f, b, r in zip(forward, backward, recompute, strict=True))
    logger.info(f"stages take {times} ms a batch, a message {1e3 * links[0]:.3g} ms: {schedule.text}")
    return schedule.text


def _time_links() -> tuple[float, float]:
    """Seconds one way between the first two ranks, and by how much the slowest of some messages was later."""
    rank, seconds = dist.get_rank(), []
    ping = torch.zeros(1)
    if dist.get_backend() == "nccl":
        ping = ping.cuda()
    for _ in range(_PINGS):
        start = time.perf_counter()
        if rank == 0:
            dist.send(ping, dst=1)
            dist.recv(ping, src=1)
        elif rank == 1:
            dist.recv(ping, src=0)
            dist.send(ping, dst=0)
        seconds.append((time.perf_counter() - start) / 2)
    one_way = statistics.median(seconds[1:])
    return one_way, statistics.quantiles(seconds[1:], n=10)[-1] - one_way


def batch_shape_of(dataset, args, model) -> tuple[int, ...] | None:
    """Of a batch of the training set, as far as its first row tells."""
    if dataset is None:
        return None
    row = dataset[0].get(model.main_input_name)
    return None if row is None else (args.per_device_train_batch_size, *torch.as_tensor(row).shape)


def read_assembly(checkpoint: str, args: PipelineTrainingArguments) -> Assembly:
    """
    What a checkpoint was written with.

    Args:
        checkpoint (`str`): Folder of a training checkpoint.
        args ([`PipelineTrainingArguments`]): What is asked for now.

    Raises:
        InputError: If there is none, or the arguments say otherwise.
    """
    path = Path(checkpoint) / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"resume_from_checkpoint={checkpoint!r}: holds no {FILE_NAME}; it was not written by a pipeline"
        )
    found = Assembly(**json.loads(path.read_text(encoding="utf-8")))
    given = {"stages": (args.stages, len(found.bounds) - 1)}
    if args.pipeline_bounds is not None:
        given["pipeline_bounds"] = (args.pipeline_bounds, found.bounds)
    if args.pipeline != "auto":
        mode = args.pipeline if args.pipeline in SYNCHRONOUS else parse(args.pipeline, args.stages).text
        given["pipeline"] = (mode, found.mode)
    for name, (own, written) in given.items():
        if own != written:
            raise InputError(f"{name}={own!r}: the checkpoint was written with {written!r}; use the same")
    return found
