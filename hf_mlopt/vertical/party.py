"""One party of a vertical federation: its block, its answers, and its training if it has labels."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from hf_mlopt import __version__
from hf_mlopt.configuration import to_dict
from hf_mlopt.errors import ConfigurationError, InputError
from hf_mlopt.vertical.aggregate import Sharing
from hf_mlopt.vertical.arguments import Parties, VerticalArguments
from hf_mlopt.vertical.barrier import SyncUpdater
from hf_mlopt.vertical.budget import LeakBudget
from hf_mlopt.vertical.gradients import MODES, BackwardOwner, BackwardParty
from hf_mlopt.vertical.inbox import Inbox
from hf_mlopt.vertical.messages import Frame, Kind, Purpose
from hf_mlopt.vertical.responder import Responder
from hf_mlopt.vertical.store import WeightStore
from hf_mlopt.vertical.sums import SumCollector
from hf_mlopt.vertical.transport.base import PeerLost, Transport
from hf_mlopt.vertical.updater import ALGORITHMS, Updater
from hf_mlopt.vertical.updates.blocks import FeatureBlock
from hf_mlopt.vertical.updates.losses import make_loss
from hf_mlopt.vertical.updates.schedule import BatchSchedule
from hf_mlopt.vertical.updates.weights import LazyWeights


def run_digest(arguments: VerticalArguments, parties: Parties, run: str) -> bytes:
    """16 bytes on which all parties of a run agree: of its name, roster, arguments and code version."""
    facts = {"run": run, "version": __version__, "arguments": to_dict(arguments), "parties": asdict(parties)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:16]


class VerticalParty:
    """
    A party; it answers from [`start`] on, so that a checkpoint can be loaded before.

    Args:
        arguments ([`VerticalArguments`]): The same at all parties; checked against the roster first.
        parties ([`Parties`]): The roster.
        transport ([`Transport`]): Its name is that of this party.
        sharing ([`Sharing`]): Masks.
        features (array or sparse array): `[n, d_l]`, own columns.
        labels (array, *optional*): `[n]`, at label holders.
        run (`str`, *optional*, defaults to `"run"`): Name of the run, part of every frame.
        session (`bytes`, *optional*): Of this start of the parties: frames of other ones are refused.
        note (`Callable`, *optional*): See [`Responder`].
        compute (`Callable[[], None]`, *optional*): See [`Updater`].

    Raises:
        ConfigurationError: For what the arguments refuse.
        InputError: If the data do not fit the roster.
    """

    def __init__(
        self,
        arguments: VerticalArguments,
        parties: Parties,
        transport: Transport,
        sharing: Sharing,
        features,
        labels=None,
        run: str = "run",
        session: bytes = b"",
        note: Callable[..., object] = lambda event, **fields: None,
        compute: Callable[[], None] | None = None,
    ):
        arguments.check(parties)
        self.arguments, self.parties, self.transport, self.name = arguments, parties, transport, transport.name
        self.holders = parties.label_holders(arguments.labels)
        self._check(features, labels)
        self.loss = make_loss(arguments.loss, arguments.num_labels)
        schedule = arguments.schedule(parties.num_rows)
        block = FeatureBlock(features, schedule, self.has_bias)
        optimizer, weights = None, LazyWeights(block.num_features, self.loss.words)
        if self.name in self.holders:
            optimizer = ALGORITHMS[arguments.algorithm](block, self.loss, self.loss.check_labels(labels))
            weights = optimizer.initial_weights()
        self.store = WeightStore(weights)
        limits = {name: arguments.budget(parties, name) for name in parties.names}
        self.inbox = Inbox(transport.peers, 2 * schedule.num_batches + arguments.push_ahead + 16)
        self.digest = run_digest(arguments, parties, run)
        frames = hashlib.sha256(self.digest + session).digest()[:16] if session else self.digest
        budget = LeakBudget(limits)
        asking = (parties.label_owner, self.holders, arguments.share_aggregates, arguments.push_ahead)
        served = (self.name, frames, {0: block}, self.store, sharing, budget, self.inbox, *asking)
        self.responder = Responder(*served, note=note)
        self.collector = SumCollector(self.responder, transport, arguments.timeout)
        self.updater = None
        if optimizer is not None:
            kind = SyncUpdater if arguments.mode == "sync" else Updater
            self.updater = kind(arguments, optimizer, self.collector, self.holders, compute)
        if arguments.backward in MODES:
            self._train_others(block)
        self._is_started = False

    def _train_others(self, block: FeatureBlock):
        """With labels at their owner alone: it sends derivatives, the others take them."""
        arguments, run, words = self.arguments, self.responder.run, self.loss.words
        if self.updater is not None:
            given = (arguments, self.loss, self.updater.optimizer.labels, block, self.transport, run)
            self.updater.backward = BackwardOwner(*given)
            return
        if arguments.algorithm == "saga":
            self.store.set_drift(np.zeros((block.num_features, words)))
        owner = self.parties.label_owner
        self.responder.backward = BackwardParty(arguments, owner, block, self.store, run, words)

    @property
    def has_bias(self) -> bool:
        """Whether the own block ends with a column of ones."""
        return self.arguments.bias and self.name == self.parties.label_owner

    def _check(self, features, labels):
        names, columns = self.parties.names, self.parties.num_features
        if self.name not in names or {self.name, *self.transport.peers} != set(names):
            text = f"party {self.name!r} is connected to {self.transport.peers}, the roster has {names}; compare them"
            raise InputError(text)
        if np.ndim(features) == 2 and features.shape[1] != columns[self.name]:
            text = f"features: {features.shape[1]} columns, the roster says {columns[self.name]} for {self.name!r}"
            raise InputError(f"{text}; correct one of them")
        if (labels is not None) != (self.name in self.holders):
            verb = "needs" if labels is None else "must not have"
            raise InputError(f"party {self.name!r} {verb} labels: label holders are {self.holders}")
        if labels is not None and len(labels) != self.parties.num_rows:
            raise InputError(f"labels: {len(labels)} rows, the roster says {self.parties.num_rows}; align them first")

    def add_rows(self, dataset: int, features, num_rows: int):
        """
        Own columns of other rows, for [`predict`]; every party adds its own under the same number.

        Args:
            dataset (`int`): From 1 to 255.
            features (array or sparse array): `[num_rows, d_l]`.
            num_rows (`int`): Aligned rows.
        """
        if not 1 <= dataset <= 255:
            raise ConfigurationError("dataset", dataset, "must be 1 to 255; 0 are the training rows")
        schedule = BatchSchedule(num_rows, self.arguments.batch_size, self.arguments.seed, order="kept")
        self.responder.budget.forget(dataset)  # of the rows that were there before
        self.responder.datasets[dataset] = FeatureBlock(features, schedule, self.has_bias)

    def start(self):
        """Answers peers from now on. [`train`] and [`predict`] call it."""
        if not self._is_started:
            self._is_started = True
            self.responder.start(self.transport)

    def train(self, after_step: Callable[[Updater], None] | None = None):
        """
        Makes all steps, if this party has labels, and answers until all others are done.

        Args:
            after_step (`Callable`, *optional*): See [`Updater.run`].

        Raises:
            PeerLost: If a peer is lost; the transport is then closed, so that others notice at once.
        """
        self.start()
        try:
            if self.updater is not None:
                if self.updater.backward is not None:
                    self.updater.backward.start()
                self.updater.run(after_step)
                if self.updater.backward is not None:
                    self.updater.backward.finish()
                self._tell(Kind.DONE)
            others = tuple(name for name in self.holders if name in self.collector.peers)
            self.inbox.wait_until_done(others, self.arguments.timeout)
        except BaseException:
            self._tell(Kind.FAILED)
            self.transport.close()
            raise

    def _tell(self, kind: Kind):
        frame = Frame(kind, Purpose.TRAIN, self.responder.run, 0, self.store.version)
        for peer in self.collector.peers:
            try:
                self.transport.push(peer, frame.to_bytes())
            except PeerLost:
                if kind is Kind.DONE and self.arguments.on_dropout == "abort":
                    raise

    def predict(self, dataset: int) -> np.ndarray:
        """
        Scores of rows that all parties have added, at the current weights. Only the label owner may ask.

        Returns:
            `np.ndarray`: z, `[num_rows, K]`.
        """
        if self.name != self.parties.label_owner:
            raise InputError(f"party {self.name!r} may not ask for scores; {self.parties.label_owner!r} may")
        if dataset not in self.responder.datasets:
            raise ConfigurationError("dataset", dataset, "no rows were added under this number; call add_rows")
        self.start()
        return self.collector.scores(dataset)

    @property
    def weights(self) -> np.ndarray:
        """A copy of the own block, `[d_l, K]`, the bias last."""
        return self.store.read_all()

    def on_save(self, save: Callable[[int], None]):
        """
        Sets what a party that trains without labels does before the label owner writes its state.

        Args:
            save (`Callable`): Called with the owner's number of steps; writes the own state.
        """
        if self.responder.backward is not None:
            self.responder.backward.save = save

    def settle(self):
        """Before a state is written: has those write theirs whom this party gives derivatives."""
        if self.updater is not None and self.updater.backward is not None:
            self.updater.backward.save(self.updater.position)

    def state_dict(self) -> dict:
        """What a restart needs: weights, versions, tables, position, request numbers, views given."""
        state = {"store": self.store.state_dict(), "responder": self.responder.state_dict()}
        for name, part in (("updater", self.updater), ("backward", self.responder.backward)):
            state[name] = part.state_dict() if part is not None else {}
        return state

    def load_state_dict(self, state: dict, *, new_keys: bool = True):
        """
        Takes over what [`state_dict`] gave, before training.

        Args:
            state (`dict`): Of the same party, roster and arguments.
            new_keys (`bool`, *optional*, defaults to `True`): See [`Responder.load_state_dict`].

        Raises:
            ConfigurationError: With `backward=dp`: derivatives after the checkpoint would be released a second time.
        """
        if self.arguments.backward == "dp":
            text = "cannot go on from a checkpoint: what was sent after it would be sent again with other noise, more "
            raise ConfigurationError("backward", "dp", f"{text}than dp_epsilon allows; train from the start")
        self.store.load_state_dict(state["store"])
        self.responder.load_state_dict(state["responder"], new_keys=new_keys)
        if self.updater is not None:
            self.updater.load_state_dict(state["updater"])
        if self.responder.backward is not None:
            self.responder.backward.load_state_dict(state["backward"])
