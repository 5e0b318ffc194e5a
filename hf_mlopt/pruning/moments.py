"""
Second moments of the expert inputs, as sums: they add over batches and ranks and know how many tokens each expert saw.
"""

# T tokens   K experts per token   S slots = T * K   E experts   D input features (hidden or intermediate)

import torch

from hf_mlopt.errors import InputError
from hf_mlopt.moe.layers import MoELayer
from hf_mlopt.moe.routed_tokens import RoutedTokens


# Slots of one expert per step when full second moments are summed; bounds the padded copy.
_SLOTS_PER_STEP = 2048
# Floats of one such step, 1 GB: the padded copy and the products of the experts taken together.
_OUTER_CHUNK = 1 << 28


class ExpertMoments:
    r"""
    Q_e[j] = Σ_t (g_{t,e}^γ · x_{t,j})² of every expert, for the inputs of both projections, from one forward pass.

    With `hessian` the full matrices Σ_t g_{t,e}^{2γ} x_t x_tᵀ take the place of their diagonal.

    Args:
        num_experts (`int`): Experts of the layer.
        sizes (`dict[str, int]`): Width of `"hidden"` and `"intermediate"`.
        gate_power (`float`): γ; 0 counts every routed token once.
        hessian (`bool`): Whether to keep full second moments.
        normalize_gate (`bool`): Whether to divide router weights by their sum over the experts of a token.
        output_norms (`bool`): Whether to sum router weight times norm of the expert's output, as
            [REAP](https://huggingface.co/papers/2510.13999) scores experts; needs `RoutedTokens.output_norm_S`.
        device: Where the sums live.
    """

    # `sums` holds: tokens [E], gate_mass [E], hidden and intermediate [E, D] or [E, D, D], if asked for
    # output_norm [E], and of all tokens of the layer without router weights: layer_tokens [], layer_hidden [D] or
    # [D, D].
    def __init__(
        self,
        num_experts,
        sizes,
        *,
        gate_power=0.0,
        hessian=False,
        normalize_gate=False,
        output_norms=False,
        device="cpu",
    ):
        self.num_experts, self.gate_power = num_experts, gate_power
        self.hessian, self.normalize_gate = hessian, normalize_gate
        # Diagonals are small and summed in float64; Hessians are large and summed in float32.
        dtype = torch.float32 if hessian else torch.float64
        shape = {source: (size, size) if hessian else (size,) for source, size in sizes.items()}
        self.sums = {
            "tokens": torch.zeros(num_experts, dtype=torch.int64, device=device),
            "gate_mass": torch.zeros(num_experts, dtype=torch.float64, device=device),
            "layer_tokens": torch.zeros((), dtype=torch.int64, device=device),
            "layer_hidden": torch.zeros(shape["hidden"], dtype=dtype, device=device),
            **{key: torch.zeros((num_experts, *shape[key]), dtype=dtype, device=device) for key in shape},
        }
        if output_norms:
            self.sums["output_norm"] = torch.zeros(num_experts, dtype=torch.float64, device=device)

    def update(self, _layer: MoELayer, routed: RoutedTokens) -> None:
        """Adds one forward pass; padding tokens count for nothing. Has the signature of an observer."""
        weight_TK = routed.topk_weight_TK.float()
        gate_S = routed.gate_S.float()
        if self.normalize_gate:
            total_T1 = weight_TK.sum(dim=-1, keepdim=True)
            gate_S, weight_TK = gate_S / total_T1[routed.token_S, 0], weight_TK / total_T1
        square_TK, square_S = weight_TK.pow(2 * self.gate_power), gate_S.pow(2 * self.gate_power)
        real_T = torch.ones(len(routed.hidden_TH), device=square_TK.device)
        if routed.token_mask_T is not None:
            real_T = routed.token_mask_T.to(square_TK)
            square_TK, square_S = square_TK * real_T[:, None], square_S * real_T[routed.token_S]

        self._count(routed, weight_TK, real_T)
        if "output_norm" in self.sums:
            self._add_output_norms(routed, gate_S, real_T)
        if self.hessian:
            hidden_SH = routed.hidden_TH[routed.token_S]
            add_grouped_outer(self.sums["hidden"], hidden_SH, routed.expert_S, square_S)
            add_grouped_outer(self.sums["intermediate"], routed.intermediate_SI, routed.expert_S, square_S)
            real_TH = routed.hidden_TH.float() * real_T[:, None]
            self.sums["layer_hidden"].addmm_(real_TH.T, real_TH)
            return
        # One matrix product gives Q of all experts and, in the last row, of the whole layer. Index E is the sentinel
        # that expert parallelism routes foreign tokens to.
        index_TK = routed.topk_index_TK.clamp(max=self.num_experts)
        gate_TE = torch.zeros(len(real_T), self.num_experts + 2, device=real_T.device)
        gate_TE.scatter_(1, index_TK, square_TK)
        gate_TE[:, -1] = real_T
        hidden_ED = gate_TE.T @ _squares(routed.hidden_TH)
        self.sums["hidden"] += hidden_ED[: self.num_experts]
        self.sums["layer_hidden"] += hidden_ED[-1]
        intermediate_SI = _squares(routed.intermediate_SI).mul_(square_S[:, None])
        self.sums["intermediate"] += sum_by_expert(intermediate_SI, routed.expert_S, self.num_experts)

    def _count(self, routed: RoutedTokens, weight_TK: torch.Tensor, real_T: torch.Tensor) -> None:
        index = routed.topk_index_TK.clamp(max=self.num_experts).flatten()
        real_S = real_T.double().repeat_interleave(weight_TK.shape[-1])
        counts = torch.zeros(2, self.num_experts + 1, dtype=torch.float64, device=index.device)
        counts[0].index_add_(0, index, real_S)
        counts[1].index_add_(0, index, weight_TK.flatten().double() * real_S)
        self.sums["tokens"] += counts[0, :-1].long()
        self.sums["gate_mass"] += counts[1, :-1]
        self.sums["layer_tokens"] += real_T.sum().long()

    def _add_output_norms(self, routed: RoutedTokens, gate_S: torch.Tensor, real_T: torch.Tensor) -> None:
        assert routed.output_norm_S is not None, "observe with output_norms=True"
        value_S = gate_S.double() * routed.output_norm_S * real_T[routed.token_S]
        # A token meets an expert once: each value has a place of its own, and the sum has one order on every device.
        value_TE = torch.zeros(len(real_T), self.num_experts + 1, dtype=torch.float64, device=value_S.device)
        value_TE[routed.token_S, routed.expert_S.clamp(max=self.num_experts)] = value_S
        self.sums["output_norm"] += value_TE[:, :-1].sum(dim=0)

    def keep_(self, experts: list[int]) -> "ExpertMoments":
        """Forgets all experts but the given ones, which are numbered anew in the order given; in place."""
        self.num_experts = len(experts)
        for key in [key for key in self.sums if not key.startswith("layer_")]:
            self.sums[key] = self.sums[key][experts]  # one at a time: the old sums of a Hessian are large
        return self

    def merge(self, other: "ExpertMoments") -> "ExpertMoments":
        """Adds the sums of another batch or rank."""
        for key, value in other.sums.items():
            self.sums[key] += value.to(self.sums[key].device)
        return self

    def check_finite(self, layer: MoELayer) -> None:
        """Raises `InputError` naming layer, tensor and expert where an activation was not finite."""
        for source in ("hidden", "intermediate", "output_norm"):
            if source not in self.sums:
                continue
            sums = self.sums[source].reshape(self.num_experts, -1).sum(dim=1)
            if not bool(torch.isfinite(sums).all()):
                expert, what = int((~torch.isfinite(sums)).nonzero()[0]), source.partition("_")[0]
                raise InputError(
                    f"{layer.name}: the {what} activations of expert {expert} hold NaN or Inf on the calibration "
                    "data; check the checkpoint and its dtype."
                )


