"""Replicas of a whole pipeline: the same block of all of them averages its gradients before every update."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from hf_mlopt.communication import CompressionConfig
from hf_mlopt.communication.collectives import all_gather_mean, two_phase_mean


class ReplicaMean:
    """
    Averages the gradients of a block over its replicas, in float32 or coded; called when a group is complete.

    Args:
        block (`nn.Module`): Of this rank.
        group (`ProcessGroup`): The ranks that hold the same block.
        is_sum (`bool`): Add instead: the loss has been divided by the number of items of all replicas.
        compression ([`CompressionConfig`], *optional*): How gradients travel; `error_feedback` `none` or `classic`.
        exempt (`Collection[str]`, *optional*): Names of parameters that travel in float32 all the same.
    """

    def __init__(
        self,
        block: nn.Module,
        group,
        is_sum: bool,
        compression: CompressionConfig | None = None,
        exempt: Collection[str] = (),
    ):
        self.group, self.world = group, dist.get_world_size(group)
        self.factor = float(self.world) if is_sum else 1.0
        self.compression = compression
        trained = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
        is_coded = {name: compression is not None and name not in exempt for name in trained}
        if (
            compression is not None
            and 4 * sum(trained[n].numel() for n in trained if is_coded[n]) < compression.min_bytes
        ):
            is_coded = dict.fromkeys(trained, False)
        self.coded = [parameter for name, parameter in trained.items() if is_coded[name]]
        self.plain = [parameter for name, parameter in trained.items() if not is_coded[name]]
        self.steps = self.bytes_sent = 0
        self.unsent: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        warms_up = self.compression is None or self.steps < self.compression.warmup_steps_uncompressed
        for parameters, mean in ((self.plain, self._plain), (self.coded, self._plain if warms_up else self._coded)):
            if not parameters:
                continue
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = mean(torch.cat([gradient.flatten().float() for gradient in grads])).mul_(self.factor)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        self.steps += 1

    def _plain(self, flat: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(flat, group=self.group)
        self.bytes_sent += round(2 * (self.world - 1) / self.world * 4 * flat.numel())
        return flat.div_(self.world)

    def _coded(self, flat: torch.Tensor) -> torch.Tensor:
        config, keeps = self.compression, self.compression.has_feedback
        if keeps and self.unsent is not None:
            flat.add_(self.unsent)

        def key(phase: int, rank: int) -> tuple[int, ...]:
            return (config.seed, self.steps, 0, phase, rank)

        if self.world == 2:
            result = all_gather_mean(flat, config.up, key, self.group, keeps)
        else:
            result = two_phase_mean(flat, config.up, config.down, key, self.group, keeps)
        if keeps:
            self.unsent = flat - result.sent
        self.bytes_sent += result.bytes_sent
        return result.mean

    def state_dict(self) -> dict:
        """What this replica has not sent."""
        return {"steps": self.steps, "unsent": self.unsent}

    def load_state_dict(self, state_dict: dict) -> None:
        unsent = state_dict["unsent"]
        self.steps = state_dict["steps"]
        self.unsent = None if unsent is None else unsent.to(self.coded[0].device)
