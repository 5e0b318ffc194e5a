"""The norm of the whole gradient, known to every stage some batches late."""


class LaggedNorm:
    """
    Squared norms of all blocks' gradients, by the last batch of their group.

    They are summed on the way of the gradients to stage 0 and come back with the next forward: the total of the group
    that ends with batch n reaches the backward of batch n + 1 + m_0 - m_k at stage k. One lag of 1 + m_0 makes all
    stages use the same total for the same update.

    Args:
        lag (`int`): Batches, 1 + m_0.
    """

    def __init__(self, lag: int):
        self.lag = lag
        self._totals: dict[int, float] = {}
        self._new: list[list] = []

    def add(self, n: int, squared: float) -> None:
        """At stage 0: the total of the group that ends with batch n is complete."""
        self._totals[n] = squared
        self._new.append([n, squared])

    def take_new(self) -> list[list]:
        """At stage 0: what the next forward carries, pairs of last batch and squared norm."""
        new, self._new = self._new, []
        return new

    def receive(self, pairs: list[list]) -> None:
        """At the other stages."""
        self._totals.update((n, squared) for n, squared in pairs)

    def known(self, n: int, own: float) -> float:
        """
        The squared norm that bounds the update which ends with batch n; older ones are forgotten.

        Args:
            n (`int`): Last batch of the group.
            own (`float`): Squared norm of the block's own gradient, used until the first total is old enough.
        """
        old = [end for end in self._totals if end <= n - self.lag]
        if not old:
            return own
        latest = max(old)
        self._totals = {end: squared for end, squared in self._totals.items() if end >= latest}
        return self._totals[latest]

    def state_dict(self) -> dict:
        return {"totals": dict(self._totals), "new": [list(pair) for pair in self._new]}

    def load_state_dict(self, state: dict) -> None:
        self._totals, self._new = dict(state["totals"]), [list(pair) for pair in state["new"]]
