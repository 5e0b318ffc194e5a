"""What was not sent, kept by the names of parameters while DDP moves them between buckets."""

import torch


class Residuals:
    """
    Flat float32 vectors, one per group of parameters that travel together, and views of them by name.

    A new value counts from [`commit`] on; a step that was skipped takes none.
    """

    def __init__(self):
        self._flats: dict[tuple[str, ...], torch.Tensor] = {}
        self._of: dict[str, torch.Tensor] = {}
        self._pending: dict[tuple[str, ...], torch.Tensor] = {}

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
        return self._flats[names]

    def propose(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """What the vector becomes if the step is taken."""
        self._pending[names] = value

    def commit(self) -> None:
        """The step was taken."""
        for names, value in self._pending.items():
            self._flats[names].copy_(value)
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

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self._of.items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self._flats, self._pending = {}, {}
        self._of = {name: value.float().flatten() for name, value in state_dict.items()}