def sum_by_expert(value_SD: torch.Tensor, expert_S: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Sums rows per expert, `[slots, D]` to `[experts, D]`; rows with index `num_experts` or above are dropped."""
    expert_S = expert_S.clamp(max=num_experts)
    if value_SD.device.type == "cpu":
        total_ED = torch.zeros(num_experts + 1, value_SD.shape[1])
        return total_ED.index_add_(0, expert_S, value_SD)[:-1]
    # index_add_ is not deterministic on an accelerator; a product with the one-hot matrix is.
    one_hot_SE = torch.zeros(len(expert_S), num_experts + 1, device=value_SD.device).scatter_(
        1, expert_S[:, None], 1.0
    )
    return (one_hot_SE.T @ value_SD)[:-1]


def _squares(value: torch.Tensor) -> torch.Tensor:
    single = value.float()
    return single.square() if single is value else single.square_()


def add_grouped_outer(total_EDD, value_SD: torch.Tensor, expert_S: torch.Tensor, square_S: torch.Tensor) -> None:
    """Adds Σ_s square_s · v_s v_sᵀ over the rows of each expert to `total_EDD`, many experts in one product."""
    num_experts, width = total_EDD.shape[:2]
    order_S = torch.argsort(expert_S, stable=True)
    counts_E = torch.bincount(expert_S.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]
    starts_E = counts_E.cumsum(0) - counts_E
    busiest = int(counts_E.max())
    at_once = max(1, _OUTER_CHUNK // (width * (width + min(busiest, _SLOTS_PER_STEP))))
    for first in range(0, busiest, _SLOTS_PER_STEP):
        place_C = torch.arange(first, min(first + _SLOTS_PER_STEP, busiest), device=expert_S.device)
        # Experts that have slots left: a busy one does not make the others pay for its padding.
        for active_A in (counts_E > first).nonzero().flatten().split(at_once):
            inside_AC = place_C[None] < counts_E[active_A, None]
            slot_AC = order_S[(starts_E[active_A, None] + place_C[None]).clamp(max=len(order_S) - 1)]
            scale_AC = square_S[slot_AC].sqrt() * inside_AC
            value_ACD = value_SD[slot_AC].float().mul_(scale_AC[..., None])
            total_EDD.index_add_(0, active_A, value_ACD.transpose(1, 2) @ value_ACD)
