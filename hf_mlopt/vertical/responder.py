"""The side of a party that answers: shares of its scores from versioned weights, whatever its training is doing."""

import threading
from collections.abc import Callable

import numpy as np

from hf_mlopt.errors import InputError
from hf_mlopt.vertical.aggregate import Sharing, sum_request
from hf_mlopt.vertical.budget import LeakBudget, LeakBudgetExceeded
from hf_mlopt.vertical.climb import TreeSharing
from hf_mlopt.vertical.gradients import BackwardParty
from hf_mlopt.vertical.inbox import Inbox
from hf_mlopt.vertical.messages import Frame, FrameError, Kind, Purpose, parse_frame
from hf_mlopt.vertical.store import WeightStore
from hf_mlopt.vertical.transport.base import PeerLost, Transport
from hf_mlopt.vertical.updates.blocks import FeatureBlock


class Responder:
    """
    Answers requests for shares.

    Rows cannot be chosen: batches are those of the shared schedule, and in training the round says which. Rounds of a
    channel only rise, so that nothing is answered twice.

    Args:
        name (`str`): Own party.
        run (`bytes`): 16 bytes that all frames of the run carry.
        datasets (`dict[int, FeatureBlock]`): Own columns; 0 are the training rows.
        store ([`WeightStore`]): Own weights.
        sharing ([`Sharing`]): Masks.
        budget ([`LeakBudget`]): What each requester may see.
        inbox ([`Inbox`]): Takes pushed frames that are for the updater.
        label_owner (`str`): May ask for predictions.
        holders (`tuple[str, ...]`): May ask for anything else: the parties that update.
        share_aggregates (`bool`): Whether all holders see the sum that one of them asks for.
        push_ahead (`int`): Most shares sent ahead of need.
        note (`Callable`, *optional*): `note(event, peer=..., ...)` for an audit log, of each answer and refusal.
    """

    def __init__(
        self,
        name: str,
        run: bytes,
        datasets: dict[int, FeatureBlock],
        store: WeightStore,
        sharing: Sharing,
        budget: LeakBudget,
        inbox: Inbox,
        label_owner: str,
        holders: tuple[str, ...],
        share_aggregates: bool,
        push_ahead: int,
        note: Callable[..., object] = lambda event, **fields: None,
    ):
        self.name, self.run, self.datasets, self.store = name, run, datasets, store
        self.sharing, self.budget, self.inbox = sharing, budget, inbox
        self.label_owner, self.holders = label_owner, holders
        self.share_aggregates, self.push_ahead = share_aggregates, push_ahead
        self.note, self.backward = note, None  # a `BackwardParty`, where this party has no labels and trains
        self._answered: dict[str, int] = {}
        self._lock = threading.Lock()  # peers' frames may come on several threads
        self._push: Callable[[str, bytes], None] | None = None

    def start(self, transport: Transport):
        """Serves the peers of a [`Transport`] from now on."""
        self._push = transport.push
        if isinstance(self.sharing, TreeSharing):
            self.sharing.bind(self.run, transport.push)
        transport.serve(self.on_request, self.on_push)

    def share(self, requester: str, asked: Frame) -> Frame:
        """
        Own share of a sum.

        Args:
            requester (`str`): Who gets the sum; shares of own requests count as no view.
            asked ([`Frame`]): Purpose, data set, round, batch and mark.

        Returns:
            [`Frame`]: A SHARE with the version of the weights it was made with.

        Raises:
            InputError: If the requester may not ask for this, or the request is none of the schedule, was answered
                before, or names an anchor that is gone.
            LeakBudgetExceeded: If it would show too much.
        """
        is_prediction = asked.purpose is Purpose.PREDICT
        if requester not in ((self.label_owner,) if is_prediction else self.holders):
            raise InputError(f"{requester!r} may not ask for {asked.purpose.name}: it has no labels for that")
        block = self.datasets.get(asked.dataset if is_prediction else 0)
        if block is None or asked.batch >= len(block.batches) or (asked.dataset and not is_prediction):
            raise InputError(
                f"batch {asked.batch} of data set {asked.dataset} is unknown; compare rows and batch_size"
            )
        if asked.purpose is Purpose.TRAIN and asked.batch != block.schedule.batch(asked.round_id):
            raise InputError(f"batch {asked.batch} is not that of position {asked.round_id}; compare seed and rows")
        request = sum_request(requester, asked.purpose, asked.dataset, asked.round_id, asked.batch, asked.mark)
        batch = block.batches[asked.batch]
        with self._lock:
            last = self._answered.get(request.channel, -1)
            if asked.round_id <= last:
                text = f"round {asked.round_id} of {request.channel} was answered before, the last is {last}; ask anew"
                raise InputError(text)
            pinned = asked.purpose is Purpose.ANCHOR
            version, weights = self.store.pinned(asked.mark, batch) if pinned else self.store.read(batch)
            is_shared = self.share_aggregates and not is_prediction
            for viewer in self.holders if is_shared else (requester,):
                if viewer != self.name:
                    self.budget.view(viewer, asked.dataset, asked.batch, version)
            self._answered[request.channel] = asked.round_id
            words = self.sharing.share(batch.forward(weights), request)
        if requester != self.name:
            used = self.budget.count(requester, asked.dataset, asked.batch)
            size = {"rows": len(words), "bytes": words.nbytes, "w_version": version, "budget_used": used}
            self.note("answered", **_place(requester, asked), **size)
        return self._frame(Kind.SHARE, asked, version, words)

    def _frame(
        self, kind: Kind, asked: Frame, version: int, values: np.ndarray | None = None, text: str = ""
    ) -> Frame:
        place = (asked.batch, asked.mark, asked.dataset)
        return Frame(kind, asked.purpose, self.run, asked.round_id, version, *place, values=values, text=text)

    def on_request(self, peer: str, data: bytes) -> bytes:
        """The answer to a frame: a SHARE, or REFUSED with the reason. Raises `FrameError` for anything but an ASK."""
        asked = parse_frame(data, self.run)
        if self.backward is not None and asked.kind in BackwardParty.KINDS:
            try:
                return self.backward.answer(peer, asked).to_bytes()
            except InputError as error:
                return self._refusal(peer, asked, error).to_bytes()
        if asked.kind is not Kind.ASK:
            raise FrameError(f"request of kind {asked.kind.name} by {peer!r}: only ASK is answered; drop it")
        self.inbox.saw(peer, asked.version)
        try:
            return self.share(peer, asked).to_bytes()
        except (LeakBudgetExceeded, InputError) as error:
            return self._refusal(peer, asked, error).to_bytes()

    def _refusal(self, requester: str, asked: Frame, error: Exception) -> Frame:
        self.note("refused", **_place(requester, asked), detail=str(error))
        return self._frame(Kind.REFUSED, asked, self.store.version, text=f"{type(error).__name__}: {error}")

    def on_push(self, peer: str, data: bytes) -> None:
        """Sends shares ahead where a peer allows it, and hands all else to the updater."""
        frame = parse_frame(data, self.run)
        if frame.kind is Kind.ASK:
            raise FrameError(f"pushed ASK by {peer!r}: ask by a request; drop it")
        if frame.kind is Kind.CLIMB and isinstance(self.sharing, TreeSharing):
            self.sharing.take(peer, frame, sum_request)
            return
        if frame.kind is not Kind.AHEAD:
            self.inbox.put(peer, frame)
            return
        self.inbox.saw(peer, frame.version)
        self.send_ahead(peer, frame.round_id, frame.mark)

    def send_ahead(self, peer: str, position: int, ahead: int):
        """Pushes the training shares that a requester at `position` has none of yet, up to `ahead` beyond it."""
        schedule, channel = self.datasets[0].schedule, sum_request(peer, Purpose.TRAIN, 0, 0, 0, 0).channel
        first = max(position, self._answered.get(channel, -1) + 1)
        for round_id in range(first, position + min(ahead, self.push_ahead) + 1):
            asked = Frame(Kind.ASK, Purpose.TRAIN, self.run, round_id, batch=schedule.batch(round_id))
            try:
                answer = self.share(peer, asked)
            except (LeakBudgetExceeded, InputError) as error:
                answer = self._refusal(peer, asked, error)
            try:
                self._push(peer, answer.to_bytes())
            except PeerLost:  # it will not miss what it did not get; whoever needs it finds out by asking
                return
            if answer.kind is Kind.REFUSED:
                return

    def state_dict(self) -> dict:
        """Last round answered in each channel, and the views given."""
        with self._lock:
            return {"answered": dict(self._answered), "budget": self.budget.state_dict()}

    def load_state_dict(self, state: dict, *, new_keys: bool):
        """
        Takes over what [`state_dict`] gave.

        Args:
            state (`dict`): The newest one.
            new_keys (`bool`): Whether the masks come from keys that the state has never seen. Rounds may then start
                again from any checkpoint; with the old keys an answered round stays answered.
        """
        self._answered = {} if new_keys else dict(state["answered"])
        self.budget.load_state_dict(state["budget"])


def _place(requester: str, asked: Frame) -> dict[str, str | int]:
    """What an audit line says of a request."""
    rid = f"{asked.dataset}/{asked.round_id}/{asked.mark}"
    return {"peer": requester, "purpose": asked.purpose.name, "rid": rid, "batch": asked.batch}
