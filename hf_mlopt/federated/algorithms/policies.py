"""Policies that draw hyper-parameters. Functions of their parameters, so that log π can be taken again later."""

import math
from collections.abc import Sequence

import torch

from hf_mlopt.federated.algorithms.message import Group


# d dimensions of a draw. Everything is float64: a policy is small, and must be the same everywhere.
STD_FLOOR = 1e-3
Parameters = dict[str, torch.Tensor]


class GaussianPolicy:
    """
    `z ~ N(μ, diag(σ²))` with learned μ and log σ.

    Args:
        num_dimensions (`int`): d.
        mean_bound (`float`): μ is held in ± this.
        std (`float`): σ at the beginning.
    """

    name = "gaussian"
    is_discrete = False
    lr_scale = 1.0  # times hyper_lr, by which Adam moves every parameter in a round

    def __init__(self, num_dimensions: int, mean_bound: float, std: float):
        self.num_dimensions, self.mean_bound, self.std = num_dimensions, mean_bound, std

    def parameters(self, generator: torch.Generator) -> Parameters:
        """What is learned, at the beginning."""
        zeros = torch.zeros(self.num_dimensions, dtype=torch.float64)
        return {"mean": zeros, "log_std": torch.full_like(zeros, math.log(self.std))}

    def state(self) -> Parameters:
        """What the policy further depends on and is not learned, at the beginning."""
        return {}

    def distribution(self, parameters: Group, state: Group) -> torch.distributions.Distribution:
        """π in one round, `[d]`."""
        normal = torch.distributions.Normal(parameters["mean"], parameters["log_std"].exp())
        return torch.distributions.Independent(normal, 1)

    def sample(self, parameters: Group, state: Group, generator: torch.Generator) -> torch.Tensor:
        """A draw, `[d]`."""
        noise = torch.randn(self.num_dimensions, dtype=torch.float64, generator=generator)
        return parameters["mean"] + parameters["log_std"].exp() * noise

    def log_prob(self, parameters: Group, state: Group, z: torch.Tensor) -> torch.Tensor:
        """log π(z), a number with gradients to the parameters."""
        return self.distribution(parameters, state).log_prob(z)

    def next_state(self, parameters: Group, state: Group) -> Parameters:
        """The state of the round after."""
        return {}

    def project(self, parameters: Group) -> Parameters:
        """The nearest parameters that are allowed; an update is followed by it."""
        return {
            "mean": parameters["mean"].clamp(-self.mean_bound, self.mean_bound),
            "log_std": parameters["log_std"].clamp(min=math.log(STD_FLOOR)),
        }


