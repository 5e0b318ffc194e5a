r"""
The load-balancing loss of a mixture of experts whose layers lie in several blocks.

Eq. (4) to (6) of [Switch Transformers](https://huggingface.co/papers/2101.03961), as transformers computes it: with
f_e the share of assignments to expert e and P_e its mean router probability, both over the rows of *all* layers,
`E * sum_e f_e P_e`. A product of means over layers is no sum over layers, so blocks hand on sums.
"""

# T tokens   E experts   K experts per token

from dataclasses import dataclass

import torch


Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AuxLoss:
    """
    What one block does for the loss.

    Args:
        mode (`str`): `"exact"` carries counts_E, probabilities_E and the number of rows, `[1]`, to the last block,
            whose loss is the model's; `"block"` carries the sum over blocks of each block's own loss, `[1]`, weighted
            by the block's share of the routed layers.
        coefficient (`float`): `router_aux_loss_coef`.
        num_experts, top_k (`int`): E, K.
        num_layers, num_layers_of_model (`int`): Routed layers of this block, and of all.
    """

    mode: str
    coefficient: float
    num_experts: int
    top_k: int
    num_layers: int
    num_layers_of_model: int

    @property
    def num_tensors(self) -> int:
        """Tensors that go to the next block."""
        return 3 if self.mode == "exact" else 1

    def add(
        self,
        before: Tensors,
        router_logits: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None,
        device: torch.device,
    ) -> Tensors:
        """
        Adds the layers of this block to what came from the blocks before; gradients flow through probabilities.

        Args:
            before (`tuple[torch.Tensor]`): What came; empty at the first block.
            router_logits (`tuple[torch.Tensor]`): Of every routed layer, `[T, E]`.
            attention_mask (`torch.Tensor`, *optional*): `[batch, sequence]`; rows of padding do not count.
            device (`torch.device`): Where an empty sum is made.

        Returns:
            `tuple[torch.Tensor]`: Float32, in the order of `mode`.
        """
        if self.mode == "exact":
            return self._sums(before or self._empty(device), router_logits, attention_mask)
        loss = before[0] if before else torch.zeros(1, device=device)
        if not router_logits:
            return (loss,)
        own = self._loss(self._sums(self._empty(device), router_logits, attention_mask))
        return (loss + self.num_layers / self.num_layers_of_model * own,)

    def total(self, carried: Tensors) -> torch.Tensor:
        """The scalar to add to the loss in the last block, with its coefficient."""
        return self.coefficient * (self._loss(carried) if self.mode == "exact" else carried[0].squeeze())

    def _empty(self, device: torch.device) -> Tensors:
        return tuple(torch.zeros(size, device=device) for size in (self.num_experts, self.num_experts, 1))

    def _sums(self, sums: Tensors, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> Tensors:
        counts_E, probabilities_E, rows = sums
        for logits_TE in router_logits:
            probability_TE = torch.softmax(logits_TE, dim=-1)
            index_TK = torch.topk(probability_TE, self.top_k, dim=-1).indices
            weight_T = (
                torch.ones(len(logits_TE), device=logits_TE.device) if mask is None else mask.reshape(-1).float()
            )
            assigned = weight_T.repeat_interleave(self.top_k)
            counts_E = counts_E + torch.zeros_like(counts_E).scatter_add_(0, index_TK.reshape(-1), assigned)
            probabilities_E = probabilities_E + (probability_TE.float() * weight_T[:, None]).sum(dim=0)
            rows = rows + weight_T.sum()
        return counts_E.detach(), probabilities_E, rows.detach()

    def _loss(self, sums: Tensors) -> torch.Tensor:
        counts_E, probabilities_E, rows = sums
        return self.num_experts * torch.sum(counts_E / rows * (probabilities_E / rows))
