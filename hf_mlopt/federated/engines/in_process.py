"""All sites in this process, one after the other: the default, and the reference of the other engines."""

from collections.abc import Callable, Mapping, Sequence

from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.base import Answer, Exchanged, answered


class InProcessEngine:
    """
    Args:
        names (`Sequence[str]`): The sites.
        answer (`Callable[[str, Message], Message]`): What stands at each of them.
    """

    def __init__(self, names: Sequence[str], answer: Answer):
        self.names, self.answer = list(names), answer

    def sites(self) -> list[str]:
        """See [`Engine`]."""
        return self.names

    def exchange(self, messages: Mapping[str, Message], exchanged: Exchanged, on_reply: Callable[[str], None]) -> None:
        """See [`Engine`]; a site that raises has failed."""
        for site, message in messages.items():
            exchanged.take(site, answered(self.answer, site, message))
            on_reply(site)

    def close(self) -> None:
        """See [`Engine`]."""
