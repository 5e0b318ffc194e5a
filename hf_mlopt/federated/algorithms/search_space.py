"""The hyper-parameters Auto-FedRL searches: their ranges, and what a draw of the policy stands for."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from hf_mlopt.federated.algorithms.server import require


Range = tuple[float, float] | None


@dataclass(frozen=True)
class HyperParameters:
    """
    What holds in one round; `None` for what is not searched.

    Args:
        learning_rate (`float`, *optional*): Of the sites.
        local_epochs (`int`, *optional*): Of the sites.
        local_steps (`int`, *optional*): Of the sites.
        server_lr (`float`, *optional*): Factor of the server's step.
        shares (`dict[str, float]`, *optional*): Aggregation weights of the sites, in sum 1.
    """

    learning_rate: float | None = None
    local_epochs: int | None = None
    local_steps: int | None = None
    server_lr: float | None = None
    shares: dict[str, float] | None = None


@dataclass(frozen=True)
class SearchSpace:
    r"""
    Ranges of the hyper-parameters, each `(low, high)` or `None` where it is not searched. A draw z has a number for
    each of `learning_rate`, `local_epochs` or `local_steps`, and `server_lr`, and one a site for the aggregation
    weights, whose softmax gives the shares: so a share is bounded, among 3 sites to .17-.55 by the default.

    `log`: `h = mid + half tanh(z)`, in the logarithm for learning rates, epochs and steps. No bound can be left.
    `paper`: `h = z (high - low) + mid` with the lower clamps of
    [Auto-FedRL](https://huggingface.co/papers/2203.06338)'s code: `max(lr, 1e-4)`, `max(epochs, 1)`,
    `max(server_lr, .1)`; nothing holds a value below its high end.

    Args:
        kind (`str`, *optional*, defaults to `"log"`): `log` or `paper`.
        learning_rate (`tuple[float, float]`, *optional*, defaults to `(5e-4, 5e-2)`): Above 0.
        local_epochs (`tuple[int, int]`, *optional*, defaults to `(2, 40)`): At least 1.
        local_steps (`tuple[int, int]`, *optional*): At least 1; in place of `local_epochs`.
        server_lr (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.5)`): Above 0.
        aggregation_weights (`tuple[float, float]`, *optional*, defaults to `(0.1, 1.0)`): Before the softmax.

    Raises:
        ConfigurationError: For an empty or inverted range, or a space without a dimension.
    """

    kind: str = "log"
    learning_rate: Range = (5e-4, 5e-2)
    local_epochs: Range = (2, 40)
    local_steps: Range = None
    server_lr: Range = (0.5, 1.5)
    aggregation_weights: Range = (0.1, 1.0)

    def __post_init__(self):
        require("search_space", self.kind, self.kind in ("log", "paper"), "must be log or paper")
        for name, bounds in self._ranges().items():
            is_pair = isinstance(bounds, Sequence) and len(bounds) == 2
            is_range = is_pair and all(type(b) in (int, float) for b in bounds) and -math.inf < bounds[0] < bounds[1]
            allowed = is_range and bounds[1] < math.inf
            require(name, bounds, allowed, "must be (low, high) with low below high, or null where it is not searched")
            least = 0 if name == "aggregation_weights" else 1 if name.startswith("local") else 1e-12
            require(name, bounds, bounds[0] >= least, f"low must be at least {least}")
            if name.startswith("local"):
                require(name, bounds, all(type(b) is int for b in bounds), "must be two ints")
        is_one = self.local_epochs is None or self.local_steps is None
        require("local_steps", self.local_steps, is_one, "search local_epochs or local_steps; set the other to null")
        require("search_space", self.kind, self._ranges(), "nothing is searched; give one range at least")

    def num_dimensions(self, sites: Sequence[str]) -> int:
        """d, the numbers of a draw."""
        return len(self._bounds(sites))

    def hyper_parameters(self, z: torch.Tensor, sites: Sequence[str]) -> HyperParameters:
        """
        What a draw of a continuous policy stands for.

        Args:
            z (`torch.Tensor`): `[d]`, without bounds.
            sites (`Sequence[str]`): The roster, in order of name.
        """
        if self.kind == "log":
            values = [
                _between(low, high, math.tanh(number), self._is_log(name))
                for (name, low, high), number in zip(self._bounds(sites), z.tolist(), strict=True)
            ]
        else:
            values = [
                number * (high - low) + (high + low) / 2
                for (_, low, high), number in zip(self._bounds(sites), z.tolist(), strict=True)
            ]
        return self._from_values(values, sites)

    def levels(self, sites: Sequence[str]) -> list[list[float]]:
        """
        For a discrete policy, the values each dimension can take: in `log` 9 evenly spaced in the logarithm or, where
        there is none, as they are; in `paper` the grid of its code.
        """
        return [self._levels(name, low, high) for name, low, high in self._bounds(sites)]

    def hyper_parameters_of_levels(self, indices: torch.Tensor, sites: Sequence[str]) -> HyperParameters:
        """What a draw of a discrete policy stands for: `[d]` indices into [`SearchSpace.levels`]."""
        chosen = zip(self.levels(sites), indices.tolist(), strict=True)
        return self._from_values([levels[int(index)] for levels, index in chosen], sites)

    def log_det(self, z: torch.Tensor) -> torch.Tensor:
        """
        log |du/dz| of `u = tanh(z)`, 0 in `paper`: the density of u is that of z over it. No function of the policy,
        so it changes log π and not its gradient.
        """
        if self.kind == "paper":
            return torch.zeros((), dtype=z.dtype)
        return (2 * (math.log(2) - z - torch.nn.functional.softplus(-2 * z))).sum()

    @property
    def mean_bound(self) -> float:
        """Where the means of a policy are held: ±.5 are the ends in `paper`; tanh(2.5) is .987 of the way."""
        return 0.5 if self.kind == "paper" else 2.5

    @property
    def first_std(self) -> float:
        """Standard deviation a policy begins with; in `paper` that of its code, whose precision is √85."""
        return 85**-0.25 if self.kind == "paper" else 0.6

    def describe(self) -> dict:
        """All that makes two spaces different, in plain containers."""
        return {
            name: list(value) if isinstance(value, Sequence) and name != "kind" else value
            for name, value in asdict(self).items()
        }

    def _ranges(self) -> dict[str, tuple[float, float]]:
        names = ("learning_rate", "local_epochs", "local_steps", "server_lr", "aggregation_weights")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _bounds(self, sites: Sequence[str]) -> list[tuple[str, float, float]]:
        bounds = []
        for name, (low, high) in self._ranges().items():
            repeats = len(sites) if name == "aggregation_weights" else 1
            bounds.extend([(name, low, high)] * repeats)
        return bounds

    def _is_log(self, name: str) -> bool:
        return name in ("learning_rate", "local_epochs", "local_steps")

    def _levels(self, name: str, low: float, high: float) -> list[float]:
        if self.kind == "log":
            return [_between(low, high, -1 + k / 4, self._is_log(name)) for k in range(9)]
        if name == "learning_rate":
            return [low, high]
        if name in ("local_epochs", "local_steps"):
            return sorted({float(low), *(float(5 * k) for k in range(1, int(high // 5) + 1) if 5 * k > low)})
        num_levels = 10 if name == "aggregation_weights" else 9
        return [low + (high - low) * k / (num_levels - 1) for k in range(num_levels)]

    def _from_values(self, values: Sequence[float], sites: Sequence[str]) -> HyperParameters:
        remaining = iter(values)
        found = {name: next(remaining) for name in self._ranges() if name != "aggregation_weights"}
        least = {"learning_rate": 1e-4, "local_epochs": 1, "local_steps": 1, "server_lr": 0.1}
        for name, value in found.items():
            rounded = int(value + 0.5) if name.startswith("local") else value
            found[name] = max(rounded, least[name]) if self.kind == "paper" else rounded
        if self.aggregation_weights is not None:
            shares = torch.softmax(torch.tensor(list(remaining), dtype=torch.float64), dim=0)
            found["shares"] = dict(zip(sites, shares.tolist(), strict=True))
        return HyperParameters(**found)


def _between(low: float, high: float, unit: float, is_log: bool) -> float:
    """The value at `unit` in [-1, 1] of a range."""
    if is_log:
        return min(max(math.exp(_between(math.log(low), math.log(high), unit, False)), low), high)
    return (low + high) / 2 + unit * (high - low) / 2
