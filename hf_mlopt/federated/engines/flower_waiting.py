"""Messages on a Flower `Grid` that must go out, and whose replies must come in."""

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid


logger = logging.getLogger(__name__)

# What may go away by itself. The others say that a site's installation is wrong, or that its application raised.
_RETRYABLE = {
    ErrorCode.UNKNOWN,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}
_MOST_AT_ONCE = 8  # replies that are in memory together, however many sites there are


@dataclass
class Outcome:
    """
    What came of a message.

    Args:
        key (`Hashable`): As the caller knows it.
        records (`flwr.app.RecordDict`, *optional*): The reply.
        failure (`str`): Or why there is none.
        may_pass (`bool`): Whether the failure is of a kind that goes away, though no retry was left.
    """

    key: Hashable
    records: RecordDict | None = None
    failure: str = ""
    may_pass: bool = False


@dataclass
class _Try:
    number: int = 0
    not_before: float = 0.0  # by the monotonic clock
    failure: str = ""  # of the try before


class Waiting:
    """
    Sends messages and finds their replies by the message they answer: errors that the SuperLink writes itself come
    with its own id as their source.

    Args:
        grid (`flwr.serverapp.Grid`): From the `ServerApp`.
        retries (`int`): How often a message is sent again after an error that may pass.
        pause (`float`): Seconds before the first retry; each further one waits four times as long.
        node_of (`Callable[[Hashable], int]`): Key of a message to the node it goes to, asked at each try.
    """

    def __init__(self, grid: Grid, retries: int, pause: float, node_of: Callable[[Hashable], int]):
        self.grid, self.retries, self.pause, self.node_of = grid, retries, pause, node_of
        self.ignored = 0  # replies that nobody waits for: duplicates, and those to an earlier try
        self._due: dict[Hashable, _Try] = {}
        self._pending: dict[str, tuple[Hashable, _Try]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a reply is still to come."""
        return bool(self._due or self._pending)

    def add(self, keys: Iterable[Hashable]) -> None:
        """Takes keys of messages that must go out."""
        self._due.update({key: _Try() for key in keys})

    def keys(self) -> list[Hashable]:
        """Whose reply is still to come."""
        return list(self._tries())

    def last_failure(self, key: Hashable) -> str:
        """Why a message that is still waited for was sent again; empty if it was not."""
        return self._tries()[key].failure

    def turn(self, ends: float, kind: str, records_of: Callable[[Hashable], RecordDict]) -> Iterator[Outcome]:
        """
        Sends what is due and looks once for replies.

        Args:
            ends (`float`): The deadline by the monotonic clock, in seconds; messages live as long.
            kind (`str`): Message type, such as `train.step`.
            records_of (`Callable`): Makes the records of a message, when it goes out.
        """
        for key in [key for key, a_try in self._due.items() if a_try.not_before <= time.monotonic()]:
            a_try = self._due.pop(key)
            if failure := self._push(key, a_try, ends, kind, records_of(key)):
                yield from self._failed(key, a_try, failure, True)
        for reply in self._pull():
            found = self._pending.pop(reply.metadata.reply_to_message_id, None)
            if found is None:
                self.ignored += 1
                logger.warning("a reply has come that nobody waits for; it is ignored")
            elif reply.has_error():
                code, reason = reply.error.code, reply.error.reason
                yield from self._failed(*found, f"Flower error {code}: {reason}", code in _RETRYABLE)
            else:
                yield Outcome(found[0], reply.content)

    def _tries(self) -> dict[Hashable, _Try]:
        return {**self._due, **dict(self._pending.values())}

    def _push(self, key: Hashable, a_try: _Try, ends: float, kind: str, records: RecordDict) -> str:
        lifetime = max(1.0, ends - time.monotonic())  # without it, 12 hours
        message = Message(records, self.node_of(key), kind, ttl=lifetime)
        try:
            pushed = list(self.grid.push_messages([message]))
        except Exception as error:  # whatever the link's trouble is, the deadline ends it
            return f"could not be sent ({error})"
        if not pushed or pushed[0] is None:
            return "could not be sent (refused by the SuperLink)"
        self._pending[pushed[0]] = key, a_try
        return ""

    def _pull(self) -> Iterator[Message]:
        ids = list(self._pending)
        for start in range(0, len(ids), _MOST_AT_ONCE):
            try:
                yield from self.grid.pull_messages(ids[start : start + _MOST_AT_ONCE])
            except Exception as error:  # such as a database that is locked
                logger.warning("the SuperLink gives no replies: %s", error)

    def _failed(self, key: Hashable, a_try: _Try, failure: str, may_pass: bool) -> Iterator[Outcome]:
        if not may_pass or a_try.number >= self.retries:
            yield Outcome(key, None, failure, may_pass)
            return
        not_before = time.monotonic() + self.pause * 4**a_try.number
        self._due[key] = _Try(a_try.number + 1, not_before, failure)
        logger.warning("%s: %s; asked again", key, failure)


def rest(seconds: float, ends: float) -> None:
    """Sleeps, but not beyond a deadline of the monotonic clock."""
    time.sleep(max(0.0, min(seconds, ends - time.monotonic())))