class CholeskyPolicy(GaussianPolicy):
    """
    `z ~ N(μ, L Lᵀ)` with `L = diag(σ) (I + A / √d)`, A strictly lower triangular; log σ and A are learned, so the
    covariance stays positive definite. Without √d the many entries of A, each moved by Adam, would swell it.
    """

    name = "cholesky"

    def parameters(self, generator: torch.Generator) -> Parameters:
        mean = torch.zeros(self.num_dimensions, dtype=torch.float64)
        return {"mean": mean, "factor": torch.diag(torch.full_like(mean, math.log(self.std)))}

    def distribution(self, parameters: Group, state: Group) -> torch.distributions.Distribution:
        return torch.distributions.MultivariateNormal(parameters["mean"], scale_tril=_lower(parameters["factor"]))

    def sample(self, parameters: Group, state: Group, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(self.num_dimensions, dtype=torch.float64, generator=generator)
        return parameters["mean"] + _lower(parameters["factor"]) @ noise

    def project(self, parameters: Group) -> Parameters:
        factor = parameters["factor"].tril()
        diagonal = factor.diagonal().clamp(min=math.log(STD_FLOOR))
        mean = parameters["mean"].clamp(-self.mean_bound, self.mean_bound)
        return {"mean": mean, "factor": factor.tril(-1) + torch.diag(diagonal)}


class MLPPolicy(GaussianPolicy):
    """
    μ and log σ are what a network makes of those of the round before, and the network is learned: through the last
    application only, not through all rounds. The paper's CS-MLP takes the output for a step to add, bounded by 1/100;
    that has no rest, and in 200 rounds on a landscape of 11 dimensions it learned next to nothing.
    """

    name = "mlp"
    hidden = 64
    lr_scale = 0.03  # all weights move the output at once

    def parameters(self, generator: torch.Generator) -> Parameters:
        sizes, parameters = [2 * self.num_dimensions, self.hidden, self.hidden, 2 * self.num_dimensions], {}
        for layer, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
            bound = before**-0.5 if layer < 2 else 0.0  # as torch.nn.Linear; the output begins at rest
            uniform = torch.rand(after, before + 1, dtype=torch.float64, generator=generator) * 2 - 1
            parameters[f"weight{layer}"], parameters[f"bias{layer}"] = bound * uniform[:, 1:], bound * uniform[:, 0]
        return parameters

    def state(self) -> Parameters:
        return super().parameters(torch.Generator())

    def distribution(self, parameters: Group, state: Group) -> torch.distributions.Distribution:
        return super().distribution(self.next_state(parameters, state), {})

    def sample(self, parameters: Group, state: Group, generator: torch.Generator) -> torch.Tensor:
        return super().sample(self.next_state(parameters, state), {}, generator)

    def next_state(self, parameters: Group, state: Group) -> Parameters:
        hidden = torch.cat([state["mean"], state["log_std"]])
        for layer in range(3):
            hidden = parameters[f"weight{layer}"] @ (hidden if layer == 0 else hidden.relu())
            hidden = hidden + parameters[f"bias{layer}"]
        mean, log_std = hidden.chunk(2)
        return super().project({"mean": mean, "log_std": math.log(self.std) + log_std})

    def project(self, parameters: Group) -> Parameters:
        return dict(parameters)


class CategoricalPolicy:
    """
    A head of its own for every dimension; a table over all of them would have 10⁸ cells for 8 sites.

    Args:
        num_levels (`Sequence[int]`): Of each dimension.
    """

    name = "categorical"
    is_discrete = True
    lr_scale = 10.0  # a level is certain when its logit is some 5 ahead; a mean has 1 to go

    def __init__(self, num_levels: Sequence[int]):
        self.num_levels = list(num_levels)

    def parameters(self, generator: torch.Generator) -> Parameters:
        """Logits, all 0."""
        return {f"logits{i}": torch.zeros(n, dtype=torch.float64) for i, n in enumerate(self.num_levels)}

    def state(self) -> Parameters:
        """Nothing."""
        return {}

    def sample(self, parameters: Group, state: Group, generator: torch.Generator) -> torch.Tensor:
        """`[d]`, indices as float64."""
        heads = (torch.softmax(parameters[f"logits{i}"], dim=0) for i in range(len(self.num_levels)))
        draws = [torch.multinomial(head, 1, generator=generator) for head in heads]
        return torch.cat(draws).double()

    def log_prob(self, parameters: Group, state: Group, z: torch.Tensor) -> torch.Tensor:
        """log π(z), a number with gradients to the parameters."""
        indices = z.long().tolist()
        heads = (torch.log_softmax(parameters[f"logits{i}"], dim=0)[index] for i, index in enumerate(indices))
        return torch.stack(list(heads)).sum()

    def next_state(self, parameters: Group, state: Group) -> Parameters:
        """Nothing."""
        return {}

    def project(self, parameters: Group) -> Parameters:
        """Every parameter is allowed."""
        return dict(parameters)


Policy = GaussianPolicy | CategoricalPolicy
POLICIES = ("gaussian", "cholesky", "mlp", "categorical")


def build_policy(name: str, num_levels: Sequence[int], mean_bound: float, std: float) -> Policy:
    """The policy of a name in `POLICIES`, for dimensions with so many levels (only `categorical` counts them)."""
    if name == "categorical":
        return CategoricalPolicy(num_levels)
    classes = {policy.name: policy for policy in (GaussianPolicy, CholeskyPolicy, MLPPolicy)}
    return classes[name](len(num_levels), mean_bound, std)


def _lower(factor: torch.Tensor) -> torch.Tensor:
    std = factor.diagonal().exp()
    return std[:, None] * (factor.tril(-1) / len(std) ** 0.5 + torch.eye(len(std), dtype=std.dtype))
