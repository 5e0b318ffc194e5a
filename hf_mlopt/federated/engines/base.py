"""What an engine is: it carries messages to sites and brings back what they answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hf_mlopt.errors import InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.algorithms.message import Scalar
from hf_mlopt.federated.storage import SpooledReplies


# What stands at a site: it answers a message to the site of this name. A problem it raises reaches the server as text.
Answer = Callable[[str, Message], Message]


@dataclass
class Exchanged:
    """
    What came of one exchange.

    Args:
        replies (`dict[str, Message]` or `SpooledReplies`): Site to its reply.
        failures (`dict[str, str]`): Every other site to the reason.
        scalars (`dict[str, dict]`): Site to the scalars of its reply, and `bytes_up`, as it arrived.
        decode (`Callable[[str, Message], Message]`, *optional*): Site and reply to what it stands for.
    """

    replies: "dict[str, Message] | SpooledReplies" = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    decode: Callable[[str, Message], Message] | None = None

    def take(self, site: str, reply: Message) -> None:
        """Sorts a reply in; one with the scalar `error` is a failure."""
        if "error" in reply.scalars:
            self.failures[site] = str(reply.scalars["error"])
            return
        try:
            decoded = reply if self.decode is None else self.decode(site, reply)
        except InputError as error:
            self.failures[site] = str(error)
            return
        self.scalars[site] = {**reply.scalars, "bytes_up": reply.nbytes}
        if isinstance(self.replies, SpooledReplies):
            self.replies.add(site, decoded)
        else:
            self.replies[site] = decoded


class Engine(Protocol):
    """
    All that a round needs of the world. An engine knows neither algorithms nor models.
    """

    def sites(self) -> list[str]:
        """Names of the sites, once all are there that the federation waits for."""

    def exchange(self, messages: Mapping[str, Message], exchanged: Exchanged, on_reply: Callable[[str], None]) -> None:
        """
        Sends every site its message and collects what comes back until the deadline.

        Args:
            messages (`Mapping[str, Message]`): Site to message; they may share tensors.
            exchanged (`Exchanged`): Takes replies and failures; afterwards every site of `messages` is in one of the
                two, however slow, dead or wrong it is.
            on_reply (`Callable[[str], None]`): Called with a site's name as soon as it is in.
        """

    def close(self) -> None:
        """Ends what the engine has started."""


def answered(answer: Answer, site: str, message: Message) -> Message:
    """
    What a site says, or what has kept it from saying it.

    Returns:
        `Message`: The answer; or one with the scalar `error` and no tensor.
    """
    try:
        return answer(site, message)
    except Exception as error:  # whatever it is, it concerns one site of many
        return Message({}, {"error": f"{type(error).__name__}: {error}"})
