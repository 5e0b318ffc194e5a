"""Sums over two trees, hop by hop between parties: masked scores climb one, masks the other."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hf_mlopt.secure_sum import FixedPoint, Request, build_trees, hops, mask_share, unmask
from hf_mlopt.vertical.messages import Frame, FrameError, Kind, Purpose
from hf_mlopt.vertical.transport.base import PeerLost


@dataclass(eq=False)
class _Hop:
    """What one party collects and passes on for one sum in one tree."""

    missing: set[str]  # whose words have not come; this party's own are among them
    total: np.ndarray | None = None


@dataclass
class _Place:
    """This party's place in the two trees of one requester: who sends to it, and to whom it sends."""

    children: list[set[str]] = field(default_factory=list)
    parents: list[str | None] = field(default_factory=list)


class TreeSharing:
    """
    The `Sharing` of mask `tree`; see [`secure_sum.tree`](../secure_sum/tree.py). No words go from a party to the
    requester as such: its share is an empty receipt, and its words climb from child to parent by frames of their own.

    Args:
        name (`str`): Own party.
        names (`tuple[str, ...]`): All parties.
        fixed_point ([`secure_sum.FixedPoint`]): Of all parties.
        timeout (`float`): Seconds that words may take to arrive.
    """

    dtype = np.dtype(np.uint64)
    _KEPT = 4096  # sums that are over, whose words are refused if they come again

    def __init__(self, name: str, names: tuple[str, ...], fixed_point: FixedPoint, timeout: float):
        self.name, self.names, self.fixed_point, self.timeout = name, names, fixed_point, timeout
        self._places: dict[str, _Place] = {}
        self._open: dict[tuple[Request, int], _Hop] = {}
        self._over: deque[tuple[Request, int]] = deque(maxlen=self._KEPT)
        self._changed = threading.Condition()

    def bind(self, run: bytes, push: Callable[[str, bytes], None]):
        """
        Args:
            run (`bytes`): Of all frames; the public seed of the trees.
            push (`Callable`): Sends a frame to a peer.
        """
        self._run, self._push = run, push
        for requester in self.names:
            place = self._places[requester] = _Place()
            for tree in build_trees(self.names, requester, run):
                found = hops(tree)
                place.children.append({hop.sender for hop in found if hop.receiver == self.name})
                parents = [hop.receiver for hop in found if hop.sender == self.name]
                place.parents.append(parents[0] if parents else None)

    def share(self, scores: np.ndarray, request: Request) -> np.ndarray:
        """Sends own words on their way, and returns an empty receipt."""
        for tree, words in enumerate(mask_share(scores, self.fixed_point, "scores")):
            self._add(request, tree, self.name, words)
        return np.zeros((0, 0), np.uint64)

    def combine(self, shares: dict[str, np.ndarray], request: Request) -> np.ndarray:
        """The sum, once the words of all parties have climbed. Raises `PeerLost` if they do not in time."""
        end, found = time.monotonic() + self.timeout, []
        for tree in (0, 1):
            with self._changed:
                hop = self._hop(request, tree)
                while hop.missing:
                    if not self._changed.wait(end - time.monotonic()) and hop.missing:
                        peer = sorted(hop.missing)[0]
                        raise PeerLost(peer, f"no words for {request.channel} {request.round_id}")
                found.append(hop.total)
                self._end(request, tree)
        return unmask(*found, self.fixed_point)

    def take(self, peer: str, frame: Frame, request_of: Callable[..., Request]):
        """
        Adds the words of a child.

        Args:
            peer (`str`): Who sent them.
            frame ([`Frame`]): Of kind CLIMB.
            request_of (`Callable`): [`sum_request`].

        Raises:
            FrameError: If the peer is no child of this party there, or has sent its words before.
        """
        number, tree = divmod(frame.route, 2)
        if number >= len(self.names):
            raise FrameError(f"words by {peer!r} for party number {number}, there are {len(self.names)}; drop them")
        place = (frame.purpose, frame.dataset, frame.round_id, frame.batch, frame.mark)
        request = request_of(self.names[number], *place)
        if peer not in self._places[self.names[number]].children[tree]:
            raise FrameError(
                f"words by {peer!r}, who is no child in tree {tree + 1} of {self.names[number]!r}; drop them"
            )
        self._add(request, tree, peer, frame.values)

    def _add(self, request: Request, tree: int, sender: str, words: np.ndarray):
        with self._changed:
            hop = self._hop(request, tree)
            if sender not in hop.missing:
                raise FrameError(f"words of {sender!r} for {request.channel} {request.round_id} came twice; drop them")
            if hop.total is not None and hop.total.shape != words.shape:
                text = f"words of {sender!r} are {list(words.shape)}, others {list(hop.total.shape)}"
                raise FrameError(f"{text}; compare batch_size and num_labels")
            hop.missing.discard(sender)
            hop.total = words if hop.total is None else hop.total + words
            if hop.missing:
                return
            self._changed.notify_all()
            requester = request.channel.split("/")[0]
            parent = self._places[requester].parents[tree]
            if parent is None:
                return  # this party is the root: `combine` takes it
            self._end(request, tree)
        self._push(parent, self._frame(request, requester, tree, hop.total).to_bytes())

    def _hop(self, request: Request, tree: int) -> _Hop:
        key = (request, tree)
        if key in self._over:
            raise FrameError(f"{request.channel} {request.round_id} is over; drop its words")
        if key not in self._open:
            if len(self._open) >= self._KEPT:
                self._open.pop(next(iter(self._open)))  # of a party that was lost long ago
            children = self._places[request.channel.split("/")[0]].children[tree]
            self._open[key] = _Hop({self.name, *children})
        return self._open[key]

    def _end(self, request: Request, tree: int):
        self._open.pop((request, tree), None)
        self._over.append((request, tree))

    def _frame(self, request: Request, requester: str, tree: int, words: np.ndarray) -> Frame:
        _, purpose, dataset = request.channel.split("/")
        batch, mark = (int.from_bytes(request.context[place : place + 4], "little") for place in (0, 4))
        route = 2 * self.names.index(requester) + tree
        where = {"batch": batch, "mark": mark, "dataset": int(dataset), "route": route}
        return Frame(Kind.CLIMB, Purpose[purpose], self._run, request.round_id, **where, values=words)
