"""What was not sent, kept by the names of parameters while DDP moves them between buckets."""

from collections.abc import Collection

import torch


class Residuals:
    """
    Flat float32 vectors, one per group of parameters that travel together, and views of them by name.

    A new value counts from [`commit`] on; a step that was skipped takes none.
    """

    def __init__(self):
        self._flats: dict[tuple[str, ...], torch.Tensor] = {}
        self._of: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}

    def flat(self, names: tuple[str, ...], sizes: list[int], device: torch.device) -> torch.Tensor:
        """
        The vector of some parameters, in their order; zero at first.

        Args:
            names (`tuple[str]`): Of the parameters.
            sizes (`list[int]`): Their elements.
            device (`torch.device`): Where it is wanted.
        """
        if names not in self._flats:
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
            views = flat.split(sizes)
            for name, view in zip(names, views, strict=True):
                if name in self._of:  # it was in another bucket before
                    view.copy_(self._of[name])
            self._flats = {key: kept for key, kept in self._flats.items() if not set(key) & set(names)}
            self._flats[names] = flat
            self._of.update(zip(names, views, strict=True))
        if all(name in self._pending for name in names):  # the second backward pass of a step: the first has sent some
            return torch.cat([self._pending[name] for name in names])
        return self._flats[names]

    def propose(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """What the vector becomes if the step is taken."""
        parts = value.split([self._of[name].numel() for name in names])
        self._pending.update(zip(names, parts, strict=True))

    @property
    def has_pending(self) -> bool:
        """Whether new values wait for a step."""
        return bool(self._pending)

    def commit(self, unused: Collection[str] = ()) -> None:
        """
        The step was taken.

        Args:
            unused (`Collection[str]`): Parameters that it has not moved: what was sent for them has gone nowhere.
        """
        for name, value in self._pending.items():
            if name not in unused:
                self._of[name].copy_(value)
        self._pending.clear()

    def discard(self) -> None:
        """The step was not taken."""
        self._pending.clear()

    def get(self, name: str) -> torch.Tensor | None:
        """The flat vector of one parameter, if there is one; a view."""
        return self._of.get(name)

    def groups(self) -> dict[tuple[str, ...], torch.Tensor]:
        """All vectors, by the parameters in them."""
        return self._flats

    def state_dict(self) -> dict:
        """What was not sent of every parameter, and which of them travel together."""
        values = {name: value.clone() for name, value in self._of.items()}
        return {"groups": [list(names) for names in self._flats], "values": values}

    def load_state_dict(self, state_dict: dict, device: torch.device | None = None) -> None:
        """
        Args:
            state_dict (`dict`): As [`state_dict`] gives it.
            device (`torch.device`, *optional*): Where the vectors are wanted.
        """
        self._flats, self._pending = {}, {}
        self._of = {name: value.float().flatten() for name, value in state_dict["values"].items()}
        for names in state_dict["groups"]:
            self.flat(tuple(names), [self._of[name].numel() for name in names], device)
