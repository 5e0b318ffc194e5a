"""
Compression where FSDP has shared the weights out: gradients travel coded to the rank that owns their shard, which
averages them in float32. There is no way back to code, as what FSDP gathers are weights.
"""

import math
import time
import weakref

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_mlopt.communication.collectives import send_to_owners
from hf_mlopt.communication.config import CompressionConfig
from hf_mlopt.communication.ddp import compare_over_ranks, exempt_parameters
from hf_mlopt.communication.hook import Traffic
from hf_mlopt.communication.quantizers import Cast
from hf_mlopt.errors import ConfigurationError, InputError


_CODED: weakref.WeakSet = weakref.WeakSet()  # FSDP2 does not say whether a reduce-scatter is its own


def compress_sharded(
    model: torch.nn.Module, config: CompressionConfig | None = None, **settings
) -> "ShardedCompression":
    """
    Has the gradients of an FSDP model travel coded to the owners of their shards.

    ```python
    for layer in (*model.layers, model):
        fully_shard(layer)
    compression = compress_sharded(model, grad_codec="orq-9-optimal", error_feedback="classic")
    ```

    Error feedback adds 4 bytes a parameter **of the whole model** to every rank, as every rank has its own error in
    every gradient; without it nothing is kept. It counts once per exchange, so accumulate without synchronisation, and
    is in units of the gradient as FSDP hands it over, so that the scale of a loss (float16) must not change.

    Coded is a unit of FSDP at a time, from `min_bytes` on. With FSDP2 a unit whose parameters are all `exempt` travels
    in float32; FSDP1 hides which parameters are in a unit, and `exempt` does nothing there.

    Args:
        model (`torch.nn.Module`): As `fully_shard` (FSDP2) or `FullyShardedDataParallel` has wrapped it, before its
            first backward pass; in shards over all ranks of a one-dimensional mesh.
        config (`CompressionConfig`, *optional*): How; or give its fields as keywords.

    Returns:
        [`ShardedCompression`]: To save, to read traffic from.

    Raises:
        ConfigurationError: If the model is not in such shards, has this already, or an option does not fit.
        InputError: If the ranks were given different settings.
    """
    config = config or CompressionConfig(**settings)
    require_for_shards(config)
    if isinstance(model, FullyShardedDataParallel):
        return _compress_fsdp1(model, config)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        raise ConfigurationError(
            "model", type(model).__name__, "is not in FSDP's shards; compress codes the gradients of a DDP model"
        )
    return _compress_fsdp2(model, units, config)


