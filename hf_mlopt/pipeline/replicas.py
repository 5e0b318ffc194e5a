"""Replicas of a whole pipeline: the same block of all of them averages its gradients before every update."""

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
    """

    def __init__(self, block: nn.Module, group, is_sum: bool, compression: CompressionConfig | None = None):
        self.group, self.world = group, dist.get_world_size(group)
        self.parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self.factor = float(self.world) if is_sum else 1.0
        self.compression = compression
        self.steps = self.bytes_sent = 0
        self.unsent: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.flatten().float() for gradient in grads])
        if self.compression is None or self.steps < self.compression.warmup_steps_uncompressed:
            dist.all_reduce(flat, group=self.group)
            flat.div_(self.world)
            self.bytes_sent += round(2 * (self.world - 1) / self.world * 4 * flat.numel())
        else:
            flat = self._coded(flat)
        flat.mul_(self.factor)
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        self.steps += 1

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
        device = self.parameters[0].device
        self.steps, self.unsent = state_dict["steps"], None if unsent is None else unsent.to(device)
