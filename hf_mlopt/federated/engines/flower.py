"""
Messages over Flower: an own loop on its `Grid`, for its strategies carry one set of weights for all sites, wait half a
day for a reply that was lost, and cannot be resumed.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.federated.algorithms import Message
from hf_mlopt.federated.engines.base import Exchanged
from hf_mlopt.federated.engines.flower_records import from_flat, to_flat
from hf_mlopt.federated.engines.flower_waiting import Outcome, Waiting, rest
from hf_mlopt.federated.engines.site import pack, unpack


logger = logging.getLogger(__name__)

_GRACE = 30.0  # seconds that further nodes have to say their names once all sites are there


class FlowerEngine:
    """
    The sites behind a Flower `Grid`, known by the names they give themselves.

    Args:
        grid (`flwr.serverapp.Grid`): From the `ServerApp`.
        expected (`int` or `Sequence[str]`): How many sites there must be, or which.
        timeout (`float`, *optional*, defaults to 3600): Seconds of an exchange, and of the wait for all sites. It is
            the lifetime of messages as well, by the clocks of all machines.
        retries (`int`, *optional*, defaults to 2): How often a site is asked again after an error that may pass.
        pause (`float`, *optional*, defaults to 5): Seconds before the first retry; each further one waits four times
            as long, so that a SuperNode can come back.
        poll (`float`, *optional*, defaults to 0.5): Seconds between two looks for replies.
        nodes (`Mapping[str, int]`, *optional*): Site to node id, as `flwr supernode register` printed it. A name alone
            proves nothing: with it a site that gives itself the name of another is refused.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    def __init__(
        self,
        grid: Grid,
        expected: int | Sequence[str],
        *,
        timeout: float = 3600.0,
        retries: int = 2,
        pause: float = 5.0,
        poll: float = 0.5,
        nodes: Mapping[str, int] | None = None,
    ):
        names = None if isinstance(expected, int) else list(expected)
        num_expected = expected if names is None else len(names)
        for field, value, is_good, allowed in (
            ("sites", expected, num_expected >= 1, "a federation needs a site"),
            ("sites", expected, names is None or len(set(names)) == len(names), "names of sites must differ"),
            ("timeout", timeout, timeout > 0, "must be above 0 seconds"),
            ("retries", retries, retries >= 0, "must be at least 0"),
            ("pause", pause, pause >= 0, "must be at least 0 seconds"),
            ("poll", poll, poll > 0, "must be above 0 seconds"),
            ("nodes", nodes, nodes is None or len(nodes) == num_expected, f"must name all sites, {expected}"),
            ("nodes", nodes, nodes is None or names is None or set(nodes) == set(names), f"must be of sites {names}"),
        ):
            if not is_good:
                raise ConfigurationError(field, value, allowed)
        self.grid, self.timeout, self.retries, self.pause, self.poll = grid, timeout, retries, pause, poll
        self.ignored = 0  # replies that nobody waited for: duplicates and late ones
        self._names, self._num_expected, self._nodes = names or (nodes and list(nodes)), num_expected, nodes
        self._node_of: dict[str, int] = {}
        self._strangers: set[int] = set()  # nodes that have come later and are no site that is missed

    @classmethod
    def from_run_config(cls, grid: Grid, run_config: Mapping[str, Any]) -> "FlowerEngine":
        """
        The engine that a run configuration describes: `sites`, a number or names with commas between; `timeout`,
        `retries`, `pause`, `poll`; `nodes`, as in `hosp0=123,hosp1=456`.

        Raises:
            ConfigurationError: If a value is missing or cannot be read.
        """
        expected, nodes = run_config.get("sites"), run_config.get("nodes")
        if isinstance(expected, str):
            expected = [name.strip() for name in expected.split(",")]
        elif type(expected) is not int:
            raise ConfigurationError("sites", expected, "a number of sites, or their names with commas between")
        if nodes is not None:
            try:
                pairs = [entry.strip().split("=") for entry in nodes.split(",")]
                nodes = {name: int(node) for name, node in pairs}
            except ValueError as error:
                raise ConfigurationError("nodes", nodes, "must be as in 'hosp0=123,hosp1=456'") from error
        settings = {name: run_config[name] for name in ("timeout", "retries", "pause", "poll") if name in run_config}
        return cls(grid, expected, nodes=nodes, **settings)

    def sites(self) -> list[str]:
        """
        Names of the sites, once all have said theirs.

        Raises:
            InputError: If a site is unknown, has the name of another or refuses to take part, or if not all come in
                time.
        """
        ends, greeted = time.monotonic() + self.timeout, self._greeting()
        while len(self._node_of) < self._num_expected or greeted.is_busy:
            if len(self._node_of) == self._num_expected:  # then what else is there might have the name of another
                ends = min(ends, time.monotonic() + _GRACE)
            if time.monotonic() >= ends:
                break
            for outcome in self._greet(greeted, ends):
                if outcome.records is not None:
                    self._welcome(outcome.key, outcome.records)
                elif not outcome.may_pass:
                    raise InputError(f"the node {outcome.key} does not take part: {outcome.failure}")
            rest(self.poll, ends)
        if len(self._node_of) < self._num_expected:
            raise InputError(self._missing())
        if greeted.is_busy:
            logger.warning("the nodes %s are there and say nothing; the training begins without them", greeted.keys())
        return sorted(self._node_of)

    def exchange(self, messages: Mapping[str, Message], exchanged: Exchanged, on_reply: Callable[[str], None]) -> None:
        """See [`Engine`]; a reply belongs to the message it answers, whoever signs it."""
        ends, greeted = time.monotonic() + self.timeout, self._greeting()
        asked = Waiting(self.grid, self.retries, self.pause, self._node_of.__getitem__)
        asked.add(messages)
        while asked.is_busy and time.monotonic() < ends:
            for outcome in asked.turn(ends, "train.step", lambda site: from_flat(*pack(messages[site]))):
                self._take(outcome, exchanged)
                on_reply(outcome.key)
            if missed := {site for site in asked.keys() if asked.last_failure(site)}:
                self._find_again(missed, greeted, ends)
            if asked.is_busy:
                rest(self.poll, ends)
        self.ignored += asked.ignored
        for site in asked.keys():
            reason = asked.last_failure(site)
            exchanged.failures[site] = f"no answer within {self.timeout:g} s" + (reason and f", after: {reason}")
            on_reply(site)

    def close(self) -> None:
        """Nothing of this engine's goes on without it."""

    def _online(self) -> list[int]:
        try:
            return list(self.grid.get_node_ids())
        except Exception as error:  # the link may be busy; the deadline ends it
            logger.warning("the SuperLink does not say who is there: %s", error)
            return []

    def _greeting(self) -> Waiting:
        return Waiting(self.grid, self.retries, self.pause, lambda node: node)

    def _greet(self, greeted: Waiting, ends: float) -> Iterator[Outcome]:
        met = {*greeted.keys(), *self._node_of.values(), *self._strangers}
        greeted.add(node for node in self._online() if node not in met)
        yield from greeted.turn(ends, "query.hello", lambda _: RecordDict({"hello": ConfigRecord({})}))

    def _find_again(self, missed: set[str], greeted: Waiting, ends: float) -> None:
        """A SuperNode without a key has another node id when it is started again; its site is the same."""
        if self._nodes is not None:
            return
        for outcome in self._greet(greeted, ends):
            site = None if outcome.records is None else outcome.records.config_records["hello"].get("site")
            if site in missed:
                logger.info("%s has come back as node %s", site, outcome.key)
                self._node_of[site] = outcome.key
            elif not outcome.may_pass:
                self._strangers.add(outcome.key)

    def _take(self, outcome: Outcome, exchanged: Exchanged) -> None:
        if outcome.records is None:
            exchanged.failures[outcome.key] = outcome.failure
            return
        try:
            exchanged.take(outcome.key, unpack(*to_flat(outcome.records)))
        except InputError as error:
            exchanged.failures[outcome.key] = str(error)

    def _welcome(self, node: int, records: RecordDict) -> None:
        said = records.config_records.get("hello", {})
        if "error" in said:
            raise InputError(f"the node {node} does not take part: {said['error']}")
        site = said.get("site")
        known = "" if self._names is None else f"; expected are {sorted(self._names)}"
        if not isinstance(site, str) or not site:
            raise InputError(f"the node {node} calls itself {site!r}; a site needs a name")
        if self._names is not None and site not in self._names:
            raise InputError(f"the node {node} calls itself {site!r}, which is no site of this federation{known}")
        if self._nodes is not None and self._nodes[site] != node:
            raise InputError(f"the node {node} calls itself {site!r}, which is registered as node {self._nodes[site]}")
        if site in self._node_of:
            raise InputError(
                f"the nodes {self._node_of[site]} and {node} both call themselves {site!r}; give each SuperNode its "
                "own name, --node-config 'site=\"...\"'"
            )
        self._node_of[site] = node
        if len(self._node_of) > self._num_expected:
            raise InputError(
                f"{len(self._node_of)} sites have come, {sorted(self._node_of)}, and {self._num_expected} are "
                "expected; correct `sites`"
            )

    def _missing(self) -> str:
        come, names = sorted(self._node_of), self._names
        missing = "" if names is None else f"; missing are {sorted(set(names) - set(come))}"
        return (
            f"{len(come)} of {self._num_expected} sites have come within {self.timeout:g} s, {come}{missing}; start "
            "their SuperNodes, or raise `timeout`"
        )
