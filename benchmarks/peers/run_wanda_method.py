"""
The method of locuslab/wanda on unfused experts, in plain torch, written from huggingface.co/papers/2306.11695.

    python run_wanda_method.py MODEL_DIR TOKENS_FILE [--sparsity 0.5] [--pattern 2:4]

The stock way: the whole model and the states of all samples in memory, one sample at a time; per decoder layer a pass
with a forward hook on every linear layer that sums the squares of its inputs, a full stable sort of each row of
|W| * norm, and a second pass for the states of the next layer. Experts are one `nn.Linear` per matrix, each on the
tokens routed to it; without that step `nn.Linear` holds next to nothing of a fused model, see `linear_share`.

Prints one JSON line: seconds and peak memory of load and prune, zeros per expert matrix, `linear_share`, versions.
"""

import argparse
from pathlib import Path

import torch
from probe import Record, expert_sparsity
from shape import read_tokens, weight_bytes
from torch import nn
from transformers import AutoModelForCausalLM


class Expert(nn.Module):
    """One expert as three linear layers."""

    def __init__(self, gate_up_JH: torch.Tensor, down_HI: torch.Tensor, act_fn: nn.Module):
        super().__init__()
        gate_IH, up_IH = gate_up_JH.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate_IH), _linear(up_IH), _linear(down_HI)
        self.act_fn = act_fn

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_TH)) * self.up_proj(hidden_TH))


class Experts(nn.ModuleList):
    """Takes the place of the fused experts; every expert runs on the tokens routed to it."""

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK):
        output_TH = torch.zeros_like(hidden_TH)
        for index, expert in enumerate(self):
            token, slot = torch.where(top_k_index_TK == index)
            weighted = expert(hidden_TH[token]) * top_k_weights_TK[token, slot, None]
            output_TH.index_add_(0, token, weighted.to(output_TH.dtype))
        return output_TH


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A linear layer on the storage of `weight`, so that nothing is copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def unfuse(model: nn.Module) -> None:
    """Replaces the fused experts of every Mixtral layer by linear layers that view the same memory."""
    for layer in model.get_decoder().layers:
        fused = layer.mlp.experts
        pairs = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        layer.mlp.experts = Experts([Expert(gate_up, down, fused.act_fn) for gate_up, down in pairs])


def linear_share(model: nn.Module) -> float:
    """
    Share of the weights of all decoder layers that sits in `nn.Linear`: all that a pruner looks at which searches the
    layers for that class, as locuslab/wanda does. Fused experts are three-dimensional parameters of another module.
    """
    layers = model.get_decoder().layers
    total = sum(parameter.numel() for parameter in layers.parameters())
    return sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear)) / total


class _Seen(Exception):
    """Raised by the first decoder layer, to stop the forward pass there."""


def first_states(model: nn.Module, token_ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict]]:
    """Input and keyword arguments of the first decoder layer, one sample each."""
    states, keywords = [], []

    def keep(module, args, kwargs):
        states.append(args[0])
        keywords.append(kwargs)
        raise _Seen

    handle = model.get_decoder().layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for row in token_ids:
        try:
            model(row[None], use_cache=False)
        except _Seen:
            continue
    handle.remove()
    return states, keywords


def run_layer(layer: nn.Module, states: list[torch.Tensor], keywords: list[dict]) -> list[torch.Tensor]:
    return [layer(state, **kwargs) for state, kwargs in zip(states, keywords, strict=True)]


def prune_rows_(weight: torch.Tensor, squares: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """Zeroes the lowest |W| * norm of every row, or all but N of every M neighbours."""
    score = weight.abs() * squares.sqrt()
    if pattern:
        kept, group = pattern
        score = score.unflatten(1, (-1, group))
        pruned = score.sort(dim=-1, stable=True).indices[..., : group - kept]
    else:
        pruned = score.sort(dim=-1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, pruned, True)
    weight.masked_fill_(mask.view_as(weight), 0)


@torch.no_grad()
def prune(model: nn.Module, token_ids: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """Wanda on the experts of every decoder layer, in order; the outputs of the pruned layer go on."""
    states, keywords = first_states(model, token_ids)
    for layer in model.get_decoder().layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        squares = {name: torch.zeros(module.in_features) for name, module in linears.items()}

        def sum_squares(name, squares=squares):
            def hook(module, args, output):
                squares[name] += args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

            return hook

        handles = [module.register_forward_hook(sum_squares(name)) for name, module in linears.items()]
        run_layer(layer, states, keywords)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            if ".experts." in name:
                prune_rows_(module.weight, squares[name], sparsity, pattern)
        states = run_layer(layer, states, keywords)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default=None, help="N:M instead of --sparsity, such as 2:4.")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pattern = tuple(map(int, arguments.pattern.split(":"))) if arguments.pattern else None
    record = Record(
        tool="wanda method",
        method="wanda",
        pattern=arguments.pattern or f"{arguments.sparsity:g}",
        calibrated_on="routed tokens",
        threads=arguments.threads,
        batch_size=1,
        model_bytes=weight_bytes(arguments.model),
    )
    with record.catch():
        with record.phase("load"):
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
            record.facts["linear_share_fused"] = linear_share(model)
            unfuse(model)
            record.facts["linear_share_unfused"] = linear_share(model)
        with record.phase("prune"):
            prune(model, read_tokens(arguments.tokens), arguments.sparsity, pattern)
        record.stop()
        record.facts["sparsity_reached"] = expert_sparsity(model)
    print(record.close())


if __name__ == "__main__":
    main()