class ShardedCompression:
    """What [`compress_sharded`] has set up. Its `state_dict` is that of this rank."""

    def __init__(self, model: torch.nn.Module, config: CompressionConfig, group):
        self.model, self.config, self.up, self.group = model, config, config.up, group
        self.traffic = Traffic()
        self.units: list[_Unit] = []
        self.first: _Unit | None = None  # that a backward pass comes to

    def take_traffic(self) -> Traffic:
        """What travelled since the last call; a step is an exchange of all units."""
        traffic, self.traffic = self.traffic, Traffic()
        return traffic

    def logs(self) -> dict[str, float]:
        """What travelled since the last call, as numbers for a log: bytes and seconds are those of a step."""
        world = dist.get_world_size(self.group)
        traffic = self.take_traffic()
        logs = traffic.logs(2 * (world - 1) / world)  # one way
        return {**logs, "grad_unsent": traffic.unsent} if self.config.has_feedback else logs

    def state_dict(self) -> dict:
        """Of this rank: how often each unit was exchanged, and what was not sent of it."""
        return {"units": [{"exchanges": unit.exchanges, "unsent": dict(unit.unsent)} for unit in self.units]}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Raises:
            InputError: If the model has another number of units.
        """
        if len(state_dict["units"]) != len(self.units):
            raise InputError(
                f"the checkpoint holds {len(state_dict['units'])} FSDP units, the model {len(self.units)}"
            )
        for unit, saved in zip(self.units, state_dict["units"], strict=True):
            unit.exchanges = saved["exchanges"]
            unit.unsent = {numel: value.clone() for numel, value in saved["unsent"].items()}

    def reset(self) -> None:
        """Forgets what was not sent."""
        for unit in self.units:
            unit.unsent = {}


class _Unit:
    """
    What FSDP exchanges at once. It is FSDP2's reduce-scatter, too.

    Args:
        owner (`ShardedCompression`): Codec and traffic.
        is_exempt (`bool`): Travels in float32.
        group (`ProcessGroup`, *optional*): The ranks, which FSDP1 does not say at every call.
    """

    def __init__(self, owner: ShardedCompression, is_exempt: bool, group=None):
        self.owner, self.is_exempt, self.group, self.index = owner, is_exempt, group, len(owner.units)
        self.exchanges = 0
        # By size, as FSDP2 leaves out parameters that a backward pass has not reached.
        self.unsent: dict[int, torch.Tensor] = {}
        owner.units.append(self)

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False) -> None:
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise ConfigurationError("set_gradient_divide_factor", str(op), "is not supported with coded gradients")
        self.reduce_scatter(input_tensor, output_tensor, group, is_mean=op == dist.ReduceOp.AVG)

    def reduce_scatter(self, gradient: torch.Tensor, shard: torch.Tensor, group, is_mean: bool) -> None:
        """
        Args:
            gradient (`torch.Tensor`): `[ranks * numel]`, of this rank, the shard of every rank in turn.
            shard (`torch.Tensor`): `[numel]`, written: this rank's shard of the mean, or of the sum.
            group (`ProcessGroup`): The ranks.
            is_mean (`bool`): Which.
        """
        start, owner, config = time.perf_counter(), self.owner, self.owner.config
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        is_plain = self.is_exempt or self.exchanges < config.warmup_steps_uncompressed
        is_plain = is_plain or 4 * gradient.numel() < config.min_bytes
        codec = Cast() if is_plain else owner.up
        flat = gradient.detach().float()
        if gradient.numel() in self.unsent:
            flat = flat + self.unsent[gradient.numel()].to(flat.device)
        payloads = [
            codec.encode(part, (config.seed, self.exchanges, self.index, 0, rank * world + owner_rank))
            for owner_rank, part in enumerate(flat.split(shard.numel()))
        ]
        messages = [codec.to_bytes(payload) for payload in payloads]
        received = send_to_owners(messages, codec.wire_bytes(shard.numel()), group)
        total = torch.zeros(shard.numel(), dtype=torch.float32, device=flat.device)
        for message in received:
            codec.decode(codec.from_bytes(message, shard.numel()), total, accumulate=True)
        shard.copy_(total.div_(world) if is_mean else total)
        if config.has_feedback and not is_plain:
            self._keep(flat, torch.cat([codec.decode(payload) for payload in payloads]))
        elif is_plain:
            self.unsent.pop(gradient.numel(), None)  # it has gone with the rest
        self.exchanges += 1
        owner.first = owner.first or self
        self._count(sum(map(len, messages)) - len(messages[rank]), flat.numel(), is_plain, start)

    def _keep(self, flat: torch.Tensor, sent: torch.Tensor) -> None:
        unsent = flat - sent
        error = float(unsent.square().sum())
        if math.isfinite(error):  # a gradient that is not finite stays out of later steps
            self.unsent[flat.numel()] = unsent
            self.owner.traffic.error += error
            self.owner.traffic.norm += float(flat.square().sum())

    def _count(self, bytes_sent: int, numel: int, is_plain: bool, start: float) -> None:
        traffic = self.owner.traffic
        traffic.bytes_sent += bytes_sent
        traffic.elements += numel
        traffic.coded += 0 if is_plain else numel
        traffic.buckets += 1
        traffic.plain_buckets += is_plain
        traffic.steps += self is self.owner.first
        traffic.seconds += time.perf_counter() - start


def _hook(unit: _Unit, gradient: torch.Tensor, shard: torch.Tensor) -> None:
    unit.reduce_scatter(gradient, shard, unit.group, is_mean=True)


def _compress_fsdp1(model: FullyShardedDataParallel, config: CompressionConfig) -> ShardedCompression:
    modules = FullyShardedDataParallel.fsdp_modules(model)
    for module in modules:
        if module.sharding_strategy.name == "NO_SHARD":
            raise ConfigurationError("sharding_strategy", "NO_SHARD", "has no shards; take DDP and compress")
    group = model.process_group
    compare_over_ranks(config, {}, group)
    compression = ShardedCompression(model, config, group)
    try:
        model.register_comm_hook(None, _hook)
    except AssertionError as error:  # a second one, or a hybrid strategy
        raise ConfigurationError("model", type(model).__name__, str(error)) from None
    for module in modules:  # FSDP has one state for all, and a hook is not told which unit it is called for
        module._comm_hook_state = _Unit(compression, is_exempt=False, group=group)
    return compression


def _compress_fsdp2(model: torch.nn.Module, modules: list, config: CompressionConfig) -> ShardedCompression:
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        remedy = "has no set_custom_reduce_scatter, through which gradients are coded; take a later torch, or FSDP1"
        raise ConfigurationError("torch", torch.__version__, remedy)
    if any(module in _CODED for module in modules):
        raise ConfigurationError("model", type(model).__name__, "has its gradients coded already")
    named = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    meshes = {parameter.device_mesh for parameter in named.values()}
    if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
        shown = sorted(str(mesh) for mesh in meshes)
        raise ConfigurationError("mesh", shown, "must be one, of one dimension: shards over all ranks, no replicas")
    group = next(iter(meshes)).get_group()
    compare_over_ranks(config, named, group)
    exempt = exempt_parameters(model, config.exempt)
    units = {name: module for name, module in model.named_modules() if module in set(modules)}
    held: dict[str, list[str]] = {name: [] for name in units}
    for name in named:  # held by the innermost unit
        holders = [unit for unit in units if not unit or name.startswith(f"{unit}.")]
        if holders:
            held[max(holders, key=len)].append(name)
    compression = ShardedCompression(model, config, group)
    for name, module in units.items():
        module.set_custom_reduce_scatter(_Unit(compression, is_exempt=exempt.issuperset(held[name])))
        _CODED.add(module)
    return compression


def require_for_shards(config: CompressionConfig) -> None:
    """
    Refuses what has nothing to act on under FSDP.

    Raises:
        ConfigurationError: For such a field.
    """
    if config.error_feedback == "step-ahead":
        raise ConfigurationError(
            "error_feedback", "step-ahead", "shifts all weights of a rank by what that rank has not sent, and under "
            "FSDP ranks gather the same weights from one another; take classic, or DDP"
        )  # fmt: skip
    refused = {
        "grad_codec_down": (config.grad_codec_down, None, "codes the way back, and FSDP sends weights back"),
        "error_average_period": (config.error_average_period, 0, "is there for step-ahead, which FSDP cannot have"),
        "collective": (config.collective, "auto", "is not a choice under FSDP, which keeps shards only"),
    }
    for name, (value, unset, reason) in refused.items():
        if value != unset:
            raise ConfigurationError(name, value, f"{reason}; leave it out")
