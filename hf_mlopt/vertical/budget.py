"""How often a party may see the scores of a row: the more weights it sees them at, the more of the data follows."""

from hf_mlopt.errors import ConfigurationError


class LeakBudgetExceeded(RuntimeError):
    """A request whose answer would show a requester more versions of a row than it may see."""


def automatic_budget(num_rows: int, hidden_features: int) -> int:
    """
    Half of what recovers the Gram matrix of the others' rows, or their scores' low rank: `max(1, ⌊min(n-1, d)/2⌋)`.

    It stops the known attacks; it proves nothing.

    Args:
        num_rows (`int`): n.
        hidden_features (`int`): Features of all parties but the requester.

    Returns:
        `int`: Versions of w at which the requester may see a row.
    """
    return max(1, min(num_rows - 1, hidden_features) // 2)


class LeakBudget:
    """
    Counts distinct views (batch, version of own weights) that each requester was given. Rows are only ever seen in
    whole batches, so batches are counted.

    Args:
        limits (`dict[str, int | None]`): Views a row for each requester; `None` is no limit.
    """

    def __init__(self, limits: dict[str, int | None]):
        self.limits = dict(limits)
        self._views: dict[tuple[str, int, int], list[int]] = {}  # (requester, dataset, batch): [views, last version]

    def view(self, requester: str, dataset: int, batch: int, version: int):
        """
        Counts a view before it is given.

        Args:
            requester (`str`): Who will see it.
            dataset (`int`), batch (`int`): The rows.
            version (`int`): Of own weights. The same one twice in a row shows nothing new.

        Raises:
            LeakBudgetExceeded: If the requester has had its number.
            ConfigurationError: If it is unknown.
        """
        if requester not in self.limits:
            raise ConfigurationError("requester", requester, f"must be one of {sorted(self.limits)}")
        limit = self.limits[requester]
        seen = self._views.setdefault((requester, dataset, batch), [0, -1])
        if seen[1] == version:
            return
        if limit is not None and seen[0] >= limit:
            raise LeakBudgetExceeded(
                f"{requester!r} has seen batch {batch} at {seen[0]} versions of the weights, query_budget allows "
                f"{limit}: train for fewer epochs, or set a higher query_budget with accept_gram_disclosure"
            )
        seen[0] += 1
        seen[1] = version

    def forget(self, dataset: int):
        """Drops the views of a data set whose rows are replaced by others."""
        self._views = {key: views for key, views in self._views.items() if key[1] != dataset}

    def count(self, requester: str, dataset: int, batch: int) -> int:
        """Views of a batch that a requester was given."""
        return self._views.get((requester, dataset, batch), (0,))[0]

    def used(self) -> dict[str, int]:
        """Most views of any row, for each requester."""
        most = dict.fromkeys(self.limits, 0)
        for (requester, _, _), (views, _) in self._views.items():
            most[requester] = max(most[requester], views)
        return most

    def state_dict(self) -> dict:
        """Views so far: a restart must not forget them."""
        return {"views": [[*key, *value] for key, value in self._views.items()]}

    def load_state_dict(self, state: dict):
        """Takes over what [`state_dict`] gave."""
        self._views = {(name, *map(int, key)): [views, last] for name, *key, views, last in state["views"]}
